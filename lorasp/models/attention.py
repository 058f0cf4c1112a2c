"""Attention over concatenated examples: causal, or an encoder's both ways.

A batch is one row of whole examples, one behind the other. Each attends within itself: no [T, T] mask, no work across
examples. The lengths are Python integers from the collator, so nothing asks the device for them.

A decoder's examples are long and few, and have a product each, without padding and without a mask. An encoder's may be
a sentence each: those of about one length share a product, padded to a multiple of 16 tokens, in attention alone.
"""

import math
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from lorasp.dropout import ExampleDropout, drop
from lorasp.models.kept_states import KeptStates
from lorasp.recipe import RecipeError

ATTENTION = "lorasp_examples"


def attend_within_examples(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    example_lengths: tuple[int, ...] = (),
    kept_states: KeptStates | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """query [1, heads, T, d], key and value [1, kv heads, T, d] -> [1, T, heads, d]; example_lengths sum to T.
    kept_states: what examples go on from, and leave behind.

    A module that says `is_causal = False` is an encoder's.
    Raises RecipeError for what the kernels do not compute: soft-capped logits, or attention sinks.
    """
    if softcap is not None or kwargs.get("s_aux") is not None:
        raise RecipeError(
            f"model.path: {type(module).__name__} caps its attention logits or uses sinks, which is not supported"
        )
    if kept_states is not None:
        outputs = kept_states.attend(
            module, query, key, value, example_lengths, scaling=scaling, sliding_window=sliding_window
        )
    elif getattr(module, "is_causal", True):
        outputs = attend_each(
            query, key, value, example_lengths, scaling=scaling, dropout=dropout, sliding_window=sliding_window
        )
    else:
        drops = getattr(module, "dropout", None) if dropout else None
        return attend_both_ways(query, key, value, example_lengths, scaling=scaling, drops=drops), None
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def attend_each(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    example_lengths: tuple[int, ...],
    *,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> list[Tensor]:
    """The output of each example, [1, heads, its tokens, d]. Without lengths the row is one example."""
    lengths = example_lengths or (query.shape[2],)
    outputs = []
    for q, k, v in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True):
        mask = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            mask = q.new_ones(q.shape[2], q.shape[2], dtype=torch.bool).tril().triu(1 - sliding_window)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return outputs


def attend_both_ways(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    example_lengths: tuple[int, ...],
    *,
    scaling: float | None,
    drops: ExampleDropout | None,
) -> Tensor:
    """query, key and value [1, heads, T, d] -> [1, T, heads, d]. Without lengths the row is one example.

    drops: of the probabilities [heads, tokens, tokens] of each example, which are then written out: the kernel's own
    dropout is drawn from one stream for a rank. What is drawn for an example has the size that it alone is padded to.
    """
    made = _padding if type(query) is Tensor else _padding.__wrapped__  # a plan's fake tensors are of one trace only
    padding = made(example_lengths or (query.shape[2],), query.device)
    seeds = () if drops is None else drops.draw()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    padded = (
        _Moved.apply(states[0].transpose(0, 1), padding.sources, padding.places, None).split(padding.sizes)
        for states in (query, key, value)
    )
    outputs = []
    for group, *states in zip(padding.groups, *padded, strict=True):
        q, k, v = (its.unflatten(0, (len(group.examples), -1)).transpose(1, 2) for its in states)
        bias = None if group.bias is None else group.bias.to(q.dtype)
        if drops is None:
            output = F.scaled_dot_product_attention(q, k, v, bias, scale=scaling)
        else:
            scores = q @ k.transpose(2, 3) * scaling
            scores = scores if bias is None else scores + bias
            probabilities = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
            of_each = probabilities.shape[1] * probabilities.shape[2]  # rows of probabilities
            its_seeds = tuple((of_each, seeds[example]) for example in group.examples if seeds)
            output = drop(probabilities.flatten(0, 2), drops.p, its_seeds).view_as(probabilities) @ v
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return _Moved.apply(torch.cat(outputs), padding.places, padding.sources, padding.real).unsqueeze(0)


class _Group(NamedTuple):
    """Examples that are padded to one length. bias: [examples, 1, 1, length], -inf where a key is padding."""

    examples: tuple[int, ...]
    bias: Tensor | None  # None: none is padded


class _Padding(NamedTuple):
    """Where T tokens, example behind example, stand among P padded ones, group behind group."""

    groups: list[_Group]
    sizes: list[int]  # padded tokens of each group
    sources: Tensor  # int64 [P]: which token stands there; of padding, any: finite, and not looked at
    places: Tensor  # int64 [T]: where each token stands
    real: Tensor  # bool [P, 1, 1]


_MULTIPLE = 16  # tokens: fewer make more groups, more make more padding


@lru_cache(maxsize=4)  # all layers of a forward ask for the same
def _padding(lengths: tuple[int, ...], device: torch.device) -> _Padding:
    members: dict[int, list[int]] = {}
    for example, length in enumerate(lengths):
        members.setdefault(-(-length // _MULTIPLE) * _MULTIPLE, []).append(example)
    starts = [0, *accumulate(lengths)]
    groups, sizes, sources, real, places = [], [], [], [], [0] * sum(lengths)
    for longest, examples in members.items():
        padding = []
        for example in examples:
            length, start, place = lengths[example], starts[example], len(sources)
            places[start : start + length] = range(place, place + length)
            sources += [*range(start, start + length), *[start] * (longest - length)]
            real += [True] * length + [False] * (longest - length)
            padding.append([0.0] * length + [-math.inf] * (longest - length))
        is_padded = any(lengths[example] < longest for example in examples)
        bias = torch.tensor(padding, device=device)[:, None, None] if is_padded else None
        groups.append(_Group(tuple(examples), bias))
        sizes.append(len(examples) * longest)
    source, place = (torch.tensor(positions, device=device) for positions in (sources, places))
    return _Padding(groups, sizes, source, place, torch.tensor(real, device=device)[:, None, None])


class _Moved(torch.autograd.Function):
    """x[there], and of its gradient grad[back], times `real`.

    `index_select`'s own backward adds row by row, since a row may stand in several places. Here it does only where the
    others are padding, of which every gradient is nought: its scores are -inf, and its outputs not taken.
    """

    @staticmethod
    def forward(ctx, x: Tensor, there: Tensor, back: Tensor, real: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, real)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, grad: Tensor):
        back, real = ctx.saved_tensors
        moved = grad.index_select(0, back)
        return moved if real is None else moved.mul_(real), None, None, None


# Registered as attention only: for an implementation that it has no mask for, transformers makes none.
AttentionInterface.register(ATTENTION, attend_within_examples)
