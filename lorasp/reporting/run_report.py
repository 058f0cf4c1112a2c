"""The report of a run: `report.json` for programs, `report.md` for people, both from the same plain data.

Every number in it was measured or counted; what is a remainder (`workspace`) is called one. In `report.json` sizes are
bytes, durations seconds, losses in the task's unit (report_text.loss_unit), exact match a share from 0 to 1; a number
that isn't finite is null.
"""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lorasp.memory import PhasePeak, breakdown
from lorasp.reporting.report_text import render_markdown

_PACKAGES = ("lorasp", "torch", "transformers", "accelerate", "deepspeed", "bitsandbytes")
# What the C allocator keeps is up to half of a CPU rank's peak, and threads decide the seconds.
_ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "THP_MEM_ALLOC_ENABLE",
    "LD_PRELOAD",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)


def rank_phases(
    rank: int, peaks: Mapping[str, PhasePeak], counted: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, Any]]:
    """What one rank tells of its phases: plain data, to be gathered from all ranks for `build_report`.

    `counted` holds bytes by part for a phase (`{"train": {"base_shard": …, "adapters": …}}`); the rest of the phase's
    peak becomes its `workspace`. Phases it doesn't name get the workspace alone.
    """
    phases = {}
    for name, peak in peaks.items():
        fields = asdict(peak)
        del fields["name"]
        phases[name] = {"rank": rank, **fields, "breakdown": breakdown(peak.peak_bytes, counted.get(name, {}))}
    return phases


def build_report(
    *,
    recipe: Mapping[str, Any],
    world_size: int,
    device: str,
    parameters: Mapping[str, int],
    ranks: Sequence[Mapping[str, Mapping[str, Any]]],
    throughput: Mapping[str, Any],
    metrics: Mapping[str, float | None],
    data: Mapping[str, Any],
    samples: Sequence[Mapping[str, str]],
    history: Sequence[Mapping[str, float]],
    status: str,
    timeline: Sequence[Mapping[str, Sequence[Any]]] = (),
    scores: Sequence[Mapping[str, float]] = (),
    splits: Mapping[str, Mapping[str, Any]] | None = None,
    command: str | None = None,
    versions: Mapping[str, Any] | None = None,
    model_commit: str | None = None,
    planned: Mapping[str, Mapping[str, int]] | None = None,
    drift: Sequence[Mapping[str, Any]] = (),
    hosts: Sequence[str] = (),
    mmlu: Mapping[str, Any] | None = None,
    lm_eval: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report as plain data.

    `recipe`: the resolved recipe. `parameters`: `total`, `adapter`, `trained` (numbers of entries) and
    `optimizer_state_bytes` (all ranks together). `ranks`: each rank's `rank_phases`, in rank order. `throughput`:
    `real_tokens_per_second`, `computed_tokens_per_second`, `step_seconds_median`, `mfu` (see accounting.py) and
    `ranks`, the seconds of a step by part on each (see trainer.LogPoint): `rank`, `data`, `gather` … `metrics`: pairs
    `*_before` and `*_after`, and single numbers, as all are of an evaluation. `samples`: `prompt`, `expected`,
    `before`, `after`; of an evaluation `answer`. `history`: a row for each log point. `status`: "finished", or
    "stopped: " and the reason; a stopped run leaves empty what it didn't reach.
    `timeline`: for each rank its `rank` and, one entry a measurement, `seconds` since the start, `phase` ("" between
    phases), `now_bytes` and `peak_bytes` of the phase so far, both above the baseline. `scores`: `step`,
    `held_out_loss` and what else the task scores, of each evaluation. `splits`: the last of them split by split, as
    `tasks.base.Score` has it: `reported`, and `selection`, on which settings may be chosen.
    `planned`: the bytes that the worst rank's tensors were to hold at a phase's peak, by part (planning.py). `drift`:
    of each rank, as reporting/drift.py has it, with its `share`; none of a run that was too short for any. `hosts`:
    the name of each rank's machine. `mmlu`: what was `asked`, the `scores` (an `MmluScore` and its `step` each) and
    the `paper`'s figure, but of an evaluation without an adapter. `lm_eval`: what `evaluation.harness.run_harness`
    gives. `command` and `versions` default to this process's. `model_commit`: of a base from the hub.
    """
    return {
        "name": recipe["name"],
        "status": status,
        "command": command or command_line(),
        "recipe": dict(recipe),
        "world_size": world_size,
        "hosts": list(hosts),
        "device": device,
        "versions": dict(versions) if versions is not None else collect_versions(),
        **({} if model_commit is None else {"model_commit": model_commit}),
        "parameters": dict(parameters),
        "phases": by_phase(ranks),
        "planned": {phase: dict(parts) for phase, parts in (planned or {}).items()},
        "drift": [dict(rank) for rank in drift],
        "throughput": dict(throughput),
        "metrics": dict(metrics),
        "data": dict(data),
        "samples": [dict(sample) for sample in samples],
        "history": [dict(row) for row in history],
        "scores": [dict(row) for row in scores],
        **{name: dict(split) for name, split in (splits or {}).items()},
        **({} if mmlu is None else {"mmlu": dict(mmlu)}),
        **({} if lm_eval is None else {"lm_eval": dict(lm_eval)}),
        "timeline": [dict(rank) for rank in timeline],
    }


def by_phase(ranks: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The report's `phases` from each rank's `rank_phases`: a phase takes as long as its slowest rank."""
    names = dict.fromkeys(name for rank in ranks for name in rank)
    phases = {}
    for name in names:
        rows = [dict(rank[name]) for rank in ranks if name in rank]
        phases[name] = {"seconds": max(row["seconds"] for row in rows), "ranks": rows}
    return phases


def write_report(run_dir: str | Path, report: Mapping[str, Any]) -> Path:
    """Write `report.json` and `report.md` into `run_dir`, each whole or not at all; the path of `report.md`.

    Its pictures are drawn into `run_dir/plots` between the two: a picture that fails costs neither.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(report), indent=2, ensure_ascii=False, allow_nan=False)
    _write_atomically(run_dir / "report.json", text + "\n")
    try:
        from lorasp.reporting.plots import draw_plots  # here, so that a run's own memory is without matplotlib

        plots = {name: path.relative_to(run_dir) for name, path in draw_plots(report, run_dir / "plots").items()}
    except Exception as error:
        plots = {}
        print(f"the report has no pictures: {type(error).__name__}: {error}", file=sys.stderr)
    _write_atomically(run_dir / "report.md", render_markdown(report, plots))
    return run_dir / "report.md"


def command_line() -> str:
    """The command that started this process; where accelerate or torchrun launched this script, that launcher's."""
    own = sys.orig_argv
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        parent = []
    # With `python -c` and `-m` there is no script's name to find in the launcher's arguments.
    argv = parent if sys.argv[0].endswith(".py") and sys.argv[0] in parent else own
    if len(argv) > 1 and Path(argv[0]).name.startswith("python"):
        # "/venv/bin/python /venv/bin/accelerate launch …" is what "accelerate launch …" becomes.
        console_script = Path(argv[0]).is_absolute() and Path(argv[1]).parent == Path(argv[0]).parent
        argv = [Path(argv[1]).name, *argv[2:]] if console_script else ["python", *argv[1:]]
    return shlex.join(argv)


def collect_versions() -> dict[str, Any]:
    """Versions of what takes part (None: not installed), read without importing it, and the machine."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__  # which CUDA it was built for, too
    versions["git_commit"] = _git_commit()
    versions["platform"] = platform.platform()
    versions["cpu_count"] = os.cpu_count()
    versions["torch_threads"] = torch.get_num_threads()
    versions["environment"] = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return versions


def _git_commit() -> str | None:
    """The commit of the checkout that this package lies in, "+changes" behind it if tracked files differ from it."""
    package = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", package, *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Elsewhere than at its checkout's top the package was installed into somebody else's repository.
    if git("rev-parse", "--show-prefix") != f"{package.name}/":
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain", "--untracked-files=no") else commit


def _finite(value: Any) -> Any:
    """`value` with null for NaN and infinities, which JSON doesn't have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value


def _write_atomically(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)  # mkstemp's 0600 would hide the report from one's group
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
