"""How a step's time, gathers and memory follow ranks, tokens, length, rank r and layers, on this machine; Markdown.

python launch/scaling.py
python launch/scaling.py --ranks 1 2 4 --steps 5
python launch/scaling.py --memory

Runs launch/train.py on random weights of SmolLM2-135M's width, one setting varied at a time, fits the linear cost
model of lorasp/costs.py to what was measured, and shows what it says of each run when that run is left out. Below it,
calculated and not measured: a step of LLaMA-13B on 8 to 64 GPUs of which only the rates stated there are assumed.
With --memory: what each rank held beside what was planned, over shapes, ranks, lengths, policies and methods.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a clone as well as installed

from lorasp.cli import argument_parser, run_reporting_errors
from lorasp.recipe import Recipe, RecipeError

_WARM_UP = 2  # steps that are not counted
_SMOLLM2 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
_SHAPES = {
    "SmolLM2's width, few words": _SMOLLM2 | {"tie_word_embeddings": False, "vocab_size": 8192},
    "SmolLM2": _SMOLLM2,
    "LLaMA-7B's width": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
}


@dataclass(frozen=True)
class Setting:
    """What one run varies. rows: examples of `length` tokens that each rank trains in a step."""

    ranks: int = 2
    rows: int = 2
    length: int = 256
    rank: int = 16
    layers: int = 8
    shape: str = "SmolLM2's width, few words"
    policy: str = "selective"
    method: str = "lorasp"


@dataclass(frozen=True)
class Run:
    """Of one setting: medians of the counted steps in seconds, and the worst rank's peak in bytes above its start.

    planned: bytes of tensors that its plan had foreseen. load_peak, load_planned: of the load phase.
    """

    step: float
    gather: float
    peak: int
    planned: int
    load_peak: int
    load_planned: int


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=5, help="counted steps of a run")
    parser.add_argument("--threads", type=int, default=1, help="of each rank on a CPU")
    parser.add_argument("--memory", action="store_true", help="what was planned beside what was held, in other runs")
    options = parser.parse_args()

    settings = _memory_settings() if options.memory else _settings(options.ranks)
    with tempfile.TemporaryDirectory() as directory:
        study = Study(options, Path(directory))
        runs = []
        for number, setting in enumerate(settings, start=1):
            print(f"{number}/{len(settings)}: {setting}", file=sys.stderr, flush=True)
            runs.append(study.run(setting))
        if options.memory:
            print(memory_table(settings, runs))
            return 0
        print(study.table(settings, runs))
    print()
    print(on_gpus())
    return 0


def _settings(ranks: list[int]) -> list[Setting]:
    """The middle one, and one value varied at a time; of length also with as many tokens."""
    middle = Setting(ranks=2 if 2 in ranks else ranks[0])
    varied = [middle]
    varied += [replace(middle, ranks=n) for n in ranks]
    varied += [replace(middle, rows=n) for n in (1, 4)]
    varied += [replace(middle, length=n, rows=512 // n) for n in (128, 512)]
    varied += [replace(middle, rank=n) for n in (4, 64)]
    varied += [replace(middle, layers=n) for n in (4, 16)]
    return list(dict.fromkeys(varied))


def _memory_settings() -> list[Setting]:
    """Large enough for what a process holds besides tensors, some 25 MiB, to be little of it."""
    small = Setting(shape="SmolLM2", layers=30, rows=4)
    wide = Setting(shape="LLaMA-7B's width", layers=4, rows=1, length=128)
    varied = [small]
    varied += [replace(small, policy=policy) for policy in ("lean", "layer")]
    varied += [replace(small, policy="none", rows=2)]
    varied += [replace(small, ranks=1), replace(small, ranks=4, rows=2)]
    varied += [replace(small, length=1024, rows=1), replace(small, length=128, rows=8, policy="lean")]
    varied += [replace(small, rank=64), replace(small, method="lora")]
    varied += [replace(small, method="full", ranks=n, rows=2) for n in (1, 2)]
    varied += [wide, replace(wide, ranks=1, policy="lean"), replace(wide, ranks=4, policy="layer")]
    return varied


def memory_table(settings: list[Setting], runs: list[Run]) -> str:
    """Markdown: planned beside measured of each run, and the worst deviation."""
    lines = [
        f"`{shlex.join(['python', *sys.argv])}`: the worst rank's peak above its start (GiB), planned of tensors",
        "",
        "| model | method | policy | ranks | rows × length | r | train, planned | measured | off by | "
        "load, planned | measured |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for its, run in zip(settings, runs, strict=True):
        train, load = (
            f"{planned / 2**30:.3f} | {peak / 2**30:.3f}"
            for planned, peak in ((run.planned, run.peak), (run.load_planned, run.load_peak))
        )
        lines.append(
            f"| {its.shape}, {its.layers} layers | {its.method} | {its.policy} | {its.ranks} | {its.rows} × "
            f"{its.length} | {'–' if its.method == 'full' else its.rank} | {train} | "
            f"{run.peak / run.planned - 1:+.0%} | {load} |"
        )
    worst = max(abs(run.peak / run.planned - 1) for run in runs)
    return "\n".join([*lines, "", f"Largest deviation of the train peak: {worst:.1%}."])


class Study:
    """Runs settings in a directory of its own, and tells what they took beside what the model says."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self._options, self._directory = options, directory

    def recipe(self, setting: Setting) -> dict:
        shape = self._directory / "shape.json"
        shape.write_text(json.dumps(_SHAPES[setting.shape] | {"num_hidden_layers": setting.layers}))
        steps = _WARM_UP + (1 if self._options.memory else self._options.steps)
        trains_all = {"quantization": "none"} if setting.method == "full" else {"adapter": {"rank": setting.rank}}
        return {
            **trains_all,
            "method": setting.method,
            "name": "run",
            "output_dir": str(self._directory),
            "overwrite": True,
            "rehearse": False,
            "model": {"path": str(shape), "weights": "random"},
            "data": {
                "train": "random",
                "max_length": setting.length,
                "limit": steps * setting.rows * setting.ranks,
            },
            "training": {
                "epochs": 1.0,
                "global_batch_size": setting.rows * setting.ranks,
                "micro_batch_size": setting.rows,
                "log_every": 1,
                "activation_checkpointing": setting.policy,
            },
            "tracking": {"with": []},
        }

    def run(self, setting: Setting) -> Run:
        recipe = self._directory / "recipe.yaml"
        recipe.write_text(json.dumps(self.recipe(setting)))  # JSON is YAML
        command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--use_deepspeed"]
        command += ["--num_machines", "1", "--num_processes", str(setting.ranks), "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", str(ROOT / "launch" / "train.py"), str(recipe)]
        environment = os.environ | {"OMP_NUM_THREADS": str(self._options.threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RecipeError(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
        report = json.loads((self._directory / "run" / "report.json").read_text())
        history = report["history"][_WARM_UP:]
        return Run(
            step=statistics.median(row["step_seconds"] for row in history),
            gather=max(rank["gather"] for rank in report["throughput"]["ranks"]),
            peak=_peak(report, "train"),
            planned=sum(report["planned"]["train"].values()),
            load_peak=_peak(report, "load"),
            load_planned=sum(report["planned"]["load"].values()),
        )

    def table(self, settings: list[Setting], runs: list[Run]) -> str:
        """Markdown. Ranks beyond the cores take turns on them: their computation costs that much more."""
        import torch

        from lorasp.costs import Prices, count_work, gathered_bytes

        cores = torch.cuda.device_count() or (os.cpu_count() or 1) / self._options.threads
        models = [_on_meta(Recipe(**self.recipe(setting))) for setting in settings]
        works = []
        for setting, model in zip(settings, models, strict=True):
            work = count_work(model, rows=setting.rows, length=setting.length, world_size=setting.ranks)
            turns = max(1.0, setting.ranks / cores)
            works.append(replace(work, **{f.name: getattr(work, f.name) * turns for f in fields(work)}))
        seconds = [run.step for run in runs]
        lines = [
            f"`{shlex.join(['python', *sys.argv])}`: {_device(self._options)}; medians of {self._options.steps} steps",
            "",
            "| ranks | rows × length a rank | r | layers | s a step | model, this run left out | of it waiting for "
            "gathers (s) | received a step (MiB) | train peak (MiB) | planned, of tensors (MiB) |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for index, (setting, run, model) in enumerate(zip(settings, runs, models, strict=True)):
            others = [other for other in range(len(runs)) if other != index]
            prices = Prices.fit([works[other] for other in others], [seconds[other] for other in others])
            told = prices.of(works[index])
            received = gathered_bytes(model) * (setting.ranks - 1) / setting.ranks
            lines.append(
                f"| {setting.ranks} | {setting.rows} × {setting.length} | {setting.rank} | {setting.layers} | "
                f"{run.step:.3f} | {told:.3f} ({told / run.step - 1:+.0%}) | {run.gather:.3f} | "
                f"{received / 2**20:.1f} | {run.peak / 2**20:.0f} | {run.planned / 2**20:.0f} |"
            )
        prices = Prices.fit(works, seconds)
        middle = prices.parts(works[0])
        told = ", ".join(f"{name} {part / sum(middle.values()):.0%}" for name, part in middle.items())
        lines += ["", f"Of the first run's step, by the model fitted to all: {told}."]
        return "\n".join(lines)


def _peak(report: dict, phase: str) -> int:
    return max(rank["peak_bytes"] for rank in report["phases"][phase]["ranks"])


def _device(options: argparse.Namespace) -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {options.threads} thread(s) a rank"


def _on_meta(recipe: Recipe, dtype=None):
    import torch

    from lorasp.models.build import build_on_meta
    from lorasp.models.weights import load_config, locate_model

    config = load_config(locate_model(recipe.model), recipe.model)
    return build_on_meta(config, recipe, dtype or torch.float32)


def on_gpus() -> str:
    """Markdown: LLaMA-13B on GPUs of stated rates."""
    import torch

    from lorasp.costs import Cluster, count_work, gathered_bytes

    rows, length = 1, 1024
    data = {"train": "random", "max_length": length}
    recipe = Recipe(model={"path": "llama-13b", "weights": "random"}, adapter={"rank": 64}, data=data)
    model = _on_meta(recipe, torch.bfloat16)
    gathered = gathered_bytes(model)
    clusters = [
        Cluster("8 × A100, one 100 Gb/s port a node", 8, 156e12, 4e11, 200e9, 10e9),
        Cluster("8 × A100, eight 200 Gb/s ports a node", 8, 156e12, 4e11, 200e9, 160e9),
    ]
    lines = [
        f"Calculated, not measured: LLaMA-13B, r = 64, NF4, bf16, {rows} × {length} tokens a GPU a step, "
        f"{gathered / 2**30:.1f} GiB gathered a step. Assumed of an A100: half of its 312 TFLOP/s in matrix products, "
        "4·10¹¹ weights dequantized a second, 200 GB/s from its node; of a port, 80 % of its rate. Gathers run beside "
        "the computation: a step takes the longer of the two, and from the tokens in the last column on, that is the "
        "computation.",
        "",
        "| nodes | GPUs | shards over | computation (s) | gathers (s) | tokens/s, all GPUs | tokens a GPU |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for cluster in clusters:
        for gpus in (8, 16, 32, 64):
            work = count_work(model, rows=rows, length=length, world_size=gpus)
            for hierarchical in (False, True) if gpus > cluster.per_node else (False,):
                compute, gather = cluster.seconds(work, gathered, gpus, hierarchical=hierarchical)
                over = "its node" if hierarchical else "all"
                rate = gpus * rows * length / max(compute, gather)
                seconds = f"{compute:.2f} | {gather:.2f}"
                hidden = rows * length * gather / compute
                lines.append(f"| {cluster.name} | {gpus} | {over} | {seconds} | {rate:,.0f} | {hidden:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
