"""The compact adapter on a frozen linear (Eq. 2).

    y = x·Wᵀ + b + scale · (x·(A⊙S_A)ᵀ)·(B⊙S_B)ᵀ        A ∈ R^{r×in}, B ∈ R^{out×r}
    scale = alpha / r, or alpha / √r with rsLoRA (arXiv 2312.03732)

The trained parameters `A` and `B` are 1-D vectors of the selected entries: gradients, their reduction, fp32 masters
and moments are as long as these vectors by construction. LoRA is the case in which every entry is selected.
"""

import fnmatch
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasp.hashing import random_uniform, stream_key
from lorasp.quantization import ShardedLinear
from lorasp.recipe import Adapter, Quantization, RecipeError
from lorasp.selection import select_entries, selection_digest


class AdaptedLinear(ShardedLinear):
    """A frozen `ShardedLinear` with a compact adapter.

    A [selected entries of r×in] starts uniform in ±1/√in (LoRA's Kaiming start) and B [selected of out×r] at zero, so
    that ΔW = 0 at the start. With `frozen_entries: init` the unselected entries of A stay at their start as a frozen
    parameter `A_rest`; B's would be zero either way. `A_bits` and `B_bits` hold S (see selection.py).

    Both the selection and the start of A are functions of (seed, name) alone.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        quantization: Quantization,
        dtype: torch.dtype,
        adapter: Adapter,
        strategy: str,
        fraction: float,
        seed: int,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, quantization=quantization, dtype=dtype)
        rank = adapter.rank
        self.name, self.dropout = name, adapter.dropout
        self.scale = adapter.alpha / (math.sqrt(rank) if adapter.rslora else rank)
        draw = {"strategy": strategy, "fraction": fraction, "seed": seed}
        self.A_selection, A_bits = select_entries(rank, in_features, name=f"{name}.A", **draw)
        self.B_selection, B_bits = select_entries(out_features, rank, name=f"{name}.B", **draw)
        self.register_buffer("A_bits", A_bits)
        self.register_buffer("B_bits", B_bits)

        bound = 1 / math.sqrt(in_features)
        start = random_uniform(stream_key(seed, name, "start of A"), rank * in_features, -bound, bound).to(dtype)
        self.A = nn.Parameter(self.A_selection.select(start.view(rank, in_features), A_bits).contiguous())
        self.B = nn.Parameter(torch.zeros(self.B_selection.count, dtype=dtype))
        self.A_rest = None
        if adapter.frozen_entries == "init" and self.A_selection.count < start.numel():
            unselected = ~self.A_selection.mask(A_bits).view(-1)
            self.A_rest = nn.Parameter(start[unselected], requires_grad=False)

    def dense_A(self) -> Tensor:
        """A⊙S (plus A's frozen start outside S with `frozen_entries: init`), [r, in] in the compute dtype."""
        rest = None if self.A_rest is None else self.A_rest.data
        return self.A_selection.expand(self.A.data, self.A_bits, rest)

    def dense_B(self) -> Tensor:
        """B⊙S, [out, r] in the compute dtype."""
        return self.B_selection.expand(self.B.data, self.B_bits)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else None
        return _AdaptedLinearFunction.apply(x, dropped, self.A, self.B, self.bias, self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, trained={self.A_selection.count}+{self.B_selection.count}"


class _AdaptedLinearFunction(torch.autograd.Function):
    """Base and adapter in one: the update is added in place, and nothing that ZeRO-3 gathered is saved.

    Saves x (or its dropped copy), which gradients of A and B need. x·Aᵀ is made again in backward: r/out of the
    base's product.
    """

    @staticmethod
    def forward(ctx, x: Tensor, dropped: Tensor | None, A: Tensor, B: Tensor, bias: Tensor | None, module) -> Tensor:
        adapter_input = x if dropped is None else dropped
        ctx.module, ctx.dropped = module, dropped is not None
        ctx.save_for_backward(adapter_input)
        y = F.linear(x, module.dense_weight(), bias)
        low_rank = _rows(adapter_input) @ module.dense_A().t()
        _rows(y).addmm_(low_rank, module.dense_B().t(), alpha=module.scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        module, (adapter_input,) = ctx.module, ctx.saved_tensors
        A, B = module.dense_A(), module.dense_B()
        rows, inputs = _rows(grad), _rows(adapter_input)
        grad_low_rank = (rows @ B).mul_(module.scale)
        grad_A = grad_B = grad_dropped = None
        if ctx.needs_input_grad[2]:
            grad_A = module.A_selection.select(grad_low_rank.t() @ inputs, module.A_bits)
        if ctx.needs_input_grad[3]:
            low_rank = (inputs @ A.t()).mul_(module.scale)
            grad_B = module.B_selection.select(rows.t() @ low_rank, module.B_bits)
        grad_x = grad @ module.dense_weight() if ctx.needs_input_grad[0] else None
        if ctx.dropped:
            grad_dropped = (grad_low_rank @ A).view(adapter_input.shape) if ctx.needs_input_grad[1] else None
        elif grad_x is not None:
            _rows(grad_x).addmm_(grad_low_rank, A)
        return grad_x, grad_dropped, grad_A, grad_B, None, None


def _rows(x: Tensor) -> Tensor:
    """[..., n] -> [tokens, n], a view wherever x is contiguous."""
    if not linears:
        raise RecipeError(
            "adapter.target_modules: this model has no linear layer (nn.Linear) to adapt; GPT-2's, for one, are of "
            "another kind (Conv1D)"
        )
    return x.reshape(-1, x.shape[-1])


def find_targets(linears: dict[str, nn.Linear], target_modules: str | list[str]) -> set[str]:
    """Names of the linears to adapt, out of `linears` (name -> module, without the output head).

    `all-linear` takes all; otherwise each entry matches a module's last name (`q_proj`), its whole name, or a pattern
    (`*.layers.0.*`). Raises RecipeError if an entry matches nothing, listing what there is.
    """
    if target_modules == "all-linear":
        return set(linears)
    found: set[str] = set()
    for pattern in target_modules:
        matches = {
            name for name in linears if name.rsplit(".", 1)[-1] == pattern or fnmatch.fnmatchcase(name, pattern)
        }
        if not matches:
            there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
            raise RecipeError(
                f"adapter.target_modules: {pattern!r} matches no linear layer of this model; it has: {there}"
            )
        found |= matches
    return found


def adapted_linears(model: nn.Module) -> Iterator[AdaptedLinear]:
    """The model's adapted linears, in module order."""
    return (module for module in model.modules() if isinstance(module, AdaptedLinear))


def model_selection_digest(model: nn.Module) -> str:
    """Digest of S over the whole model: equal on every machine and world size for one seed."""
    masks = []
    for linear in adapted_linears(model):
        masks.append((f"{linear.name}.A", linear.A_selection, linear.A_bits))
        masks.append((f"{linear.name}.B", linear.B_selection, linear.B_bits))
    return selection_digest(masks)
