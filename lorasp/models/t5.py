"""T5 over concatenated pairs: encoder, decoder and cross-attention without padding and without a mask.

A batch is a row of sources and a row of targets, each one behind the other. A source attends within itself, a target
causally within itself and to its own source; so attention is one product a pair, exact, as in attention.py. The
relative position bias depends on distances alone: that of the longest example, made once by block 0, whose module
holds the table, holds all others in its corner. transformers' own code would make it, and a bias of zeros for the
cross-attention, over the whole row.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasp.adapter import AdaptedLinear
from lorasp.dropout import ExampleDropout, ExamplesAtHand, drop
from lorasp.models.writing import Writing


@dataclass
class PairsAtHand:
    """The pairs of a forward: their sources and targets, and the translations that are being written, if any are."""

    sources: ExamplesAtHand = field(default_factory=ExamplesAtHand)
    targets: ExamplesAtHand = field(default_factory=ExamplesAtHand)
    writing: Writing | None = None


def take_pairs(model: PreTrainedModel) -> PairsAtHand:
    """Makes a T5ForConditionalGeneration compute pairs; what it computes follows from what is returned."""
    # One module for the tied table, where transformers has three: hooks and counts then see it once.
    model.set_input_embeddings(model.shared)
    if not model.config.scale_decoder_outputs:
        # T5 1.1 and FLAN have a head of their own, which transformers ties all the same.
        head = model.lm_head.weight
        model.lm_head.weight = nn.Parameter(torch.empty_like(head), requires_grad=head.requires_grad)
    pairs = PairsAtHand()
    for name, module in list(model.named_modules()):
        # Keys and values of the cross-attention are made of the source.
        reads_source = name.startswith("encoder.") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        examples = pairs.sources if reads_source else pairs.targets
        if isinstance(module, AdaptedLinear):
            module.examples = examples
        if isinstance(module, nn.Dropout):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _dropout(name, module.p, examples))
        if type(module).__name__ == "T5Attention":
            # A submodule, so that it knows whether the model trains.
            module.weights_dropout = _dropout(f"{name}.weights", module.dropout, examples)
            module.forward = _Attention(module, pairs, crosses=name.endswith("EncDecAttention"))
    return pairs


def _dropout(name: str, p: float, examples: ExamplesAtHand) -> ExampleDropout:
    ours = ExampleDropout(name, p, of_tokens=True)
    ours.examples = examples
    return ours


class _Attention:
    """A T5Attention's forward over the pairs at hand."""

    def __init__(self, attention: nn.Module, pairs: PairsAtHand, *, crosses: bool) -> None:
        self.attention, self.pairs, self.crosses = attention, pairs, crosses
        self.causal = attention.is_decoder and not crosses

    def __call__(
        self,
        hidden_states: Tensor,
        mask: None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        **_,
    ) -> tuple[Tensor, Tensor | None, None]:
        """hidden_states [1, T, hidden] -> (the same shape, the bias for the next block, no attention weights).

        position_bias [1, heads, longest, longest], -inf where a decoder's token must not look; None in block 0, which
        makes it, and in cross-attention, which has none.
        """
        attention, writing = self.attention, self.pairs.writing
        if writing is not None and attention.is_decoder:
            if position_bias is None and not self.crosses:
                position_bias = self._bias(writing.written + 1)[:, :, -1:]
            attended = self._attend_written(hidden_states, key_value_states, position_bias, writing)
        else:
            own = self.pairs.targets if attention.is_decoder else self.pairs.sources
            if position_bias is None and not self.crosses:
                position_bias = self._bias(max(own.lengths))
            attended = self._attend_each(hidden_states, key_value_states, position_bias, own)
        return attention.o(attended), position_bias, None

    def _heads(self, states: Tensor) -> Tensor:
        """[1, T, heads · d] -> [1, heads, T, d]."""
        return states.unflatten(-1, (self.attention.n_heads, -1)).transpose(1, 2)

    def _bias(self, longest: int) -> Tensor:
        bias = self.attention.compute_bias(longest, longest)
        if self.causal:
            later = torch.ones(longest, longest, dtype=torch.bool, device=bias.device).triu(1)
            bias = bias.masked_fill(later, float("-inf"))
        return bias

    def _attend_each(
        self, hidden_states: Tensor, source: Tensor | None, bias: Tensor | None, own: ExamplesAtHand
    ) -> Tensor:
        attention = self.attention
        states, read = (source, self.pairs.sources) if self.crosses else (hidden_states, own)
        q = self._heads(attention.q(hidden_states)).split(own.lengths, dim=2)
        k, v = (self._heads(linear(states)).split(read.lengths, dim=2) for linear in (attention.k, attention.v))
        drops = attention.weights_dropout
        seeds = drops.draw() if drops.training and drops.p else (None,) * len(own.lengths)
        outputs = []
        for its_q, its_k, its_v, seed in zip(q, k, v, seeds, strict=True):
            its_bias = None if bias is None else bias[:, :, : its_q.shape[2], : its_k.shape[2]]
            outputs.append(self._attend(its_q, its_k, its_v, its_bias, seed))
        return torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seed: int | None) -> Tensor:
        """The product of one pair. T5's is not scaled: its initialisation is."""
        if seed is None:
            return F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)
        # Written out: the kernel's own dropout is drawn from one stream for a rank.
        scores = q @ k.transpose(2, 3)
        weights = (scores if bias is None else scores + bias).softmax(-1, dtype=torch.float32).to(v.dtype)
        flat = weights.flatten(0, 2)
        return drop(flat, self.attention.weights_dropout.p, ((len(flat), seed),)).view_as(weights) @ v

    def _attend_written(self, hidden_states: Tensor, source: Tensor, bias: Tensor | None, writing: Writing) -> Tensor:
        """hidden_states [1, rows, hidden]: the newest token of each row -> [1, rows, heads · d]."""
        attention = self.attention
        q = attention.q(hidden_states)[0].unflatten(-1, (attention.n_heads, -1))  # [rows, heads, d]
        if self.crosses:
            k, v, seen = writing.source_states(
                attention, lambda: tuple(self._heads(linear(source)) for linear in (attention.k, attention.v))
            )
            q = q.unflatten(0, (len(k), -1)).transpose(1, 2)  # [sources, heads, beams, d]
            attended = F.scaled_dot_product_attention(q, k, v, seen, scale=1.0).transpose(1, 2).flatten(0, 1)
        else:
            own = (linear(hidden_states)[0] for linear in (attention.k, attention.v))
            k, v = writing.own_states(attention, *(states.unflatten(-1, (attention.n_heads, 1, -1)) for states in own))
            attended = F.scaled_dot_product_attention(q.unsqueeze(2), k, v, bias, scale=1.0).squeeze(2)
        return attended.flatten(1).unsqueeze(0)
