"""Sharding a unit of the model while it is built, and counting what each rank then holds."""

import deepspeed
from deepspeed.utils import get_z3_leaf_modules, set_z3_leaf_module
from torch import Tensor, nn
from torch import distributed as dist


def shard_unit(unit: nn.Module, config: dict) -> None:
    """Cuts every parameter of `unit` over the ranks; rank 0's values are the ones that count.

    Each rank keeps ⌈n/N⌉ elements of a parameter of n elements. A unit with submodules becomes a ZeRO-3 leaf: its
    parameters are gathered together, one collective a dtype, and not submodule by submodule.
    """
    # An embedding whose weight is trained must not be one: DeepSpeed frees a leaf without differentiable inputs before
    # its gradient arrives.
    set_z3_leaf_module(unit, any(True for _ in unit.children()))
    deepspeed.zero.Init(module=unit, config_dict_or_path=config)  # becomes sharded by being made
    for name, parameter in unit.named_parameters():
        if parameter.ds_tensor.dtype != parameter.dtype:
            raise AssertionError(f"{name}: sharding turned {parameter.dtype} into {parameter.ds_tensor.dtype}")


def broadcast_buffer(tensor: Tensor) -> None:
    """Rank 0's values of a small tensor that stays whole on every rank."""
    dist.broadcast(tensor, 0)


def largest_unit_numel(model: nn.Module) -> int:
    """Elements, as stored, of the largest unit that is gathered at once (a decoder layer), over all ranks."""
    return max(sum(p.ds_numel for p in unit.parameters()) for unit in get_z3_leaf_modules(model))


def shard_bytes(parameter: nn.Parameter) -> int:
    """Bytes that this rank keeps of a parameter: its shard, with padding."""
    return parameter.ds_tensor.numel() * parameter.ds_tensor.element_size()


def whole(parameter: nn.Parameter) -> Tensor:
    """The values of a parameter on every rank, in its shape. Collective where it is sharded.

    From the shards themselves: DeepSpeed refuses to gather what it gathers ahead for the next step (its "param in
    flight"), and a save comes between two steps.
    """
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    shard = parameter.ds_tensor
    values = shard.new_empty(dist.get_world_size() * shard.numel())
    dist.all_gather_into_tensor(values, shard)
    return values[: parameter.ds_numel].view(parameter.ds_shape)


def gathered(parameter: nn.Parameter):
    """Context in which a sharded parameter is whole on every rank. Collective; changes to it are not kept."""
    return deepspeed.zero.GatheredParameters(parameter)
