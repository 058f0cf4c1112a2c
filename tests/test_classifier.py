"""Classifiers of BERT's family: against transformers' own with padding, against peft's LoRA, and what they refuse."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from lorasp.accounting import count_parameters
from lorasp.adapter import adapted_linears, trained_linears
from lorasp.checkpoint import AdapterInfo, load_adapter, save_adapter
from lorasp.data.batches import training_batches
from lorasp.data.glue import GlueExample
from lorasp.head import SelectedLinear
from lorasp.models.build import build_on_meta, filled_units
from lorasp.models.classes import open_weights
from lorasp.models.recompute import set_recomputation
from lorasp.models.weights import load_config, locate_model
from lorasp.recipe import Model, Recipe, RecipeError
from lorasp.tasks import task_of
from tests.tiny_encoders import recipe_tree, save_encoder, write_rte

KINDS = ("bert", "roberta")
CPU = torch.device("cpu")
DENSE = {"format": "none"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("glue")
    write_rte(root)
    for kind in KINDS:
        save_encoder(kind, root / kind)
        save_encoder(kind, root / f"{kind}_drops", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    return root


def recipe(place, kind, **sections) -> Recipe:
    return Recipe(**recipe_tree(place / kind, place, **sections))


def build(settings: Recipe):
    """The recipe's model, whole on the CPU, as training begins."""
    directory = locate_model(settings.model)
    model = build_on_meta(load_config(directory, settings.model), settings, torch.float32)
    for _ in filled_units(model.model, open_weights(directory, settings), device=CPU):
        pass
    return model


def examples_of(settings: Recipe):
    return task_of(settings).read_data(locate_model(settings.model)).train.examples


def theirs(place, kind, ours):
    """transformers' classifier of the same weights: the encoder from its checkpoint, the head from `ours`."""
    model = AutoModelForSequenceClassification.from_pretrained(
        place / kind, num_labels=ours.model.config.num_labels, attn_implementation="eager"
    )
    for name in ours.head_linears(ours.model):
        linear = ours.model.get_submodule(name)
        model.get_submodule(name).weight.data.copy_(linear.dense_weight().detach())
        model.get_submodule(name).bias.data.copy_(linear.bias.detach())
    return model


def padded(examples, pad: int) -> dict:
    width = max(len(example.input_ids) for example in examples)

    def filled(values, value):
        return torch.tensor([[*its, *[value] * (width - len(its))] for its in values])

    return {
        "input_ids": filled([example.input_ids for example in examples], pad),
        "token_type_ids": filled([example.token_type_ids for example in examples], 0),
        "attention_mask": filled([[1] * len(example.input_ids) for example in examples], 0),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_with_padding(place, kind):
    settings = recipe(place, kind, quantization=DENSE)
    ours, examples = build(settings).eval(), examples_of(settings)[:7]
    reference = theirs(place, kind, ours).eval()
    batch = task_of(settings).collate(examples, range(7))
    with torch.no_grad():
        logits = ours(**batch.model_inputs(CPU), score=True)
        expected = reference(**padded(examples, reference.config.pad_token_id)).logits
        loss = ours(**batch.model_inputs(CPU))
    assert (logits - expected).abs().max() < 1e-6 < 1e-4 < logits.std(0).min()
    labels = torch.tensor([example.label for example in examples])
    assert loss.item() == pytest.approx(F.cross_entropy(expected, labels, reduction="sum").item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["trained", "absent"])
def test_a_head_that_the_checkpoint_has_is_kept(place, kind, head, tmp_path):
    """BERT's pooler is pretrained; a whole classifier's checkpoint brings all of it; otherwise it is seeded."""
    settings = recipe(place, kind, quantization=DENSE)
    first = build(settings)
    if head == "absent":
        assert torch.equal(out(build(settings)).dense_weight(), out(first).dense_weight())
        other = build(recipe(place, kind, quantization=DENSE, seed=1))
        assert not torch.equal(out(other).dense_weight(), out(first).dense_weight())
        assert 0.01 < out(first).dense_weight().std() < 0.04 and not out(first).bias.any()
        return
    model = theirs(place, kind, first)
    for name in first.head_linears(first.model):
        torch.nn.init.normal_(model.get_submodule(name).weight)
    model.save_pretrained(tmp_path)
    again = build(settings.model_copy(update={"model": Model(path=str(tmp_path))}))
    for name in first.head_linears(first.model):
        assert torch.equal(again.model.get_submodule(name).dense_weight(), model.get_submodule(name).weight)


def test_the_names_of_older_checkpoints_are_known(place, tmp_path):
    """`LayerNorm.gamma`, positions as a buffer, a head of pretraining: as the first BERTs lie on the hub."""
    stored = load_file(place / "bert" / "model.safetensors")
    renamed = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in stored.items()
    }
    renamed |= {"cls.predictions.bias": torch.zeros(3), "bert.embeddings.position_ids": torch.arange(66)[None]}
    shutil.copytree(place / "bert", tmp_path, dirs_exist_ok=True)
    save_file(renamed, tmp_path / "model.safetensors")
    settings = recipe(place, "bert", quantization=DENSE)
    older = build(settings.model_copy(update={"model": Model(path=str(tmp_path))}))
    for (name, value), other in zip(build(settings).model.named_parameters(), older.model.parameters(), strict=True):
        assert torch.equal(value, other), name
    save_file({**renamed, "bert.encoder.other.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RecipeError, match="unexpected: bert.encoder.other.weight"):
        build(settings.model_copy(update={"model": Model(path=str(tmp_path))}))


def out(model) -> SelectedLinear:
    return model.model.get_submodule(model.head_linears(model.model)[-1])


def steps_of(settings: Recipe, examples, world_size=1):
    data = task_of(settings).read_data(locate_model(settings.model))
    return training_batches(
        examples,
        data.order(settings),
        micro_batch_size=settings.training.micro_batch_size,
        rank=0,
        world_size=world_size,
        collate=task_of(settings).collate,
    )


def adamw(parameters, settings: Recipe) -> torch.optim.AdamW:
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=settings.training.learning_rate, eps=settings.training.eps, weight_decay=0.0)


def trained_losses(settings: Recipe, model) -> list[float]:
    """Of plain AdamW at a constant rate, one micro batch after the other; the model is trained."""
    model.train()
    optimizer = adamw(model.parameters(), settings)
    losses = []
    for step in steps_of(settings, examples_of(settings)):
        optimizer.zero_grad()
        losses.append(0.0)
        for batch in step.micro_batches:
            loss = model(**batch.model_inputs(CPU)) / step.label_count
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_lora_with_its_head_trains_as_pefts_does(place, kind):
    """Losses of four steps of AdamW, peft's LoRA on padded batches with the head in `modules_to_save`."""
    from peft import LoraConfig, get_peft_model

    settings = recipe(place, kind, method="lora", quantization=DENSE, adapter={"rank": 4, "alpha": 8.0})
    ours = build(settings)
    head = ["pooler", "classifier"] if kind == "bert" else ["classifier"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], modules_to_save=head)
    reference = get_peft_model(theirs(place, kind, ours), config)
    for linear in adapted_linears(ours.model):
        peer = reference.base_model.model.get_submodule(linear.name)
        peer.lora_A["default"].weight.data.copy_(linear.dense_A().detach())
    examples = examples_of(settings)
    trained = [p for p in reference.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == count_parameters(ours).trained
    optimizer = adamw(trained, settings)
    expected = []
    reference.train()  # the model has no dropout
    for step in steps_of(settings, examples):
        rows = [row for batch in step.micro_batches for row in batch.rows]
        chosen = [examples[row] for row in rows]
        labels = torch.tensor([example.label for example in chosen])
        loss = F.cross_entropy(reference(**padded(chosen, ours.model.config.pad_token_id)).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert trained_losses(settings, ours) == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == 4


def dense_masked(place, kind, ours):
    """Plain torch: W + scale·(B⊙S_B)(A⊙S_A), and a head whose gradient is masked."""
    model = theirs(place, kind, ours)
    model.requires_grad_(False)
    for linear in trained_linears(ours.model):
        peer = model.get_submodule(linear.name)
        if isinstance(linear, SelectedLinear):
            mask = linear.selection.mask(linear.W_bits)
            peer.requires_grad_(True)
            peer.weight.register_hook(lambda grad, mask=mask: grad * mask)
            continue
        S_A, S_B = (s.mask(bits) for _, s, bits in linear.selections())
        peer.A = torch.nn.Parameter(linear.dense_A().detach().clone())
        peer.B = torch.nn.Parameter(torch.zeros(S_B.shape))

        def forward(x, peer=peer, S_A=S_A, S_B=S_B, scale=linear.scale):
            return F.linear(x, peer.weight, peer.bias) + scale * (x @ (peer.A * S_A).t()) @ (peer.B * S_B).t()

        peer.forward = forward
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_lora_sp_with_a_selected_head_trains_as_dense_masks_do(place, kind):
    settings = recipe(place, kind, quantization=DENSE)
    ours = build(settings)
    reference = dense_masked(place, kind, ours)
    head = out(ours)
    before, mask = head.dense_weight().detach().clone(), head.selection.mask(head.W_bits)
    examples, expected = examples_of(settings), []
    optimizer = adamw(reference.parameters(), settings)
    for step in steps_of(settings, examples):
        chosen = [examples[row] for batch in step.micro_batches for row in batch.rows]
        labels = torch.tensor([example.label for example in chosen])
        loss = F.cross_entropy(reference(**padded(chosen, ours.model.config.pad_token_id)).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert trained_losses(settings, ours) == pytest.approx(expected, rel=1e-5)
    # What is not selected stands where it stood; all that is has moved.
    assert torch.equal(head.dense_weight() == before, ~mask) and int(mask.sum()) == head.selection.count == 36


def test_of_a_head_as_much_is_trained_as_of_an_adapter_or_all(place):
    """36·36 + 36·2 entries of weights and 36 + 2 of biases; adapters of 3 layers · 2 linears · 2 · 4·36."""
    adapters, weights, biases = 3 * 2 * 2 * 4 * 36, 36 * 36 + 36 * 2, 36 + 2
    for changes, trained_adapters, trained_weights in (
        ({}, adapters // 2, weights // 2),
        ({"adapter": {"head": "whole"}}, adapters // 2, weights),
        ({"method": "lora"}, adapters, weights),
        ({"selection": {"fraction": 0.25}}, adapters // 4, weights // 4),
        ({"selection": {"strategy": "structured"}}, adapters // 2, weights // 2),
    ):
        expected = trained_adapters + trained_weights + biases
        for kind in KINDS:
            counts = count_parameters(build(recipe(place, kind, quantization=DENSE, **changes)))
            assert counts.trained == expected, changes
            assert counts.adapter == adapters
            assert counts.trained_head == expected - trained_adapters


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_belongs_to_the_example_of_a_step(place, kind):
    """Losses with dropout: the same whatever micro batches or checkpointing, others than without it, and not twice the
    same in two steps.
    """
    settings = recipe(place, f"{kind}_drops", quantization=DENSE, adapter={"dropout": 0.1})
    found = trained_losses(settings, build(settings))
    alone = settings.model_copy(update={"training": settings.training.model_copy(update={"micro_batch_size": 1})})
    assert trained_losses(alone, build(alone)) == pytest.approx(found, rel=1e-5)
    model = build(settings)
    assert set_recomputation(model.model, "layer") == ("layer", None)
    assert trained_losses(settings, model) == pytest.approx(found, rel=1e-6)
    without = recipe(place, kind, quantization=DENSE)
    assert abs(trained_losses(without, build(without))[0] - found[0]) > 1e-4  # rounding moves it by 1e-7
    # Of the mean over many masks, plain dropout's: what is kept is scaled by 1/(1 - p).
    drops = model.model.base_model.embeddings.dropout.train()
    drops.examples.lengths, drops.examples.keys = (50, 150), (3, 4)
    dropped = drops(torch.ones(1, 200, 36))
    assert set(dropped.unique().tolist()) == {0.0, 1.25} and dropped.mean() == pytest.approx(1, abs=0.03)


def test_a_policy_for_decoders_falls_back_to_layer(place):
    policy, why = set_recomputation(build(recipe(place, "bert", quantization=DENSE)).model, "selective")
    assert policy == "layer" and "BertForSequenceClassification" in why


def test_a_saved_classifier_is_the_same_again(place, tmp_path):
    settings = recipe(place, "bert")
    model = build(settings)
    trained_losses(settings, model)
    info = AdapterInfo.of(settings, model, base_digest="", selection_seed=0, step=4)
    values = ((name, p.detach().float()) for name, p in model.named_parameters() if p.requires_grad)
    save_adapter(tmp_path, info, model, values, writes=True)
    other = settings.model_copy(update={"seed": 7})  # another S, another head, until the file is applied
    again = build_on_meta(load_config(place / "bert", settings.model), other, torch.float32)
    load_adapter(tmp_path, settings).apply(again)
    for _ in filled_units(again.model, open_weights(place / "bert", other), device=CPU):
        pass
    batch = task_of(settings).collate(examples_of(settings), range(6))
    with torch.no_grad():
        expected = model.eval()(**batch.model_inputs(CPU), score=True)
        assert torch.equal(again.eval()(**batch.model_inputs(CPU), score=True), expected)


def test_full_fine_tuning_trains_all_and_a_regression_squares_errors(place):
    settings = recipe(place, "roberta", method="full", task="stsb", training={"learning_rate": 1e-3})
    model = build(settings)
    counts = count_parameters(model)
    assert counts.trained == counts.total and counts.adapter == counts.trained_head == 0
    items = [GlueExample((0, 7, 8, 2), (0,) * 4, 3.5), GlueExample((0, 9, 2), (0,) * 3, 0.25)]
    batch = task_of(settings).collate(items, [0, 1])
    logits = model(**batch.model_inputs(CPU), score=True)
    expected = (logits[0, 0] - 3.5) ** 2 + (logits[1, 0] - 0.25) ** 2
    assert model(**batch.model_inputs(CPU)).item() == pytest.approx(expected.item(), rel=1e-6)
    empty = model(**task_of(settings).collate(items, []).model_inputs(CPU))
    empty.backward()
    assert empty.item() == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())
