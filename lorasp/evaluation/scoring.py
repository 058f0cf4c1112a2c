"""Log-likelihoods of continuations, over all ranks: planned so that each runs as many forwards, of like size.

Rows of a family begin alike, as the questions of a subject with the same shots do. What all of them begin with is
computed once on each rank that has some of them; the others go on from its keys and values (see KeptStates). A
beginning is found in the tokens, not in the text, so nothing is assumed of the tokenizer, and the result is that of
whole rows.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorasp.models.kept_states import ALONE, KeptStates, Link

if TYPE_CHECKING:  # a plan of memory needs no deepspeed
    from lorasp.zero.engine import Engine


@dataclass(frozen=True)
class ScoredRow:
    """Tokens, and continuations after them whose log-likelihoods are wanted.

    tokens: with all but the last token of a continuation at its end; an array("i") holds thousands of rows in a ninth
    of a tuple's memory. continuations: of one length, differing in their last token only. family: rows of one begin
    alike; None: with no other.
    """

    tokens: Sequence[int]
    continuations: tuple[tuple[int, ...], ...]
    family: Hashable | None = None

    @property
    def scored(self) -> int:
        """Positions at the end that predict: as many as a continuation has tokens."""
        return len(self.continuations[0])


@dataclass(frozen=True)
class Part:
    """An example of a forward: a row, without what it goes on from, or what rows go on from (`row` is None)."""

    row: int | None
    tokens: Sequence[int]
    link: Link = ALONE


@dataclass(frozen=True)
class Forward:
    """done: keys that no later forward of this rank goes on from."""

    parts: tuple[Part, ...] = ()
    done: tuple[int, ...] = ()

    @property
    def rows(self) -> list[int]:
        return [part.row for part in self.parts if part.row is not None]

    @property
    def token_count(self) -> int:
        return sum(len(part.tokens) for part in self.parts)

    def inputs(self, rows: Sequence[ScoredRow], states: KeptStates, device: torch.device) -> dict[str, Any]:
        """What the model's forward takes, but for `score` and `kept_states`; `states` is told of it."""
        parts = self.parts or (Part(None, (0,)),)  # a rank without rows takes part all the same
        lengths = tuple(len(part.tokens) for part in parts)
        starts = states.begin([part.link for part in parts], lengths)
        width = max((len(rows[row].continuations) for row in self.rows), default=1)
        places: list[int] = []
        labels: list[list[int]] = []
        end = 0
        for part, length in zip(parts, lengths, strict=True):
            end += length
            if part.row is not None:
                row = rows[part.row]
                places.extend(range(end - row.scored, end))
                # One column a continuation; where a row has fewer, its first fills the others.
                columns = [*row.continuations, *[row.continuations[0]] * (width - len(row.continuations))]
                labels.extend(map(list, zip(*columns, strict=True)))
        position_ids = torch.cat(
            [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        )
        inputs = {
            "input_ids": torch.tensor([[token for part in parts for token in part.tokens]], device=device),
            "position_ids": position_ids.unsqueeze(0).to(device),
            "positions": torch.tensor(places, dtype=torch.int64, device=device),
            "labels": torch.tensor(labels, dtype=torch.int64, device=device).view(-1, width),
        }
        return {**inputs, "example_lengths": lengths}


def plan_forwards(
    rows: Sequence[ScoredRow], *, world_size: int, tokens: int, reuse: bool = True
) -> list[list[Forward]]:
    """The forwards of each rank: as many on every one, each row once over all of them.

    tokens: that a forward has at most, unless one row alone is longer. reuse: whether rows go on from what their
    family begins with. A rank without rows has empty forwards: ZeRO-3's gathers wait for it.
    """
    beginnings = _beginnings(rows) if reuse else {}
    order = _in_families(rows, beginnings)
    shares = _dealt(order, rows, beginnings, world_size)
    count = max(len(_packed(share, rows, beginnings, tokens)) for share in shares)
    return [_in_forwards(share, rows, beginnings, tokens, count) for share in shares]


def _beginnings(rows: Sequence[ScoredRow]) -> dict[Hashable, int]:
    """Tokens that all rows of each family begin with, and that none of them predicts from; where two or more do."""
    families: dict[Hashable, list[ScoredRow]] = {}
    for row in rows:
        if row.family is not None:
            families.setdefault(row.family, []).append(row)
    found = {}
    for family, its in families.items():
        first, last = min(row.tokens for row in its), max(row.tokens for row in its)  # all others lie between
        common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        common = min(common, min(len(row.tokens) - row.scored for row in its))
        if len(its) > 1 and common > 0:
            found[family] = common
    return found


def _in_families(rows: Sequence[ScoredRow], beginnings: dict[Hashable, int]) -> list[int]:
    """Rows by family, the longest first within each: equal lengths share a mask, and a rank's last ones are short."""
    places: dict[Hashable, int] = {}
    for row in rows:
        places.setdefault(row.family, len(places))
    return sorted(range(len(rows)), key=lambda i: (places[rows[i].family], -len(rows[i].tokens), i))


class _Cost:
    """Tokens that a sequence of rows takes, added up row by row."""

    def __init__(self, rows: Sequence[ScoredRow], beginnings: dict[Hashable, int]) -> None:
        self._rows, self._beginnings = rows, beginnings

    def of(self, index: int, previous: int | None) -> int:
        """previous: the row before it on the same rank, whose family's beginning is there already."""
        row = self._rows[index]
        shared = self._beginnings.get(row.family, 0)
        if shared and previous is not None and self._rows[previous].family == row.family:
            return len(row.tokens) - shared
        return len(row.tokens)


def _dealt(
    order: Sequence[int], rows: Sequence[ScoredRow], beginnings: dict[Hashable, int], world_size: int
) -> list[list[int]]:
    """A stretch of `order` for each rank, of about equal cost: a family is cut where ranks meet, and nowhere else."""
    cost = _Cost(rows, beginnings)
    shares: list[list[int]] = []
    left = list(order)
    for rank in range(world_size):
        costs = [cost.of(row, left[i - 1] if i else None) for i, row in enumerate(left)]
        target, taken, count = sum(costs) / (world_size - rank), 0, 0
        # The row that crosses the target goes where it overshoots less.
        while count < len(left) and taken + costs[count] / 2 <= target:
            taken += costs[count]
            count += 1
        if rank == world_size - 1:
            count = len(left)
        shares.append(left[:count])
        left = left[count:]
    return shares


def _packed(
    share: Sequence[int], rows: Sequence[ScoredRow], beginnings: dict[Hashable, int], tokens: int
) -> list[list[int]]:
    """`share` cut into forwards of at most so many tokens, in order."""
    cost = _Cost(rows, beginnings)
    forwards: list[list[int]] = []
    held = 0
    for i, row in enumerate(share):
        its = cost.of(row, share[i - 1] if i else None)
        if not forwards or held + its > tokens:
            forwards.append([])
            held = 0
        forwards[-1].append(row)
        held += its
    return forwards


def _in_forwards(
    share: Sequence[int], rows: Sequence[ScoredRow], beginnings: dict[Hashable, int], tokens: int, count: int
) -> list[Forward]:
    """`share` as `count` forwards, with the lowest bound on their size that gives no more: all of about one size."""
    low, high = 0, tokens
    while high - low > 1:
        middle = (low + high) // 2
        if len(_packed(share, rows, beginnings, middle)) <= count:
            high = middle
        else:
            low = middle
    packed = _packed(share, rows, beginnings, high)
    packed += [[]] * (count - len(packed))
    family_of = {row: rows[row].family for row in share if rows[row].family in beginnings}
    last: dict[Hashable, int] = {family_of[row]: n for n, its in enumerate(packed) for row in its if row in family_of}
    keys = {family: key for key, family in enumerate(last)}
    room = dict.fromkeys(last, 0)
    for row, family in family_of.items():
        room[family] = max(room[family], len(rows[row].tokens))
    begun: set[Hashable] = set()
    forwards = []
    for number, its in enumerate(packed):
        parts = []
        for row in its:
            family = family_of.get(row)
            if family is None:
                parts.append(Part(row, rows[row].tokens))
                continue
            shared, key = beginnings[family], keys[family]
            if family not in begun:
                begun.add(family)
                parts.append(Part(None, rows[row].tokens[:shared], Link(key, keeps=True, room=room[family])))
            parts.append(Part(row, rows[row].tokens[shared:], Link(key)))
        done = tuple(keys[family] for family, its_last in last.items() if its_last == number)
        forwards.append(Forward(tuple(parts), done))
    return forwards


def kept_parts(of_rank: Sequence[Forward]) -> dict[int, Part]:
    """By key: what the rows of a rank's forwards go on from."""
    return {part.link.key: part for forward in of_rank for part in forward.parts if part.link.keeps}


def standing_alone(forward: Forward, kept: Mapping[int, Part]) -> Forward:
    """`forward` as if it were the first of its rank's: what its rows go on from (`kept_parts`) stands before them."""
    begun = {part.link.key for part in forward.parts if part.link.keeps}
    keys = dict.fromkeys(part.link.key for part in forward.parts if part.link.key is not None)
    return Forward((*(kept[key] for key in keys if key not in begun), *forward.parts), tuple(keys))


def heaviest(of_ranks: Sequence[Sequence[Forward]]) -> Forward:
    """The largest forward of all ranks, as if it were the first."""
    alone = (standing_alone(forward, kept) for its in of_ranks for kept in [kept_parts(its)] for forward in its)
    return max(alone, key=lambda forward: forward.token_count)


def score_forward(
    engine: "Engine", forward: Forward, rows: Sequence[ScoredRow], states: KeptStates, device: torch.device
) -> Iterator[tuple[int, list[tuple[float, bool]]]]:
    """(row, of each continuation its log-likelihood in nats and whether greedy decoding would write it).

    Collective: each rank runs its own forward. states: the rank's, from one forward to the next.
    """
    inputs = forward.inputs(rows, states, device)
    with torch.no_grad():
        losses, greedy = engine(**inputs, score=True, kept_states=states)
    states.drop(forward.done)
    counts = [rows[row].scored for row in forward.rows]
    losses, greedy = losses.cpu(), greedy.cpu()
    for row, its_losses, its_greedy in zip(forward.rows, losses.split(counts), greedy.split(counts), strict=True):
        sums, all_greedy = its_losses.double().sum(0).neg().tolist(), its_greedy.all(0).tolist()
        yield row, list(zip(sums, all_greedy, strict=True))[: len(rows[row].continuations)]
