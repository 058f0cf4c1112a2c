"""Texts that a decoder writes token by token: what it has read and written so far, kept between forwards."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


class Writing:
    """`beams` texts for each of some sources, all of one length: a row a text, those of a source side by side.

    The encoder runs in the first forward alone. Keys and values of a source are kept once, whatever its beams: they
    are as many queries to them. Nothing kept has a gradient.
    """

    def __init__(self, source_lengths: tuple[int, ...], beams: int, room: int) -> None:
        """room: tokens, the start included, that a text may come to."""
        self.source_lengths, self.beams, self.room = source_lengths, beams, room
        self.written = 0  # tokens that the decoder has read of each text
        self.encoded: Tensor | None = None  # [1, tokens of all sources, hidden], once the encoder has run
        self._of_sources: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._own: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._seen: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.source_lengths) * self.beams

    def source_states(
        self, attention: nn.Module, make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [sources, heads, longest, d], and which of them are a source's own [sources, 1, 1, longest].

        make: gives both as [1, heads, tokens of all sources, d].
        """
        if attention not in self._of_sources:
            self._of_sources[attention] = tuple(
                pad_sequence([part[0].transpose(0, 1) for part in states.split(self.source_lengths, dim=2)], True)
                .transpose(1, 2)
                .contiguous()
                for states in make()
            )
        k, v = self._of_sources[attention]
        if self._seen is None:
            lengths = torch.tensor(self.source_lengths, device=k.device)
            self._seen = (torch.arange(k.shape[2], device=k.device) < lengths.unsqueeze(1))[:, None, None]
        return k, v, self._seen

    def own_states(self, attention: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the newest token's [rows, heads, 1, d] behind those before it: [rows, heads, written + 1, d] each."""
        if attention not in self._own:
            self._own[attention] = tuple(t.new_empty(*t.shape[:2], self.room, t.shape[3]) for t in (key, value))
        for kept, new in zip(self._own[attention], (key, value), strict=True):
            kept[:, :, self.written] = new[:, :, 0]
        return tuple(kept[:, :, : self.written + 1] for kept in self._own[attention])

    def follow(self, parents: Tensor) -> None:
        """Row i goes on from what row `parents[i]` has written so far; int64 [rows]."""
        for attention, states in self._own.items():
            self._own[attention] = tuple(kept.index_select(0, parents) for kept in states)
