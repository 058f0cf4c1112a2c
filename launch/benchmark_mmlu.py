"""MMLU by ours and by lm-evaluation-harness, in turns on this machine: questions a second, and whether they agree.

python launch/benchmark_mmlu.py
python launch/benchmark_mmlu.py --subjects anatomy philosophy --limit 20 --rounds 3 --max-length 512
python launch/benchmark_mmlu.py --ranks 1 2 --quantization nf4 --only-ours

Needs `pip install lm-eval==0.4.13` and MMLU's CSVs in $LORASP_DATA/mmlu (default: ../shared/data). Both score the same
questions with SmolLM2-135M in fp32 on the same threads, unquantized; the harness by launch/peers/lm_eval_mmlu.py at
batch 8, its best here. The seconds are those of reading, tokenizing and scoring, without loading the model. Ours are
whole launches of launch/evaluate.py, once for each number of `--ranks`, which share the threads out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a clone as well as installed

from lorasp.cli import argument_parser, run_reporting_errors
from lorasp.recipe import RecipeError

# Two of each category, short questions and long ones.
SUBJECTS = """
    abstract_algebra college_biology formal_logic high_school_us_history sociology security_studies global_facts
    professional_medicine
""".split()
_AGREES = 1e-3  # nats
_HARNESS = "lm-evaluation-harness"

Scores = dict[tuple[str, int], list[float]]  # (subject, index) -> log-likelihoods of the four answers


def main() -> int:
    options = _options()
    data = Path(os.environ.get("LORASP_DATA", ROOT.parent / "shared" / "data")) / "mmlu"
    if not data.is_dir():
        raise RecipeError(f"{data} is missing; set LORASP_DATA to the folder that holds mmlu/dev and mmlu/test")
    from lorasp.models.demo import convert_demo_model

    with tempfile.TemporaryDirectory() as directory:
        bench = _Bench(options, data, convert_demo_model(), Path(directory))
        sides = {f"ours, {ranks} rank(s)": partial(bench.run_ours, ranks) for ranks in options.ranks}
        if not options.only_ours:
            sides = {_HARNESS: bench.run_harness, **sides}
        runs: dict[str, list[tuple[float, Scores]]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, run in sides.items():
                runs[name].append(run())
    first, *others = runs
    expected = runs[first][-1][1]
    count = len(expected)
    print(
        f"{count} questions of {len(options.subjects)} subjects, {options.threads} threads, {options.rounds} rounds\n"
    )
    print("| | questions/s, median (range) | seconds |\n| --- | ---: | ---: |")
    for name, its in runs.items():
        rates = [count / seconds for seconds, _ in its]
        median = statistics.median(seconds for seconds, _ in its)
        print(f"| {name} | {statistics.median(rates):.2f} ({min(rates):.2f}–{max(rates):.2f}) | {median:.1f} |")
    agree = True
    for name in others:
        ratio = statistics.median(s for s, _ in runs[first]) / statistics.median(s for s, _ in runs[name])
        worst, other, close = compare(runs[name][-1][1], expected)
        agree = agree and worst <= _AGREES and not other
        print(
            f"\n{name}: {ratio:.1f} times as fast as {first}; log-likelihoods differ by {worst:.1e} nats at most; "
            f"{other} other choices where the best two differ by more than {_AGREES:g}, {close} where they do not"
        )
    return 0 if agree else 1


def compare(ours: Scores, theirs: Scores) -> tuple[float, int, int]:
    """(largest difference, other choices where the best two differ by more than _AGREES, and where by less).

    Raises ValueError unless both are of the same questions.
    """
    if ours.keys() != theirs.keys():
        raise ValueError(f"{len(ours.keys() ^ theirs.keys())} questions were scored by one side only")
    worst, others, close = 0.0, 0, 0
    for question, values in theirs.items():
        worst = max(worst, *(abs(a - b) for a, b in zip(ours[question], values, strict=True)))
        if ours[question].index(max(ours[question])) != values.index(max(values)):
            first, second = sorted(values, reverse=True)[:2]
            others, close = others + (first - second > _AGREES), close + (first - second <= _AGREES)
    return worst, others, close


class _Bench:
    def __init__(self, options: argparse.Namespace, data: Path, model: Path, directory: Path) -> None:
        self._options, self._data, self._model, self._directory = options, data, model, directory
        if options.max_length is not None:  # the harness reads it from the configuration
            self._model = directory / "model"
            self._model.mkdir()
            for path in model.iterdir():
                if path.name != "config.json":
                    (self._model / path.name).symlink_to(path)
            config = json.loads((model / "config.json").read_text())
            config["max_position_embeddings"] = options.max_length
            (self._model / "config.json").write_text(json.dumps(config))
        # JSON is YAML. Rows to train on are named and never read.
        recipe = {
            "name": "mmlu",
            "output_dir": str(directory / "runs"),
            "model": {"path": str(self._model), "dtype": "float32"},
            "quantization": {"format": options.quantization},
            "data": {"train": "unused"},
            "mmlu": {
                "data": str(data),
                "subjects": options.subjects,
                "limit": options.limit,
                "tokens": options.tokens,
            },
            "tracking": {"with": []},
        }
        (directory / "mmlu.yaml").write_text(json.dumps(recipe))

    def run_harness(self) -> tuple[float, Scores]:
        """(seconds, scores)."""
        out = self._directory / "theirs.json"
        script = ROOT / "launch" / "peers" / "lm_eval_mmlu.py"
        arguments = [self._model, self._data, out, self._options.limit, *self._options.subjects]
        _run([sys.executable, str(script), *map(str, arguments)], self._options.threads)
        found = json.loads(out.read_text())
        return found["seconds"], {(item["subject"], int(item["i"])): item["ll"] for item in found["items"]}

    def run_ours(self, ranks: int) -> tuple[float, Scores]:
        """(seconds, scores)."""
        launch = [sys.executable]
        if ranks > 1:
            torchrun = Path(sys.executable).with_name("torchrun")
            launch = [str(torchrun), "--standalone", "--nproc_per_node", str(ranks)]
        command = [*launch, str(ROOT / "launch" / "evaluate.py"), str(self._directory / "mmlu.yaml")]
        _run(command, max(1, self._options.threads // ranks))
        run = self._directory / "runs" / "mmlu-evaluation"
        [score] = json.loads((run / "report.json").read_text())["mmlu"]["scores"]
        lines = (run / "mmlu" / "step-00000000.jsonl").read_text().splitlines()[1:]
        found = {(line["subject"], line["index"]): line["log_likelihoods"] for line in map(json.loads, lines)}
        return score["prepare_seconds"] + score["seconds"], found


def _run(command: list[str], threads: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        script = next(part for part in command if part.endswith(".py"))
        raise RecipeError(f"{script} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def _options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS)
    parser.add_argument("--limit", type=int, default=50, help="questions a subject")
    parser.add_argument("--rounds", type=int, default=1, help="both sides run in each")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="of ours; a run for each number")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side")
    parser.add_argument("--tokens", type=int, default=4096, help="a forward pass of a rank of ours")
    parser.add_argument("--max-length", type=int, help="tokens that the model takes; longer prompts are cut")
    parser.add_argument("--quantization", default="none", help="of ours; the harness computes without")
    parser.add_argument("--only-ours", action="store_true")
    options = parser.parse_args()
    if min(options.limit, options.rounds, *options.ranks, options.threads, options.tokens) < 1:
        raise RecipeError("--limit, --rounds, --ranks, --threads and --tokens are at least 1")
    return options


if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
