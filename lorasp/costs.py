"""What a training step needs of a rank, counted; and the seconds that it takes where each kind of work has its price.

The model is linear: seconds = Σ amount · seconds each. On the machine at hand the prices are fitted to measured steps
(`Prices.fit`); on hardware that nobody measured they follow from stated rates (`Cluster`), and what comes out is a
calculation, not a measurement.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Self

import numpy as np

from lorasp.accounting import count_flops
from lorasp.models.causal_lm import CausalLM
from lorasp.models.gathers import gathered_bytes, unit_gathers
from lorasp.quantization import ShardedLinear


@dataclass(frozen=True)
class Work:
    """Of one rank in one optimizer step with one micro batch, under `selective`.

    products: FLOPs in linears, adapters and head, as accounting.py counts them. attention: FLOPs of the attention
    kernel, forward and (2.5 times) backward, of the causal half. weights: dequantized, in forward and again in
    backward. passed: elements that elementwise operations go over, taken as tokens · layers · (hidden + inner sizes).
    received: bytes of gathers that come from other ranks. units: units gathered; whatever a unit costs by itself.
    """

    products: float
    attention: float
    weights: float
    passed: float
    received: float
    units: float


def count_work(model: CausalLM, *, rows: int, length: int, world_size: int) -> Work:
    """Of `rows` examples of `length` tokens on each rank, each token but the first a label. model: on meta will do."""
    config = model.model.config.get_text_config()
    flops, tokens = count_flops(model), rows * length
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    linears = [module for module in model.modules() if isinstance(module, ShardedLinear)]
    quantized = sum(m.in_features * m.out_features for m in linears if m.quantization.format != "none")
    return Work(
        products=flops.per_token * tokens + flops.per_label * rows * (length - 1),
        attention=3.5 * 2 * length * heads * head * layers * tokens,
        weights=2 * quantized,
        passed=tokens * layers * (config.hidden_size + config.intermediate_size),
        received=gathered_bytes(model) * (world_size - 1) / world_size,
        units=sum(gathers for _, gathers in unit_gathers(model)),
    )


@dataclass(frozen=True)
class Prices:
    """Seconds each of what `Work` counts, in its order."""

    seconds: tuple[float, ...]

    @classmethod
    def fit(cls, works: Sequence[Work], seconds: Sequence[float]) -> Self:
        """Least squares of the relative errors, none below 0."""
        from scipy.optimize import nnls  # most of a second, which a plan of memory need not wait for

        amounts = np.array([astuple(work) for work in works], dtype=float)
        scale = np.maximum(amounts.max(axis=0), 1e-300)
        rows = amounts / scale / np.array(seconds)[:, None]
        found, _ = nnls(rows, np.ones(len(rows)))
        return cls(tuple(found / scale))

    def of(self, work: Work) -> float:
        """Seconds of a step."""
        return sum(amount * price for amount, price in zip(astuple(work), self.seconds, strict=True))

    def parts(self, work: Work) -> dict[str, float]:
        """Seconds of a step by kind of work."""
        return {f.name: getattr(work, f.name) * price for f, price in zip(fields(work), self.seconds, strict=True)}


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes, by their stated rates. flops, link and network are to be those that programs reach.

    flops: of matrix products, a GPU. weights: dequantized a second, a GPU. link: bytes/s that a GPU receives from
    its node. network: bytes/s that a *node* receives from the others.
    """

    name: str
    per_node: int
    flops: float
    weights: float
    link: float
    network: float

    def seconds(self, work: Work, gathered: float, gpus: int, *, hierarchical: bool) -> tuple[float, float]:
        """(of computation, of gathers) in a step; they overlap, so that a step takes the longer of the two.

        gathered: bytes as stored, of all gathers (`gathered_bytes`). A ring brings a GPU all that it lacks from its
        neighbour, and a node all that it lacks through its network once. hierarchical: each node holds a whole set of
        shards, so that nothing that is gathered crosses the network.
        """
        compute = (work.products + work.attention) / self.flops + work.weights / self.weights
        nodes = -(-gpus // self.per_node)
        group = min(gpus, self.per_node) if hierarchical else gpus
        within = gathered * (group - 1) / group / self.link
        across = 0.0 if hierarchical else gathered * (nodes - 1) / nodes / self.network
        return compute, max(within, across)
