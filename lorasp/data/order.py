"""Which examples each optimizer step trains: a pure function of the seed, the step and the data set.

An epoch draws from each source of a mixture, shuffles, and cuts what it has into units: single examples, or packs of
them. Ranks have no part in it, so the units of a step are the same however many ranks share them, and a run resumes at
any step and at any world size.
"""

import bisect
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from lorasp.data.examples import Example
from lorasp.data.packing import pack
from lorasp.hashing import permutation, stream_key

Unit = tuple[int, ...]  # the examples that go through the model together: one, or those of a pack

_SORTED_TOGETHER = 50  # global batches: enough to find alike lengths, few enough to stay near the shuffled order


class SampleOrder:
    """The order of a run's examples.

    lengths: tokens of each example. sources: (number of examples, weight) of each source, whose examples stand one
    behind the other; an epoch visits a source of weight w round(w · number) times, every example once before any
    twice, across epochs too. pack_to: tokens of a pack; None trains examples one by one. group_by_length: the units of
    a global batch are of like length. global_batch_size counts units. `max_steps` only shortens a run.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        seed: int,
        epochs: float,
        global_batch_size: int,
        max_steps: int | None = None,
        sources: Sequence[tuple[int, float]] | None = None,
        pack_to: int | None = None,
        group_by_length: bool = False,
    ) -> None:
        self.global_batch_size = global_batch_size
        self._lengths = lengths
        self.seed = seed
        # (examples, visits an epoch) of each source
        self._sources = [(count, max(1, round(count * weight))) for count, weight in sources or [(len(lengths), 1.0)]]
        self._pack_to = pack_to
        self._group_by_length = group_by_length
        an_epoch = sum(visits for _, visits in self._sources)
        total = max(1, round(an_epoch * epochs))
        self._visits = [min(an_epoch, total - start) for start in range(0, total, an_epoch)]  # of each epoch
        # Where each epoch begins in the stream of units. How many packs an epoch makes is known once it is packed.
        # Of epochs that `max_steps` ends before, that is of no matter.
        sizes = self._visits if pack_to is None else (len(self._packs(epoch)) for epoch in range(len(self._visits)))
        needed = math.inf if max_steps is None else max_steps * global_batch_size
        self._starts = [0]
        for end in itertools.accumulate(sizes):
            self._starts.append(end)
            if end >= needed:
                break
        steps = math.ceil(self._starts[-1] / global_batch_size)
        self.total_steps = steps if max_steps is None else min(steps, max_steps)
        self._epoch = lru_cache(maxsize=2)(self._units)  # a global batch that spans two epochs needs both

    def global_batch(self, step: int) -> list[Unit]:
        """The units of optimizer step `step`, from 0; the last step may have fewer, one may span two epochs."""
        start = step * self.global_batch_size
        stop = min(start + self.global_batch_size, self._starts[-1])
        units = []
        for at in range(start, stop):
            epoch = bisect.bisect_right(self._starts, at) - 1
            units.append(self._epoch(epoch)[at - self._starts[epoch]])
        return units

    def examples_of(self, epoch: int) -> list[int]:
        """The examples that `epoch` (from 0) visits, in its shuffled order."""
        drawn: list[int] = []
        first = 0
        for source, (count, visits) in enumerate(self._sources):
            drawn += [first + index for index in self._draw(source, count, epoch * visits, (epoch + 1) * visits)]
            first += count
        shuffled = permutation(stream_key(self.seed, "sample order", epoch), len(drawn)).tolist()
        return [drawn[index] for index in shuffled[: self._visits[epoch]]]

    def largest_units(self, examples: Sequence[Example], count: int) -> list[Example]:
        """Units, each as one example: no `count` of a step have more tokens or more labels than the largest of them.

        They are the longest `count` of the step that has the most tokens in so many, and likewise for labels.
        """

        def largest(size: Callable[[Unit], int]) -> Counter[Unit]:
            steps = (heapq.nlargest(count, self.global_batch(step), key=size) for step in range(self.total_steps))
            return Counter(max(steps, key=lambda units: sum(map(size, units))))

        longest = largest(lambda unit: sum(self._lengths[row] for row in unit))
        fullest = largest(lambda unit: sum(examples[row].label_count for row in unit))
        return [_merged([examples[row] for row in unit]) for unit in (longest | fullest).elements()]

    def _draw(self, source: int, count: int, start: int, stop: int) -> list[int]:
        """Visits `start` to `stop` of a source's endless stream of shuffled passes, sorted."""
        drawn: list[int] = []
        while start < stop:
            done, at = divmod(start, count)
            taken = min(count - at, stop - start)
            if taken == count:
                drawn += range(count)
            else:
                drawn += permutation(stream_key(self.seed, "source", source, done), count)[at : at + taken].tolist()
            start += taken
        return sorted(drawn)

    def _packs(self, epoch: int) -> list[Unit]:
        visited = self.examples_of(epoch)
        packs = pack([self._lengths[row] for row in visited], self._pack_to)
        shuffled = permutation(stream_key(self.seed, "pack order", epoch), len(packs)).tolist()
        return [tuple(visited[index] for index in packs[number]) for number in shuffled]

    def _units(self, epoch: int) -> list[Unit]:
        if self._pack_to is not None:
            return self._packs(epoch)
        visited = self.examples_of(epoch)
        if self._group_by_length:
            visited = self._grouped(visited, epoch)
        return [(row,) for row in visited]

    def _grouped(self, visited: list[int], epoch: int) -> list[int]:
        """`visited` with rows of like length side by side in each global batch, the batches in random order."""
        size = self.global_batch_size
        # The first rows complete the global batch that the epoch before began: they stay what they are.
        head = min(-self._starts[epoch] % size, len(visited))
        groups = []
        for start in range(head, len(visited), size * _SORTED_TOGETHER):
            window = sorted(visited[start : start + size * _SORTED_TOGETHER], key=lambda row: self._lengths[row])
            groups += [window[at : at + size] for at in range(0, len(window), size)]
        tail = [groups.pop()] if groups and len(groups[-1]) < size else []
        order = permutation(stream_key(self.seed, "length groups", epoch), len(groups)).tolist()
        return [*visited[:head], *itertools.chain(*(groups[index] for index in order), *tail)]


def _merged(examples: Sequence[Example]) -> Example:
    """One example as long as `examples` together, with as many labels: for sizes, not for training."""
    if len(examples) == 1:
        return examples[0]
    input_ids = tuple(itertools.chain(*(example.input_ids for example in examples)))
    return Example(input_ids, len(input_ids) - sum(example.label_count for example in examples))
