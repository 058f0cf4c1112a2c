"""Random weights of a true shape: reproducible by name alone, and loaded as a checkpoint would be."""

import json

import pytest
import torch
import transformers

from lorasp.data.random_tokens import random_tokens
from lorasp.models import random_weights
from lorasp.models.build import build_on_meta, filled_units
from lorasp.models.classes import open_weights
from lorasp.models.random_weights import RandomWeights
from lorasp.models.weights import load_config, locate_model
from lorasp.recipe import Model, Recipe, RecipeError, named_shapes
from lorasp.recipe_loading import load_recipe
from lorasp.run import read_data
from tests.distributed.launching import ROOT

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "initializer_range": 0.05,
}
# Of the papers and model cards: LLaMA (arXiv 2302.13971), Llama 2, RoBERTa (with the head that it is pretrained with).
PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "roberta-base": 124_697_433,  # arXiv 1907.11692's 125 M and 355 M, the head of pretraining included
    "roberta-large": 355_412_057,
    "t5-small": 60_506_624,  # arXiv 1910.10683, as released: the head is the embedding
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
}


def recipe(tmp_path, seed=0, **sections):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    model = {"path": str(path), "weights": "random"}
    return Recipe(seed=seed, model=model, data={"train": "random", "max_length": 16, "limit": 5}, **sections)


@pytest.mark.parametrize("name", named_shapes())
def test_a_named_shape_has_the_parameters_of_the_published_model(name):
    settings = Model(path=name, weights="random")
    config = load_config(locate_model(settings), settings)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_a_tensor_follows_from_seed_and_name_and_is_as_initialised(tmp_path):
    settings = recipe(tmp_path)
    weights, again = (open_weights(locate_model(settings.model), settings) for _ in range(2))
    name = "model.layers.1.mlp.up_proj.weight"
    made = weights.read([name])[name]
    assert made.shape == (160, 64) and made.dtype == torch.bfloat16
    assert abs(made.float().std() - 0.05) < 0.002 and abs(made.float().mean()) < 0.002
    again.read(["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"])  # in another order
    assert torch.equal(again.read([name])[name], made)
    assert not torch.equal(again.read(["model.layers.0.mlp.up_proj.weight"]).popitem()[1], made)
    other = recipe(tmp_path, seed=1)
    assert not torch.equal(open_weights(locate_model(other.model), other).read([name])[name], made)
    assert weights.read(["model.norm.weight"])["model.norm.weight"].eq(1).all()


def test_values_do_not_depend_on_the_threads_that_draw_them(tmp_path, monkeypatch):
    settings = recipe(tmp_path)
    monkeypatch.setattr(random_weights, "_DRAWN_AT_ONCE", 1000)  # 11 parts, the last of 240
    made = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        weights = open_weights(locate_model(settings.model), settings)
        made.append(weights.read(["model.layers.1.mlp.up_proj.weight"]).popitem()[1])
    assert torch.equal(*made)
    parts = made[0].view(-1).split(1000)
    assert len({float(part[0]) for part in parts}) == 11  # each from a stream of its own


def test_a_model_of_random_weights_is_the_same_twice_and_has_finite_logits(tmp_path):
    settings = recipe(tmp_path)
    config = load_config(locate_model(settings.model), settings.model)
    digests, logits = set(), []
    for _ in range(2):
        weights = RandomWeights(config, settings.seed, tmp_path, trust_remote_code=False)
        model = build_on_meta(config, settings, torch.float32)
        for _ in filled_units(model.model, weights, device=torch.device("cpu")):
            pass
        digests.add(weights.digest())
        ids = torch.arange(12).unsqueeze(0)
        logits.append(model(ids, ids, (12,), torch.arange(12)))
    assert len(digests) == 1 and torch.equal(*logits) and logits[0].isfinite().all() and logits[0].std() > 0.01


def test_random_tokens_are_rows_of_one_length_below_the_vocabulary(tmp_path):
    settings = recipe(tmp_path)
    data = read_data(settings, locate_model(settings.model))
    rows = [example.input_ids for example in data.train.examples]
    assert [len(row) for row in rows] == [16] * 5 and len(set(rows)) == 5
    assert 0 <= min(map(min, rows)) and 250 < max(map(max, rows)) < 300
    assert {example.label_count for example in data.train.examples} == {15}
    assert data.tokenizer is None and data.held_out is None and data.samples(3) == []
    assert rows == [example.input_ids for example in random_tokens(settings, 300).train.examples]
    assert data.report()["train"]["tokens"] == 80


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.path=lama-7b"], '"lama-7b" is no shape for weights: random; named are llama-13b, llama-30b'),
        (["data.held_out=0.1"], "data.held_out: random tokens teach nothing that could be held out"),
        (["model.path=./nothing.json"], '"./nothing.json" does not exist'),
        (["model.weights=randon"], '"randon" is not one of stored, random'),
    ],
)
def test_bad_settings_are_told(changes, said):
    with pytest.raises(RecipeError) as refused:
        load_recipe(ROOT / "recipes" / "rehearsal_7b.yaml", changes)
    assert said in str(refused.value)
