"""Ours beside the stack that one would pick today (launch/peers/), on this machine, in one call; prints Markdown.

python launch/benchmark.py
python launch/benchmark.py --cases same_examples --rounds 3 --steps 3
python launch/benchmark.py --ranks 4 --batch 8 --length 512

Needs `pip install peft` and Alpaca in $LORASP_DATA (default: ../shared/data). Both sides train SmolLM2-135M at rank
16 on all linears with NF4 and ZeRO-3, in the same precision, with the same allocator settings and threads; they take
turns in every round. `same_examples`: both train the same examples in the same steps, padded by the stack, unpadded by
ours. `full_rows`: rows filled to their length, joined end to end by the stack, whole examples side by side by ours.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a clone as well as installed

from lorasp.cli import argument_parser, run_reporting_errors
from lorasp.recipe import Recipe, RecipeError

STACK = "stack"
_WARM_UP = 2  # steps of every process that are not counted: allocations, and ZeRO-3's trace
_RANK = 16
_STACK_IN_WORDS = "PEFT + bitsandbytes + Accelerate + ZeRO-3"
# What a process of either side holds before it does anything: subtracted from every peak on a CPU.
_EMPTY = """
import re, accelerate, bitsandbytes, deepspeed, peft, torch, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1] if not torch.cuda.is_available() else 0)
"""
# Both sides alike: without these glibc keeps what was freed, which is up to half of a rank's resident peak.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}


@dataclass(frozen=True)
class Case:
    """What is compared: the stack's arguments, and the settings of each of our variants."""

    title: str
    stack: list[str]
    ours: dict[str, list[str]]


@dataclass
class Measured:
    """Of one side in one case: seconds of every counted step, and peaks of the worst rank in bytes."""

    seconds: list[float] = field(default_factory=list)
    load_peak: int = 0
    train_peak: int = 0
    first_loss: float = 0.0
    real_tokens: float = 0.0  # a step, over all ranks


CASES = {
    "same_examples": Case("the same examples, each step", [], {"ours": []}),
    "full_rows": Case(
        "full rows",
        ["packed"],
        {
            f"ours, {policy}": ["data.packing=true", f"training.activation_checkpointing={policy}"]
            for policy in ("selective", "lean", "layer")
        },
    ),
}


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=2, help="turns that each side takes")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a turn")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank on a CPU")
    parser.add_argument("--batch", type=int, default=4, help="examples, or full rows, a rank a step")
    parser.add_argument("--length", type=int, default=256, help="tokens at which an example ends, and of a full row")
    options = parser.parse_args()
    from importlib import util

    if util.find_spec("peft") is None:
        raise RecipeError("the stack to compare with needs peft; pip install peft")

    with tempfile.TemporaryDirectory() as directory:
        bench = Benchmark(options, Path(directory))
        results = {name: bench.run(CASES[name]) for name in options.cases}
    print(bench.table(results))
    return 0


class Benchmark:
    """Files of both sides in `directory`, and the runs."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        from lorasp.models.demo import convert_demo_model

        self._options, self._directory = options, directory
        self._model = convert_demo_model()
        self._total = _WARM_UP + options.steps
        self._global_batch = options.batch * options.ranks
        self._environment = {**os.environ, **_ALLOCATOR, "OMP_NUM_THREADS": str(options.threads)}
        self.empty = 1024 * int(self._output([sys.executable, "-c", _EMPTY]).split()[-1])  # DeepSpeed talks, too
        self._write_data()

    def run(self, case: Case) -> dict[str, Measured]:
        """All sides in turn, round after round."""
        found = {side: Measured() for side in (STACK, *case.ours)}
        for round in range(self._options.rounds):
            for side, measured in found.items():
                print(f"{case.title}, round {round + 1}/{self._options.rounds}: {side}", file=sys.stderr, flush=True)
                if side == STACK:
                    self._run_stack(case, measured)
                else:
                    self._run_ours(side, case.ours[side], measured)
        losses = [measured.first_loss for measured in found.values()]
        if not case.stack and max(losses) - min(losses) > 1e-3 * min(losses):
            raise RecipeError(f"the sides do not train the same examples: the first step's losses are {losses}")
        return found

    def _write_data(self) -> None:
        """Ours in the file's order; the stack's, which it reads in sequence, in the order in which ours visits it."""
        from lorasp.data.load import load_data
        from lorasp.models.weights import load_tokenizer

        data = Path(os.environ.get("LORASP_DATA", ROOT.parent / "shared" / "data")) / "alpaca" / "alpaca_data.json"
        if not data.is_file():
            raise RecipeError(f"{data} is missing; set LORASP_DATA to the folder that holds alpaca/alpaca_data.json")
        rows = [row for row in json.loads(data.read_text()) if row["output"]]
        rows = rows[: self._total * self._global_batch]
        texts = [{"prompt": "", "completion": f"{r['instruction']}\n{r['input']}\n{r['output']}"} for r in rows]
        (self._directory / "ours.json").write_text(json.dumps(texts))
        settings = self._settings("unused")
        self._recipe = Recipe(**settings)
        loaded = load_data(self._recipe, load_tokenizer(self._model, self._recipe.model))
        order = loaded.order(self._recipe)
        self._steps = [[row for unit in order.global_batch(step) for row in unit] for step in range(self._total)]
        self._lengths = [len(example.input_ids) for example in loaded.train.examples]
        ordered = [rows[row] for step in self._steps for row in step]
        (self._directory / "stack.json").write_text(json.dumps(ordered))
        (self._directory / "packed.json").write_text(data.read_text())

    def _settings(self, name: str) -> dict:
        return {
            "name": name,
            "output_dir": str(self._directory / "runs"),
            "overwrite": True,
            "rehearse": False,
            "model": {"path": str(self._model)},
            "adapter": {"rank": _RANK, "alpha": 2.0 * _RANK},
            "data": {"train": str(self._directory / "ours.json"), "max_length": self._options.length},
            "training": {
                "epochs": 1.0,
                "max_steps": self._total,
                "global_batch_size": self._global_batch,
                "micro_batch_size": self._options.batch,
                "log_every": 1,
                "schedule": "constant",
            },
            "evaluation": {"before": False, "samples": 0},
            "tracking": {"with": []},
        }

    def _run_ours(self, side: str, overrides: list[str], measured: Measured) -> None:
        settings = self._settings("ours")
        if overrides:  # full rows need more examples than steps of single ones do
            settings["data"] |= {"train": str(self._directory / "packed.json"), "template": "short", "limit": 4000}
        recipe = self._directory / "ours.yaml"
        recipe.write_text(json.dumps(settings))  # JSON is YAML
        self._output([*self._launcher(), str(ROOT / "launch" / "train.py"), str(recipe), *overrides])
        report = json.loads((self._directory / "runs" / "ours" / "report.json").read_text())
        history = report["history"]
        measured.seconds += [row["step_seconds"] for row in history[_WARM_UP:]]
        measured.first_loss = history[0]["loss"]
        measured.real_tokens = statistics.mean(
            row["step_seconds"] * row["real_tokens_per_second"] for row in history[_WARM_UP:]
        )
        load, train = (max(r["peak_total_bytes"] for r in report["phases"][p]["ranks"]) for p in ("load", "train"))
        measured.load_peak = max(measured.load_peak, load)
        measured.train_peak = max(measured.train_peak, load, train)  # the stack's peak is over both, too

    def _run_stack(self, case: Case, measured: Measured) -> None:
        options = self._options
        data = self._directory / ("packed.json" if case.stack else "stack.json")
        arguments = [self._total, options.batch, options.length, _RANK, *case.stack]
        script = ROOT / "launch" / "peers" / "stock_qlora_zero3.py"
        out = self._output([*self._launcher(), str(script), str(self._model), str(data), *map(str, arguments)])
        ranks = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        ranks.sort(key=lambda rank: rank["rank"])
        # A step takes as long as its slowest rank.
        measured.seconds += [max(times) for times in zip(*(r["step_seconds"] for r in ranks), strict=True)][_WARM_UP:]
        measured.load_peak = max(measured.load_peak, *(int(r["load_peak_gb"] * 2**30) for r in ranks))
        measured.train_peak = max(measured.train_peak, *(int(r["train_peak_gb"] * 2**30) for r in ranks))
        measured.real_tokens = sum(rank["real_tokens"] for rank in ranks)
        if not case.stack:
            # Its loss is a rank's own mean: weighted by their labels, the mean of the global batch.
            counts = [
                sum(
                    self._lengths[row] - 1 for row in self._steps[0][rank * options.batch : (rank + 1) * options.batch]
                )
                for rank in range(options.ranks)
            ]
            losses = [rank["loss"][0] for rank in ranks]
            measured.first_loss = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)

    def _launcher(self) -> list[str]:
        accelerate = str(Path(sys.executable).with_name("accelerate"))
        return [accelerate, "launch", "--use_deepspeed", "--num_machines", "1"] + [
            *("--num_processes", str(self._options.ranks)),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
        ]

    def _output(self, command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment, cwd=self._directory)
        if done.returncode:
            raise RecipeError(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
        return done.stdout

    def table(self, results: dict[str, dict[str, Measured]]) -> str:
        """Markdown: every figure, and its ratio to the stack's."""
        import torch

        options = self._options
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {options.threads} thread(s) a rank"
        )
        columns = "case,side,s a step,ratio,train peak (GiB),ratio,load peak (GiB),ratio,real tokens a step".split(",")
        lines = [
            f"`{shlex.join(['python', *sys.argv])}` on {options.ranks} ranks ({device}): SmolLM2-135M, r = {_RANK} on "
            f"all linears, {options.batch} × {options.length} a rank. Medians of {options.rounds} × {options.steps} "
            f"steps (range); peaks of the worst rank above an empty process ({self.empty / 2**30:.2f} GiB).",
            "",
            f"| {' | '.join(columns)} |",
            "| --- | --- |" + " ---: |" * (len(columns) - 2),
        ]
        for name, sides in results.items():
            stack = sides[STACK]
            for side, measured in sides.items():
                seconds, stacks = statistics.median(measured.seconds), statistics.median(stack.seconds)
                cells = [CASES[name].title, _STACK_IN_WORDS if side == STACK else side]
                cells.append(f"{seconds:.2f} ({min(measured.seconds):.2f}–{max(measured.seconds):.2f})")
                cells.append(f"{seconds / stacks:.2f}")
                for peak, its in ((measured.train_peak, stack.train_peak), (measured.load_peak, stack.load_peak)):
                    cells.append(f"{(peak - self.empty) / 2**30:.2f}")
                    cells.append(f"{(peak - self.empty) / (its - self.empty):.2f}")
                cells.append(f"{measured.real_tokens:.0f}")
                lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
