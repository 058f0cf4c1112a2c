"""A model that we build equals the one that transformers loads: logits, losses, gradients, for every family."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from lorasp.accounting import count_flops, count_parameters
from lorasp.adapter import AdaptedLinear
from lorasp.data.batches import collate
from lorasp.data.examples import Example
from lorasp.live_tensors import LiveTensors
from lorasp.models import build as build_module
from lorasp.models import causal_lm
from lorasp.models.build import build_on_meta, filled_units, units
from lorasp.models.causal_lm import CHUNK_ROWS, Head
from lorasp.models.weights import Checkpoint, load_config
from lorasp.quantization import ShardedLinear
from lorasp.recipe import Recipe, RecipeError
from lorasp.run import _check_agreement
from tests.tiny_models import save_model

FAMILIES = ["llama", "llama_tied", "qwen2", "mistral"]
EXAMPLES = [
    Example(tuple(torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()), prompt)
    for length, prompt in ((5, 2), (31, 10), (1, 1), (17, 17), (24, 3))
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(kind, root / kind) for kind in FAMILIES}


def recipe(directory, **sections):
    tree = {
        "model": {"path": str(directory)},
        "data": {"train": "unused"},
        "quantization": {"format": "none"},
        "adapter": {"rank": 4},
    }
    tree |= sections
    if tree.get("method") == "full":
        del tree["adapter"]
    return Recipe(**tree)


def build(directory, **sections):
    """Our model on one process, unsharded."""
    settings = recipe(directory, **sections)
    model = build_on_meta(load_config(directory, settings.model), settings, torch.float32)
    for _ in filled_units(model.model, Checkpoint(directory), device=torch.device("cpu")):
        pass
    return model


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_of_concatenated_examples_equal_transformers_one_by_one(kind, directories):
    """Also with Mistral's window of 12 tokens, shorter than two of the examples, and with grouped queries."""
    ours, theirs = build(directories[kind]), AutoModelForCausalLM.from_pretrained(directories[kind])
    batch = collate(EXAMPLES, [0, 1, 2, 3, 4])
    everywhere = torch.arange(sum(batch.lengths))
    inputs = batch.model_inputs("cpu") | {"positions": everywhere, "labels": None}
    logits = ours(**inputs)
    reference = torch.cat([theirs(torch.tensor([example.input_ids])).logits[0] for example in EXAMPLES])
    torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_parameter_is_filled_once_and_belongs_to_one_unit(kind, directories):
    model = build(directories[kind])
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    held = [parameter for unit in units(model.model) for parameter in unit.module.parameters()]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) - len(set(map(id, held))) == (kind in ("llama_tied", "qwen2"))  # the head, tied to the embedding


def test_counts_are_those_of_the_architecture(directories):
    for kind in FAMILIES:
        reference = AutoModelForCausalLM.from_pretrained(directories[kind]).num_parameters()
        settings = recipe(directories[kind], quantization={"format": "nf4"})
        on_meta = build_on_meta(load_config(directories[kind], settings.model), settings, torch.float32)
        counts = count_parameters(on_meta)
        linears = [module for module in on_meta.modules() if isinstance(module, AdaptedLinear)]
        adapter = sum(4 * (linear.in_features + linear.out_features) for linear in linears)
        assert counts.total == reference + adapter and counts.adapter == adapter and 2 * counts.trained == adapter
        full = build_on_meta(
            load_config(directories[kind], settings.model), recipe(directories[kind], method="full"), torch.float32
        )
        assert count_parameters(full).trained == count_parameters(full).total == reference


def test_flops_are_those_of_the_products_that_a_step_makes(directories):
    """Counted by torch while the whole model is trained; with an adapter by hand, structured and not."""
    model = build(directories["llama"], method="full", training={"activation_checkpointing": "none"})
    batch = collate(EXAMPLES, [1])
    with FlopCounterMode(display=False) as counter:
        model(**batch.model_inputs("cpu")).backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for operation, flops in counted.items() if str(operation) in ("aten.mm", "aten.addmm"))
    flops = count_flops(model)
    assert products == flops.per_token * 31 + flops.per_label * 21
    head = model.model.lm_head.weight.numel()
    assert flops.per_label == 6 * head

    frozen = count_flops(build(directories["llama"]))
    linears = [module for module in model.modules() if isinstance(module, ShardedLinear)]
    base = sum(linear.in_features * linear.out_features for linear in linears)
    adapter = sum(4 * (linear.in_features + linear.out_features) for linear in linears)  # rank 4
    assert frozen.per_token == 4 * base + 6 * adapter and frozen.per_label == 4 * head
    halves = sum(4 * (linear.in_features // 2 + linear.out_features // 2) for linear in linears)
    structured = count_flops(build(directories["llama"], selection={"strategy": "structured"}))
    assert structured.per_token == 4 * base + 6 * halves
    # A's frozen start fills its other half.
    kept = {"adapter": {"rank": 4, "frozen_entries": "init"}, "selection": {"strategy": "structured"}}
    expected = sum(4 * (linear.in_features + linear.out_features // 2) for linear in linears)
    assert count_flops(build(directories["llama"], **kept)).per_token == 4 * base + 6 * expected
    # Half of the limit: as many FLOPs a second as 7 tokens with 2 labels need.
    assert frozen.mfu(7, 2, limit=2 * (7 * frozen.per_token + 2 * frozen.per_label)) == 0.5


def test_nothing_but_adapters_is_trained_and_full_trains_all(directories):
    lorasp = build(directories["qwen2"])
    assert {name.rpartition(".")[2] for name, p in lorasp.named_parameters() if p.requires_grad} == {"A", "B"}
    full = build(directories["qwen2"], method="full")
    assert all(parameter.requires_grad for parameter in full.parameters())
    assert sum(isinstance(module, ShardedLinear) for module in full.modules()) == 3 * 7


@pytest.mark.parametrize("rows_at_once", [8, CHUNK_ROWS])
def test_head_loss_and_gradients_equal_cross_entropy_over_several_chunks(rows_at_once, monkeypatch):
    monkeypatch.setattr(causal_lm, "_CACHED_ROWS", rows_at_once)  # as on a CPU, and as on a GPU
    head = Head(torch.nn.Parameter(torch.randn(50, 16)), None)
    hidden, labels = torch.randn(300, 16, requires_grad=True), torch.randint(0, 50, (300,))
    other = hidden.detach().clone().requires_grad_()
    ours = head(hidden, labels)
    theirs = F.cross_entropy(other @ head.weight.t(), labels, reduction="sum")
    (ours * 0.3).backward()
    (theirs * 0.3).backward(inputs=[other])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(hidden.grad, other.grad, rtol=1e-4, atol=1e-5)
    losses, correct = head(hidden, labels, score=True)
    torch.testing.assert_close(losses.sum(), theirs, rtol=1e-5, atol=1e-4)
    assert torch.equal(correct, (hidden @ head.weight.t()).argmax(-1) == labels)


@pytest.mark.parametrize("rows", [60, 4096])
def test_head_sums_and_scales_in_fp32_when_it_computes_in_bf16(rows):
    """60 labels, less than a chunk, and 32 chunks; torch's linear_cross_entropy is off by 2e-3 and by 1e-2.

    0.3003 lies between two bf16 numbers, 0.2996 and 0.3008: a rounded scale would be off by 2e-3.
    """
    torch.manual_seed(0)
    head = Head(torch.nn.Parameter((torch.randn(301, 32) / 4).bfloat16()), torch.nn.Parameter(torch.zeros(301)))
    head.bias.data = torch.randn(301).bfloat16()
    hidden, labels = torch.randn(rows, 32).bfloat16().requires_grad_(), torch.randint(0, 301, (rows,))
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, head.weight, head.bias)]
    ours, expected = head(hidden, labels), F.cross_entropy(F.linear(*wide), labels, reduction="sum")
    # Each logit is rounded to 8 bits; over the labels that averages out.
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(expected.item(), rel=1e-4)
    (ours * 0.3003).backward()
    (expected * 0.3003).backward()
    for tensor, reference in zip((hidden, head.weight, head.bias), wide, strict=True):
        assert tensor.grad.dtype == torch.bfloat16
        difference = tensor.grad.float() - reference.grad
        # Rounded twice to 8 bits, 2^-9 each at most.
        assert difference.norm() < 3e-3 * reference.grad.norm()
    # At random, so that the whole is as long as it should be; rounded logits lengthen it by their variance, 4e-4 here.
    scale = (hidden.grad.float() * wide[0].grad).sum() / wide[0].grad.square().sum()
    assert scale.item() == pytest.approx(1, abs=8e-4)


@pytest.mark.parametrize(("dtype", "bytes_of_a_logit"), [(torch.float32, 4), (torch.bfloat16, 2 + 4)])
def test_head_holds_the_logits_of_one_chunk(dtype, bytes_of_a_logit):
    """In bf16 in fp32 as well, for the softmax. Of five chunks, the last half full."""
    vocabulary, rows = 5_000, 4 * CHUNK_ROWS + CHUNK_ROWS // 2
    head = Head(torch.nn.Parameter(torch.randn(vocabulary, 8, dtype=dtype), requires_grad=False), None)
    hidden = torch.randn(rows, 8, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (rows,))
    with LiveTensors() as live:
        head(hidden, labels)
    chunk = CHUNK_ROWS * vocabulary * bytes_of_a_logit
    assert chunk < live.peak_bytes < 1.1 * chunk + 2 * hidden.nbytes


def test_head_without_a_label_gives_a_loss_of_zero_that_still_has_a_gradient():
    """Also of the head, where it is trained: ranks would reduce other buckets than each other."""
    head = Head(torch.nn.Parameter(torch.randn(50, 16)), None)
    hidden = torch.randn(1, 16, requires_grad=True)
    none = torch.empty(0, dtype=torch.long)
    loss = head(hidden[none], none)
    loss.backward()
    assert loss.item() == 0 and torch.all(hidden.grad == 0) and torch.all(head.weight.grad == 0)


def test_architectures_that_touch_the_logits_are_refused(directories):
    settings = recipe(directories["llama"])
    config = load_config(directories["llama"], settings.model)
    config.final_logit_softcapping = 30.0
    with pytest.raises(RecipeError, match="final_logit_softcapping"):
        build_on_meta(config, settings, torch.float32)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_out_the_quantization_of_a_unit(world_size, directories):
    """Whole tensors, about equally many weights a rank; nothing of what needs no computing."""
    settings = recipe(directories["llama"], quantization={"format": "nf4"})
    model = build_on_meta(load_config(directories["llama"], settings.model), settings, torch.float32)
    checkpoint = Checkpoint(directories["llama"])
    layers = [unit for unit in units(model.model) if ".layers." in unit.name]
    owners = build_module._readers(layers[0], world_size, checkpoint)
    sizes = {name: m.in_features * m.out_features for name, m in build_module._linears(layers[0])}
    assert set(owners) == set(sizes) and set(owners.values()) <= set(range(world_size))
    loads = [sum(sizes[name] for name, rank in owners.items() if rank == its) for its in range(world_size)]
    assert max(loads) - min(loads) <= max(sizes.values())
    dense = recipe(directories["llama"])
    model = build_on_meta(load_config(directories["llama"], dense.model), dense, torch.float32)
    assert {
        rank for unit in units(model.model) for rank in build_module._readers(unit, world_size, checkpoint).values()
    } == {0}


def test_ranks_that_drew_another_selection_stop():
    ranks = SimpleNamespace(gather=lambda digest: ["a", "a", "b"])
    with pytest.raises(RecipeError, match=r"rank\(s\) 2 select other entries"):
        _check_agreement("a", ranks)
    _check_agreement("a", SimpleNamespace(gather=lambda digest: [digest, digest]))
