"""`selective` and `lean`: the numbers of plain autograd, the bytes that they say, and nothing computed twice."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig, Ministral3Config, Qwen3Config

from lorasp.adapter import adapted_linears
from lorasp.data.batches import collate
from lorasp.data.examples import Example
from lorasp.live_tensors import LiveTensors
from lorasp.models.attention import ATTENTION
from lorasp.models.recompute import kept_bytes_per_token, set_recomputation
from lorasp.quantization import ShardedLinear
from tests.test_models import FAMILIES, build
from tests.tiny_models import save_model

POLICIES = ["selective", "lean"]
SETTINGS = {
    "lorasp": {},
    "some_targets": {
        "adapter": {"rank": 3, "target_modules": ["q_proj", "down_proj"]},
        "selection": {"strategy": "uniform"},
    },
    "full": {"method": "full"},
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(kind, root / kind) for kind in FAMILIES}


def examples(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    return [Example(tuple(torch.randint(0, 256, (n,), generator=generator).tolist()), 2) for n in lengths]


def batch(*lengths: int) -> dict:
    data = examples(*lengths)
    return collate(data, range(len(data))).model_inputs("cpu")


def built(directory, policy: str, dtype=torch.float64, **settings):
    """In training mode, with adapters that do something: B starts at 0, and so would A's gradient."""
    model = build(directory, **settings).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith((".A", ".B")):
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    assert set_recomputation(model.model, policy) == (policy, None)
    return model.train()


def loss_and_gradients(model, lengths):
    """Of a weighted sum of the decoder's output, in the model's precision; the loss head's is fp32."""
    inputs = batch(*lengths)
    model.zero_grad()
    hidden = model.model.get_decoder()(
        input_ids=inputs["input_ids"],
        position_ids=inputs["position_ids"],
        example_lengths=inputs["example_lengths"],
        use_cache=False,
    )[0]
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    loss = (hidden * weights.to(hidden.dtype)).sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_loss_and_gradients_are_plain_autograds(kind, settings, policy, directories):
    """In fp64 (norms stay fp32, as the models have them); Mistral's window is shorter than two of the examples."""
    plain = built(directories[kind], "none", **SETTINGS[settings])
    ours = built(directories[kind], policy, **SETTINGS[settings])
    for lengths in ((20, 4, 33), (17,)):
        loss, gradients = loss_and_gradients(ours, lengths)
        expected_loss, expected = loss_and_gradients(plain, lengths)
        assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-4)  # of a sum of thousands
        assert gradients.keys() == expected.keys() != set()
        for name, gradient in gradients.items():
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("policy", ["none", *POLICIES, "layer"])
def test_dropout_is_the_same_mask_in_backward_as_in_forward(policy, directories):
    """The gradient along a direction against a central difference of losses with the same seed."""
    model = built(directories["llama_tied"], policy, adapter={"rank": 4, "dropout": 0.4})

    examples = next(adapted_linears(model)).examples  # the same for all

    def loss(seed=5):
        examples.lengths, examples.keys = (20, 11), (seed, seed + 1)
        return loss_and_gradients(model, (20, 11))

    value, gradients = loss()
    assert value != loss(seed=6)[0]
    generator = torch.Generator().manual_seed(1)
    parameters = {name: p for name, p in model.named_parameters() if name in gradients}
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in parameters.items()}
    slope = sum((gradients[name] * direction[name]).sum() for name in gradients)
    found = []
    for step in (1e-4, -1e-4):
        for name, parameter in parameters.items():
            parameter.data += step * direction[name]
        found.append(loss()[0])
        for name, parameter in parameters.items():
            parameter.data -= step * direction[name]
    assert (found[0] - found[1]).item() / 2e-4 == pytest.approx(slope.item(), rel=1e-3)


@pytest.mark.parametrize("adapter", [{"rank": 16}, {"rank": 1, "target_modules": ["q_proj"]}])
@pytest.mark.parametrize("policy", [*POLICIES, "layer"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_layer_keeps_the_bytes_that_are_stated(kind, policy, adapter, directories):
    """And none for the adapters, of whatever rank on whatever linears."""
    model = built(directories[kind], policy, torch.float32, adapter=adapter)
    decoder, tokens = model.model.get_decoder(), 40
    layer = decoder.layers[1]
    x = torch.randn(1, tokens, model.model.config.hidden_size, requires_grad=True)
    cos_sin = decoder.rotary_emb(x, torch.arange(tokens).unsqueeze(0))
    with LiveTensors() as live:
        y = layer(x, position_embeddings=cos_sin, attention_mask=None, example_lengths=(25, 15))
    kept = live.live_bytes - y.nbytes + x.nbytes  # y is the next layer's; x was there before
    assert kept == tokens * kept_bytes_per_token(policy, model.model.config, element_size=4)


# 7 linears a layer, each dequantized (and, sharded, gathered) once forward and once for its input's gradient.
DEQUANTIZED = {"none": 14, "selective": 14, "lean": 14 + 2, "layer": 14 + 7}


@pytest.mark.parametrize("policy", DEQUANTIZED)
def test_nothing_is_dequantized_twice_in_backward(policy, directories, monkeypatch):
    """`lean` repeats gate and up; `layer` repeats each linear of the layer."""
    model = built(directories["llama"], policy, torch.float32, quantization={"format": "nf4"})
    calls = []
    dense_weight = ShardedLinear.dense_weight
    monkeypatch.setattr(ShardedLinear, "dense_weight", lambda self: calls.append(self) or dense_weight(self))
    loss_and_gradients(model, (9,))
    assert len(calls) == 3 * DEQUANTIZED[policy]


def test_nothing_that_was_dequantized_is_alive_after_forward(directories):
    model = built(directories["llama"], "selective", torch.float32, quantization={"format": "nf4"})
    with LiveTensors() as live:
        loss = model(**batch(3))
    # A layer's 7 dense weights alone would be 4 · (45·(42+14+14+42) + 3·45·91) bytes = 69 KB; three tokens' are less.
    assert loss.requires_grad and live.live_bytes < 30_000


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen3Config, "Qwen3DecoderLayer cannot be taken apart: it consists of other parts (self_attn.k_norm"),
        (GraniteConfig, "GraniteDecoderLayer cannot be taken apart: its parts are joined in another way"),
        (Ministral3Config, "Ministral3DecoderLayer cannot be taken apart: its parts are joined in another way"),
    ],
)
def test_other_layers_fall_back_to_layer_and_say_why(config, reason, policy):
    """Qwen3 norms q and k. Granite has just Llama's parts, and scales what it adds to the residual; Ministral 3 too,
    and scales the queries from position 16,384 on.
    """
    settings = {"residual_multiplier": 0.5} if config is GraniteConfig else {}
    small = config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        **settings,
    )
    model = AutoModelForCausalLM.from_config(small, attn_implementation=ATTENTION)
    forward = model.model.layers[0].forward
    applied, fallback = set_recomputation(model, policy)
    assert applied == "layer" and fallback.startswith(reason)
    assert model.is_gradient_checkpointing and model.model.layers[0].forward == forward


@pytest.mark.parametrize("policy", POLICIES)
def test_dropout_of_attention_is_no_reason_to_fall_back(policy):
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50, attention_dropout=0.1),
        attn_implementation=ATTENTION,
    )
    assert set_recomputation(model, policy) == (policy, None)


def test_offloading_moves_all_that_is_kept_and_changes_no_number(directories, monkeypatch):
    plain = built(directories["llama"], "selective", torch.float32)
    offloaded = built(
        directories["llama"],
        "selective",
        torch.float32,
        training={"offload_activations": True},
    )
    moved = []

    class Recording(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory=False, device_type="cuda"):
            super().__init__(lambda tensor: moved.append(tensor.nbytes) or tensor.clone(), lambda tensor: tensor)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Recording)
    found = []
    for model in (offloaded, plain):
        loss = model(**batch(20, 11))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    # 31 tokens: what 3 layers keep, and what the last norm does.
    assert sum(moved) >= 3 * 31 * kept_bytes_per_token("selective", offloaded.model.config, 4)
    assert all(torch.equal(ours, expected) for ours, expected in zip(*found, strict=True))
