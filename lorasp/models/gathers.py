"""What a training step gathers of a sharded model: counted from its units."""

from collections.abc import Iterator

from torch import nn

from lorasp.models.build import units
from lorasp.models.task_model import TaskModel


def unit_gathers(model: TaskModel) -> Iterator[tuple[nn.Module, int]]:
    """Each unit, and how often it is gathered in a step: for forward, and again for backward if that needs it.

    A tied weight is gathered for each of its two units.
    """
    once = set(model.needless_in_backward())
    for unit in units(model.model):
        yield unit.module, 1 if unit.module in once else 2


def gathered_bytes(model: TaskModel) -> int:
    """Bytes, as stored, of all that a training step gathers; of each, a rank lacks (N - 1)/N."""
    return sum(
        gathers * sum(p.numel() * p.element_size() for p in module.parameters())
        for module, gathers in unit_gathers(model)
    )
