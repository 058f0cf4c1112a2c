"""Keys and values that outlive a forward: of a beginning that many rows share, or of a text that is being written.

A forward is a row of examples, one behind the other. Each may go on from kept states: its tokens attend to those and,
causally, to themselves. And each may leave its own behind, in the same forward already: the beginning stands before
the examples that go on from it, and every layer has its states when it comes to them. Nothing is copied for an
example: its keys are written behind those it goes on from, where there is room for the longest one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Link:
    """What an example has to do with kept states.

    key: whose it goes on from, and leaves behind; None for an example of its own. keeps: its own tokens stay, behind
    those. room: for so many tokens in all, where they are the first (`keeps` of a new key).
    """

    key: int | None = None
    keeps: bool = False
    room: int = 0


ALONE = Link()


class KeptStates:
    """One a rank. Not for training: what is kept has no gradient."""

    def __init__(self) -> None:
        self._links: tuple[Link, ...] = ()
        self._states: dict[int, dict[nn.Module, tuple[Tensor, Tensor]]] = {}  # key -> attention -> keys, values
        self._lengths: dict[int, int] = {}  # tokens that are kept
        self._after: dict[int, int] = {}  # tokens that will be, after the forward
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def begin(self, links: Sequence[Link], lengths: Sequence[int]) -> tuple[int, ...]:
        """Announces the next forward's examples; the position of the first token of each."""
        self._lengths = self._after
        self._after = dict(self._lengths)
        self._links = tuple(links)
        self._masks.clear()
        starts = []
        for link, length in zip(links, lengths, strict=True):
            start = 0 if link.key is None else self._after.get(link.key, 0)
            starts.append(start)
            if link.keeps:
                self._after[link.key] = start + length
        return tuple(starts)

    def drop(self, keys: Iterable[int]) -> None:
        """Frees what no later example goes on from."""
        for key in keys:
            self._states.pop(key, None)
            self._after.pop(key, None)

    def nbytes(self) -> int:
        """Bytes of the tensors that are kept."""
        pairs = (pair for states in self._states.values() for pair in states.values())
        return sum(tensor.numel() * tensor.element_size() for pair in pairs for tensor in pair)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        *,
        scaling: float | None,
        sliding_window: int | None,
    ) -> list[Tensor]:
        """As `attend_each`, of the forward that `begin` announced: [1, heads, its tokens, d] of each example."""
        outputs, kept = [], dict(self._lengths)
        parts = (states.split(lengths, dim=2) for states in (query, key, value))
        for link, q, k, v in zip(self._links, *parts, strict=True):
            length = q.shape[2]
            if link.key is not None:
                start = kept.get(link.key, 0)
                k, v = self._behind(module, link, start, k, v)
                if link.keeps:
                    kept[link.key] = start + length
            outputs.append(self._attend(q, k, v, scaling, sliding_window))
        return outputs

    def _behind(self, module: nn.Module, link: Link, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes an example's keys and values behind those it goes on from: views of all of them."""
        states = self._states.setdefault(link.key, {})
        if module not in states:
            states[module] = tuple(
                tensor.new_empty(*tensor.shape[:2], link.room, tensor.shape[3]) for tensor in (k, v)
            )
        stop = start + k.shape[2]
        for room, new in zip(states[module], (k, v), strict=True):
            room[:, :, start:stop] = new  # raises where there is too little room
        return tuple(room[:, :, :stop] for room in states[module])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
        length, all_of_it = q.shape[2], k.shape[2]
        mask = None
        windowed = window is not None and all_of_it > window
        if windowed or 1 < length < all_of_it:
            mask = self._mask(length, all_of_it, window if windowed else None, q.device)
        causal = mask is None and length == all_of_it
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )

    def _mask(self, length: int, all_of_it: int, window: int | None, device: torch.device) -> Tensor:
        """bool [length, all]: the last token sees all, each one before it one less; within the window."""
        found = self._masks.get((length, all_of_it, window))
        if found is None:
            found = torch.ones(length, all_of_it, dtype=torch.bool, device=device).tril(all_of_it - length)
            if window is not None:
                found = found.triu(all_of_it - length + 1 - window)
            self._masks[length, all_of_it, window] = found
        return found
