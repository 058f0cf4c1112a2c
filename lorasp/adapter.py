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
from torch import Tensor, nn

from lorasp.dropout import DropoutSeeds, ExamplesAtHand, drop_mask
from lorasp.hashing import random_uniform, stream_key
from lorasp.head import SelectedLinear
from lorasp.quantization import ShardedLinear
from lorasp.recipe import Adapter, Quantization, RecipeError
from lorasp.residual import fit_factors
from lorasp.selection import Selection, select_entries, select_features, selection_digest


class AdaptedLinear(ShardedLinear):
    """A frozen `ShardedLinear` with a compact adapter.

    A [selected entries of r×in] starts uniform in ±1/√in (LoRA's Kaiming start) and B [selected of out×r] at zero, so
    that ΔW = 0 at the start. With `frozen_entries: init` the unselected entries of A stay at their start as a frozen
    parameter `A_rest`; B's would be zero either way. `A_bits` and `B_bits` hold S (see selection.py).

    Both the selection and the start of A are functions of (seed, name) alone; without a seed nothing is drawn, and A
    and B are on the meta device. With `quantization.init: residual` (Eq. 3), A and B start where base and adapter
    together come closest to W: `load` then fits them too, and leaves ‖W - Q‖ / ‖W‖ of the plain base, and
    ‖W - Q - ΔW‖ / ‖W‖ of what it kept, in `start_errors`.
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
        seed: int | None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, quantization=quantization, dtype=dtype)
        rank = adapter.rank
        self.name, self.dropout = name, adapter.dropout
        self.scale = adapter.alpha / (math.sqrt(rank) if adapter.rslora else rank)
        draw = {"fraction": fraction, "seed": seed}
        if strategy == "structured":
            # The linears of one parent that read equally many features read the same ones: q, k, v; gate, up.
            inputs, outputs = f"{name.rpartition('.')[0]}.inputs", f"{name}.B"
            self.A_selection, A_bits = select_features(rank, in_features, layout="columns", name=inputs, **draw)
            self.B_selection, B_bits = select_features(out_features, rank, layout="rows", name=outputs, **draw)
        else:
            draw["strategy"] = strategy
            self.A_selection, A_bits = select_entries(rank, in_features, name=f"{name}.A", **draw)
            self.B_selection, B_bits = select_entries(out_features, rank, name=f"{name}.B", **draw)
        self.register_buffer("A_bits", A_bits)
        self.register_buffer("B_bits", B_bits)

        count, entries = self.A_selection.count, self.A_selection.entries
        if seed is None:
            selected, rest = torch.empty(entries, dtype=dtype, device="meta").split([count, entries - count])
        else:
            bound = 1 / math.sqrt(in_features)
            start = random_uniform(stream_key(seed, name, "start of A"), entries, -bound, bound).to(dtype)
            selected = self.A_selection.select(start.view(rank, in_features), A_bits)
            rest = start[~self.A_selection.mask(A_bits).view(-1)] if adapter.frozen_entries == "init" else None
        self.A = nn.Parameter(selected.contiguous())
        self.B = nn.Parameter(torch.zeros(self.B_selection.count, dtype=dtype, device=selected.device))
        self.A_rest = None
        if adapter.frozen_entries == "init" and count < entries:
            self.A_rest = nn.Parameter(rest.contiguous(), requires_grad=False)
        self.examples = ExamplesAtHand()
        self.start_errors: tuple[float, float] | None = None

    def dense_A(self) -> Tensor:
        """A⊙S (plus A's frozen start outside S with `frozen_entries: init`), [r, in] in the compute dtype."""
        rest = None if self.A_rest is None else self.A_rest.data
        return self.A_selection.expand(self.A.data, self.A_bits, rest)

    def dense_B(self) -> Tensor:
        """B⊙S, [out, r] in the compute dtype."""
        return self.B_selection.expand(self.B.data, self.B_bits)

    def filled_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from super().filled_tensors()
        if self.quantization.init == "residual":
            yield from (("A", self.A), ("B", self.B))

    def allocate(self, device: torch.device) -> None:
        super().allocate(device)
        if self.quantization.init == "residual":
            self._move_adapter(device)

    def load(self, weight: Tensor, bias: Tensor | None) -> None:
        super().load(weight, bias)
        if self.quantization.init == "residual":
            self._move_adapter(weight.device)
            self._fit_start(weight.float())

    def _move_adapter(self, device: torch.device) -> None:
        for tensor in (self.A, self.B, self.A_rest, self.A_bits, self.B_bits):
            if tensor is not None:
                tensor.data = tensor.data.to(device)

    @torch.no_grad()
    def _fit_start(self, weight: Tensor) -> None:
        """Eq. 3: fits A and B to W - Q, quantizes W - ΔW to the next Q, and so on; keeps the best pair of the two.

        The error need not fall from one iterate to the next. weight: fp32 [out, in].
        """
        A_selected, B_selected = self.A_selection.mask(self.A_bits), self.B_selection.mask(self.B_bits)
        A_fixed = None if self.A_rest is None else self.dense_A().float() * ~A_selected
        norm = weight.norm().item() or 1.0
        plain = best = (weight - self.dense_weight()).norm().item() / norm
        kept = {name: tensor.data for name, tensor in self.filled_tensors()}
        A, B = self.dense_A().float(), self.dense_B().float()
        for iteration in range(self.quantization.iterations):
            if iteration:
                self._place(*self._quantize(torch.addmm(weight, B, A, alpha=-self.scale).view(-1)))
            lost = (weight - self.dense_weight()).div_(self.scale)
            A, B = fit_factors(lost, A, B_selected, A_selected, A_fixed)
            self.A.data = self.A_selection.select(A, self.A_bits).to(self.dtype).contiguous()
            self.B.data = self.B_selection.select(B, self.B_bits).to(self.dtype).contiguous()
            error = lost.addmm_(B, A, alpha=-1).norm().item() * self.scale / norm
            if error < best:
                best, kept = error, {name: tensor.data for name, tensor in self.filled_tensors()}
        for name, tensor in kept.items():
            getattr(self, name).data = tensor
        self.start_errors = (plain, best)

    saved = ("A", "B", "A_rest", "A_bits", "B_bits")  # of an adapter's file
    trained_parts = ("A", "B")
    needs_input = True  # for the gradients of A and B

    def trained(self) -> tuple[nn.Parameter, ...]:
        return self.A, self.B

    def selections(self) -> Iterator[tuple[str, Selection, Tensor]]:
        """(name, S, its bits) of both matrices."""
        yield f"{self.name}.A", self.A_selection, self.A_bits
        yield f"{self.name}.B", self.B_selection, self.B_bits

    def draw_dropout(self) -> DropoutSeeds | None:
        """Of the examples at hand, if there are any: a mask is drawn again in backward, not kept."""
        if not (self.training and self.dropout and self.examples.keys):
            return None
        return tuple(zip(self.examples.lengths, self.examples.seeds(self.name), strict=True))

    def project(self, rows: Tensor, seed: DropoutSeeds | None = None) -> Tensor:
        """rows [tokens, in] -> [tokens, out]: base and adapter in one, the update added in place."""
        y = super().project(rows)
        dropped = rows if seed is None else drop_mask(rows, self.dropout, seed).mul_(rows)
        scale = self._scale_beside(seed)
        (inputs, A), (outputs, B) = self._factors()
        low_rank = _thin_product(_taken(dropped, inputs), A.t())
        if outputs is None:
            return y.addmm_(low_rank, B.t(), alpha=scale)
        return _add_to(y, outputs, low_rank.mul_(scale) @ B.t())

    def backward(
        self, rows: Tensor, grad: Tensor, seed: DropoutSeeds | None = None, into: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """(gradient of `rows`, [of A, of B]); x·Aᵀ is made again, r/out of the base's product."""
        (inputs, A), (outputs, B) = self._factors()
        scale = self._scale_beside(seed)
        mask = None if seed is None else drop_mask(rows, self.dropout, seed)
        taken = _taken(rows if mask is None else rows * mask, inputs)
        grad_taken = _taken(grad, outputs)
        grad_low_rank = _thin_product(grad_taken, B).mul_(scale)
        grad_A = grad_low_rank.t() @ taken
        grad_B = _thin_product(grad_taken.t(), _thin_product(taken, A.t()).mul_(scale))
        del taken, grad_taken
        grad_rows = self._backward_of_base(grad, into)
        if inputs is not None:
            update = grad_low_rank @ A
            _add_to(grad_rows, inputs, update if mask is None else update.mul_(_taken(mask, inputs)))
        elif mask is None:
            grad_rows.addmm_(grad_low_rank, A)
        else:
            grad_rows.addcmul_(grad_low_rank @ A, mask)
        return grad_rows, [
            grad_A.reshape(-1) if inputs is not None else self.A_selection.select(grad_A, self.A_bits),
            grad_B.reshape(-1) if outputs is not None else self.B_selection.select(grad_B, self.B_bits),
        ]

    def _factors(self) -> tuple[tuple[Tensor | None, Tensor], tuple[Tensor | None, Tensor]]:
        """(input features, A), (output features, B): the dense matrices without features, or those of the features.

        Under `structured` [r, in/2] and [out/2, r]: half of the adapter's products are never made. A's frozen start
        fills the other half, and with it A is dense again.
        """
        narrow_A, narrow_B = self._are_narrow()
        inputs = self.A_selection.features(self.A_bits) if narrow_A else None
        outputs = self.B_selection.features(self.B_bits) if narrow_B else None
        A = self.dense_A() if inputs is None else self.A.data.view(self.A_selection.rows, -1)
        B = self.dense_B() if outputs is None else self.B.data.view(-1, self.B_selection.columns)
        return (inputs, A), (outputs, B)

    def _are_narrow(self) -> tuple[bool, bool]:
        return self.A_selection.layout == "columns" and self.A_rest is None, self.B_selection.layout == "rows"

    def factor_entries(self) -> int:
        """Entries of A and B as a token is multiplied by them: all, or those of the selected features."""
        return sum(
            selection.count if narrow else selection.entries
            for selection, narrow in zip((self.A_selection, self.B_selection), self._are_narrow(), strict=True)
        )

    def _scale_beside(self, seed: DropoutSeeds | None) -> float:
        """`scale`, and 1/(1 - p) beside a mask, which is of zeros and ones."""
        return self.scale if seed is None else self.scale / (1 - self.dropout)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, trained={self.A_selection.count}+{self.B_selection.count}"


def _taken(rows: Tensor, features: Tensor | None) -> Tensor:
    return rows if features is None else rows.index_select(1, features)


def _add_to(rows: Tensor, features: Tensor, update: Tensor) -> Tensor:
    """Adds update [n, selected] to the features of rows [n, all], in place.

    Not by `index_add_`, which goes down one column after the other: a fifth of the speed on a CPU.
    """
    return rows.scatter_add_(1, features.expand(len(rows), -1), update)


def _thin_product(left: Tensor, right: Tensor) -> Tensor:
    """left [n, k] · right [k, r] as the transpose of r rows, which MKL makes up to six times faster than r columns."""
    return (right.t() @ left.t()).t()


def find_targets(linears: dict[str, nn.Linear], target_modules: str | list[str]) -> set[str]:
    """Names of the linears to adapt, out of `linears` (name -> module, without the output head).

    `all-linear` takes all; otherwise each entry matches a module's last name (`q_proj`), its whole name, or a pattern
    (`*.layers.0.*`). Raises RecipeError if an entry matches nothing, listing what there is.
    """
    if not linears:
        raise RecipeError(
            "adapter.target_modules: this model has no linear layer (nn.Linear) to adapt; GPT-2's, for one, are of "
            "another kind (Conv1D)"
        )
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


def trained_linears(model: nn.Module) -> Iterator[AdaptedLinear | SelectedLinear]:
    """What an adapter's file holds something of: adapted linears, and those of a head, in module order."""
    return (module for module in model.modules() if isinstance(module, AdaptedLinear | SelectedLinear))


def model_selection_digest(model: nn.Module) -> str:
    """Digest of S over the whole model: equal on every machine and world size for one seed."""
    return selection_digest(mask for linear in trained_linears(model) for mask in linear.selections())
