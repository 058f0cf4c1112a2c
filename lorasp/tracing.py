"""What a step, or a forward that scores, needs besides what is kept: traced on fake tensors, which have no memory.

Forward and backward run as they are; what each operation makes and frees is counted, and nothing is computed.
"""

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from lorasp.data.batches import Batch
from lorasp.evaluation.scoring import Forward, ScoredRow
from lorasp.live_tensors import LiveTensors
from lorasp.models.build import build_on_meta, units
from lorasp.models.causal_lm import CHUNK_ROWS
from lorasp.models.kept_states import KeptStates
from lorasp.models.recompute import set_recomputation
from lorasp.models.task_model import TaskModel
from lorasp.quantization import ShardedLinear
from lorasp.recipe import Recipe, RecipeError

# The head goes over its labels in chunks, and each from the third on makes and frees what the second did. Its hidden
# states, and their gradients, are those of all labels all the same.
_TRACED_LABELS = 2 * CHUNK_ROWS


class NoPlan(Exception):
    """A model that cannot be traced on fake tensors, and why. It may train all the same."""


class Traces:
    """What plans of one model, method and precision share: models built, and steps traced, are found again."""

    def __init__(self) -> None:
        self._whole: TaskModel | None = None
        self._models: dict[tuple, TaskModel] = {}
        self._fallbacks: dict[TaskModel, str | None] = {}
        self._found: dict[tuple, dict[str, int]] = {}

    def whole(self, recipe: Recipe, config: PreTrainedConfig, dtype: torch.dtype) -> TaskModel:
        """The recipe's model without memory, to be counted, not run. Raises as `build_on_meta`."""
        if self._whole is None:
            self._whole = build_on_meta(config, recipe, dtype, draws=False)
        return self._whole

    def model(
        self, recipe: Recipe, config: PreTrainedConfig, dtype: torch.dtype, layers: Collection[str]
    ) -> TaskModel:
        """Of `whole`, to be run, with no other layers than those of these names (see `layer_kinds`)."""
        key = (frozenset(layers), recipe.training.activation_checkpointing)
        if key not in self._models:
            model = _with_layers(self.whole(recipe, config, dtype), layers)
            _, self._fallbacks[model] = set_recomputation(model.model, recipe.training.activation_checkpointing)
            self._models[key] = model
        return self._models[key]

    def fallback(self, model: TaskModel) -> str | None:
        """Why a model that `model` gave does not recompute as its recipe says; None: it does."""
        return self._fallbacks[model]

    def step(self, model: TaskModel, batch: Batch, *, activations_away: bool) -> dict[str, int]:
        """What `trace` finds of a model that `model` gave; other batches of the same lengths need the same."""
        key = (model, batch.lengths, batch.label_counts, activations_away)
        if key not in self._found:
            self._found[key] = trace(model, batch, activations_away=activations_away)
        return self._found[key]

    def scoring(self, model: TaskModel, forward: Forward, rows: Sequence[ScoredRow]) -> dict[str, int]:
        """What `trace_scoring` finds of a model that `model` gave."""
        key = (model, tuple((len(part.tokens), part.link, part.row is None) for part in forward.parts))
        if key not in self._found:
            self._found[key] = trace_scoring(model, forward, rows)
        return self._found[key]


def layer_kinds(model: TaskModel) -> list[list[str]]:
    """Names of the model's layers, those of one kind together: in one stack, with the same parameters trained.

    Of a LLaMA all layers are of one kind, unless only some have adapters; a T5's first block has a table of its own.
    """
    kinds: dict[tuple, list[str]] = {}
    for name, layer in _layers(model):
        parameters = [(its, tuple(p.shape), p.dtype, p.requires_grad) for its, p in layer.named_parameters()]
        kinds.setdefault((name.rpartition(".")[0], type(layer), *parameters), []).append(name)
    return list(kinds.values())


def largest_layer(model: TaskModel) -> int:
    """Bytes, as stored, of the largest of the model's layers."""
    return max((sum(p.numel() * p.element_size() for p in layer.parameters()) for _, layer in _layers(model)))


def _layers(model: TaskModel) -> Iterator[tuple[str, nn.Module]]:
    """(name within the Hugging Face model, module) of the units that are one of a list."""
    for unit in units(model.model):
        name = unit.name.removesuffix(".")
        if isinstance(model.model.get_submodule(name.rpartition(".")[0]), nn.ModuleList):
            yield name, unit.module


def trace(model: TaskModel, batch: Batch, *, activations_away: bool) -> dict[str, int]:
    """Most bytes of activations up to the end of the head's forward, in backward, and in a source's encoder's.

    Each by itself is a sum over layers; which one is the greatest depends on how many layers of each kind there are.
    Without such an encoder the third is the second.

    activations_away: what is kept for backward waits in the host's memory, and is not counted.
    Raises NoPlan for a model whose code wants to see a value.
    """
    batch = replace(batch, labels=batch.labels[:_TRACED_LABELS])
    model.train()
    model.offload_activations = False
    kept = saved_tensors_hooks(_leave, _return) if activations_away else contextlib.nullcontext()
    with _on_fakes(model, batch.model_inputs(torch.device("cpu"))) as inputs, LiveTensors() as live:
        in_backward: list[int] = []
        with kept, _at_gradient(model.source_encoder(), lambda: in_backward.append(live.take_peak())):
            loss = model(**inputs)
        at_head = live.take_peak()
        loss.backward()
        in_backward.append(live.take_peak())
    return {"peak_at_head": at_head, "peak_in_backward": in_backward[0], "peak_in_encoder": in_backward[-1]}


def trace_scoring(model: TaskModel, forward: Forward, rows: Sequence[ScoredRow]) -> dict[str, int]:
    """Bytes of the keys and values that `forward` leaves for others, and the most of activations beside them.

    Raises NoPlan as `trace` does.
    """
    model.eval()
    states = KeptStates()
    with _on_fakes(model, forward.inputs(rows, states, torch.device("cpu"))) as inputs, LiveTensors() as live:
        with torch.no_grad():
            model(**inputs, score=True, kept_states=states)
        peak = live.take_peak()
    kept = states.nbytes()
    return {"kept_in_scoring": kept, "peak_in_scoring": peak - kept}


@contextlib.contextmanager
def _on_fakes(model: TaskModel, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The inputs as fake tensors, for a model of such. Raises NoPlan for what goes wrong within."""
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=False) as fakes:
        _make_fake(model)
        try:
            yield {
                name: fakes.from_tensor(value) if isinstance(value, Tensor) else value
                for name, value in inputs.items()
            }
        except RecipeError:
            raise
        except Exception as error:  # of another architecture's code, which may want to see a value
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise NoPlan(f"{type(model.model).__name__} cannot be traced without memory ({reason})") from error


def _at_gradient(module: nn.Module | None, call: Callable[[], None]) -> AbstractContextManager:
    """Calls once the gradient of what `module` put out meanwhile is whole."""
    if module is None:
        return contextlib.nullcontext()

    def watch(_: nn.Module, __: Any, output: Any) -> None:
        output[0].register_hook(lambda gradient: call())

    return module.register_forward_hook(watch)


def _with_layers(whole: TaskModel, layers: Collection[str]) -> TaskModel:
    """A copy of `whole`, on the meta device as it is, without its other layers."""
    stacks: dict[str, dict[str, nn.Module]] = {}
    for name, layer in _layers(whole):
        stack, _, index = name.rpartition(".")
        its = stacks.setdefault(stack, {})
        if name in layers:
            its[index] = layer
    lists = {stack: whole.model.get_submodule(stack) for stack in stacks}
    all_of = {stack: modules._modules for stack, modules in lists.items()}
    try:
        for stack, modules in lists.items():
            modules._modules = {str(place): layer for place, layer in enumerate(stacks[stack].values())}
        # Handles to remove hooks by stay what they are: what T5's refer to, tables that are one now, is gone.
        held = [its if isinstance(its, list) else [its] for its in vars(whole.model).values()]
        handles = [its for some in held for its in some if isinstance(its, RemovableHandle)]
        model = copy.deepcopy(whole, {id(handle): handle for handle in handles})
    finally:
        for stack, modules in lists.items():
            modules._modules = all_of[stack]
    if len(stacks) == 1:  # T5 asks its stacks, not its configuration
        text, (its,) = model.model.config.get_text_config(), stacks.values()
        if getattr(text, "layer_types", None):
            text.layer_types = [text.layer_types[int(index)] for index in its]
        text.num_hidden_layers = len(its)
    return model


def _make_fake(model: nn.Module) -> None:
    """Puts fake CPU tensors where parameters and buffers are; a weight in codes is then made of nothing."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    if parameter.requires_grad:  # reduced into a bucket at once, and let go
                        made[id(parameter)].register_post_accumulate_grad_hook(_drop_gradient)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        if isinstance(module, ShardedLinear) and module.quantization.format != "none":
            module.dense_weight = _Dequantized(module)


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _leave(tensor: Tensor) -> Tensor:
    """Fake tensors have one device to be on; a meta tensor stands for what waits in the host's memory."""
    return tensor.to("meta")


def _return(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


class _Dequantized:
    """Stands for a linear's `dense_weight`: new memory of its size."""

    def __init__(self, linear: ShardedLinear) -> None:
        self._shape, self._dtype = (linear.out_features, linear.in_features), linear.dtype

    def __call__(self) -> Any:
        return torch.empty(self._shape, dtype=self._dtype, device="cpu")
