"""Examples of a row that see each other, or a token that sees what follows it, are found out."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GptOssConfig,
    Lfm2Config,
    MambaConfig,
    Qwen3NextConfig,
    StableLmConfig,
)

from lorasp.isolation import check_isolation
from lorasp.planning import plan
from lorasp.recipe import RecipeError
from tests.test_models import build, recipe
from tests.tiny_models import VOCABULARY, save_model

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


class WholeModel:
    """An engine's face, of a model that one process holds."""

    def __init__(self, model):
        self.model = model

    def train_mode(self, training):
        self.model.train(training)

    def __call__(self, **inputs):
        return self.model(**inputs)


def saved(config, path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # else attention adds next to nothing
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_examples_of_the_usual_decoders_stand_alone(kind, tmp_path):
    check_isolation(WholeModel(build(save_model(kind, tmp_path))), torch.float32, CPU)


def test_a_forward_that_passes_no_lengths_is_found_out(tmp_path):
    model = build(save_model("llama", tmp_path))
    forward = model.forward
    model.forward = lambda example_lengths, **inputs: forward(example_lengths=(sum(example_lengths),), **inputs)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(RecipeError, match="with llama the examples of a row see each other"):
            check_isolation(WholeModel(model), dtype, CPU)


def test_a_token_that_sees_what_follows_it_is_found_out(tmp_path):
    model = build(
        save_model("llama", tmp_path)
    )  # whose layers are whole, and so call the attention that is registered
    for layer in model.model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(RecipeError, match="or a token what follows it"):
        check_isolation(WholeModel(model), torch.float32, CPU)


def test_a_convolution_over_the_row_is_found_out(tmp_path):
    layers = {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 1, "block_auto_adjust_ff_dim": False}
    model = build(saved(Lfm2Config(**SMALL, **layers), tmp_path))
    with pytest.raises(RecipeError, match="with lfm2 the examples of a row see each other"):
        check_isolation(WholeModel(model), torch.float32, CPU)


@pytest.mark.parametrize(
    "config",
    [
        FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2),
        StableLmConfig(**SMALL),
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1),
        Qwen3NextConfig(**SMALL, num_experts=2, linear_num_key_heads=2, linear_num_value_heads=2),
    ],
)
def test_architectures_with_a_state_or_attention_of_their_own_are_refused_before_they_are_loaded(config, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=rf"{config.model_type} has (a recurrent state|attention of its own kinds)"):
        build(tmp_path)


def test_attention_with_sinks_is_refused_by_the_plan(tmp_path):
    config = GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1, num_key_value_heads=1, head_dim=16)
    settings = recipe(tmp_path, quantization={"format": "none"})
    with pytest.raises(RecipeError, match="GptOssAttention caps its attention logits or uses sinks"):
        plan(settings, config, world_size=1, dtype=torch.float32, device="cpu")
