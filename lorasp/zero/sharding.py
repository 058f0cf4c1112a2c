"""Sharding a unit of the model while it is built, and counting what each rank then holds."""

from collections.abc import Iterable

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import MultipleAllGatherHandles, ZeroParamStatus
from deepspeed.utils import get_z3_leaf_modules, groups, set_z3_leaf_module
from torch import Tensor, nn
from torch import distributed as dist

from lorasp.recipe_deepspeed import SHARD_GROUP

# Bytes from which a parameter is gathered by a collective of its own: the start of one no longer matters.
_LARGE = 2**24


def shard_unit(unit: nn.Module, config: dict) -> None:
    """Cuts every parameter of `unit` over the ranks; rank 0's values are the ones that count.

    Each rank keeps ⌈n/N⌉ elements of a parameter of n elements. A unit with submodules becomes a ZeRO-3 leaf: its
    parameters are gathered together, one collective a dtype, and not submodule by submodule.
    """
    # An embedding whose weight is trained must not be one: DeepSpeed frees a leaf without differentiable inputs before
    # its gradient arrives.
    set_z3_leaf_module(unit, any(True for _ in unit.children()))
    # Becomes sharded by being made.
    deepspeed.zero.Init(module=unit, config_dict_or_path=config, zero_param_parallel_group=_node_group(config))
    for name, parameter in unit.named_parameters():
        _gather_large_ones_alone(parameter)
        if parameter.ds_tensor.dtype != parameter.dtype:
            raise AssertionError(f"{name}: sharding turned {parameter.dtype} into {parameter.ds_tensor.dtype}")


def keep_unit_whole(unit: nn.Module, config: dict) -> None:
    """Gives every rank rank 0's values of what is frozen in `unit`, and shards what is trained (ZeRO's stage 2).

    A frozen parameter becomes a buffer, which ZeRO leaves alone: registered as a parameter it would be sharded.
    """
    for module in unit.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                dist.broadcast(parameter.data, 0)
                del module._parameters[name]
                module.register_buffer(name, parameter)
    shard_unit(unit, config)


def _node_group(config: dict) -> dist.ProcessGroup | None:
    """The ranks that hold a whole set of shards among them; None where only all of them do.

    Made once: each Init would make groups of its own, and DeepSpeed refuses the second time.
    """
    size = config["zero_optimization"].get(SHARD_GROUP, 1)
    if size == 1:
        return None
    if groups._get_zero_param_intra_parallel_group() is None:
        groups._create_zero_param_parallel_group(size)
    return groups._get_zero_param_intra_parallel_group()


def _gather_large_ones_alone(parameter: nn.Parameter) -> None:
    """Keeps DeepSpeed from gathering into one buffer and copying each parameter out of it, where that is costly.

    What is gathered alone is used where it arrived. The buffer of several lives until the last of them is used: an
    embedding that was gathered ahead together with the norm before it was there twice, at the height of a step.
    """
    gather_together = parameter.all_gather_coalesced

    def all_gather_coalesced(parameters: Iterable[nn.Parameter], **how):
        # In the same order on every rank, as DeepSpeed has it: what comes is a set.
        parameters = sorted(parameters, key=lambda p: p.ds_id)
        large = [p for p in parameters if p.ds_numel * p.element_size() >= _LARGE]
        small = [p for p in parameters if p.ds_numel * p.element_size() < _LARGE]
        # On one rank the shard is the whole.
        in_place = dist.get_backend() == "gloo" and dist.get_world_size() > 1
        alone = _BroadcastGather if in_place else lambda p: gather_together([p], **how)
        handles = [*map(alone, large), *([gather_together(small, **how)] if small else [])]
        return handles[0] if len(handles) == 1 else MultipleAllGatherHandles(handles)

    parameter.all_gather_coalesced = all_gather_coalesced


class _BroadcastGather:
    """A gather on its way, as DeepSpeed handles it: each rank broadcasts its shard into its place of the whole.

    Gloo's own all-gather receives into memory of its own and copies from there: twice the bytes, 1.7 times as long.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter, shard = parameter, parameter.ds_tensor
        parameter.ds_status = ZeroParamStatus.INFLIGHT
        world_size = dist.get_world_size()
        self._whole = shard.new_empty(world_size * shard.numel())
        places = self._whole.chunk(world_size)
        places[dist.get_rank()].copy_(shard)
        self._works = [dist.broadcast(place, rank, async_op=True) for rank, place in enumerate(places)]

    def wait(self, handle_dependency: bool = True) -> None:
        """handle_dependency: between streams, which a CPU has not."""
        for work in self._works:
            work.wait()
        if self._works:  # several modules may wait for the same gather
            self._parameter.data = self._whole[: self._parameter.ds_numel].view(self._parameter.ds_shape)
            self._parameter.ds_status = ZeroParamStatus.AVAILABLE
            self._works, self._whole = [], None


def spare_backward_gathers(module: nn.Module) -> None:
    """Frees a module whose backward needs none of its weights from being gathered for it.

    ZeRO-3 gathers whatever had a forward. To be called once the engine has put its hooks.
    """
    for hooks, name in (
        (module._forward_hooks, "_pre_backward_module_hook"),
        (module._forward_pre_hooks, "_post_backward_module_hook"),
    ):
        for key in [key for key, hook in hooks.items() if hook.__name__ == name]:
            del hooks[key]


def bring_to_first(tensor: Tensor, owner: int) -> None:
    """Gives rank 0 the values that rank `owner` has of `tensor`; other ranks do nothing."""
    if dist.get_rank() == owner:
        dist.send(tensor.detach(), 0)
    elif dist.get_rank() == 0:
        dist.recv(tensor.detach(), owner)


def broadcast_buffer(tensor: Tensor) -> None:
    """Rank 0's values of a small tensor that stays whole on every rank."""
    dist.broadcast(tensor, 0)


def largest_unit_numel(model: nn.Module) -> int:
    """Elements, as stored, of the largest unit that is gathered at once (a decoder layer), over all ranks."""
    return max(sum(p.ds_numel for p in unit.parameters()) for unit in get_z3_leaf_modules(model))


def shard_bytes(parameter: nn.Parameter) -> int:
    """Bytes that this rank keeps of a parameter: its shard with padding, and its part of the node's set if any.

    Of one that stays whole: all of it, besides the shard if it has one.
    """
    shards = (getattr(parameter, name, None) for name in ("ds_tensor", "ds_secondary_tensor"))
    whole = parameter.data if getattr(parameter, "ds_persist", True) else None
    kept = [*shards, whole]
    return sum(shard.numel() * shard.element_size() for shard in kept if shard is not None)


def whole(parameter: nn.Parameter) -> Tensor:
    """The values of a parameter on every rank, in its shape. Collective where it is sharded.

    From the shards themselves: DeepSpeed refuses to gather what it gathers ahead for the next step (its "param in
    flight"), and a save comes between two steps.
    """
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    # One that waits in the host's memory (offload_param) is on no device that nccl knows.
    shard = parameter.ds_tensor.to(get_accelerator().current_device_name())
    values = shard.new_empty(dist.get_world_size() * shard.numel())
    dist.all_gather_into_tensor(values, shard)
    return values[: parameter.ds_numel].view(parameter.ds_shape)


def gathered(parameter: nn.Parameter):
    """Context in which a sharded parameter is whole on every rank. Collective; changes to it are not kept."""
    return deepspeed.zero.GatheredParameters(parameter)
