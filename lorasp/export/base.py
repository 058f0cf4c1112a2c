"""The base's weights, streamed unit by unit into a checkpoint that transformers reads: merged, or in 4 bits."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from lorasp.adapter import AdaptedLinear
from lorasp.checkpoint import save_model
from lorasp.export.adapter import dense_factors
from lorasp.finished_run import FinishedRun
from lorasp.models.build import filled_units
from lorasp.models.causal_lm import CausalLM
from lorasp.models.weights import Checkpoint
from lorasp.quantization import ShardedLinear
from lorasp.whole_files import write_text_whole

_PACKED_EXTRA_BYTES = 2048  # the tables and JSON that bitsandbytes' layout repeats with each linear


def write_merged(
    directory: Path,
    run: FinishedRun,
    model: CausalLM,
    dtype: torch.dtype,
    base: str,
    device: torch.device,
    on_unit: Callable[[], None],
) -> None:
    """W + scale·B·A of every adapted linear, and the rest of the base, in `dtype`.

    model: on meta, and dense where `base` is "original". Raises RecipeError if the base is not the adapter's.
    """

    def merged(linear: ShardedLinear) -> dict[str, Tensor]:
        weight = linear.dense_weight().detach()
        if isinstance(linear, AdaptedLinear):
            # In fp32 whatever the dtype: one rounding, at the end.
            A, B = (factor.to(device) for factor in dense_factors(run.saved, linear))
            weight = torch.addmm(weight.float(), B, A, alpha=linear.scale)
        return {"weight": weight.to(dtype)}

    _write(directory, run, model, merged, dtype, device, on_unit)
    config = _config(run.base)
    config["lorasp"] = {"method": "full"} if run.saved is None else {"merged_into": f"the {base} base", **_origin(run)}
    _write_config(directory, config, dtype)


def write_packed(
    directory: Path, run: FinishedRun, model: CausalLM, device: torch.device, on_unit: Callable[[], None]
) -> None:
    """The base in bitsandbytes' 4-bit layout: the very codes and scales that the adapter was trained on.

    model: on meta. What is not quantized is written in the run's compute precision.
    """

    def packed(linear: ShardedLinear) -> dict[str, Tensor]:
        if linear.quantization.format == "none":
            return {"weight": linear.dense_weight().detach().to(run.dtype)}
        return linear.packed()

    dense = [name for name, linear in _linears(model) if linear.quantization.format == "none"]
    head = next(name for name, module in model.model.named_modules() if module is model.model.get_output_embeddings())
    quantization = run.recipe.quantization
    stored = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.format,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=run.dtype,
        llm_int8_skip_modules=[head, *dense] if dense else None,  # None: the head alone
    )
    _write(directory, run, model, packed, run.dtype, device, on_unit)
    config = _config(run.base) | {"quantization_config": stored.to_dict(), "lorasp": _origin(run)}
    _write_config(directory, config, run.dtype)


def merged_bytes(model: CausalLM, dtype: torch.dtype) -> int:
    """Bytes of `write_merged`'s tensors."""
    return dtype.itemsize * (
        sum(linear.in_features * linear.out_features for _, linear in _linears(model)) + _other_entries(model)
    )


def packed_bytes(model: CausalLM, dtype: torch.dtype) -> int:
    """Bytes of `write_packed`'s tensors, about: what is not quantized in `dtype`."""
    weights = sum(
        tensor.numel() * tensor.element_size()
        for _, linear in _linears(model)
        for name, tensor in linear.base_tensors()
        if name != "bias"
    )
    return weights + _PACKED_EXTRA_BYTES * len(_linears(model)) + dtype.itemsize * _other_entries(model)


def _linears(model: CausalLM) -> list[tuple[str, ShardedLinear]]:
    return [(name, module) for name, module in model.model.named_modules() if isinstance(module, ShardedLinear)]


def _other_entries(model: CausalLM) -> int:
    """Biases, norms, embeddings and head; a tied one once."""
    ours = {
        f"{name}.{part}" for name, _ in _linears(model) for part in ("weight", "codes", "scales", "A", "B", "A_rest")
    }
    return sum(parameter.numel() for name, parameter in model.model.named_parameters() if name not in ours)


def _write(
    directory: Path,
    run: FinishedRun,
    model: CausalLM,
    weight_of: Callable[[ShardedLinear], dict[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    on_unit: Callable[[], None],
) -> None:
    checkpoint = run.open_base()
    tensors = _tensors(model, checkpoint, weight_of, dtype, device, on_unit)
    save_model(directory, tensors, None, prefix="", writes=True)
    run.check_base(checkpoint)


@torch.no_grad()
def _tensors(
    model: CausalLM,
    checkpoint: Checkpoint,
    weight_of: Callable[[ShardedLinear], dict[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    on_unit: Callable[[], None],
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint to be, on the CPU; a unit is freed before the next is filled."""
    once = {name for name, _ in model.model.named_parameters()}  # of a tied pair, the first
    for unit in filled_units(model.model, checkpoint, device=device):
        for prefix, module in unit.module.named_modules(prefix=unit.name.removesuffix(".")):
            dot = f"{prefix}." if prefix else ""
            if isinstance(module, ShardedLinear):
                yield from ((f"{dot}{name}", tensor.cpu()) for name, tensor in weight_of(module).items())
                others = [] if module.bias is None else [("bias", module.bias)]
            else:
                others = [pair for pair in module.named_parameters(recurse=False) if f"{dot}{pair[0]}" in once]
            yield from ((f"{dot}{name}", parameter.detach().to(dtype).cpu()) for name, parameter in others)
        unit.module.to("meta")
        on_unit()


def _config(base: Path) -> dict[str, Any]:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    return config


def _write_config(directory: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    config.pop("torch_dtype", None)  # its name before transformers 5
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_text_whole(directory / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _origin(run: FinishedRun) -> dict[str, Any]:
    info = run.saved.info
    return {"base_model": info.base_model, "base_digest": info.base_digest, "adapter_step": info.step}
