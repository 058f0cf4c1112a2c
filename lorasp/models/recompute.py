"""Decoder layers that keep the least from which backward repeats no matrix product: `selective`, and `lean`.

Plain autograd keeps every operation's inputs; checkpointing a whole layer keeps one and repeats all products, gathers
and dequantizations. A layer here is three autograd functions around the attention kernel,

    q, k, v = rotary(W_qkv · norm(x))        keeps x, rstd            (the kernel: q, k, v, o, logsumexp)
    x₁ = x + W_o · o                         keeps o, the kernel's own
    y  = x₁ + W_down · (act(gate) ⊙ up)      keeps x₁, rstd, gate, up (`lean`: not gate and up)

which rebuild norm, rotary and activation elementwise in backward. They hold modules, not weights: ZeRO-3 gathers a
layer anew for its backward, and nothing that it gathered is pinned. Adapters read what is kept or rebuilt anyway, so
they keep nothing of their own. Dropout masks are drawn again from a seed.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import SiLUActivation

from lorasp.dropout import DropoutSeeds
from lorasp.host_blocks import empty
from lorasp.models.attention import attend_each
from lorasp.models.kept_states import KeptStates
from lorasp.quantization import ShardedLinear
from lorasp.recipe import Quantization

_PARTS = {
    "input_layernorm",
    "post_attention_layernorm",
    *("self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn"),
}


class RecomputingForward:
    """A decoder layer's forward that keeps little; to be set as `layer.forward`. Raises ValueError for other parts.

    keeps_gate_and_up: `selective`; otherwise `lean`, which repeats those two products in backward.
    """

    def __init__(self, layer: nn.Module, *, keeps_gate_and_up: bool) -> None:
        names = {name for name, _ in layer.named_modules() if name}
        if names != _PARTS:
            raise ValueError(f"it consists of other parts ({', '.join(sorted(names ^ _PARTS))})")
        attention, mlp = layer.self_attn, layer.mlp
        self.attention, self.activation = attention, mlp.act_fn
        self.norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = attention.o_proj
        self.gate, self.up, self.down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.keeps_gate_and_up = keeps_gate_and_up
        # As the families write it: the layer's own where there are layers of both kinds (Qwen2), else the model's.
        config = attention.config
        self.window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        example_lengths: tuple[int, ...] = (),
        kept_states: KeptStates | None = None,
        **_,
    ) -> Tensor:
        """hidden_states [1, T, hidden] -> the same shape; position_embeddings: cos and sin, [1, T, head] each."""
        norm = self.norms[0]
        trained = _trained(norm, *self.qkv)
        seed = _shared_seed(self.qkv)
        q, k, v = _NormQKV.apply(hidden_states, self, seed, *position_embeddings, *trained)
        how = {"scaling": self.attention.scaling, "sliding_window": self.window}
        if kept_states is not None:
            outs = kept_states.attend(self.attention, q, k, v, example_lengths, **how)
        else:
            dropout = self.attention.attention_dropout if self.attention.training else 0.0
            outs = attend_each(q, k, v, example_lengths, dropout=dropout, **how)
        seed = _shared_seed((self.output,))
        hidden_states = _OutputAndResidual.apply(
            hidden_states, self.output, seed, len(outs), *outs, *self.output.trained()
        )
        seeds = (_shared_seed((self.gate, self.up)), _shared_seed((self.down,)))
        trained = _trained(self.norms[1], self.gate, self.up, self.down)
        return _NormMlpAndResidual.apply(hidden_states, self, seeds, *trained)


class _NormQKV(torch.autograd.Function):
    """x [1, T, hidden] -> q, k, v [1, heads, T, head], q and k rotated. Keeps x and the norm's 1/rms [T, 1]."""

    @staticmethod
    def forward(
        ctx, x: Tensor, layer: RecomputingForward, seed: DropoutSeeds | None, cos: Tensor, sin: Tensor, *trained
    ):
        ctx.layer, ctx.seed = layer, seed
        rows = x[0]
        rstd = _rstd(rows, layer.norms[0])
        ctx.save_for_backward(x, rstd, cos, sin)
        normed = _normalize(rows, rstd, layer.norms[0])
        heads = [linear.project(normed, seed).view(x.shape[1], -1, layer.attention.head_dim) for linear in layer.qkv]
        rotated = [_rotate(states, cos[0], sin[0]) for states in heads[:2]]
        return tuple(states.transpose(0, 1).unsqueeze(0) for states in (*rotated, heads[2]))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, rstd, cos, sin = ctx.saved_tensors
        layer, rows = ctx.layer, x[0]
        normed = _normalize(rows, rstd, layer.norms[0])
        grad_normed, gradients = None, []
        for linear, grad, rotates in zip(layer.qkv, grads, (True, True, False), strict=True):
            grad = grad[0].transpose(0, 1)  # [T, heads, head]
            # The transpose of a rotation is the rotation back.
            grad = (_rotate(grad, cos[0], -sin[0]) if rotates else grad).reshape(x.shape[1], -1)
            grad_normed, its = linear.backward(normed, grad, ctx.seed, into=grad_normed)
            gradients += its
        grad_x, of_norm = _norm_backward(rows, rstd, layer.norms[0], grad_normed)
        return grad_x.unsqueeze(0), None, None, None, None, *of_norm, *gradients


class _OutputAndResidual(torch.autograd.Function):
    """x + W_o·o, from o as the attention kernel gave it: an [1, heads, t, head] of each example.

    The kernel keeps these very tensors for its own backward: joined, they would be kept twice.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, linear: ShardedLinear, seed: DropoutSeeds | None, count: int, *outs_and_trained: Tensor
    ):
        outs = outs_and_trained[:count]
        ctx.linear, ctx.seed = linear, seed
        ctx.lengths = [out.shape[2] for out in outs]
        ctx.heads = outs[0].shape[1]
        ctx.save_for_backward(*(outs if linear.needs_input else ()))
        y = linear.project(_joined(outs), seed)
        return y.add_(x[0]).unsqueeze(0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows = _joined(ctx.saved_tensors) if ctx.saved_tensors else None
        grad_rows, gradients = ctx.linear.backward(rows, grad[0], ctx.seed)
        grad_heads = grad_rows.view(grad.shape[1], ctx.heads, -1).transpose(0, 1).unsqueeze(0)
        return grad, None, None, None, *grad_heads.split(ctx.lengths, dim=2), *gradients


class _NormMlpAndResidual(torch.autograd.Function):
    """x + W_down·(act(gate) ⊙ up), gate and up of norm(x) [1, T, hidden]."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        layer: RecomputingForward,
        seeds: tuple[DropoutSeeds | None, DropoutSeeds | None],
        *trained: Tensor,
    ):
        ctx.layer, ctx.seeds = layer, seeds
        rows = x[0]
        rstd = _rstd(rows, layer.norms[1])
        normed = _normalize(rows, rstd, layer.norms[1])
        gate, up = layer.gate.project(normed, seeds[0]), layer.up.project(normed, seeds[0])
        del normed
        ctx.save_for_backward(x, rstd, *((gate, up) if layer.keeps_gate_and_up else ()))
        y = layer.down.project(_activated(layer.activation, gate).mul_(up), seeds[1])
        return y.add_(rows).unsqueeze(0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, rstd, *kept), layer = ctx.saved_tensors, ctx.layer
        rows = x[0]
        normed = _normalize(rows, rstd, layer.norms[1])
        gate, up = kept or (linear.project(normed, ctx.seeds[0]) for linear in (layer.gate, layer.up))
        activated = _activated(layer.activation, gate)
        product = torch.mul(activated, up, out=empty(up.shape, up))
        grad_product, of_down = layer.down.backward(product, grad[0], ctx.seeds[1])
        grad_gate = _activation_backward(layer.activation, gate, torch.mul(grad_product, up, out=product))
        grad_up = grad_product.mul_(activated)
        del activated, product, gate, up, kept
        grad_normed, of_gate = layer.gate.backward(normed, grad_gate, ctx.seeds[0])
        grad_normed, of_up = layer.up.backward(normed, grad_up, ctx.seeds[0], into=grad_normed)
        del grad_gate, grad_up
        grad_x, of_norm = _norm_backward(rows, rstd, layer.norms[1], grad_normed)
        return grad_x.add_(grad[0]).unsqueeze(0), None, None, *of_norm, *of_gate, *of_up, *of_down


def set_recomputation(model: PreTrainedModel, policy: str) -> tuple[str, str | None]:
    """Makes the decoder layers keep what `policy` says; (the policy in force, why it is not the one asked for).

    `selective` and `lean` fall back to `layer` unless every layer consists of the usual parts, and a small one of its
    class computes the same numbers both ways.
    """
    fallback = None
    if policy in ("selective", "lean"):
        fallback = _take_apart(model, keeps_gate_and_up=policy == "selective")
        policy = "layer" if fallback else policy
    if policy == "layer":
        # Not reentrant: the recomputation runs inside backward, where its gather serves the gradient as well.
        enable = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.24, which warns of
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})  # the older name
    return policy, fallback


def _take_apart(model: PreTrainedModel, *, keeps_gate_and_up: bool) -> str | None:
    forwards = []
    layers = getattr(model.get_decoder(), "layers", None)
    if not layers:
        return f"{type(model).__name__} keeps its layers in another place"
    for index, layer in enumerate(layers):
        try:
            forwards.append((layer, RecomputingForward(layer, keeps_gate_and_up=keeps_gate_and_up)))
            _compare_small(type(layer), model.config.get_text_config(), index)
        except Exception as error:  # of another architecture's code, on sizes that it may not take
            return f"{type(layer).__name__} cannot be taken apart: {str(error).strip().splitlines()[0]}"
    for layer, forward in forwards:
        layer.forward = forward
    return None


def kept_bytes_per_token(policy: str, config: PreTrainedConfig, element_size: int) -> int | None:
    """Bytes that a decoder layer keeps of a token between forward and backward; None for `none`, which is autograd's.

    `layer`: its input. `lean`: also q, k, v, o, the second norm's input, and fp32 logsumexp and 1/rms. `selective`:
    also gate and up.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if policy == "none":
        return None
    if policy == "layer":
        return hidden * element_size
    elements = 2 * hidden + 2 * (heads + key_heads) * head
    if policy == "selective":
        elements += 2 * config.intermediate_size
    return elements * element_size + 4 * (heads + 2)


def _compare_small(layer_class: type[nn.Module], config: PreTrainedConfig, index: int) -> None:
    """Raises ValueError unless a narrow layer of this class computes what `RecomputingForward` does, both ways."""
    small = copy.deepcopy(config)
    small.hidden_size, small.intermediate_size = 24, 40
    small.attention_dropout = 0.0  # the kernel's, drawn anew each time
    small.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "sliding_window", None):
        small.sliding_window = 3  # shorter than the rows below
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = layer_class(small, index).float().train()
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.2)
        x = torch.randn(1, 9, small.hidden_size)
        grad = torch.randn_like(x)
        angles = torch.randn(1, 9, small.head_dim // 2).repeat(1, 1, 2)
    for name, linear in list(layer.named_modules()):
        if isinstance(linear, nn.Linear):
            ours = ShardedLinear(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                quantization=Quantization(format="none"),
                dtype=torch.float32,
            )
            ours.load(linear.weight.data, None if linear.bias is None else linear.bias.data)
            parent, _, last = name.rpartition(".")
            setattr(layer.get_submodule(parent), last, ours)
    inputs = {
        "position_embeddings": (angles.cos(), angles.sin()),
        "position_ids": torch.tensor([[*range(4), *range(10**6, 10**6 + 5)]]),  # some scale queries far on
        "attention_mask": None,
        "example_lengths": (4, 5),
    }
    found = []
    for forward in (layer.forward, RecomputingForward(layer, keeps_gate_and_up=False)):
        taken = x.clone().requires_grad_()
        y = forward(taken, **inputs)
        y = y[0] if isinstance(y, tuple) else y
        found.append((y.detach(), *torch.autograd.grad(y, taken, grad)))
    for theirs, ours in zip(*found, strict=True):
        if not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-4 * float(theirs.abs().max())):
            raise ValueError("its parts are joined in another way")


def _trained(norm: nn.Module, *linears: ShardedLinear) -> tuple[nn.Parameter, ...]:
    """In the order of the gradients that the functions return."""
    return (
        *((norm.weight,) if norm.weight.requires_grad else ()),
        *(parameter for linear in linears for parameter in linear.trained()),
    )


def _shared_seed(linears: Sequence[ShardedLinear]) -> DropoutSeeds | None:
    """Linears that read the same input share one dropout mask: it is made once an input."""
    return next((seed for seed in (linear.draw_dropout() for linear in linears) if seed is not None), None)


def _joined(outs: Sequence[Tensor]) -> Tensor:
    """[1, heads, t, head] of each example -> [T, heads · head]; of one example a view, where the kernel wrote so."""
    rows = [out[0].transpose(0, 1) for out in outs]
    if len(rows) == 1:
        return rows[0].flatten(1)
    shape = (sum(map(len, rows)), *rows[0].shape[1:])
    return torch.cat(rows, out=empty(shape, rows[0])).flatten(1)


def _activated(activation: nn.Module, gate: Tensor) -> Tensor:
    if _is_silu(activation):
        return torch.ops.aten.silu.out(gate, out=empty(gate.shape, gate))
    return activation(gate)


def _activation_backward(activation: nn.Module, gate: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `gate` from `grad`, that of the activation's output, whose memory it may take."""
    if _is_silu(activation):
        return torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=grad)
    with torch.enable_grad():
        gate = gate.detach().requires_grad_()
        (grad_gate,) = torch.autograd.grad(activation(gate), gate, grad)
    return grad_gate


def _is_silu(activation: nn.Module) -> bool:
    return isinstance(activation, nn.SiLU | SiLUActivation)


def _rstd(rows: Tensor, norm: nn.Module) -> Tensor:
    """1/√(mean square + ε) of each row, fp32 [T, 1]."""
    precise = torch.promote_types(rows.dtype, torch.float32)
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=precise)
    return norms.square_().div_(rows.shape[-1]).add_(norm.variance_epsilon).rsqrt_()


def _normalize(rows: Tensor, rstd: Tensor, norm: nn.Module) -> Tensor:
    # In fp32, as rstd is, and rounded to the rows' precision before the weight's product, as transformers does.
    return torch.mul(rows, rstd, out=empty(rows.shape, rows)).mul_(norm.weight)


def _norm_backward(rows: Tensor, rstd: Tensor, norm: nn.Module, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """With x̂ = x·rstd and g = grad·weight: rstd · (g - x̂ · mean(g·x̂)), computed in fp32; and the weight's gradient."""
    unit = torch.mul(rows, rstd, out=empty(rows.shape, rstd))
    of_weight = [(grad * unit).sum(0).to(grad.dtype)] if norm.weight.requires_grad else []
    weighted = torch.mul(grad, norm.weight, out=empty(rows.shape, rstd))
    mean = torch.linalg.vecdot(weighted, unit).div_(rows.shape[-1]).unsqueeze(-1)
    return weighted.addcmul_(unit, mean, value=-1).mul_(rstd).to(rows.dtype), of_weight


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [T, heads, head] by cos and sin [T, head], new memory; -sin rotates back."""
    half = states.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = torch.mul(states, cos, out=empty(states.shape, states))
    rotated[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return rotated
