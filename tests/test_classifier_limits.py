"""Classifiers: what they count and need, at true size too, and what is refused."""

import copy

import pytest
import torch
from transformers import LlamaConfig

from lorasp.accounting import count_flops, count_parameters
from lorasp.adapter import adapted_linears
from lorasp.live_tensors import LiveTensors
from lorasp.models.build import build_on_meta
from lorasp.models.recompute import set_recomputation
from lorasp.models.weights import load_config, locate_model
from lorasp.planning import as_method, plan
from lorasp.recipe import Model, Recipe, RecipeError
from lorasp.tasks import task_of
from tests.test_classifier import CPU, DENSE, build, examples_of, recipe
from tests.test_classifier import place as place  # the fixture
from tests.tiny_encoders import recipe_tree


def roberta(size: str, **sections) -> tuple[Recipe, object]:
    tree = recipe_tree("unused", "glue", **{"adapter": {"rank": 8}, **sections})
    tree["model"] = {"path": f"roberta-{size}", "weights": "random"}
    settings = Recipe(**tree)
    return settings, load_config(locate_model(settings.model), settings.model)


@pytest.mark.parametrize(
    ("size", "layers", "hidden", "paper"), [("base", 12, 768, (0.9e6, 0.45e6)), ("large", 24, 1024, (1.8e6, 0.9e6))]
)
def test_counts_at_true_size_are_the_papers(size, layers, hidden, paper):
    """r = 8 on queries and values, and the head: Table 1's figures are these, to the digits that it prints."""
    adapters, head, biases = layers * 2 * 2 * 8 * hidden, hidden * hidden + 2 * hidden, hidden + 2
    found = []
    for method in ("lora", "lorasp"):
        settings, config = roberta(size, method=method)
        counts = count_parameters(build_on_meta(config, settings, torch.float32, draws=False))
        found.append(counts.trained)
        assert counts.trained == (adapters + head) // (2 if method == "lorasp" else 1) + biases
    assert found == pytest.approx(paper, rel=0.03)
    settings, config = roberta(size, adapter={"rank": 8, "head": "whole"})
    whole = count_parameters(build_on_meta(config, settings, torch.float32, draws=False)).trained
    assert whole == adapters // 2 + head + biases > 1.3 * paper[1]  # so the paper's row has half of the head
    settings, config = roberta(size)
    full = as_method(settings, "full")
    counts = count_parameters(build_on_meta(config, full, torch.float32))
    # Embeddings (with 2 of positions and types and a norm), per layer 4h² + 8h² weights, 9h biases and 4h of norms.
    embeddings = (50265 + 514 + 1 + 2) * hidden
    assert counts.trained == embeddings + layers * (12 * hidden**2 + 13 * hidden) + head + biases


def test_a_plan_is_what_a_step_of_three_layers_makes(place):
    """Activations: traced with one layer and two, and carried on, against the tensors of a real step of three."""
    for policy in ("none", "layer"):
        settings = recipe(place, "bert_drops", quantization=DENSE, training={"activation_checkpointing": policy})
        config = load_config(place / "bert_drops", settings.model)
        model = build(settings)
        set_recomputation(model.model, policy)
        batch = task_of(settings).worst_batch(examples_of(settings), 4)
        model.train()
        with LiveTensors() as live:
            loss = model(**batch.model_inputs(CPU))
            at_head, live.peak_bytes = live.peak_bytes, live.live_bytes
            loss.backward()
        gradients = sum(p.numel() * 4 for p in model.parameters() if p.grad is not None)
        planned = plan(settings, config, world_size=1, dtype=torch.float32, device="cpu", batch=batch)
        activations = planned.phases["train"]["activations"]
        measured = max(at_head, live.peak_bytes - gradients)
        assert activations == pytest.approx(measured, rel=0.15), policy


def test_products_of_the_head_are_counted_for_a_row_and_not_for_a_token(place):
    flops = count_flops(build(recipe(place, "roberta", quantization=DENSE)))
    assert flops.per_label == 6 * (36 * 36 + 36 * 2)
    linears = 3 * (4 * 36 * 36 + 2 * 36 * 50)
    assert flops.per_token == 4 * linears + 6 * 3 * 2 * 2 * 4 * 36


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": {"held_out": 0.1}}, "data.held_out: task rte has no use for it; remove this setting"),
        ({"data": {"packing": True}}, "data.packing: task rte has no use for it"),
        ({"mmlu": {"data": "cais/mmlu"}}, "mmlu.data: it asks a causal language model, not one of task rte"),
        ({"data": {"train": [{"path": "a"}]}}, "data.train: task rte has one data set; give GLUE's directory"),
        ({"task": "causal_lm", "data": {"selection": 0.1}}, "data.selection: task causal_lm has no use for it"),
        ({"task": "causal_lm", "adapter": {"head": "whole"}}, "adapter.head: a language model's head is not trained"),
        (
            {"task": "wmt16_en_ro", "adapter": {"head": "whole"}},
            "adapter.head: a language model's head is not trained",
        ),
        ({"method": "lora", "adapter": {"head": "whole"}}, "adapter.head: method lora trains all"),
        ({"method": "full", "quantization": {"format": "nf4"}}, "quantization.format: method full trains the weights"),
    ],
)
def test_settings_without_a_use_are_refused(changes, told):
    with pytest.raises(ValueError, match="^.*") as error:
        Recipe(**recipe_tree("m", "glue", **changes))
    assert told in str(error.value)


def test_a_model_of_another_family_is_refused_before_it_is_built(place):
    llama = LlamaConfig()
    for config, changes, told in (
        (llama, {}, "task rte needs an encoder (bert, roberta, xlm-roberta), and this is a llama"),
        (load_config(place / "bert", Model(path="m")), {"task": "causal_lm"}, "bert is no causal language model"),
        (load_config(place / "bert", Model(path="m")), {"data": {"max_length": 67}}, "has positions for 66 tokens"),
        (load_config(place / "roberta", Model(path="m")), {"data": {"max_length": 65}}, "positions for 64 tokens"),
    ):
        with pytest.raises(RecipeError) as error:
            build_on_meta(copy.deepcopy(config), recipe(place, "bert", **changes), torch.float32)
        assert told in str(error.value) and "\n" not in str(error.value)


def test_targets_are_queries_and_values_unless_named(place):
    assert recipe(place, "bert").adapter.target_modules == ["query", "value"]
    settings = recipe(place, "bert", quantization=DENSE, adapter={"rank": 4, "target_modules": "all-linear"})
    names = {linear.name for linear in adapted_linears(build(settings))}
    assert len(names) == 3 * 6 and not any("pooler" in name or "classifier" in name for name in names)
