"""4-bit weights as plain parameters: bitsandbytes' numbers to the bit, and nothing of them kept by autograd."""

import pytest
import torch
from bitsandbytes import functional as bnb

from lorasp.live_tensors import LiveTensors
from lorasp.quantization import ShardedLinear
from lorasp.recipe import Quantization

# [out, in]; some not divisible by a block of 64, and the last of more weights than are quantized at once
SHAPES = [(96, 64), (7, 33), (1, 64), (130, 70), (1025, 1027)]


def linear(weight, bias=None, format="nf4", double_quant=True, block_size=64, dtype=torch.float32, trained=False):
    quantization = Quantization(format=format, double_quant=double_quant, block_size=block_size)
    module = ShardedLinear(
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        quantization=quantization,
        dtype=dtype,
        trained=trained,
    )
    module.load(weight, bias)
    return module


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_weight_equals_bitsandbytes_bit_for_bit(shape, format, double_quant, block_size, dtype):
    weight = torch.randn(shape).to(dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type=format, compress_statistics=double_quant)
    reference = bnb.dequantize_4bit(codes, state)
    ours = linear(weight, format=format, double_quant=double_quant, block_size=block_size, dtype=dtype)
    assert ours.dense_weight().dtype == dtype
    assert torch.equal(ours.dense_weight(), reference)


def test_quantizing_makes_no_copies_of_the_whole_weight():
    weight = torch.randn(8 * 2**20).view(2048, -1).bfloat16()
    with LiveTensors() as live:
        module = linear(weight, dtype=torch.float32)
    # fp32 copies of 2^20 weights at a time beside codes and scales; bitsandbytes alone makes five of the whole.
    assert live.peak_bytes < 2 * weight.numel() < 32 * 2**20
    assert live.live_bytes == sum(tensor.nbytes for _, tensor in module.base_tensors())


def test_bytes_are_half_a_byte_a_weight_and_a_byte_a_block():
    module = linear(torch.randn(130, 70))
    assert module.codes.dtype == torch.uint8 and module.codes.numel() == 130 * 70 // 2
    blocks = -(-130 * 70 // 64)
    assert module.scales.dtype == torch.uint8 and module.scales.numel() == blocks
    assert module.scale_scales.numel() == -(-blocks // 256)
    single = linear(torch.randn(130, 70), double_quant=False)
    assert single.scales.dtype == torch.float32 and single.scales.numel() == blocks
    assert not any(parameter.requires_grad for parameter in [*module.parameters(), *single.parameters()])


@pytest.mark.parametrize("format", ["none", "nf4"])
def test_forward_and_input_gradient_equal_a_plain_linear(format):
    module = linear(torch.randn(48, 32), torch.randn(48), format=format)
    x = torch.randn(2, 5, 32, requires_grad=True)
    ours = module(x)
    ours.square().sum().backward()
    y = x.detach().clone().requires_grad_()
    reference = torch.nn.functional.linear(y, module.dense_weight().detach(), module.bias)
    reference.square().sum().backward()
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(x.grad, y.grad)


def test_trained_dense_weight_gets_plain_gradients():
    module = linear(torch.randn(48, 32), torch.randn(48), format="none", trained=True)
    reference = torch.nn.Linear(32, 48)
    reference.load_state_dict({"weight": module.weight.detach(), "bias": module.bias.detach()})
    x = torch.randn(2, 5, 32)
    module(x).square().sum().backward()
    reference(x).square().sum().backward()
    torch.testing.assert_close(module.weight.grad, reference.weight.grad)
    torch.testing.assert_close(module.bias.grad, reference.bias.grad)


def test_autograd_keeps_no_weight_and_no_activation_of_a_frozen_linear():
    module = linear(torch.randn(256, 128))
    x = torch.randn(16, 128, requires_grad=True)
    with LiveTensors() as live:
        y = module(x)
    assert live.live_bytes == y.numel() * 4  # the output alone; a plain linear would hold 256 · 128 · 4 bytes more


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="expected"):
        module = linear(torch.randn(8, 8), format="none")
        module.load(torch.randn(8, 9), None)
