"""An encoder's attention over groups of padded examples, beside a product an example."""

import pytest
import torch
import torch.nn.functional as F

from lorasp.dropout import ExampleDropout, ExamplesAtHand, drop_mask
from lorasp.models.attention import attend_both_ways

HEADS, WIDTH = 3, 8
LENGTHS = [(5, 16, 17, 1, 32, 3), (16, 16), (40,), (7, 9, 16, 2), (129, 4)]


def states(count: int) -> list[torch.Tensor]:
    """q, k, v as a model makes them: [1, heads, T, d] views of [T, heads, d]; large, so that the softmax is far from
    even.
    """
    torch.manual_seed(0)
    return [(3 * torch.randn(1, count, HEADS, WIDTH)).transpose(1, 2).requires_grad_() for _ in range(3)]


def dropped(p: float, lengths: tuple[int, ...]) -> ExampleDropout:
    drops = ExampleDropout("attention.dropout", p, of_tokens=True).train()
    drops.examples = ExamplesAtHand(lengths=lengths, keys=tuple(range(100, 100 + len(lengths))))
    return drops


def one_by_one(query, key, value, lengths, masks=None):
    outputs = []
    for index, (q, k, v) in enumerate(zip(*(its.split(lengths, dim=2) for its in (query, key, value)), strict=True)):
        if masks is None:
            outputs.append(F.scaled_dot_product_attention(q, k, v))
        else:
            weights = (q @ k.transpose(2, 3) / WIDTH**0.5).softmax(-1)
            outputs.append(weights * masks[index] @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def assert_same_values_and_gradients(ours, theirs, inputs):
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    found, expected = (torch.autograd.grad(outputs, inputs, grad) for outputs in (ours, theirs))
    for its, other in zip(found, expected, strict=True):
        torch.testing.assert_close(its, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_padding_changes_nothing(lengths):
    inputs = states(sum(lengths))
    ours = attend_both_ways(*inputs, lengths, scaling=None, drops=None)
    assert ours.shape == (1, sum(lengths), HEADS, WIDTH)
    assert_same_values_and_gradients(ours, one_by_one(*inputs, lengths), inputs)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_an_examples_dropout_is_that_of_its_own_length(lengths):
    """The mask is drawn for the example's length in steps of 16, whatever stands beside it."""
    inputs, drops = states(sum(lengths)), dropped(0.4, lengths)
    ours = attend_both_ways(*inputs, lengths, scaling=None, drops=drops)
    masks = []
    for length, seed in zip(lengths, drops.draw(), strict=True):
        padded = -(-length // 16) * 16
        mask = drop_mask(torch.empty(HEADS * padded, padded), 0.4, ((HEADS * padded, seed),))
        masks.append(mask.view(HEADS, padded, padded)[:, :length, :length] / 0.6)
    assert_same_values_and_gradients(ours, one_by_one(*inputs, lengths, masks), inputs)


def test_without_examples_the_row_is_one():
    inputs = states(21)
    ours = attend_both_ways(*inputs, (), scaling=None, drops=None)
    assert_same_values_and_gradients(ours, one_by_one(*inputs, (21,)), inputs)
    kept = attend_both_ways(*inputs, (), scaling=None, drops=dropped(0.4, ()))  # a rank without an example
    torch.testing.assert_close(kept, ours, rtol=1e-5, atol=1e-5)
