"""A Hugging Face decoder with a head that never returns the logits of a batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lorasp.models.kept_states import KeptStates
from lorasp.models.task_model import ENCODERS, TaskModel
from lorasp.quantization import linear_into
from lorasp.recipe import Recipe, RecipeError

# Settings by which some architectures change the logits behind the head's back.
_UNSUPPORTED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")

# Rows of logits at a time: 64 MiB in fp32 for a vocabulary of 128 k. Chunks of 8 would give a fifth of the speed (15
# against 47 to 70 GFLOP/s on a CPU core).
CHUNK_ROWS = 128
# And of those at a time on a CPU, so that all passes over them find them in its cache. On a GPU passes cost launches,
# of which there would be 16 times as many.
_CACHED_ROWS = 8


class Head(nn.Module):
    """The output projection, `weight` [vocabulary, hidden], possibly tied to the input embedding.

    A module of its own, so that ZeRO-3 gathers the weight for its forward, whichever answer is asked for.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, hidden: Tensor, labels: Tensor | None = None, score: bool = False) -> Tensor | tuple:
        """hidden [rows, hidden], labels int64 [rows].

        Without labels: logits [rows, vocabulary]. With labels: the sum of the cross entropies, an fp32 scalar in any
        compute precision; of no label 0, and gradients of 0, since all ranks reduce one of each weight. With `score`:
        (cross entropies fp32, whether each label is the argmax), in the shape of labels, which may then be several a
        row, [rows, labels].
        """
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        if score:
            return self._score(hidden, labels)
        return _CrossEntropySum.apply(hidden, self.weight, self.bias, labels)

    def _score(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        wide = _summed_in(hidden)
        losses, correct = [hidden.new_zeros(0, dtype=wide)], [labels.new_zeros(0, dtype=torch.bool)]
        several = labels if labels.dim() == 2 else labels.unsqueeze(1)
        for rows, targets in zip(hidden.split(CHUNK_ROWS), several.split(CHUNK_ROWS), strict=True):
            logits = F.linear(rows, self.weight, self.bias).to(wide)
            losses.append((logits.logsumexp(-1, keepdim=True) - logits.gather(1, targets)).flatten())
            correct.append((logits.argmax(-1, keepdim=True) == targets).flatten())
        return torch.cat(losses).view_as(labels), torch.cat(correct).view_as(labels)


def _summed_in(hidden: Tensor) -> torch.dtype:
    """fp32, in any lower compute precision; fp64 of an fp64 model."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _softmax_minus_onehot(logits: Tensor, targets: Tensor) -> Tensor:
    """Makes of logits [rows, vocabulary], in place, the gradient of the summed cross entropy; gives that sum."""
    logits -= logits.amax(1, keepdim=True)
    of_labels = logits.gather(1, targets)
    sums = logits.exp_().sum(1, keepdim=True)
    logits.div_(sums).scatter_add_(1, targets, torch.full_like(sums, -1))
    return (sums.log() - of_labels).sum()


class _CrossEntropySum(torch.autograd.Function):
    """Σ over rows of the cross entropy of hidden·Wᵀ + b, chunk by chunk; the gradients are made in forward.

    What `F.linear_cross_entropy(reduction="sum")` does, as fast, but summed and scaled in fp32: in bf16 torch's own
    also sums and returns in bf16, which puts the loss of 1,000 labels off by 0.6 % and of 16,000 by 4 %, and rounds
    the scale that comes back. Keeps the gradients, in the compute dtype, and nothing of W, which ZeRO-3 takes away
    before backward.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """-> fp32 scalar (fp64 of an fp64 model)."""
        wide = _summed_in(hidden)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        needed = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        # Summed over chunks, where bf16 would lose small ones.
        grad_weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None
        # Every chunk's in one buffer: new memory of this size would come filled with zeros, each time.
        buffer = hidden.new_empty(min(CHUNK_ROWS, len(labels)), len(weight))
        for start in range(0, len(labels), CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            rows = hidden[chunk]
            made = linear_into(buffer[: len(rows)], rows, weight, bias)
            grad = made.to(wide)
            at_once = _CACHED_ROWS if grad.is_cpu else CHUNK_ROWS
            for logits, targets in zip(grad.split(at_once), labels[chunk].split(at_once), strict=True):
                total += _softmax_minus_onehot(logits, targets.unsqueeze(1))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = made.copy_(grad)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight += grad.t() @ rows
            del logits  # a view, which would keep what is wider than the buffer until the next chunk's is made
        # Values, not outputs: nothing of these refers back to the graph.
        ctx.grads = [
            None if grad is None else grad.to(tensor.dtype)
            for grad, tensor in ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))
        ]
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):
        grads, ctx.grads = ctx.grads, None
        for grad in grads:
            if grad is not None:
                # In fp32, for bf16 · scale would round the scale; in parts, for no second copy of W's size.
                for part in grad.split(8 * CHUNK_ROWS):
                    part.copy_(part.to(grad_total.dtype) * grad_total)
        return *grads, None


class CausalLM(TaskModel):
    """A Hugging Face causal language model, of which only the positions asked for reach the head."""

    auto_class = AutoModelForCausalLM
    is_called = "causal language model"

    def __init__(self, model: PreTrainedModel, *, offload_activations: bool = False) -> None:
        super().__init__(model, offload_activations=offload_activations)
        if model._is_stateful or not model._supports_attention_backend:
            raise RecipeError(
                f"model.path: {model.config.model_type} has a recurrent state, or attention by code of its own, which "
                f"no one tells where an example of a row ends; such models are not supported"
            )
        head = model.get_output_embeddings()
        model.set_output_embeddings(Head(head.weight, head.bias))

    @classmethod
    def configured(cls, config: PreTrainedConfig, recipe: Recipe) -> PreTrainedConfig:
        if config.model_type in ENCODERS and not config.is_decoder:  # transformers would build it all the same
            raise RecipeError(
                f"model.path: {config.model_type} is no {cls.is_called}: it sees what it would have to predict; give "
                f"a decoder, or name the task that it is to learn (task: rte)"
            )
        for setting in _UNSUPPORTED_LOGITS:
            if getattr(config, setting, None) not in (None, 1.0):
                raise RecipeError(
                    f"model.path: {config.model_type} scales its logits ({setting}), which is not supported"
                )
        return config

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        example_lengths: tuple[int, ...],
        positions: Tensor,
        labels: Tensor | None = None,
        score: bool = False,
        example_keys: tuple[int, ...] = (),
        kept_states: KeptStates | None = None,
    ) -> Tensor | tuple:
        """input_ids and position_ids int64 [1, T]: examples one behind the other, positions restarting at 0.

        positions int64 [rows]: places in 0..T-1 whose hidden state predicts; labels int64 [rows]. Returns what `Head`
        returns for them. example_keys: of their dropout masks. kept_states: what examples go on from (their positions
        then start behind it), and leave behind.
        """
        decoder = self.model.get_decoder()
        self.hold(example_lengths, example_keys)
        with self.keeping(input_ids.device):
            hidden = decoder(
                # A passed attention mask, even of ones, or a cache would make examples attend to each other.
                input_ids=input_ids,
                position_ids=position_ids,
                use_cache=False,
                example_lengths=example_lengths,
                **({} if kept_states is None else {"kept_states": kept_states}),
            )[0]
        return self.model.get_output_embeddings()(hidden[0, positions], labels, score)
