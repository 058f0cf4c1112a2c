"""4-bit frozen weights as ordinary parameters, so that ZeRO-3 shards all of them.

bitsandbytes' own `Linear4bit` hides the scales in a `QuantState` that no sharding sees: each rank keeps every layer's
scales whole. Here codes and scales are both parameters, and bitsandbytes' functional kernels do the arithmetic
(Q = qN(W) of Eq. 3; QLoRA, arXiv 2305.14314, sections 2 and 3, for NF4 and double quantization).

Bytes for n weights in blocks of b: n/2 of codes and n/b of scales (4n/b without double quantization); under double
quantization also one fp32 for each 256 scales and one offset a tensor, which stay whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorasp import host_blocks
from lorasp.dropout import DropoutSeeds
from lorasp.recipe import Quantization
from lorasp.uncompiled import uncompiled

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

_SCALES_A_BLOCK = 256  # fixed in bitsandbytes: second-level blocks of double quantization
_QUANTIZED_AT_ONCE = 2**20  # weights; a multiple of every block size
_scale_code: dict[torch.device, Tensor] = {}


@cache
def _bnb() -> ModuleType:
    """Imported when something is first quantized: a plan of a model's memory needs its shapes only."""
    with uncompiled():
        from bitsandbytes import functional

    return functional


def _scale_code_on(device: torch.device) -> Tensor:
    """The 256 values that a double-quantized scale's byte stands for, fp32 [256]; one copy a device."""
    if device not in _scale_code:
        _scale_code[device] = _bnb().create_dynamic_map().to(device)
    return _scale_code[device]


class ShardedLinear(nn.Module):
    """y = x·Wᵀ + b, where W is a ZeRO-3 shard between uses: dense, or codes and scales of a 4-bit format.

    Autograd saves nothing of W: the function keeps this module on its context and takes W (dequantized again) in
    backward, when ZeRO-3 has gathered it anew. A plain `F.linear` would pin every gathered weight until backward.

    quantization.format `none` keeps `weight` [out, in] in `dtype`; otherwise `codes` uint8 [⌈out·in/2⌉] and `scales`
    [⌈out·in/block⌉], uint8 under double quantization with the fp32 buffers `scale_scales` and `scale_offset`, fp32
    without. Made on the meta device; filled by `load`, or left to be received by `allocate`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        quantization: Quantization,
        dtype: torch.dtype,
        trained: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.quantization, self.dtype = quantization, dtype
        entries = in_features * out_features
        if quantization.format == "none":
            self.weight = _parameter((out_features, in_features), dtype, trained)
        else:
            self.weight = None  # T5's feed-forward asks what it is
            blocks = -(-entries // quantization.block_size)
            self.codes = _parameter((-(-entries // 2),), torch.uint8)
            self.scales = _parameter((blocks,), torch.uint8 if quantization.double_quant else torch.float32)
            if quantization.double_quant:
                second = torch.empty(-(-blocks // _SCALES_A_BLOCK), device="meta")
                self.register_buffer("scale_scales", second)
                self.register_buffer("scale_offset", torch.empty((), device="meta"))
        self.bias = _parameter((out_features,), dtype, trained) if bias else None

    def base_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the base (not of an adapter): parameters, then second-level scales."""
        for name in ("weight", "codes", "scales", "bias", "scale_scales", "scale_offset"):
            tensor = getattr(self, name, None)
            if tensor is not None:
                yield name, tensor

    def filled_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of what `load` fills."""
        return self.base_tensors()

    def allocate(self, device: torch.device) -> None:
        """Gives every meta tensor of the base uninitialised memory on `device`, where `load` would fill it."""
        for name, tensor in list(self.base_tensors()):
            if tensor.is_meta:
                _replace(self, name, torch.empty_like(tensor, device=device))

    def load(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fills the base from `weight` [out, in] and `bias` [out] on the target device, quantizing if asked to.

        `weight` in any precision: rounded to the compute dtype first, as the stock path does, for the same codes.
        """
        if self.bias is not None:
            _replace(self, "bias", bias.to(self.dtype))
        if self.quantization.format == "none":
            _replace(self, "weight", weight.to(self.dtype))
            return
        self._place(*self._quantize(weight.reshape(-1)))

    def _quantize(self, weight: Tensor) -> tuple[Tensor, QuantState]:
        """What `bnb.quantize_4bit` gives of the whole, to the bit, in parts: on a CPU it makes 5 fp32 copies of W."""
        codes, scales = [], []
        for part in weight.split(_QUANTIZED_AT_ONCE):
            part_codes, state = _bnb().quantize_4bit(
                part.to(self.dtype),
                blocksize=self.quantization.block_size,
                quant_type=self.quantization.format,
                compress_statistics=False,
            )
            codes.append(part_codes.view(-1))
            scales.append(state.absmax)
        state.absmax = torch.cat(scales)
        if self.quantization.double_quant:
            state.offset = state.absmax.mean()
            state.absmax, state.state2 = _bnb().quantize_blockwise(
                state.absmax - state.offset, blocksize=_SCALES_A_BLOCK
            )
        return torch.cat(codes), state

    def packed_shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Names and shapes of W in bitsandbytes' 4-bit layout, as transformers stores it; None: any shape."""
        shapes: dict[str, tuple[int, ...] | None] = {
            "weight": (self.codes.numel(), 1),
            "weight.absmax": tuple(self.scales.shape),
            "weight.quant_map": (16,),
            f"weight.quant_state.bitsandbytes__{self.quantization.format}": None,  # JSON, as bytes
        }
        if self.quantization.double_quant:
            shapes["weight.nested_absmax"] = tuple(self.scale_scales.shape)
            shapes["weight.nested_quant_map"] = (256,)
        return shapes

    def packed(self) -> dict[str, Tensor]:
        """W in bitsandbytes' 4-bit layout: codes and scales as they are, under the names of `packed_shapes`."""
        state = self._quant_state()
        state.code = _bnb().get_4bit_type(self.quantization.format, device=self.codes.device)
        stored = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return {"weight": self.codes.data.view(-1, 1), **stored}

    def load_packed(self, packed: dict[str, Tensor], bias: Tensor | None) -> None:
        """Fills the base from what `packed` gives and from `bias` [out], on the target device, without rounding.

        Raises ValueError, saying how it is stored, where that is not as this linear is to be quantized.
        """
        if self.bias is not None:
            _replace(self, "bias", bias.to(self.dtype))
        codes = packed["weight"]
        stored = {name: tensor for name, tensor in packed.items() if name != "weight"}
        state = _bnb().QuantState.from_dict(stored, device=codes.device)
        if (state.quant_type, state.blocksize) != (self.quantization.format, self.quantization.block_size):
            raise ValueError(
                f"in {state.quant_type} with blocks of {state.blocksize}, the recipe asks for "
                f"{self.quantization.format} with blocks of {self.quantization.block_size} (quantization.block_size)"
            )
        if state.nested and not (
            state.state2.blocksize == _SCALES_A_BLOCK
            and torch.allclose(state.state2.code, _scale_code_on(codes.device), rtol=0, atol=1e-6)
        ):
            raise ValueError("with another double quantization of its scales than bitsandbytes' own")
        self._place(codes, state)

    def _place(self, codes: Tensor, state: QuantState) -> None:
        _replace(self, "codes", codes.view(-1))
        _replace(self, "scales", state.absmax)
        if self.quantization.double_quant:
            # Of their own memory, as they stay whole: views would keep a memory-mapped file resident.
            _replace(self, "scale_scales", state.state2.absmax.clone())
            _replace(self, "scale_offset", state.offset.clone())

    def dense_weight(self) -> Tensor:
        """W, [out, in] in the compute dtype: the parameter itself, or codes dequantized into new memory."""
        if self.quantization.format == "none":
            return self.weight
        # [codes, 1] as bitsandbytes has it: a leading dimension of 1 would be taken for a transposed weight.
        return _bnb().dequantize_4bit(self.codes.data.view(-1, 1), self._quant_state())

    def _quant_state(self) -> QuantState:
        second = None
        if self.quantization.double_quant:
            second = _bnb().QuantState(
                absmax=self.scale_scales,
                code=_scale_code_on(self.codes.device),
                blocksize=_SCALES_A_BLOCK,
                dtype=torch.float32,
            )
        return _bnb().QuantState(
            absmax=self.scales.data,
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=self.dtype,
            blocksize=self.quantization.block_size,
            quant_type=self.quantization.format,
            offset=self.scale_offset if second else None,
            state2=second,
        )

    def trained(self) -> tuple[nn.Parameter, ...]:
        """The parameters that `backward` gives gradients of, in its order."""
        return tuple(p for p in (getattr(self, "weight", None), self.bias) if p is not None and p.requires_grad)

    def draw_dropout(self) -> DropoutSeeds | None:
        """Of a fresh dropout mask on the adapter's input; None where nothing is dropped."""
        return None

    # What autograd functions of several linears are made of. They see no graph: plain tensors in, plain tensors out.

    def project(self, rows: Tensor, seed: DropoutSeeds | None = None) -> Tensor:
        """rows [tokens, in] -> [tokens, out], new memory. seed: see `draw_dropout`."""
        out, weight = host_blocks.empty((len(rows), self.out_features), rows), self.dense_weight()
        return linear_into(out, rows, weight, self.bias)

    def backward(
        self, rows: Tensor | None, grad: Tensor, seed: DropoutSeeds | None = None, into: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """(gradient of `rows` [tokens, in], those of `trained()`) from `grad` [tokens, out].

        rows may be None where `needs_input` is false. into: a gradient of the same rows, by another linear, to which
        this one's is added in place.
        """
        gradients = [grad.sum(0) if parameter is self.bias else grad.t() @ rows for parameter in self.trained()]
        return self._backward_of_base(grad, into), gradients

    def _backward_of_base(self, grad: Tensor, into: Tensor | None) -> Tensor:
        weight = self.dense_weight()
        if into is not None:
            return into.addmm_(grad, weight)
        return torch.mm(grad, weight, out=host_blocks.empty((len(grad), self.in_features), grad))

    @property
    def needs_input(self) -> bool:
        """Whether `backward` needs the rows that went in."""
        return bool(self.trained())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return _ProjectionFunction.apply(x, self, self.draw_dropout(), *self.trained())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, base={self.quantization.format}, dtype={self.dtype}"


def linear_into(out: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear(rows, weight, bias)`, by the same kernels, in `out`."""
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)


class _ProjectionFunction(torch.autograd.Function):
    """One linear. Saves its input where gradients of trained parameters need it, and nothing that ZeRO-3 gathered.

    The trained parameters are arguments only so that autograd sees them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, module: ShardedLinear, seed: DropoutSeeds | None, *trained: Tensor) -> Tensor:
        ctx.module, ctx.seed, ctx.shape = module, seed, x.shape
        ctx.save_for_backward(x if module.needs_input else None)
        return module.project(x.reshape(-1, x.shape[-1]), seed).view(*x.shape[:-1], module.out_features)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        grad_x, gradients = ctx.module.backward(rows, grad.reshape(-1, grad.shape[-1]), ctx.seed)
        return grad_x.view(ctx.shape), None, None, *gradients


def _parameter(shape: tuple[int, ...], dtype: torch.dtype, trained: bool = False) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=trained)


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts `tensor` where a meta parameter or buffer of that name, shape and dtype stands."""
    old = getattr(module, name)
    if old.shape != tensor.shape or old.dtype != tensor.dtype:
        raise ValueError(f"{name}: {[*tensor.shape]} {tensor.dtype} given, {[*old.shape]} {old.dtype} expected")
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[name] = tensor
