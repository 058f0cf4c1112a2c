"""A Hugging Face decoder with a head that never returns the logits of a batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

# The default options cut chunks of 8 rows: a fifth of the speed (15 against 47 to 70 GFLOP/s on a CPU core).
_CHUNK_ROWS = 128
_CHUNKS = nn.LinearCrossEntropyOptions(batch_chunk_size=_CHUNK_ROWS, chunking_method=None)


class Head(nn.Module):
    """The output projection, `weight` [vocabulary, hidden], possibly tied to the input embedding.

    A module of its own, so that ZeRO-3 gathers the weight for its forward, whichever answer is asked for.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, hidden: Tensor, labels: Tensor | None = None, score: bool = False) -> Tensor | tuple:
        """hidden [rows, hidden], labels int64 [rows].

        Without labels: logits [rows, vocabulary]. With labels: the sum of the cross entropies, in chunks that make
        their gradients in forward. With `score`: (cross entropies fp32 [rows], whether each label is the argmax).
        """
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        if score:
            return self._score(hidden, labels)
        if labels.numel() == 0:  # a rank without labels takes part in every collective all the same
            return hidden.sum() * 0
        return F.linear_cross_entropy(
            hidden, self.weight, labels, linear_bias=self.bias, reduction="sum", options=_CHUNKS
        )

    def _score(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses, correct = [hidden.new_zeros(0, dtype=torch.float32)], [labels.new_zeros(0, dtype=torch.bool)]
        for rows, targets in zip(hidden.split(_CHUNK_ROWS), labels.split(_CHUNK_ROWS), strict=True):
            logits = F.linear(rows, self.weight, self.bias).float()
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
            correct.append(logits.argmax(-1) == targets)
        return torch.cat(losses), torch.cat(correct)


class CausalLM(nn.Module):
    """A Hugging Face causal language model, of which only the positions asked for reach the head."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        head = model.get_output_embeddings()
        model.set_output_embeddings(Head(head.weight, head.bias))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        example_lengths: tuple[int, ...],
        positions: Tensor,
        labels: Tensor | None = None,
        score: bool = False,
    ) -> Tensor | tuple:
        """input_ids and position_ids int64 [1, T]: examples one behind the other, positions restarting at 0.

        positions int64 [rows]: places in 0..T-1 whose hidden state predicts; labels int64 [rows]. Returns what `Head`
        returns for them.
        """
        decoder = self.model.get_decoder()
        hidden = decoder(
            # A passed attention mask, even of ones, or a cache would make examples attend to each other.
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            example_lengths=example_lengths,
        )[0]
        return self.model.get_output_embeddings()(hidden[0, positions], labels, score)
