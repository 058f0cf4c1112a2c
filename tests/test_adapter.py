"""The compact layer against a dense masked LoRA and against peft."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lorasp.adapter import AdaptedLinear, find_targets
from lorasp.dropout import ExamplesAtHand, drop_mask
from lorasp.live_tensors import LiveTensors
from lorasp.recipe import Adapter, Quantization, RecipeError


def adapted(
    in_features=32,
    out_features=48,
    strategy="balanced",
    fraction=0.5,
    bias=True,
    seed=0,
    format="none",
    name="model.layers.0.q_proj",
    **adapter,
):
    settings = Adapter(**{"rank": 4, "alpha": 8, **adapter})
    module = AdaptedLinear(
        name,
        in_features,
        out_features,
        bias=bias,
        quantization=Quantization(format=format),
        dtype=torch.float32,
        adapter=settings,
        strategy=strategy,
        fraction=fraction,
        seed=seed,
    )
    module.load(torch.randn(out_features, in_features), torch.randn(out_features) if bias else None)
    with torch.no_grad():
        module.B.normal_()
    return module


class DenseMaskedLora(torch.nn.Module):
    """Eq. 2 written down: dense A and B, masks, plain autograd."""

    def __init__(self, module: AdaptedLinear) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = module.dense_weight().detach(), module.bias, module.scale
        self.S_A = module.A_selection.mask(module.A_bits)
        self.S_B = module.B_selection.mask(module.B_bits)
        self.A = torch.nn.Parameter(torch.zeros(self.S_A.shape))
        self.B = torch.nn.Parameter(torch.zeros(self.S_B.shape))
        self.A.data[self.S_A], self.B.data[self.S_B] = module.A.data, module.B.data

    def forward(self, x):
        delta = (self.B * self.S_B) @ (self.A * self.S_A)
        return F.linear(x, self.weight + self.scale * delta, self.bias)


@pytest.mark.parametrize("strategy", ["balanced", "uniform", "structured"])
@pytest.mark.parametrize("sizes", [(32, 48, 4), (33, 47, 3), (7, 5, 1), (64, 64, 16)])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("format", ["none", "nf4"])
def test_equals_a_dense_masked_lora(strategy, sizes, fraction, format):
    in_features, out_features, rank = sizes
    module = adapted(in_features, out_features, strategy, fraction, rank=rank, format=format)
    reference = DenseMaskedLora(module)
    x = torch.randn(2, 9, in_features, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours, theirs = module(x), reference(y)
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(module.A.grad, reference.A.grad[reference.S_A], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(module.B.grad, reference.B.grad[reference.S_B], rtol=1e-5, atol=1e-4)


def test_structured_makes_half_of_the_adapters_products_on_the_same_inputs_for_all_that_share_them():
    x = torch.randn(64, 32)

    def flops(strategy, **adapter):
        module = adapted(strategy=strategy, **adapter)
        with FlopCounterMode(display=False) as counter:
            module(x.clone().requires_grad_()).sum().backward()
        return counter.get_total_flops() - 2 * 2 * 64 * 32 * 48  # without the base's two products

    whole = 2 * 64 * 4 * (4 * 32 + 3 * 48)  # forward and backward, four products as wide as A and three as B
    in_place = 2 * 64 * 4 * (32 + 48)  # one of each, which the counter does not see
    assert flops("balanced") == whole - in_place
    assert flops("structured") == whole / 2  # none of them in place
    q, k = (adapted(strategy="structured", name=f"model.layers.0.self_attn.{part}") for part in ("q_proj", "k_proj"))
    other = adapted(strategy="structured", name="model.layers.1.self_attn.q_proj")
    assert torch.equal(q.A_bits, k.A_bits) and not torch.equal(q.B_bits, k.B_bits)
    assert not torch.equal(q.A_bits, other.A_bits)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_structured_with_dropout_or_frozen_start_is_what_dense_matrices_give(dropout, monkeypatch):
    for frozen_entries in ("zero", "init"):
        module = adapted(strategy="structured", dropout=dropout, frozen_entries=frozen_entries).train()
        monkeypatch.setattr(module, "draw_dropout", lambda: ((6, 7),) if dropout else None)
        x = torch.randn(6, 32, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        mask = drop_mask(x, dropout, ((6, 7),)) / (1 - dropout) if dropout else 1
        A, B = (matrix.detach().clone().requires_grad_() for matrix in (module.dense_A(), module.dense_B()))
        theirs = F.linear(y, module.dense_weight(), module.bias) + module.scale * (y * mask) @ A.t() @ B.t()
        ours = module(x)
        ours.square().sum().backward()
        theirs.square().sum().backward()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
        S_A, S_B = module.A_selection.mask(module.A_bits), module.B_selection.mask(module.B_bits)
        torch.testing.assert_close(module.A.grad, A.grad[S_A], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(module.B.grad, B.grad[S_B], rtol=1e-4, atol=1e-3)


def test_entries_outside_S_contribute_nothing_or_their_start():
    zero, init = adapted(fraction=0.5), adapted(fraction=0.5, frozen_entries="init")
    S = zero.A_selection.mask(zero.A_bits)
    assert torch.all(zero.dense_A()[~S] == 0)
    assert torch.equal(init.dense_A()[S], zero.dense_A()[S]) and torch.all(init.dense_A()[~S] != 0)
    assert init.A_rest.numel() == zero.A_selection.entries - zero.A_selection.count
    assert not init.A_rest.requires_grad
    start = init.dense_A()
    bound = 1 / math.sqrt(32)
    assert start.abs().max() <= bound and start.abs().mean() == pytest.approx(bound / 2, rel=0.2)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fraction_one_equals_peft(rslora, dropout, monkeypatch):
    peft = pytest.importorskip("peft")
    module = adapted(fraction=1.0, rslora=rslora, dropout=dropout)
    host = torch.nn.Sequential(torch.nn.Linear(32, 48))
    host[0].weight.data, host[0].bias.data = module.dense_weight().detach().clone(), module.bias.data.clone()
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, use_rslora=rslora, target_modules=["0"])
    reference = peft.get_peft_model(host, config)
    lora = reference.base_model.model[0]
    lora.lora_A["default"].weight.data = module.A.data.view(4, 32).clone()
    lora.lora_B["default"].weight.data = module.B.data.view(48, 4).clone()
    x = torch.randn(6, 32)
    for model in (module, reference):
        model.train()
    if dropout:  # peft draws another mask: it gets ours
        monkeypatch.setattr(module, "draw_dropout", lambda: ((6, 7),))
        mask = drop_mask(x, dropout, ((6, 7),))
        lora.lora_dropout["default"].forward = lambda rows: rows * mask / 0.7
    ours, theirs = module(x), reference(x)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # By their norms: an entry may be a small difference of large sums, which are added in another order with dropout.
    for found, expected in ((module.A, lora.lora_A), (module.B, lora.lora_B)):
        reference = expected["default"].weight.grad
        assert (found.grad.view_as(reference) - reference).norm() <= 1e-5 * reference.norm()


def test_a_dropout_mask_belongs_to_its_example_wherever_it_stands():
    """Alone, or behind another one in the row; another mask in another step, and for another linear."""
    module, x = adapted(dropout=0.3).train(), torch.randn(9, 32)

    def mask_of(module, rows):
        return drop_mask(rows, module.dropout, module.draw_dropout())

    module.examples = ExamplesAtHand(lengths=(4, 5), keys=(11, 12))
    together = mask_of(module, x)
    module.examples = ExamplesAtHand(lengths=(5,), keys=(12,))
    alone = mask_of(module, x[4:])
    assert torch.equal(together[4:], alone)
    module.examples = ExamplesAtHand(lengths=(5,), keys=(13,))
    assert not torch.equal(mask_of(module, x[4:]), alone)
    other = adapted(dropout=0.3, name="model.layers.0.k_proj").train()
    other.examples = ExamplesAtHand(lengths=(5,), keys=(12,))
    assert not torch.equal(mask_of(other, x[4:]), alone)
    assert 0.5 < alone.mean() < 0.9
    module.examples = ExamplesAtHand()  # a rank without an example computes one token, of which nothing is learned
    assert module.draw_dropout() is None


def test_trained_parameters_are_half_of_loras_by_construction():
    sp, lora = adapted(fraction=0.5), adapted(fraction=1.0)
    assert sp.A.shape == (64,) and lora.A.shape == (128,)  # 4 · 32 entries
    assert sp.B.shape == (96,) and lora.B.shape == (192,)  # 48 · 4 entries


def test_start_and_selection_do_not_depend_on_construction_order():
    first = adapted()
    torch.manual_seed(123)
    adapted(in_features=16, seed=5)
    again = adapted()
    assert torch.equal(first.A, again.A) and torch.equal(first.A_bits, again.A_bits)
    assert not torch.equal(first.A, adapted(seed=1).A)


@pytest.mark.parametrize("strategy", ["balanced", "uniform", "structured"])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("frozen_entries", ["zero", "init"])
def test_without_a_seed_nothing_is_drawn_and_all_has_its_size(strategy, fraction, frozen_entries):
    how = {"strategy": strategy, "fraction": fraction, "frozen_entries": frozen_entries, "in_features": 37}
    drawn, sized = adapted(**how), adapted(seed=None, **how)
    assert {n: t.shape for n, t in drawn.state_dict().items()} == {n: t.shape for n, t in sized.state_dict().items()}
    assert (drawn.A_selection, drawn.B_selection) == (sized.A_selection, sized.B_selection)


def test_autograd_keeps_only_the_input():
    module = adapted(in_features=128, out_features=256)
    x = torch.randn(16, 128, requires_grad=True) * 1
    with LiveTensors() as live:
        y = module(x)
    assert live.live_bytes == y.numel() * 4  # the output; x is the caller's, dense A and B and x·Aᵀ are gone


def linears():
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.up_proj")]
    return {name: torch.nn.Linear(4, 4) for name in names}


def test_targets_by_last_name_whole_name_and_pattern():
    assert find_targets(linears(), "all-linear") == set(linears())
    assert find_targets(linears(), ["q_proj"]) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    }
    assert find_targets(linears(), ["*.layers.1.*"]) == {name for name in linears() if ".1." in name}


def test_a_target_that_matches_nothing_lists_what_there_is():
    with pytest.raises(RecipeError, match=r"'query' matches no linear layer .* q_proj, up_proj"):
        find_targets(linears(), ["q_proj", "query"])
