"""T5 as it learns to translate: sources in, the loss of their targets out, or the next token of what is written."""

from collections.abc import Iterator

from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from lorasp.models.causal_lm import Head
from lorasp.models.t5 import take_pairs
from lorasp.models.task_model import TaskModel
from lorasp.models.writing import Writing
from lorasp.recipe import Recipe, RecipeError


class Seq2SeqLM(TaskModel):
    """A T5ForConditionalGeneration, of whose decoder only the positions asked for reach the head."""

    auto_class = AutoModelForSeq2SeqLM
    is_called = "encoder-decoder"

    def __init__(self, model: PreTrainedModel, *, offload_activations: bool = False) -> None:
        super().__init__(model, offload_activations=offload_activations)
        self._pairs = take_pairs(model)
        head = model.get_output_embeddings()
        model.set_output_embeddings(Head(head.weight, head.bias))

    @classmethod
    def configured(cls, config: PreTrainedConfig, recipe: Recipe) -> PreTrainedConfig:
        if config.model_type != "t5":
            raise RecipeError(
                f"model.path: task {recipe.task} is learned by T5 (t5-base, say); {config.model_type} is of another "
                f"family"
            )
        return config

    def target_modules(self) -> Iterator[nn.Module]:
        """The decoder but for what it reads of the source."""
        for name, module in self.model.decoder.named_modules():
            if not name.endswith(("EncDecAttention.k", "EncDecAttention.v")):
                yield module

    def source_encoder(self) -> nn.Module:
        return self.model.encoder

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        source_lengths: tuple[int, ...],
        target_lengths: tuple[int, ...] = (),
        positions: Tensor | None = None,
        labels: Tensor | None = None,
        score: bool = False,
        example_keys: tuple[int, ...] = (),
        writing: Writing | None = None,
    ) -> Tensor | tuple:
        """input_ids int64 [1, S]: sources one behind the other; decoder_input_ids int64 [1, T]: likewise what their
        targets are predicted from, or, with `writing`, the newest token of each text; -1 where a text starts.

        positions int64 [rows]: places in 0..T-1 whose hidden state predicts, None for all; labels int64 [rows].
        Returns what `Head` returns for them. example_keys: of the pairs' dropout masks. writing: see `Writing`; its
        sources are encoded in its first forward only.
        """
        pairs, keys = self._pairs, example_keys or (0,) * len(source_lengths)
        pairs.sources.lengths, pairs.targets.lengths = source_lengths, target_lengths
        pairs.sources.keys = pairs.targets.keys = keys
        pairs.writing = writing
        config = self.model.config
        start = config.pad_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
        decoder_input_ids = decoder_input_ids.masked_fill(decoder_input_ids < 0, start)
        with self.keeping(input_ids.device):
            encoded = None if writing is None else writing.encoded
            if encoded is None:
                encoded = self.model.encoder(input_ids=input_ids)[0]
            hidden = self.model.decoder(input_ids=decoder_input_ids, encoder_hidden_states=encoded, use_cache=False)[0]
        if writing is not None:
            writing.encoded, writing.written = encoded, writing.written + 1
        hidden = hidden[0] if positions is None else hidden[0, positions]
        if config.scale_decoder_outputs:  # of T5 1.0, whose head is its table
            hidden = hidden * config.d_model**-0.5
        return self.model.get_output_embeddings()(hidden, labels, score)
