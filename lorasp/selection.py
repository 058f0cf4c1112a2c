"""S: which entries of a matrix are trained (Eq. 1).

A `Selection` holds S as packed bits and maps between the 1-D vector of selected entries (the trained parameter) and
the dense matrix A⊙S or B⊙S (Eq. 2). Bits are drawn by a counter hash of (seed, module name, matrix), so that S
depends neither on construction order nor on machine or world size.

Bytes held, for a matrix of n entries:

    balanced, fraction 1/2   one bit a pair of neighbours    n/16 bytes
    structured               one bit a feature               n/(8r) bytes
    every other mask         one bit an entry                n/8 bytes
    fraction 1 (LoRA)        nothing
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from lorasp.hashing import random_int64, stream_key
from lorasp.recipe_errors import RecipeError

_LARGEST_GROUP = 8


@dataclass(frozen=True)
class Selection:
    """S of one matrix of `rows * columns` entries, row-major.

    layout: `all` (no bits), `pair` (bit i tells which of the entries 2i, 2i + 1 is selected), `bitmap` (bit i tells
    whether entry i is selected), `columns` or `rows` (bit i tells whether column i, or row i, is selected as a whole).
    Bits are little-endian within a byte.
    """

    rows: int
    columns: int
    count: int
    layout: str

    @property
    def entries(self) -> int:
        return self.rows * self.columns

    @property
    def bytes_held(self) -> int:
        """Length of the packed bits, in bytes."""
        flags = {"all": 0, "pair": self.entries // 2, "bitmap": self.entries}
        flags |= {"columns": self.columns, "rows": self.rows}
        return -(-flags[self.layout] // 8)

    def features(self, bits: Tensor) -> Tensor:
        """Of the layout `columns` (or `rows`): which are selected, ascending, int64, on the bits' device."""
        size, other = (self.columns, self.rows) if self.layout == "columns" else (self.rows, self.columns)
        return _places(_unpack(bits, size), self.count // other)

    def expand(self, values: Tensor, bits: Tensor, rest: Tensor | None = None) -> Tensor:
        """The dense matrix, [rows, columns] in `values`' dtype: `values` [count] where S = 1; elsewhere zero, or the
        entries of `rest` [entries - count] in row-major order (`frozen_entries: init`).
        """
        if self.layout == "all":
            return values.view(self.rows, self.columns)
        if self.layout == "pair":
            # A step expands each matrix twice: on a GPU the launch of each operation counts, not its work.
            second = _unpack(bits, self.count)
            dense = values.new_empty(self.entries)
            pairs = dense[: 2 * self.count].view(-1, 2)
            torch.mul(values, second, out=pairs[:, 1])
            torch.sub(values, pairs[:, 1], out=pairs[:, 0])
            if rest is not None:
                swapped = rest[: self.count] * second
                pairs[:, 0] += swapped
                pairs[:, 1] += rest[: self.count] - swapped
            if 2 * self.count < self.entries:  # an odd number: the last one has no neighbour
                dense[-1] = 0 if rest is None else rest[-1]
            return dense.view(self.rows, self.columns)
        dense = values.new_zeros(self.entries)
        if self.layout in ("columns", "rows"):
            matrix, dim = dense.view(self.rows, self.columns), 1 if self.layout == "columns" else 0
            chosen = _unpack(bits, matrix.shape[dim])
            for part, flags in ((values, chosen), (rest, ~chosen)):
                if part is not None:
                    shape = (self.rows, -1) if dim == 1 else (-1, self.columns)
                    part = part.view(shape)
                    matrix.index_copy_(dim, _places(flags, part.shape[dim]), part)
        else:
            chosen = _unpack(bits, self.entries)
            before = chosen.cumsum(0)  # selected entries up to and with this one
            torch.mul(values[(before - 1).clamp_(min=0)], chosen, out=dense)
            if rest is not None and rest.numel():
                unselected = torch.arange(self.entries, device=bits.device) - before
                dense += rest[unselected.clamp_(min=0, max=rest.numel() - 1)] * ~chosen
        return dense.view(self.rows, self.columns)

    def select(self, dense: Tensor, bits: Tensor) -> Tensor:
        """The selected entries of `dense` [rows, columns] in row-major order, [count]: the transpose of `expand`."""
        flat = dense.reshape(-1)
        if self.layout == "all":
            return flat
        if self.layout == "pair":
            pairs = flat[: 2 * self.count].view(-1, 2)
            return torch.where(_unpack(bits, self.count), pairs[:, 1], pairs[:, 0])
        if self.layout in ("columns", "rows"):
            return dense.index_select(1 if self.layout == "columns" else 0, self.features(bits)).reshape(-1)
        return flat[_places(_unpack(bits, self.entries), self.count)]

    def mask(self, bits: Tensor) -> Tensor:
        """S itself, bool [rows, columns]."""
        ones = torch.ones(self.count, device=bits.device)
        return self.expand(ones, bits).bool()


def select_features(
    rows: int, columns: int, *, layout: str, fraction: float, seed: int | None, name: str
) -> tuple[Selection, Tensor]:
    """Draws the strategy `structured`: ⌊fraction · n⌋ whole columns (of A) or rows (of B), by `layout`; uint8 bits.

    Matrices of one `name` and number of columns (or rows) have the same ones. seed and errors as of `select_entries`.
    """
    size, other = (columns, rows) if layout == "columns" else (rows, columns)
    if fraction == 1:
        return Selection(rows, columns, rows * columns, "all"), torch.empty(0, dtype=torch.uint8)
    count, bits = _draw_uniform(size, fraction, _key(seed, name))
    if count == 0:
        raise RecipeError(
            f"selection.fraction: {name} has {size} features: too few to train {fraction:g} of them; raise it"
        )
    return Selection(rows, columns, count * other, layout), bits


def select_entries(
    rows: int, columns: int, *, strategy: str, fraction: float, seed: int | None, name: str
) -> tuple[Selection, Tensor]:
    """Draws S for the matrix called `name` (module, then A or B): the selection and its bits, uint8 on the CPU.

    seed: None draws nothing, for one who asks for sizes only: bits of no meaning, as long as they would be.

    strategy: `balanced` takes k of every m neighbouring entries for fraction = k/m, so that the selected ones are
    evenly spread as section 3.2 of the paper asks; `uniform` takes any ⌊fraction · n⌋ of the n entries, each subset as
    likely.

    Raises RecipeError for a matrix too small for the fraction, ValueError for an unknown strategy or a fraction that
    `balanced` cannot take, which no recipe holds.
    """
    selection, bits = _draw(rows, columns, strategy, fraction, _key(seed, name))
    if selection.count == 0:
        raise RecipeError(
            f"selection.fraction: {name} has {rows * columns} entries: too few to train {fraction:g} of them; raise "
            f"it, or adapter.rank"
        )
    return selection, bits


def _key(seed: int | None, name: str) -> int | None:
    return None if seed is None else stream_key(seed, name)


def _draw(rows: int, columns: int, strategy: str, fraction: float, key: int | None) -> tuple[Selection, Tensor]:
    entries = rows * columns
    if fraction == 1:
        return Selection(rows, columns, entries, "all"), torch.empty(0, dtype=torch.uint8)
    if strategy == "uniform":
        count, bits = _draw_uniform(entries, fraction, key)
        return Selection(rows, columns, count, "bitmap"), bits
    if strategy != "balanced":
        raise ValueError(f"unknown selection strategy {strategy!r}")

    k, m = balanced_group(fraction)
    if (k, m) == (1, 2):
        selection = Selection(rows, columns, entries // 2, "pair")
        if key is None:
            return selection, torch.zeros(selection.bytes_held, dtype=torch.uint8)
        coins = random_int64(key, -(-selection.count // 64)).view(torch.uint8)
        return selection, _pack(_unpack(coins, selection.count))
    groups = entries // m
    if key is None:
        selection = Selection(rows, columns, groups * k, "bitmap")
        return selection, torch.zeros(selection.bytes_held, dtype=torch.uint8)
    ranks = random_int64(key, groups * m).view(groups, m).argsort(dim=1, stable=True).argsort(dim=1)
    chosen = torch.zeros(entries, dtype=torch.bool)
    chosen[: groups * m] = (ranks < k).view(-1)
    return Selection(rows, columns, groups * k, "bitmap"), _pack(chosen)


def _draw_uniform(size: int, fraction: float, key: int | None) -> tuple[int, Tensor]:
    """⌊fraction · size⌋ of `size` flags, any subset as likely: (how many, the bits)."""
    count = int(size * Fraction(fraction).limit_denominator(10**6))
    if key is None:
        return count, torch.zeros(-(-size // 8), dtype=torch.uint8)
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[torch.sort(random_int64(key, size), stable=True).indices[:count]] = True
    return count, _pack(chosen)


def balanced_group(fraction: float) -> tuple[int, int]:
    """(k, m) with k/m = fraction and m at most 8: `balanced` trains k of every m neighbouring entries."""
    group = Fraction(fraction).limit_denominator(_LARGEST_GROUP)
    if not 0 < group <= 1 or abs(float(group) - fraction) > 1e-3:
        raise ValueError(
            f"selection.fraction {fraction} is not k/m with m at most {_LARGEST_GROUP}, as the balanced strategy needs"
        )
    return group.numerator, group.denominator


def selection_digest(masks: Iterable[tuple[str, Selection, Tensor]]) -> str:
    """SHA-256 over all matrices, in the order of their names: (name, selection, bits) each. Equal S, equal digest."""
    digest = hashlib.sha256()
    for name, selection, bits in sorted(masks, key=lambda mask: mask[0]):
        digest.update(f"{name} {selection.rows}x{selection.columns} {selection.count} {selection.layout}\n".encode())
        digest.update(bits.cpu().numpy().tobytes())
    return digest.hexdigest()


def _pack(flags: Tensor) -> Tensor:
    """bool [n] -> uint8 [⌈n/8⌉], the first flag in the lowest bit; unused bits are zero."""
    padded = torch.zeros(-(-flags.numel() // 8) * 8, dtype=torch.uint8)
    padded[: flags.numel()] = flags
    return (padded.view(-1, 8) * _bit_values(padded.device)).sum(dim=1, dtype=torch.uint8)


def _unpack(bits: Tensor, count: int) -> Tensor:
    """uint8 [⌈count/8⌉] -> bool [count], on the bits' device."""
    values = _bit_values if type(bits) is Tensor else _bit_values.__wrapped__  # a plan's fake tensors are of one trace
    return (bits.unsqueeze(1) & values(bits.device)).view(-1)[:count].bool()


@cache
def _bit_values(device: torch.device) -> Tensor:
    """1, 2, 4 … 128; one copy a device."""
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)


def _places(chosen: Tensor, count: int) -> Tensor:
    """Where the `count` ones of `chosen` [n] are, int64 [count].

    Never asks the device how many there are, as `nonzero` and `masked_select` do: that would synchronise a GPU.
    """
    every = torch.arange(chosen.numel(), device=chosen.device)
    # The places of zeros all go to one extra slot behind the last.
    slot = torch.where(chosen, chosen.cumsum(0) - 1, count)
    return every.new_empty(count + 1).scatter_(0, slot, every)[:count]
