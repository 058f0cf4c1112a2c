"""Attention over concatenated examples, without padding and without a mask: causal, or an encoder's both ways.

A batch is one row of whole examples, one behind the other. Each attends within itself, so attention is one product an
example: exact, no [T, T] mask, no work across examples. The lengths are Python integers from the collator,
so nothing asks the device for them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from lorasp.dropout import ExampleDropout, drop
from lorasp.models.kept_states import KeptStates

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
    Raises ValueError for what the kernels do not compute: soft-capped logits, or attention sinks.
    """
    if softcap is not None or kwargs.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__} caps its attention logits or uses sinks, which is not supported")
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
        outputs = attend_both_ways(query, key, value, example_lengths, scaling=scaling, drops=drops)
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
) -> list[Tensor]:
    """As `attend_each`, of an encoder. drops: of the probabilities [heads, tokens, tokens] of each example, which are
    then written out: the kernel's own dropout is drawn from one stream for a rank.
    """
    lengths = example_lengths or (query.shape[2],)
    seeds = () if drops is None else drops.draw()
    outputs = []
    for index, (q, k, v) in enumerate(
        zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    ):
        if drops is None:
            outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scaling))
            continue
        scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        probabilities = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        flat = probabilities.flatten(0, 2)
        dropped = drop(flat, drops.p, tuple((len(flat), seed) for seed in seeds[index : index + 1]))
        outputs.append(dropped.view_as(probabilities) @ v)
    return outputs


# Registered as attention only: for an implementation that it has no mask for, transformers makes none.
AttentionInterface.register(ATTENTION, attend_within_examples)
