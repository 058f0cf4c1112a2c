"""What a few steps consist of: `runs/NAME/profile/`, as the recipe's `profile` section asks for it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from lorasp.data.batches import TrainingStep
from lorasp.recipe import Profile, RecipeError


def check_profile(settings: Profile, total_steps: int) -> None:
    """Raises RecipeError where the run has no step to profile."""
    if settings.first_step is not None and settings.first_step > total_steps:
        raise RecipeError(f"profile.first_step: {settings.first_step} is behind the last step, {total_steps}")


def profiled(
    steps: Iterable[TrainingStep],
    settings: Profile,
    run_dir: Path,
    *,
    rank: int,
    device: torch.device,
    warn: Callable[[str], None],
    writing: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[TrainingStep]:
    """The same steps; those that `settings` names run under torch's profiler.

    Leaves `rank_R_trace.json.gz` of each rank (Chrome's format, for ui.perfetto.dev: operations, kernels, every
    allocation), and on a GPU `rank_R_memory.pickle` (the allocator's history, for pytorch.org/memory_viz). The steps
    are slower than others, and what torch records is memory of the rank's; their numbers are in the curves all the
    same. A disk that refuses is told to `warn`. writing: around what takes its time.
    """
    if settings.first_step is None:
        yield from steps
        return
    profiler = None
    last = settings.first_step + settings.steps - 1
    for step in steps:
        if step.step + 1 == settings.first_step:
            profiler = _start(device)
        yield step
        # Asked for the next one: this one has been run.
        if profiler is not None and step.step + 1 == last:
            with writing():
                _stop(profiler, run_dir / "profile", rank, device, warn)
            profiler = None
    if profiler is not None:  # the run was over before the last of them
        with writing():
            _stop(profiler, run_dir / "profile", rank, device, warn)


def _start(device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history()
    profiler = profile(activities=activities, profile_memory=True)
    profiler.start()
    return profiler


def _stop(profiler: profile, directory: Path, rank: int, device: torch.device, warn: Callable[[str], None]) -> None:
    profiler.stop()
    try:
        directory.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(directory / f"rank_{rank}_trace.json.gz"))
        if device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(directory / f"rank_{rank}_memory.pickle"))
    except (OSError, RuntimeError) as error:  # no reason to lose the run
        warn(f"the profile of rank {rank} could not be written to {directory} ({error})")
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(enabled=None)
