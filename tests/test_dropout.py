"""The masks' shares, scale and independence; that they follow the example: test_adapter, test_classifier, test_t5."""

import pytest
import torch
from scipy.stats import binomtest, chisquare

from lorasp.dropout import drop, drop_mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.9])
def test_a_mask_drops_its_share_and_what_is_kept_is_scaled_up(probability, dtype):
    rows = torch.ones(1000, 129, dtype=dtype)  # an odd width: a part's last number is not used up
    mask = drop_mask(rows, probability, ((333, 1), (667, 2)))
    assert mask.dtype == dtype and mask.shape == rows.shape
    dropped = int((mask == 0).sum())
    assert binomtest(dropped, mask.numel(), probability).pvalue > 1e-3
    assert mask.unique().tolist() == [0, 1]
    # Each entry by itself rounded to the precision; a mask of bf16 would hold 1.109375 instead of 1/0.9, for all.
    rows = torch.randn(1000, 129).to(dtype)
    scaled = (mask.float() * rows.float() / (1 - probability)).to(dtype)
    assert torch.equal(drop(rows, probability, ((333, 1), (667, 2))), scaled)


def test_entries_of_a_mask_do_not_depend_on_their_neighbours():
    """Four entries come from one number: all sixteen patterns of the four are as frequent as they must be."""
    mask = drop_mask(torch.empty(1, 400_000), 0.5, ((1, 7),)).view(-1, 4) != 0
    patterns = torch.bincount((mask * torch.tensor([1, 2, 4, 8])).sum(1), minlength=16)
    assert chisquare(patterns.numpy()).pvalue > 1e-3


def test_a_share_of_all_or_of_nothing_still_gives_numbers():
    rows = torch.ones(4, 1000)
    assert torch.equal(drop(rows, 0.0, ((4, 1),)), rows)
    assert drop(rows, 1 - 1e-9, ((4, 1),)).isfinite().all()
    assert torch.equal(drop(rows, 0.5, ()), rows)  # a rank without an example


def test_backward_drops_what_forward_dropped():
    rows = torch.randn(6, 11, requires_grad=True)
    seeds = ((2, 3), (4, 5))
    out = drop(rows, 0.3, seeds)
    out.sum().backward()
    mask = drop_mask(rows, 0.3, seeds)
    assert torch.equal(rows.grad, mask / 0.7) and torch.equal(out, mask * rows.detach() / 0.7)
