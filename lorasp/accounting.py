"""What a model has, and what a rank holds of it: counted from the tensors, never estimated."""

from dataclasses import dataclass

from torch import nn

from lorasp.adapter import AdaptedLinear
from lorasp.head import SelectedLinear
from lorasp.models.causal_lm import Head
from lorasp.models.task_model import TaskModel
from lorasp.quantization import ShardedLinear
from lorasp.zero.engine import Engine
from lorasp.zero.sharding import shard_bytes

ADAPTER = ("A", "B", "A_rest", "W", "W_rest")  # how the names of its parameters end, and of a head's


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters over all ranks. total: base and adapter; adapter: entries of all A and B; trained: those updated;
    trained_head: of these, those of a classifier's head.
    """

    total: int
    adapter: int
    trained: int
    trained_head: int = 0


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Counts an unsharded model (the meta device will do); a quantized weight counts as the entries it stands for."""
    base = adapter = head = 0
    for module in model.modules():
        parameters = dict(module.named_parameters(recurse=False))
        if isinstance(module, ShardedLinear) and module.quantization.format != "none":
            base += module.in_features * module.out_features
            parameters = {name: p for name, p in parameters.items() if name not in ("codes", "scales")}
        if isinstance(module, AdaptedLinear):
            adapter += module.A_selection.entries + module.B_selection.entries
            parameters = {name: p for name, p in parameters.items() if name not in ("A", "B", "A_rest")}
        if isinstance(module, SelectedLinear):
            head += sum(p.numel() for p in module.trained())
        base += sum(p.numel() for p in parameters.values())
    # A tied parameter is one.
    every = [p for module in model.modules() for p in module.parameters(recurse=False)]
    base -= sum(p.numel() for p in every) - sum(p.numel() for p in set(every))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ParameterCounts(base + adapter, adapter, trained, head)


@dataclass(frozen=True)
class TrainingFlops:
    """Floating-point operations that training needs of a model, whatever is recomputed.

    Two for each entry of a matrix that a token meets forward, two backward for the gradient of the input, two more
    where the matrix is trained. per_token: of a real token, in the layers' linears and adapters (of an
    encoder-decoder: of a source's token); per_label: of a labelled position in the head, besides what it takes as a
    real token. Attention's own products, which grow with the length, are left out.
    """

    per_token: int
    per_label: int

    def mfu(self, tokens_per_second: float, labels_per_second: float, limit: float) -> float:
        """Model FLOPs utilization (arXiv 2204.02311, appendix B): needed FLOP/s over those possible.

        Both rates and `limit` (FLOP/s in matrix products, see `timing.matrix_product_limit`) over all ranks.
        """
        return (self.per_token * tokens_per_second + self.per_label * labels_per_second) / limit


def count_flops(model: TaskModel) -> TrainingFlops:
    """Of an unsharded model (the meta device will do)."""
    per_token = per_label = 0
    per_target = 0
    of_labels, of_targets = set(model.label_modules()), set(model.target_modules())
    for module in model.modules():
        if isinstance(module, Head):
            per_label += (6 if module.weight.requires_grad else 4) * module.weight.numel()
        elif module in of_labels:
            per_label += 6 * module.in_features * module.out_features
        elif isinstance(module, ShardedLinear):
            base_trained = not isinstance(module, AdaptedLinear) and module.needs_input
            flops = (6 if base_trained else 4) * module.in_features * module.out_features
            if isinstance(module, AdaptedLinear):
                flops += 6 * module.factor_entries()
            if module in of_targets:
                per_target += flops
            else:
                per_token += flops
    if of_targets:  # a target's tokens are among the real ones, but meet the decoder in place of the encoder
        per_label += per_target - per_token
    return TrainingFlops(per_token, per_label)


def held_bytes(model: nn.Module, engine: Engine | None) -> dict[str, int]:
    """Bytes that this rank holds between steps, by part.

    base_shard: its part of the frozen base (`method: full`: of all weights), all of it with ZeRO's stage 2; adapters:
    its part of A and B, and of a classifier's head, in compute precision; masks: S, whole on each rank; buffers:
    rotary frequencies and second-level scales, whole; gradients: its fp32 part and the reduction bucket; optimizer:
    its fp32 masters and moments (none before the first step).
    """
    held = dict.fromkeys(("base_shard", "adapters", "masks", "buffers", "gradients", "optimizer"), 0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, nn.Parameter):  # also where it was made a buffer (sharding.keep_unit_whole)
            part = "adapters" if name.rpartition(".")[2] in ADAPTER else "base_shard"
            held[part] += shard_bytes(tensor)
        else:
            part = "masks" if name.endswith("_bits") else "buffers"
            held[part] += tensor.numel() * tensor.element_size()
    if engine is not None:
        held["gradients"] = engine.gradient_bytes()
        held["optimizer"] = engine.optimizer_state_bytes()
    return held
