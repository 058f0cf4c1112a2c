"""A BERT-family encoder with a classification head, over examples that stand one behind the other."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from lorasp.dropout import ExampleDropout
from lorasp.glue import GLUE
from lorasp.models.encoder_weights import EncoderCheckpoint
from lorasp.models.task_model import ENCODERS, TaskModel
from lorasp.models.weights import Checkpoint
from lorasp.recipe import Recipe, RecipeError


class SequenceClassifier(TaskModel):
    """transformers' `BertForSequenceClassification` or `RobertaForSequenceClassification`, computed without padding.

    The head is all that follows the last layer: RoBERTa's `classifier.dense` and `classifier.out_proj`, BERT's
    `pooler.dense` and `classifier`. A configuration with one label is a regression.
    """

    auto_class = AutoModelForSequenceClassification
    is_called = "encoder with a classification head"

    def __init__(self, model: PreTrainedModel, *, offload_activations: bool = False) -> None:
        super().__init__(model, offload_activations=offload_activations)
        encoder = model.base_model
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Dropout):
                of_tokens = name.startswith(f"{model.base_model_prefix}.")
                ours = ExampleDropout(name, module.p, of_tokens=of_tokens)
                ours.examples = self._examples
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, ours)
        # RoBERTa's positions start behind that of its padding token.
        self._trains_embeddings = next(encoder.embeddings.parameters()).requires_grad
        self._first_position = 0 if model.config.model_type == "bert" else encoder.embeddings.padding_idx + 1

    @classmethod
    def configured(cls, config: PreTrainedConfig, recipe: Recipe) -> PreTrainedConfig:
        if config.model_type not in ENCODERS or getattr(config, "is_decoder", False):
            raise RecipeError(
                f"model.path: task {recipe.task} needs an encoder ({', '.join(ENCODERS)}), and this is a "
                f"{config.model_type}; give one, or another task"
            )
        longest = config.max_position_embeddings - (0 if config.model_type == "bert" else config.pad_token_id + 1)
        if recipe.data.max_length > longest:
            raise RecipeError(f"data.max_length: this model has positions for {longest} tokens; lower it to that")
        labels = GLUE[recipe.task].labels or ("score",)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.problem_type = "regression" if len(labels) == 1 else "single_label_classification"
        return config

    @classmethod
    def open(cls, directory: Path, config: PreTrainedConfig, recipe: Recipe) -> Checkpoint:
        prefix = ENCODERS[config.model_type]
        return EncoderCheckpoint(directory, config, recipe.seed, prefix=prefix, head=cls._head(config.model_type))

    @staticmethod
    def _head(model_type: str) -> list[str]:
        if model_type == "bert":
            return ["bert.pooler.dense", "classifier"]
        return ["classifier.dense", "classifier.out_proj"]

    @classmethod
    def head_linears(cls, model: PreTrainedModel) -> list[str]:
        return cls._head(model.config.model_type)

    @staticmethod
    def let_gradients_in(model: PreTrainedModel) -> None:
        """`forward` does: of frozen embeddings, no backward then needs anything."""

    def label_modules(self) -> Iterator[nn.Module]:
        yield from map(self.model.get_submodule, self.head_linears(self.model))

    def needless_in_backward(self) -> Iterator[nn.Module]:
        """Of frozen embeddings, all parts."""
        for module in self.model.base_model.embeddings.modules():
            its = list(module.parameters(recurse=False))
            if its and not any(parameter.requires_grad for parameter in its):
                yield module

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor,
        example_lengths: tuple[int, ...],
        firsts: Tensor,
        labels: Tensor,
        score: bool = False,
        example_keys: tuple[int, ...] = (),
    ) -> Tensor:
        """input_ids, position_ids, token_type_ids int64 [1, T]: examples one behind the other, positions from 0.

        firsts int64 [examples]: where each begins, whose first token's hidden state is classified. labels [examples]:
        int64 classes, or fp32 values of a regression. Returns the sum of their cross entropies (nats), or of their
        squared errors, an fp32 scalar; with `score` the logits, fp32 [examples, labels].
        """
        self.hold(example_lengths, example_keys)
        encoder = self.model.base_model
        with self.keeping(input_ids.device):
            # No graph of what is frozen: transformers' checkpointing would have it begin at the embedding.
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._trains_embeddings):
                hidden = encoder.embeddings(
                    input_ids=input_ids,
                    token_type_ids=token_type_ids,
                    position_ids=position_ids + self._first_position,
                )
            if torch.is_grad_enabled():
                hidden.requires_grad_()  # a ZeRO-3 leaf whose input has no gradient fails in backward
            # Without a mask: examples are kept apart by their lengths.
            hidden = encoder.encoder(hidden, attention_mask=None, example_lengths=example_lengths)[0]
        logits = self._classify(hidden[0, firsts].unsqueeze(1)).float()
        if score:
            return logits
        if logits.shape[1] == 1:
            return F.mse_loss(logits[:, 0], labels, reduction="sum")
        return F.cross_entropy(logits, labels, reduction="sum")

    def _classify(self, first: Tensor) -> Tensor:
        """first [examples, 1, hidden] -> [examples, labels]."""
        if self.model.config.model_type == "bert":
            return self.model.classifier(self.model.dropout(self.model.bert.pooler(first)))
        return self.model.classifier(first)
