"""A classifier's linear: trained from where it stands, whole or as S selects.

    y = x·Wᵀ + b,  W = W₀ where S = 0

Unlike an adapter's matrices W is no update of a frozen weight but the weight, so that an entry outside S keeps its
value: zero would take it away. The bias, a vector beside a matrix, is trained whole.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lorasp.dropout import DropoutSeeds
from lorasp.quantization import ShardedLinear
from lorasp.recipe import Quantization
from lorasp.selection import Selection, select_entries, select_features


class SelectedLinear(ShardedLinear):
    """W's selected entries are the 1-D parameter `W`, the others the frozen `W_rest` (None where all are selected);
    `W_bits` holds S. Never quantized. `load` leaves alone what a saved adapter brought.
    """

    saved = ("W", "bias", "W_rest", "W_bits")  # of an adapter's file
    trained_parts = ("W", "bias")

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        strategy: str,
        fraction: float,
        seed: int | None,
    ) -> None:
        super().__init__(
            in_features, out_features, bias=bias, quantization=Quantization(format="none"), dtype=dtype, trained=True
        )
        del self.weight
        self.name = name
        how = {"name": f"{name}.W", "fraction": fraction, "seed": seed}
        if strategy == "structured":
            self.selection, bits = select_features(out_features, in_features, layout="columns", **how)
        else:
            self.selection, bits = select_entries(out_features, in_features, strategy=strategy, **how)
        self.register_buffer("W_bits", bits)
        count, entries = self.selection.count, self.selection.entries
        self.W = nn.Parameter(torch.empty(count, dtype=dtype, device="meta"))
        self.W_rest = None
        if count < entries:
            rest = torch.empty(entries - count, dtype=dtype, device="meta")
            self.W_rest = nn.Parameter(rest, requires_grad=False)

    def selections(self) -> Iterator[tuple[str, Selection, Tensor]]:
        """(name, S, its bits) of the matrix."""
        yield f"{self.name}.W", self.selection, self.W_bits

    def base_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, getattr(self, name)) for name in self.saved[:3] if getattr(self, name) is not None)

    def load(self, weight: Tensor, bias: Tensor | None) -> None:
        if not self.W.is_meta:
            return
        weight, bits = weight.to(self.dtype), self.W_bits.to(weight.device)
        values = {"W": self.selection.select(weight, bits), "bias": bias}
        if self.W_rest is not None:
            values["W_rest"] = weight[~self.selection.mask(bits)]
        for name, value in values.items():
            if value is not None:
                old = getattr(self, name)
                value = value.to(self.dtype).contiguous()
                self._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)

    def dense_weight(self) -> Tensor:
        rest = None if self.W_rest is None else self.W_rest.data
        return self.selection.expand(self.W.data, self.W_bits, rest)

    def trained(self) -> tuple[nn.Parameter, ...]:
        return (self.W,) if self.bias is None else (self.W, self.bias)

    def backward(
        self, rows: Tensor | None, grad: Tensor, seed: DropoutSeeds | None = None, into: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        gradients = [self.selection.select(grad.t() @ rows, self.W_bits)]
        if self.bias is not None:
            gradients.append(grad.sum(0))
        return self._backward_of_base(grad, into), gradients
