"""What all ranks do after a step or a batch: a signal may reach one of them only, and a clock is each one's own."""

from collections.abc import Callable

import torch
from torch import distributed as dist

from lorasp.health import asked_to_leave


class Agreement:
    """One sum of two numbers a step, between hosts: nothing waits for a GPU. leaves: whether the run is to end.

    on_progress: called as this rank comes to it, which tells it from one that does not (watchdog.py).
    """

    def __init__(self, on_progress: Callable[[], None]) -> None:
        self._group = dist.new_group(backend="gloo")
        self._on_progress = on_progress
        self.leaves = False

    def saves(self, is_due: bool) -> bool:
        """Whether the state is to be saved, on all ranks alike: where the run leaves, or a rank finds it due.

        Collective.
        """
        self._on_progress()
        flags = torch.tensor([asked_to_leave(), is_due], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        self.leaves, saves = (bool(flag) for flag in flags)
        return saves or self.leaves

    def to_leave(self) -> bool:
        """Whether the run is to end, on all ranks alike. Collective."""
        return self.saves(is_due=False)
