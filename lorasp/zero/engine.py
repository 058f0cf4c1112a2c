"""The engine: the loss of a micro batch in, an optimizer step out; and the sharded state that it keeps."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lorasp.memory import GATHERED_AT_ONCE
from lorasp.models.task_model import TaskModel
from lorasp.recipe import Training
from lorasp.timing import PartTimer
from lorasp.uncompiled import uncompiled
from lorasp.zero.launch import LIVE, PREFETCH, Ranks
from lorasp.zero.sharding import largest_unit_numel, spare_backward_gathers

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of each trained entry


class Engine:
    """DeepSpeed's ZeRO-3 engine around a sharded model.

    The optimizer is torch's AdamW over each rank's flat vector of trained entries: fp32 master, two moments.
    """

    def __init__(self, ranks: Ranks, model: TaskModel, training: Training) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # One group, no "no decay for 1-D parameters" rule: every compact adapter is 1-D.
        optimizer = torch.optim.AdamW(
            trained,
            lr=training.learning_rate,
            betas=training.betas,
            eps=training.eps,
            weight_decay=training.weight_decay,
            fused=True,
        )
        zero = ranks.accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if zero.get(PREFETCH) == "auto":
            zero[PREFETCH] = largest_unit_numel(model)
            # DeepSpeed gathers so much ahead of every module, also of those without weights: several layers, soon.
            zero.setdefault(LIVE, 2 * zero[PREFETCH])
        self._accelerator = ranks.accelerator
        self._world_size = ranks.world_size
        with uncompiled():  # to see whether the optimizer is Muon, DeepSpeed imports it
            self._engine, _ = ranks.accelerator.prepare(model, optimizer)
        for module in model.needless_in_backward():
            spare_backward_gathers(module)
        self.model = model
        self.timer = PartTimer(ranks.device)
        # Each called before each gather of a unit, reduction and update, in the same order on each rank.
        self.on_progress: list[Callable[[], None]] = []
        self._time_parts()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._groups = [[(names[id(parameter)], parameter) for parameter in group] for group in self._zero.fp16_groups]

    @property
    def _zero(self):
        return self._engine.optimizer

    def _time_parts(self) -> None:
        """gather: until a unit's parameters are there, and so until the slowest rank is; reduce: the last of the
        gradients' sums over ranks, likewise; optimizer: clipping and update.
        """
        for owner, method, part in (
            (self._zero.parameter_offload.get_param_coordinator(), "fetch_sub_module", "gather"),
            (self._zero, "independent_gradient_partition_epilogue", "reduce"),
            (self._zero, "step", "optimizer"),
        ):
            setattr(owner, method, self.timer.timed(part, self._counted(getattr(owner, method))))

    def _counted(self, function: Callable) -> Callable:
        @wraps(function)
        def call(*args, **kwargs):
            for progressed in self.on_progress:
                progressed()
            return function(*args, **kwargs)

        return call

    def __call__(self, **inputs):
        """The model's forward, with ZeRO-3's gathers."""
        return self._engine(**inputs)

    def train_mode(self, training: bool) -> None:
        """Dropout and the timer of a step's parts are on while training."""
        self._engine.train(training)
        self.timer.running = training

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of `loss`; with `last`, reduces over ranks, clips and steps the optimizer.

        DeepSpeed divides by the accumulation steps and averages over the ranks.
        """
        self._accelerator.gradient_state._set_sync_gradients(last)
        self._accelerator.backward(loss)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self._zero.param_groups:
            group["lr"] = learning_rate

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """Steps within leave weights, moments and counters as they were before the first step of all, to the bit.

        At a learning rate of 0 AdamW adds 0 to every weight (and decays by 0); its moments and its step count are set
        back to the zeros that a first step starts from.
        """
        counters = {name: getattr(self._engine, name) for name in ("global_steps", "global_samples", "micro_steps")}
        self.set_learning_rate(0.0)
        yield
        for state in self._zero.optimizer.state.values():
            for tensor in state.values():
                if isinstance(tensor, Tensor):
                    tensor.zero_()
        for name, value in counters.items():
            setattr(self._engine, name, value)

    def step_applied(self) -> bool:
        """Whether the last step changed the weights: DeepSpeed leaves out one whose gradient is NaN or infinite.

        Known on the host, and the same on all ranks: DeepSpeed itself reads the norm once a step.
        """
        return self._engine.was_step_applied()

    def gradient_norm(self) -> Tensor:
        """Norm of the whole gradient at the last step, before clipping, fp32 scalar."""
        return torch.as_tensor(self._engine.get_global_grad_norm())

    # `fp32_partitioned_groups_flat[g]` is this rank's part of group g: each parameter's shard of
    # `partition_numel()` elements, padded at the end of the last rank, one after the other.

    def trained_values(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 values on the CPU in the parameter's shape) of every trained parameter, from the masters.

        Collective: every rank must exhaust it. Gathers a bucket of parameters at a time.
        """
        yield from self._gathered(self._zero.fp32_partitioned_groups_flat)

    def moments(self) -> Iterator[tuple[str, str, Tensor]]:
        """(`exp_avg` or `exp_avg_sq`, name, fp32 values) of every trained parameter, once a step was taken.

        Collective, as `trained_values`.
        """
        states = [self._zero.optimizer.state[flat] for flat in self._zero.fp32_partitioned_groups_flat]
        for kind in MOMENTS:
            for name, values in self._gathered([state[kind] for state in states]):
                yield kind, name, values

    def _gathered(self, flats: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
        for flat, group in zip(flats, self._groups, strict=True):
            start, bucket = 0, []
            for name, parameter in group:
                bucket.append((name, parameter))
                length = sum(p.partition_numel() for _, p in bucket)
                if length >= GATHERED_AT_ONCE or parameter is group[-1][1]:
                    part = flat[start : start + length].detach()
                    whole = part.new_empty(self._world_size * length)
                    dist.all_gather_into_tensor(whole, part)
                    yield from _cut(whole.view(self._world_size, length).cpu(), bucket)
                    start, bucket = start + length, []

    @torch.no_grad()
    def set_trained_values(self, values: Mapping[str, Tensor]) -> None:
        """Sets this rank's masters to `values` (by name, fp32, whole), of which the compute copies are roundings."""
        for flat, group in zip(self._zero.fp32_partitioned_groups_flat, self._groups, strict=True):
            start = 0
            for name, parameter in group:
                length = parameter.partition_numel()
                part = values[name].flatten()[dist.get_rank() * length :][:length]  # the last rank's is padded
                flat[start : start + len(part)].copy_(part)
                start += length

    @torch.no_grad()
    def restore(self, read: Callable[[str, str, int, int], Tensor], step: int) -> None:
        """Puts masters, moments and compute copies where they were after optimizer step `step`. Collective.

        read: gives elements start to stop of a parameter's flat fp32 vector, from (`master`, `exp_avg` or
        `exp_avg_sq`; name; start; stop). A rank reads its own part only.
        """
        self._zero._partition_all_parameters()  # what was gathered ahead, or stays gathered, is of the old values
        self._zero.invalidate_secondary_tensor()  # and so is the node's set of shards
        for flat, group in zip(self._zero.fp32_partitioned_groups_flat, self._groups, strict=True):
            moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            start = 0
            for name, parameter in group:
                length = parameter.partition_numel()
                first = dist.get_rank() * length
                last = min(first + length, parameter.ds_numel)  # the last rank's part is padded
                if first < last:
                    for kind, vector in (("master", flat), *moments.items()):
                        vector[start : start + last - first].copy_(read(kind, name, first, last))
                parameter.ds_tensor.view(-1).copy_(flat[start : start + length])
                start += length
            # AdamW keeps its count of steps as a tensor, beside the parameter where it is fused.
            count = torch.tensor(float(step), device=flat.device)
            self._zero.optimizer.state[flat] = {"step": count, **moments}
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def optimizer_state_bytes(self) -> int:
        """Bytes that this rank's optimizer holds: fp32 masters and every tensor of AdamW's state, as allocated."""
        return sum(_bytes(flat) for flat in self._zero.fp32_partitioned_groups_flat) + sum(
            _bytes(tensor)
            for state in self._zero.optimizer.state.values()
            for tensor in state.values()
            if isinstance(tensor, Tensor)
        )

    def optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(`master`, `exp_avg` or `exp_avg_sq`; this rank's tensor), for counts and dtypes."""
        for flat in self._zero.fp32_partitioned_groups_flat:
            yield "master", flat
            for name, tensor in self._zero.optimizer.state[flat].items():
                if name != "step":
                    yield name, tensor

    def gradient_bytes(self) -> int:
        """Bytes of this rank's gradient shards and of the bucket in which they are reduced."""
        held = _bytes(self._zero.grad_partitions_flat_buffer)
        for buckets in getattr(self._zero, "ipg_buckets", {}).values():
            if buckets.buffer is not None:
                held += _bytes(buckets.buffer)
        return held


def _cut(whole: Tensor, bucket: list[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
    """`whole` [ranks, elements of the bucket on a rank] into the bucket's parameters, without the padding."""
    offset = 0
    for name, parameter in bucket:
        length = parameter.partition_numel()
        values = whole[:, offset : offset + length].reshape(-1)[: parameter.ds_numel]
        yield name, values.view(parameter.ds_shape)
        offset += length


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
