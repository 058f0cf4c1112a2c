"""Which tokens beam search goes on with: arithmetic on scores, no model."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decoding:
    """length_penalty: a text's summed log-likelihood is divided by its length to this power, EOS counted."""

    beams: int
    max_new_tokens: int  # EOS counted
    length_penalty: float
    eos: int


@dataclass(order=True)
class _Finished:
    score: float
    tokens: list[int] = field(compare=False)  # without EOS


class BeamSearch:
    """The `beams` likeliest texts of each of some sources, as they grow by a token; one beam is greedy decoding.

    What transformers' `generate(num_beams=beams, early_stopping=True)` does: of the 2·beams likeliest continuations of
    a source those of the first `beams` that end are finished, the first `beams` that do not end go on, and the source
    is done once `beams` texts are finished. At `max_new_tokens` the open ones are finished as they are.
    """

    def __init__(self, sources: int, how: Decoding) -> None:
        self._how = how
        self._open: list[list[list[int]]] = [[[] for _ in range(how.beams)] for _ in range(sources)]
        self._finished: list[list[_Finished]] = [[] for _ in range(sources)]
        # All beams begin alike: only the first one counts, or all would write the same.
        self._scores = torch.full((sources, how.beams), float("-inf"))
        self._scores[:, 0] = 0.0
        self._length = 0

    @property
    def is_done(self) -> bool:
        return self._length == self._how.max_new_tokens or all(len(its) >= self._how.beams for its in self._finished)

    def advance(self, logits: Tensor) -> tuple[list[int], list[int]]:
        """logits [sources · beams, vocabulary] of the next token of each row. -> of each row the token that it goes on
        with, and the row whose text it goes on from.
        """
        sources, vocabulary = len(self._open), logits.shape[-1]
        scores = logits.float().log_softmax(-1).view(sources, self._how.beams, vocabulary)
        scores = (scores + self._scores.to(scores.device).unsqueeze(2)).flatten(1)
        kept = scores.topk(min(2 * self._how.beams, scores.shape[1]))
        self._length += 1
        tokens: list[int] = []
        parents: list[int] = []
        for source, (values, places) in enumerate(zip(kept.values.tolist(), kept.indices.tolist(), strict=True)):
            goes_on = self._choose(source, values, [divmod(place, vocabulary) for place in places])
            self._scores[source] = torch.tensor([score for score, _, _ in goes_on])
            tokens += [token for _, _, token in goes_on]
            parents += [source * self._how.beams + beam for _, beam, _ in goes_on]
        return tokens, parents

    def _choose(
        self, source: int, scores: list[float], continuations: list[tuple[int, int]]
    ) -> list[tuple[float, int, int]]:
        """(score, beam, token) of the `beams` that go on; those that end are put among the finished."""
        texts, finished = self._open[source], self._finished[source]
        is_open, is_last = len(finished) < self._how.beams, self._length == self._how.max_new_tokens
        goes_on = []
        for rank, (score, (beam, token)) in enumerate(zip(scores, continuations, strict=True)):
            ends = token == self._how.eos
            if is_open and (ends or is_last) and rank < self._how.beams:
                text = texts[beam] if ends else [*texts[beam], token]
                finished.append(_Finished(score / self._length**self._how.length_penalty, text))
            if not ends and len(goes_on) < self._how.beams:
                goes_on.append((score, beam, token))
        self._open[source] = [[*texts[beam], token] for _, beam, token in goes_on]
        return goes_on

    def best(self) -> list[list[int]]:
        """The best text of each source, without EOS."""
        return [max(its).tokens for its in self._finished]
