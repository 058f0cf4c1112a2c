"""Ours beside the stack that one would pick today (launch/peers/), on this machine, in one call; prints Markdown.

python launch/benchmark.py
python launch/benchmark.py --cases same_examples --rounds 3 --steps 3
python launch/benchmark.py --ranks 4 --batch 8 --length 512
python launch/benchmark.py --ranks 1 --cases full_rows_7b --batch 4 --length 1024 --steps 5

Needs `pip install peft` and Alpaca in $LORASP_DATA (default: ../shared/data). Both sides train at rank 16 on all
linears with NF4 and ZeRO-3, in the same precision, with the same allocator settings and threads; they take turns in
every round. Every token is a label on both. `same_examples`: both train the same examples in the same steps, padded by
the stack, unpadded by ours. `full_rows`: rows filled to their length with the same examples in the same order, joined
end to end by the stack, whole ones side by side by ours (of 256 tokens: 1.4 % fewer labels a step).
`width_7b`: load and train layers of LLaMA-7B's true width with random weights (8: 4 GB of disk, 14 of memory);
`full_rows_7b`: full rows on those, for GPUs, where the stack's clock stops before the last kernels of a step do.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a clone as well as installed

from lorasp.cli import argument_parser, run_reporting_errors
from lorasp.recipe import Recipe, RecipeError

STACK = "stack"
_WARM_UP = 2  # steps of every process that are not counted: allocations, and ZeRO-3's trace
_RANK = 16
_ROUNDED_APART = 2**-8  # of losses in bf16, as a GPU computes
_FULL_APART = 0.05  # of labels a step in full rows: whole examples do not fill theirs to the last token
_STACK_READS = 4000  # rows of a file, where it fills rows with them
_POLICIES = ["selective", "lean", "layer"]
_STACK_IN_WORDS = "PEFT + bitsandbytes + Accelerate + ZeRO-3"
# What a process of either side holds before it does anything: subtracted from every peak on a CPU.
_EMPTY = """
import re, accelerate, bitsandbytes, deepspeed, peft, torch, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1] if not torch.cuda.is_available() else 0)
"""
# Runs a script and leaves the peak of the bytes that its tensors held, which no allocator's habits change.
_LIVE = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from lorasp.live_tensors import LiveTensors
out, sys.argv = sys.argv[1], sys.argv[2:]
live = LiveTensors()
try:
    with live:
        runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    open(out + os.environ["RANK"], "w").write(str(live.peak_bytes))
"""
# Of both sides alike. returning: blocks from 1 MiB on are mapped apart, without which the stack holds three times as
# much.
# default: glibc as it comes; any setting, here its own default, keeps host_memory.py from changing it.
_MALLOC = {
    "returning": {
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
        "MALLOC_TRIM_THRESHOLD_": str(2**20),
        "THP_MEM_ALLOC_ENABLE": "1",
    },
    "default": {"MALLOC_ARENA_MAX": str(8 * (os.cpu_count() or 1))},
}


@dataclass(frozen=True)
class Case:
    """What is compared. packed: full rows. ours: the settings of each of our variants.

    batch, length: examples (or rows) a rank a step, and tokens at which one ends; None: as the command line says.
    """

    title: str
    ours: dict[str, list[str]]
    packed: bool = False
    model: str = "SmolLM2-135M"
    batch: int | None = None
    length: int | None = None


@dataclass
class Measured:
    """Of one side in one case: seconds of every counted step, and peaks of the worst rank in bytes.

    train_peak: of the whole process, loading included, as the stack measures it. live_peak: bytes in tensors at once,
    from a turn of its own whose seconds do not count; 0 where there was none. real_tokens, labels: a step, over all
    ranks.
    """

    seconds: list[float] = field(default_factory=list)
    load_peak: int = 0
    train_peak: int = 0
    live_peak: int = 0
    first_loss: float = 0.0
    real_tokens: float = 0.0
    labels: float = 0.0
    mfu: list[float] = field(default_factory=list)  # ours: as the report of each turn says it


_FULL_ROWS = {f"ours, {policy}": [f"training.activation_checkpointing={policy}"] for policy in _POLICIES}
CASES = {
    "same_examples": Case("the same examples, each step", {"ours": []}),
    "full_rows": Case("full rows", _FULL_ROWS, packed=True),
    "width_7b": Case("layers of 7B's width, random", {"ours": []}, model="slice-7b", batch=1, length=128),
    "full_rows_7b": Case("full rows, layers of 7B's width, random", _FULL_ROWS, packed=True, model="slice-7b"),
}


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["same_examples", "full_rows"])
    parser.add_argument("--policies", nargs="+", choices=_POLICIES, default=_POLICIES, help="ours on full rows")
    parser.add_argument("--rounds", type=int, default=2, help="turns that each side takes")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a turn")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank on a CPU")
    parser.add_argument("--batch", type=int, default=4, help="examples, or full rows, a rank a step")
    parser.add_argument("--length", type=int, default=256, help="tokens at which an example ends, and of a full row")
    parser.add_argument("--layers", type=int, default=8, help="of 7B's width")
    parser.add_argument("--live", action="store_true", help="one more turn each, which counts the bytes of tensors")
    parser.add_argument("--malloc", choices=list(_MALLOC), default="returning", help="the C allocator, of both sides")
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
    """All sides of the cases in turn, and the table of what was measured."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self._options, self._directory = options, directory
        self._environment = {**os.environ, **_MALLOC[options.malloc], "OMP_NUM_THREADS": str(options.threads)}
        self.empty = 1024 * int(self._output([sys.executable, "-c", _EMPTY]).split()[-1])  # DeepSpeed talks, too
        (directory / "live.py").write_text(_LIVE)

    def run(self, case: Case) -> dict[str, Measured]:
        """All sides in turn, round after round; with --live once more each."""
        options = self._options
        work = Workload(case, options, self._directory)
        left_out = {f"ours, {policy}" for policy in _POLICIES if policy not in options.policies}
        found = {side: Measured() for side in (STACK, *case.ours) if side not in left_out}
        for round in range(1, options.rounds + 1):
            for side, measured in found.items():
                print(f"{case.title}, round {round}/{options.rounds}: {side}", file=sys.stderr, flush=True)
                self._run(side, work, measured)
        for side, measured in found.items() if options.live else ():
            print(f"{case.title}, bytes of tensors: {side}", file=sys.stderr, flush=True)
            self._run(side, work, measured, live=True)
        _check_same_work(case, found.values())
        return found

    def _run(self, side: str, work: "Workload", measured: Measured, live: bool = False) -> None:
        command = work.stack_command() if side == STACK else work.our_command(work.case.ours[side])
        counters = self._directory / "live."
        out = self._output(self._launcher() + ([str(self._directory / "live.py"), str(counters)] * live) + command)
        if live:
            peaks = [int(Path(f"{counters}{rank}").read_text()) for rank in range(self._options.ranks)]
            measured.live_peak = max(peaks)
        elif side == STACK:
            work.read_stack(out, measured)
        else:
            work.read_ours(measured)

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
        device = torch.cuda.get_device_name() if _has_gpu() else f"CPU, {options.threads} thread(s) a rank"
        columns = ["case", "side", "s a step", "ratio", "train peak (GiB)", "ratio", "load peak (GiB)", "ratio"]
        columns += (["live peak (GiB)", "ratio"] if options.live else []) + ["real tokens a step", "MFU"]
        lines = [
            f"`{shlex.join(['python', *sys.argv])}` on {options.ranks} ranks ({device}): r = {_RANK} on all linears, "
            f"{options.batch} × {options.length} a rank (width_7b: 1 × 128). Medians of {options.rounds} × "
            f"{options.steps} steps (range); peaks of the worst rank above an empty process "
            f"({self.empty / 2**30:.2f} GiB). MFU: of real tokens, nothing repeated counts.",
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
                peaks = [(m.train_peak - self.empty, m.load_peak - self.empty) for m in (measured, stack)]
                peaks = list(zip(*peaks, strict=True))
                if options.live:
                    peaks.append((measured.live_peak, stack.live_peak))
                for peak, its in peaks:
                    cells += [f"{peak / 2**30:.2f}", f"{peak / its:.2f}"]
                cells += [f"{measured.real_tokens:.0f}", f"{_mfu(measured, sides):.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _check_same_work(case: Case, sides: Collection[Measured]) -> None:
    """Raises RecipeError unless all train as many labels a step, and, where rows are examples, at the same loss.

    In full rows the stack's tokens attend to the examples before theirs: its loss is another.
    """
    labels = [measured.labels for measured in sides]
    if max(labels) - min(labels) > (_FULL_APART if case.packed else 1e-6) * max(labels):
        few = "; so few full rows may leave more room: take a larger --batch or --steps" if case.packed else ""
        raise RecipeError(f"the sides do not train as many labels: {labels} a step{few}")
    losses = [measured.first_loss for measured in sides]
    apart = _ROUNDED_APART if _has_gpu() else 1e-3
    if not case.packed and max(losses) - min(losses) > apart * min(losses):
        raise RecipeError(f"the sides do not train the same examples: the first step's losses are {losses}")


def _mfu(measured: Measured, sides: dict[str, Measured]) -> float:
    """The stack's needs as many FLOPs a token, every one of which is a label (_check_same_work), at the same limit: by
    its rate of tokens beside that of our first."""
    ours = next(m for side, m in sides.items() if side != STACK)

    def rate(m: Measured) -> float:
        return m.real_tokens / statistics.median(m.seconds)

    limit = statistics.median(ours.mfu) / rate(ours)
    return statistics.median(measured.mfu) if measured.mfu else limit * rate(measured)


class Workload:
    """The files of a case and the commands of both sides on them."""

    def __init__(self, case: Case, options: argparse.Namespace, directory: Path) -> None:
        from lorasp.models.demo import convert_demo_model

        self.case, self._ranks = case, options.ranks
        self._batch, self._length = case.batch or options.batch, case.length or options.length
        self._directory = directory / case.model
        self._directory.mkdir(exist_ok=True)
        is_slice = case.model == "slice-7b"
        self._model = _slice_of_7b(self._directory / "model", options.layers) if is_slice else convert_demo_model()
        self._total = _WARM_UP + options.steps
        self._global_batch = self._batch * self._ranks
        self._write_data()

    def _write_data(self) -> None:
        """Ours in the file's order; the stack's, which it reads in sequence, in the order in which ours visits it.

        For full rows more than ours visits: the stack's have no room left, so that it gets a little further.
        """
        from lorasp.data.load import load_data
        from lorasp.models.weights import load_tokenizer

        data = Path(os.environ.get("LORASP_DATA", ROOT.parent / "shared" / "data")) / "alpaca" / "alpaca_data.json"
        if not data.is_file():
            raise RecipeError(f"{data} is missing; set LORASP_DATA to the folder that holds alpaca/alpaca_data.json")
        rows = [row for row in json.loads(data.read_text()) if row["output"]]
        rows = rows[: _STACK_READS if self.case.packed else self._total * self._global_batch]
        # No prompt: every token is a label, as the stack has it.
        texts = [{"prompt": "", "completion": f"{r['instruction']}\n{r['input']}\n{r['output']}"} for r in rows]
        (self._directory / "ours.json").write_text(json.dumps(texts))
        recipe = Recipe(**self._settings())
        loaded = load_data(recipe, load_tokenizer(self._model, recipe.model))
        [part], order = loaded.train.parts, loaded.order(recipe)
        steps = [[row for unit in order.global_batch(step) for row in unit] for step in range(self._total)]
        self._lengths = [[len(part.encoded.examples[row].input_ids) for row in step] for step in steps]
        visited = [row for step in steps for row in step]
        visited += sorted(set(range(len(part.encoded.rows))) - set(visited))
        (self._directory / "stack.json").write_text(json.dumps([rows[part.encoded.rows[row]] for row in visited]))

    def _settings(self) -> dict:
        # In full rows the stack has examples whole, and its are ours: those that no row holds are left out.
        filled = {"packing": True, "too_long": "drop"} if self.case.packed else {}
        return {
            "name": "ours",
            "output_dir": str(self._directory / "runs"),
            "overwrite": True,
            "rehearse": False,
            "model": {"path": str(self._model)},
            "adapter": {"rank": _RANK, "alpha": 2.0 * _RANK},
            "quantization": {"cache": False},  # the stack quantizes at each start
            "data": {"train": str(self._directory / "ours.json"), "max_length": self._length, **filled},
            "training": {
                "epochs": 1.0,
                "max_steps": self._total,
                "global_batch_size": self._global_batch,
                "micro_batch_size": self._batch,
                "log_every": 1,
                "schedule": "constant",
            },
            "evaluation": {"before": False, "samples": 0},
            "tracking": {"with": []},
        }

    def our_command(self, overrides: list[str]) -> list[str]:
        recipe = self._directory / "ours.yaml"
        recipe.write_text(json.dumps(self._settings()))  # JSON is YAML
        return [str(ROOT / "launch" / "train.py"), str(recipe), *overrides]

    def stack_command(self) -> list[str]:
        arguments = [self._total, self._batch, self._length, _RANK, *(["packed"] if self.case.packed else [])]
        script = ROOT / "launch" / "peers" / "stock_qlora_zero3.py"
        return [str(script), str(self._model), str(self._directory / "stack.json"), *map(str, arguments)]

    def read_ours(self, measured: Measured) -> None:
        report = json.loads((self._directory / "runs" / "ours" / "report.json").read_text())
        history = report["history"]
        measured.seconds += [row["step_seconds"] for row in history[_WARM_UP:]]
        measured.first_loss = history[0]["loss"]
        measured.mfu.append(report["throughput"]["mfu"])
        measured.real_tokens, measured.labels = (
            statistics.mean(row["step_seconds"] * row[f"{kind}_per_second"] for row in history[_WARM_UP:])
            for kind in ("real_tokens", "labels")
        )
        phases = report["phases"]
        peaks = {name: max(rank["peak_total_bytes"] for rank in phase["ranks"]) for name, phase in phases.items()}
        measured.load_peak = max(measured.load_peak, peaks["load"])
        measured.train_peak = max(measured.train_peak, *peaks.values())

    def read_stack(self, out: str, measured: Measured) -> None:
        # Two ranks that print at once may leave one line: as many objects as there are.
        ranks, begin = [], out.find('{"rank"')
        while begin >= 0:
            rank, end = json.JSONDecoder().raw_decode(out, begin)
            ranks.append(rank)
            begin = out.find('{"rank"', end)
        ranks.sort(key=lambda rank: rank["rank"])
        # A step takes as long as its slowest rank.
        measured.seconds += [max(times) for times in zip(*(r["step_seconds"] for r in ranks), strict=True)][_WARM_UP:]
        measured.load_peak = max(measured.load_peak, *(int(r["load_peak_gb"] * 2**30) for r in ranks))
        measured.train_peak = max(measured.train_peak, *(int(r["train_peak_gb"] * 2**30) for r in ranks))
        # It tells the mean of all its steps, also of those that are not counted: of single examples not the same.
        counted = statistics.mean(sum(lengths) for lengths in self._lengths[_WARM_UP:])
        measured.real_tokens = sum(rank["real_tokens"] for rank in ranks) if self.case.packed else counted
        measured.labels = measured.real_tokens - self._global_batch  # nothing stands before a row's first token
        # Its loss is a rank's own mean: weighted by their labels, the mean of the global batch.
        lengths = iter([self._length] * self._global_batch if self.case.packed else self._lengths[0])
        counts = [sum(next(lengths) - 1 for _ in range(self._batch)) for _ in range(self._ranks)]
        losses = [rank["loss"][0] for rank in ranks]
        measured.first_loss = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)


def _slice_of_7b(directory: Path, layers: int) -> Path:
    """A checkpoint of LLaMA-7B's width and so many of its 32 layers, bf16, seeded random.

    A layer a file, as large checkpoints are; its tokens are the demo model's first 32,000.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from lorasp.models.demo import convert_demo_model

    directory.mkdir()
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=layers, vocab_size=32000
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    _cut_tokenizer(convert_demo_model(), directory, config.vocab_size)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = dict.fromkeys((f"self_attn.{name}_proj" for name in "qkvo"), (hidden, hidden))
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    index = {}

    def write(tensors: dict[str, torch.Tensor], name: str) -> None:
        save_file(tensors, directory / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{name}.weight": normal(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = ones.clone()
        write(tensors, f"model-layer-{layer}.safetensors")
    rest = {"model.norm.weight": ones}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rest[name] = normal(config.vocab_size, hidden)
    write(rest, "model-rest.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def _cut_tokenizer(source: Path, directory: Path, size: int) -> None:
    """The BPE tokenizer at `source` with its first `size` tokens: later ones are merges that are left out."""
    tree = json.loads((source / "tokenizer.json").read_text())
    model = tree["model"]
    model["vocab"] = {token: index for token, index in model["vocab"].items() if index < size}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    model["merges"] = [pair for pair in pairs if "".join(pair) in model["vocab"]]
    (directory / "tokenizer.json").write_text(json.dumps(tree))
    (directory / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())


if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
