"""The spread of a step's examples over ranks, and the batches that the model sees.

Everything here is a pure function of (order, step, rank, world size) and of the data set, which every rank holds
whole: so no rank asks another for anything.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch

from lorasp.data.examples import Example
from lorasp.data.order import SampleOrder
from lorasp.hashing import stream_key

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """Examples one after another in a single row: T real tokens, L of them labels, no padding.

    A batch of no examples is one unlabelled token, all four tuples empty: a rank without work still has to run the
    forward, as the gathers of ZeRO-3 wait for every rank.
    """

    input_ids: torch.Tensor  # int64 [1, T]
    position_ids: torch.Tensor  # int64 [1, T], from 0 again in each example: what keeps attention within it
    label_positions: torch.Tensor  # int64 [L], where in 0..T-1 the hidden states stand that predict the labels
    labels: torch.Tensor  # int64 [L]
    lengths: tuple[int, ...]  # tokens of each example
    label_counts: tuple[int, ...]  # labels of each example; `labels` holds them in this order
    rows: tuple[int, ...]  # which examples of the data set
    keys: tuple[int, ...] = ()  # of each example in this step, for its dropout masks; none outside training

    def model_inputs(self, device: torch.device | str) -> dict[str, Any]:
        """What `CausalLM.forward` takes, with the tensors on `device`."""
        tensors = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "positions": self.label_positions,
            "labels": self.labels,
        }
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return {**moved, "example_lengths": self.lengths, "example_keys": self.keys}


class TrainingStep(NamedTuple):
    """One rank's share of an optimizer step, and the whole step's counts over all ranks."""

    step: int  # from 0
    micro_batches: list[Batch]  # as many on every rank
    label_count: int  # N, by which the global batch's summed loss is divided
    token_count: int  # real tokens of all ranks together
    computed_count: int  # the same and the dummy tokens of micro batches without an example


def collate(examples: Sequence[Example], rows: Sequence[int]) -> Batch:
    """The batch of `examples[row]` for each of `rows`, in that order."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    label_positions: list[int] = []
    labels: list[int] = []
    for row in rows:
        example, start = examples[row], len(input_ids)
        input_ids.extend(example.input_ids)
        position_ids.extend(range(len(example.input_ids)))
        indices = example.label_indices()
        label_positions.extend(start + index - 1 for index in indices)
        labels.extend(example.input_ids[index] for index in indices)
    return Batch(
        input_ids=torch.tensor([input_ids or [0]]),
        position_ids=torch.tensor([position_ids or [0]]),
        label_positions=torch.tensor(label_positions, dtype=torch.int64),  # an empty list would be float32
        labels=torch.tensor(labels, dtype=torch.int64),
        lengths=tuple(len(examples[row].input_ids) for row in rows),
        label_counts=tuple(examples[row].label_count for row in rows),
        rows=tuple(rows),
    )


def spread(items: Sequence[Item], lengths: Sequence[int], slots: int, micro_batch_size: int) -> list[list[Item]]:
    """`items` dealt to `slots` micro batches of at most `micro_batch_size`, with token counts as equal as can be had.

    Ranks wait for one another in every forward, so each micro batch should cost the same: longest item first, each to
    the slot with room that has the fewest tokens so far, the lowest of equals. `lengths[i]` is the length of
    `items[i]`, in tokens. A slot stays empty where there are fewer items than slots.
    """
    if len(items) > slots * micro_batch_size:
        raise ValueError(f"{len(items)} rows for {slots} micro batches of {micro_batch_size}")
    dealt: list[list[Item]] = [[] for _ in range(slots)]
    open_slots = [(0, slot) for slot in range(slots)]
    for index in sorted(range(len(items)), key=lambda index: -lengths[index]):
        tokens, slot = heapq.heappop(open_slots)
        dealt[slot].append(items[index])
        if len(dealt[slot]) < micro_batch_size:
            heapq.heappush(open_slots, (tokens + lengths[index], slot))
    return dealt


def training_batches(
    examples: Sequence[Example],
    order: SampleOrder,
    *,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    start_step: int = 0,
    collate: Callable[[Sequence[Example], Sequence[int]], Batch] = collate,
) -> Iterator[TrainingStep]:
    """This rank's micro batches of every optimizer step from `start_step` on.

    collate: of another task's examples, and batches.

    `order.global_batch_size` must be a multiple of `micro_batch_size * world_size`; the quotient is the accumulation.
    Both sizes count the order's units: examples, or packs of them.
    """
    accumulation, rest = divmod(order.global_batch_size, micro_batch_size * world_size)
    if rest:
        raise ValueError(f"{order.global_batch_size} is no multiple of {micro_batch_size} x {world_size}")
    for step in range(start_step, order.total_steps):
        units = order.global_batch(step)
        lengths = [sum(len(examples[row].input_ids) for row in unit) for unit in units]
        slots = spread(units, lengths, accumulation * world_size, micro_batch_size)
        yield TrainingStep(
            step=step,
            # Slot = accumulation step * world size + rank: a short global batch fills the first forward of all ranks.
            micro_batches=[
                _keyed(collate(examples, list(chain(*slot))), order, step) for slot in slots[rank::world_size]
            ],
            label_count=sum(examples[row].label_count for unit in units for row in unit),
            token_count=sum(lengths),
            computed_count=sum(lengths) + sum(not slot for slot in slots),
        )


def _keyed(batch: Batch, order: SampleOrder, step: int) -> Batch:
    return replace(batch, keys=tuple(stream_key(order.seed, "example", step, row) for row in batch.rows))


def evaluation_batches(
    examples: Sequence[Example],
    micro_batch_size: int,
    rank: int,
    world_size: int,
    collate: Callable[[Sequence[Example], Sequence[int]], Batch] = collate,
) -> list[Batch]:
    """This rank's batches of the whole data set: as many on every rank, each example once over all of them."""
    forwards = math.ceil(len(examples) / (micro_batch_size * world_size))
    lengths = [len(example.input_ids) for example in examples]
    slots = spread(range(len(examples)), lengths, forwards * world_size, micro_batch_size)
    return [collate(examples, slot) for slot in slots[rank::world_size]]
