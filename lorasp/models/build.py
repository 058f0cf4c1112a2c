"""From a configuration to a sharded model, unit by unit, so that no rank ever holds the whole of it.

Units are the decoder layers (the classes that a model lists as not to be split) and each module outside them with
parameters of its own: embedding, final norm, head. A rank's peak while loading is its own shard and one unit.
"""

import copy
import re
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from lorasp.adapter import AdaptedLinear, find_targets, trained_linears
from lorasp.head import SelectedLinear
from lorasp.host_memory import return_freed_memory
from lorasp.models.attention import ATTENTION
from lorasp.models.classes import model_class
from lorasp.models.task_model import TaskModel
from lorasp.models.weights import Checkpoint
from lorasp.quantization import ShardedLinear
from lorasp.recipe import Quantization, Recipe, RecipeError


@dataclass(frozen=True)
class Unit:
    """A part of the model that is filled and sharded at once. name: with the trailing dot, or empty."""

    name: str
    module: nn.Module


def build_on_meta(
    config: PreTrainedConfig, recipe: Recipe, dtype: torch.dtype, attention: str = ATTENTION, *, draws: bool = True
) -> TaskModel:
    """The model with its linears replaced and adapters attached; every base parameter is on the meta device.

    attention: transformers' name of another implementation, for one that keeps a cache. draws: False where only sizes
    are asked for, and adapters need neither their start nor their S.

    Raises RecipeError if the architecture, or a target module, is not there, or if the checkpoint is quantized in
    another way than the recipe says.
    """
    kept_dense = _check_stored_quantization(config, recipe.quantization)
    kind = model_class(recipe)
    config = kind.configured(copy.deepcopy(config), recipe)
    vars(config).pop("quantization_config", None)  # how the checkpoint is stored is `fill_and_shard`'s matter
    try:
        # Buffers are made for real: rotary frequencies are computed, not loaded.
        with init_empty_weights(include_buffers=False):
            model = kind.auto_class.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=recipe.model.trust_remote_code
            )
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"model.path: {config.model_type} is no {kind.is_called} here ({reason})") from None
    except KeyError as error:
        if error.args != (attention,):
            raise
        raise RecipeError(
            f"model.path: {config.model_type} has attention of its own kinds only: not supported"
        ) from None
    # Registering on meta made a copy of each tied parameter.
    model.tie_weights()
    _replace_linears(model, kind.head_linears(model), recipe, dtype, kept_dense, recipe.seed if draws else None)
    model.requires_grad_(recipe.method == "full")
    for linear in trained_linears(model):
        for parameter in map(linear.get_parameter, linear.trained_parts):
            parameter.requires_grad_(True)
    kind.let_gradients_in(model)
    return kind(model, offload_activations=recipe.training.offload_activations)


def units(model: PreTrainedModel) -> Iterator[Unit]:
    """The model's units in order; together they hold each parameter once."""
    whole, embedding = set(model._no_split_modules or ()), model.get_input_embeddings()
    layers = [
        (name, module)
        for name, module in model.named_modules()
        # A BERT's embeddings are not to be split either; but their input has no gradient, as a leaf's must.
        if type(module).__name__ in whole and not any(part is embedding for part in module.modules())
    ]
    if not layers:
        raise RecipeError(f"model.path: {type(model).__name__} names no layers that could be sharded one by one")
    inside = tuple(f"{name}." for name, _ in layers)
    for name, module in model.named_modules():
        if any(module is layer for _, layer in layers):
            yield Unit(f"{name}.", module)
        elif not name.startswith(inside) and next(module.parameters(recurse=False), None) is not None:
            yield Unit(f"{name}." if name else "", module)


def call_within_layers(model: PreTrainedModel, function: Callable[[], None]) -> None:
    """Has `function` called before each part of a layer (attention, MLP, norms) that runs as a module of its own.

    A layer of autograd functions (recompute.py) has none.
    """
    for unit in units(model):
        for part in unit.module.children():
            part.register_forward_pre_hook(lambda *_: function())


def fill_and_shard(
    model: TaskModel,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    rank: int,
    world_size: int,
    shard: Callable[[nn.Module], None],
    bring_to_first: Callable[[Tensor, int], None],
    broadcast: Callable[[Tensor], None],
    keep: Callable[[str, dict[str, Tensor]], None] | None = None,
) -> None:
    """Streams the checkpoint into the model: each unit is read, quantized, moved to `device` and sharded in turn.

    The ranks share out a unit's linears, each whole: double quantization takes a mean over a tensor. What this rank
    does not read it allocates. `bring_to_first` gives rank 0 what another rank (its second argument) quantized, from
    where `shard` hands the unit out, and `broadcast` the buffers that stay whole. `keep`, for rank 0, is given each
    unit's name and what is quantized of it, in bitsandbytes' layout.

    Raises RecipeError naming the tensors that are missing, unexpected or of another shape, before any is read.
    """
    for unit in filled_units(model.model, checkpoint, device=device, rank=rank, world_size=world_size, stays=False):
        for name, owner in _readers(unit, world_size, checkpoint).items():
            if owner != 0:
                for _, tensor in model.model.get_submodule(name).filled_tensors():
                    bring_to_first(tensor, owner)
        if keep is not None:
            keep(unit.name, _packed(unit))
        for _, buffer in _scale_buffers(unit.module):
            broadcast(buffer)
        shard(unit.module)
        return_freed_memory()


def filled_units(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    stays: bool = True,
) -> Iterator[Unit]:
    """The units, each filled as `fill_and_shard` says just before it is given. Raises RecipeError.

    stays: False where the caller cuts a unit up before it takes the next one. What is dense may then be the file's own
    mapping: an embedding would otherwise be there twice, at the height of loading.
    """
    _check_names(model, checkpoint)
    placed: dict[int, nn.Parameter] = {}  # a tied parameter is filled once and shared again
    for unit in units(model):
        owners = _readers(unit, world_size, checkpoint)
        for prefix, module in unit.module.named_modules(prefix=unit.name.removesuffix(".")):
            reads = owners.get(prefix, 0) == rank
            dot = f"{prefix}." if prefix else ""
            tensors = checkpoint.read(_stored_names(module, dot, checkpoint)) if reads else {}
            _fill(module, dot, tensors, placed, device, reads, stays)
            del tensors
        yield unit


def _linears(unit: Unit) -> Iterator[tuple[str, ShardedLinear]]:
    for name, module in unit.module.named_modules(prefix=unit.name.removesuffix(".")):
        if isinstance(module, ShardedLinear):
            yield name, module


def _packed(unit: Unit) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, linear in _linears(unit)
        if linear.quantization.format != "none"
        for key, tensor in linear.packed().items()
    }


def _is_quantized_here(name: str, linear: ShardedLinear, checkpoint: Checkpoint) -> bool:
    return linear.quantization.format != "none" and not _is_packed(linear, f"{name}.", checkpoint.names())


def _readers(unit: Unit, world_size: int, checkpoint: Checkpoint) -> dict[str, int]:
    """The rank that reads and quantizes each linear of the unit, about equally many weights a rank.

    Rank 0 reads all that nothing needs to be computed of.
    """
    load = [0] * world_size
    owners = {}
    sizes = {name: linear.in_features * linear.out_features for name, linear in _linears(unit)}
    for name, linear in sorted(_linears(unit), key=lambda named: -sizes[named[0]]):
        # The least loaded; of equally loaded ones the last, as rank 0 has the rest of the work.
        owners[name] = 0
        if _is_quantized_here(name, linear, checkpoint):
            owners[name] = min(range(world_size), key=lambda rank: (load[rank], -rank))
            load[owners[name]] += sizes[name]
    return owners


def _fill(
    module: nn.Module,
    prefix: str,
    tensors: dict[str, Tensor],
    placed: dict[int, nn.Parameter],
    device: torch.device,
    reads: bool,
    stays: bool,
) -> None:
    if isinstance(module, ShardedLinear):
        if reads:
            _load_linear(module, prefix, tensors, device, stays)
        else:
            module.allocate(device)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            if id(parameter) not in placed:
                if reads:
                    value = tensors[f"{prefix}{name}"].to(device=device, dtype=parameter.dtype, copy=stays)
                else:
                    value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                placed[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            module._parameters[name] = placed[id(parameter)]
        else:  # drawn, or read from an adapter: on the CPU so far
            parameter.data = parameter.data.to(device)
    for name, buffer in list(module.named_buffers(recurse=False)):
        module._buffers[name] = buffer.to(device)


def _load_linear(
    module: ShardedLinear, prefix: str, tensors: dict[str, Tensor], device: torch.device, stays: bool
) -> None:
    """stays: copies, so that nothing keeps the file's mapping alive."""
    bias = tensors.get(f"{prefix}bias")
    if bias is not None:
        bias = bias.to(device=device, dtype=module.dtype, copy=stays)
    if _is_packed(module, prefix, tensors):
        packed = {name: tensors[f"{prefix}{name}"].to(device=device, copy=stays) for name in module.packed_shapes()}
        try:
            module.load_packed(packed, bias)
        except ValueError as error:
            raise RecipeError(f"model.path: {prefix}weight is stored {error}") from None
        return
    copies = stays and module.quantization.format == "none"  # else new memory is made of it, and it is let go
    module.load(tensors[f"{prefix}weight"].to(device=device, copy=copies), bias)


def _is_packed(module: ShardedLinear, prefix: str, names: Container[str]) -> bool:
    """Whether the checkpoint holds this linear's weight in bitsandbytes' 4-bit layout."""
    return module.quantization.format != "none" and f"{prefix}weight.absmax" in names


def _scale_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for linear in module.modules():
        if isinstance(linear, ShardedLinear):
            yield from ((name, tensor) for name, tensor in linear.base_tensors() if name.startswith("scale_"))


def _check_stored_quantization(config: PreTrainedConfig, ours: Quantization) -> list[str]:
    """Patterns of the linears that a 4-bit checkpoint keeps dense; none for a checkpoint that is not quantized.

    Raises RecipeError unless the checkpoint is dense or in the 4-bit format that the recipe asks for.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return []
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if not stored.get("load_in_4bit"):
        raise RecipeError(
            f"model.path: this checkpoint is quantized already ({stored.get('quant_method', 'unknown method')}), and "
            f"of such only bitsandbytes' 4-bit ones are read; give the unquantized model"
        )
    # What is not written has bitsandbytes' default.
    format, double_quant = stored.get("bnb_4bit_quant_type", "fp4"), bool(stored.get("bnb_4bit_use_double_quant"))
    if (format, double_quant) != (ours.format, ours.double_quant):
        raise RecipeError(
            f"quantization: the weights of model.path are in {format} already, with{'' if double_quant else 'out'} "
            f"double quantization, which is not what the recipe asks for; set quantization.format={format} "
            f"quantization.double_quant={str(double_quant).lower()}, or give the unquantized model"
        )
    if ours.init == "residual":
        raise RecipeError(
            "quantization.init: the weights of model.path are in 4 bits already, so what was lost is not known; use "
            "init: plain, or give the unquantized model"
        )
    if stored.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        raise RecipeError("model.path: this checkpoint packs its codes in another type than uint8; save it with uint8")
    return stored.get("llm_int8_skip_modules") or []


def _replace_linears(
    model: PreTrainedModel,
    head: list[str],
    recipe: Recipe,
    dtype: torch.dtype,
    kept_dense: list[str],
    seed: int | None,
) -> None:
    """head: names of the linears that are trained beside adapters."""
    output = model.get_output_embeddings()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    }
    targets: set[str] = set()
    if recipe.method != "full":
        adaptable = {name: linear for name, linear in linears.items() if name not in head}
        targets = find_targets(adaptable, recipe.adapter.target_modules)
    drawn = {"strategy": recipe.selection.strategy, "seed": seed}
    for name, linear in linears.items():
        quantized = name not in head and should_convert_module(name, kept_dense)
        quantization = recipe.quantization if quantized else Quantization(format="none")
        common = {"bias": linear.bias is not None, "quantization": quantization, "dtype": dtype}
        if name in targets:
            new = AdaptedLinear(
                name,
                linear.in_features,
                linear.out_features,
                **common,
                adapter=recipe.adapter,
                fraction=recipe.effective_fraction,
                **drawn,
            )
        elif name in head and recipe.method != "full":
            del common["quantization"]
            fraction = 1.0 if recipe.adapter.head == "whole" else recipe.effective_fraction
            new = SelectedLinear(name, linear.in_features, linear.out_features, **common, fraction=fraction, **drawn)
        else:
            new = ShardedLinear(linear.in_features, linear.out_features, **common, trained=recipe.method == "full")
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)


def stored_names(unit: Unit, checkpoint: Checkpoint) -> list[str]:
    """Names of the checkpoint's tensors that the unit's base is made of."""
    return [name for name in _stored_shapes(unit, checkpoint) if name in checkpoint.names()]


def _stored_names(module: nn.Module, prefix: str, checkpoint: Checkpoint) -> list[str]:
    return [name for name in _stored_shapes_of(module, prefix, checkpoint) if name in checkpoint.names()]


def _stored_shapes(unit: Unit, checkpoint: Checkpoint) -> dict[str, tuple[int, ...] | None]:
    """Names under which the checkpoint stores the unit's base, and their shapes; None where any will do."""
    shapes: dict[str, tuple[int, ...] | None] = {}
    for prefix, module in unit.module.named_modules(prefix=unit.name.removesuffix(".")):
        shapes |= _stored_shapes_of(module, f"{prefix}." if prefix else "", checkpoint)
    return shapes


def _stored_shapes_of(module: nn.Module, prefix: str, checkpoint: Checkpoint) -> dict[str, tuple[int, ...] | None]:
    """Of a module's own parameters, without its submodules'."""
    if not isinstance(module, ShardedLinear):
        return {f"{prefix}{name}": tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    if _is_packed(module, prefix, checkpoint.names()):
        shapes = {f"{prefix}{name}": shape for name, shape in module.packed_shapes().items()}
    else:
        shapes = {f"{prefix}weight": (module.out_features, module.in_features)}
    return shapes if module.bias is None else shapes | {f"{prefix}bias": (module.out_features,)}


def _check_names(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    expected: dict[str, tuple[int, ...] | None] = {}
    for unit in units(model):
        expected |= _stored_shapes(unit, checkpoint)
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    missing = sorted(set(expected) - checkpoint.names() - tied)
    ignorable = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$"]
    unexpected = sorted(
        name
        for name in checkpoint.names() - set(expected) - tied  # T5 files may have the table under three names
        if not any(re.search(pattern, name) for pattern in ignorable)
    )
    wrong = [
        f"{name} is {list(checkpoint.shape(name))}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in checkpoint.names() and shape is not None and checkpoint.shape(name) != shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", wrong))
        if names
    ]
    if problems:
        raise RecipeError(
            f"model.path: {checkpoint.directory} does not fit {type(model).__name__}: tensors {'; '.join(problems)}"
        )
