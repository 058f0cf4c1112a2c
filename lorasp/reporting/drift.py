"""Whether a rank holds more and more: what would run out of memory at step 4,000 shows at step 40."""

from collections.abc import Sequence
from dataclasses import dataclass

_SETTLED = 5  # steps of a process, after which it holds all that it needs
_TOLERATED = 0.03
_SLACK_BYTES = 2**24  # a Python process grows by some MiB whatever it does


@dataclass(frozen=True)
class Drift:
    """Of one rank, above the baseline: what it held after `from_step`, and the most after any later logged step."""

    rank: int
    from_step: int
    held_bytes: int
    most_bytes: int
    most_at_step: int

    @property
    def share(self) -> float:
        """What was added, of what was held then; below 0 where less was held ever after."""
        return self.most_bytes / self.held_bytes - 1 if self.held_bytes else 0.0

    @property
    def is_growing(self) -> bool:
        return self.share > _TOLERATED and self.most_bytes - self.held_bytes > _SLACK_BYTES


def drift(
    steps: Sequence[int],
    held_bytes: Sequence[Sequence[int]],
    *,
    resumed_at: int = 0,
    profiled_from: int | None = None,
) -> list[Drift]:
    """Each rank's, from what the ranks held after each of `steps`; empty for a run that ended before it settled.

    resumed_at: the step after which these processes began, with memory that had to settle anew. profiled_from: the
    step from which on a rank holds a profiler's events too, which are not the run's: only steps before it count.
    """
    if profiled_from is not None:
        steps = [step for step in steps if step < profiled_from]
        held_bytes = held_bytes[: len(steps)]
    settled = next((index for index, step in enumerate(steps) if step - resumed_at >= _SETTLED), len(steps))
    if settled >= len(steps) - 1:
        return []
    found = []
    for rank, held in enumerate(zip(*held_bytes, strict=True)):
        most = max(range(settled + 1, len(steps)), key=held.__getitem__)
        found.append(Drift(rank, steps[settled], held[settled], held[most], steps[most]))
    return found
