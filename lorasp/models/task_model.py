"""A Hugging Face model as the trainer, the planner and the engine see it, whatever it learns."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lorasp.adapter import adapted_linears
from lorasp.dropout import ExamplesAtHand
from lorasp.models.weights import Checkpoint
from lorasp.recipe import Recipe

# model_type -> the name that the encoder has in transformers' classifiers of it.
ENCODERS = {"bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta"}


class TaskModel(nn.Module, ABC):
    """Its forward takes what `model_inputs` of its task's batches give, and returns the batch's summed loss; with
    `score=True` what its task's evaluation asks.

    auto_class: transformers' class that builds it. is_called: in messages. offload_activations: what is kept for
    backward waits in the host's memory (on a CPU it is there already).
    """

    auto_class: ClassVar[type]
    is_called: ClassVar[str]

    def __init__(self, model: PreTrainedModel, *, offload_activations: bool = False) -> None:
        super().__init__()
        self.model = model
        self.offload_activations = offload_activations
        self._examples = ExamplesAtHand()
        for linear in adapted_linears(model):
            linear.examples = self._examples

    @classmethod
    @abstractmethod
    def configured(cls, config: PreTrainedConfig, recipe: Recipe) -> PreTrainedConfig:
        """The configuration to build by, in place. Raises RecipeError for a model of another family."""

    @classmethod
    def open(cls, directory: Path, config: PreTrainedConfig, recipe: Recipe) -> Checkpoint:
        """The checkpoint in `directory` under the names of `auto_class`. Raises RecipeError for a damaged one."""
        return Checkpoint(directory)

    @classmethod
    def head_linears(cls, model: PreTrainedModel) -> list[str]:
        """Names of the linears that are no target of adapters, but trained beside them."""
        return []

    @staticmethod
    def let_gradients_in(model: PreTrainedModel) -> None:
        """Has the first layer's input carry a gradient: a ZeRO-3 leaf whose input has none fails in backward."""
        model.enable_input_require_grads()

    def label_modules(self) -> Iterator[nn.Module]:
        """Modules that only labelled positions reach: of a language model, its head. All others meet every token."""
        yield self.model.get_output_embeddings()

    def target_modules(self) -> Iterator[nn.Module]:
        """Modules that only targets reach, each of whose tokens is a label, where a source's reach all the others."""
        yield from ()

    def source_encoder(self) -> nn.Module | None:
        """The module that all layers of a source's encoder are in, where the model has layers of two kinds."""
        return None

    def needless_in_backward(self) -> Iterator[nn.Module]:
        """Modules with weights that no backward reads, so that nobody gathers them for it.

        Of a language model, a frozen embedding, and a frozen head, whose gradients are made in forward.
        """
        for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            if not any(parameter.requires_grad for parameter in module.parameters()):
                yield module

    def hold(self, example_lengths: tuple[int, ...], example_keys: tuple[int, ...]) -> None:
        """The examples of the forward that begins; their dropout masks follow from the keys."""
        self._examples.lengths, self._examples.keys = example_lengths, example_keys or (0,) * len(example_lengths)

    def keeping(self, device: torch.device) -> AbstractContextManager:
        """The context of what keeps activations for backward."""
        if not self.offload_activations:
            return contextlib.nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")
