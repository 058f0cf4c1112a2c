"""What all ranks do after a step: a signal may reach one of them only, and a clock is each one's own."""

import torch
from torch import distributed as dist

from lorasp.health import asked_to_leave


class Agreement:
    """One sum of two numbers a step, between hosts: nothing waits for a GPU. leaves: whether the run is to end."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self.leaves = False

    def asked(self) -> bool:
        """Whether the run is to leave, on all ranks alike. Collective."""
        self.saves(is_due=False)
        return self.leaves

    def saves(self, is_due: bool) -> bool:
        """Whether the state is to be saved, on all ranks alike: where the run leaves, or a rank finds it due.

        Collective.
        """
        flags = torch.tensor([asked_to_leave(), is_due], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        self.leaves, saves = (bool(flag) for flag in flags)
        return saves or self.leaves
