"""Dropout masks that belong to an example: the same on whichever rank, row or attempt it is computed.

A mask follows from a key of (seed, step, example) and the module's name. So a run that goes on, or on other ranks,
drops what it would have dropped, and backward draws a mask again, where plain dropout keeps it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorasp.hashing import stream_key

DropoutSeeds = tuple[tuple[int, int], ...]  # (rows, seed) of each example: a mask is a function of them


@dataclass
class ExamplesAtHand:
    """The examples of a forward, one behind the other: tokens of each, and a key that is its own in this step.

    A dropout mask belongs to an example, not to the rank or the row that it happens to be on.
    """

    lengths: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()

    def seeds(self, name: str) -> tuple[int, ...]:
        """Of each example, for the module of that name."""
        return tuple(stream_key(key, name, "dropout") for key in self.keys)


def drop_mask(rows: Tensor, probability: float, seeds: DropoutSeeds) -> Tensor:
    """Zeros, and ones where an entry of `rows` is kept: the same for a seed on one kind of device.

    What is kept is still to be multiplied by 1/(1 - p), which the mask cannot hold: bf16 would round it, and so change
    the mean of all that is dropped by up to 0.2 %.

    Sixteen bits decide on an entry, so that its p is `probability` to 1/65536. They are compared in place, which gives
    ones and zeros of 16 bits: on a CPU bools take ten times as long, and `bernoulli_` four times as long as all of it.
    """
    kept, width, generator = max(1, round((1 - probability) * 2**16)), rows[0].numel(), torch.Generator(rows.device)
    bits = torch.cat([_random_bits(length * width, generator.manual_seed(seed)) for length, seed in seeds])
    return bits.le_(kept - 2**15 - 1).to(rows.dtype).view_as(rows)


def _random_bits(count: int, generator: torch.Generator) -> Tensor:
    """int16 [count], uniform: four of each number drawn."""
    words = torch.empty(math.ceil(count / 4), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)  # None: up to the largest, so all 64 bits
    return words.view(torch.int16)[:count]


class ExampleDropout(nn.Module):
    """Stands for a model's `nn.Dropout`, `p` as there.

    of_tokens: its input is [1, T, …], the tokens of all examples; otherwise [examples, …], a row each.
    """

    def __init__(self, name: str, p: float, *, of_tokens: bool) -> None:
        super().__init__()
        self.name, self.p, self.of_tokens = name, p, of_tokens
        self.examples = ExamplesAtHand()

    def draw(self) -> tuple[int, ...]:
        """A seed an example."""
        return self.examples.seeds(self.name)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p):
            return x
        seeds = self.draw()
        lengths = self.examples.lengths if self.of_tokens else (1,) * len(seeds)
        rows = x.flatten(0, 1) if self.of_tokens else x
        return drop(rows, self.p, tuple(zip(lengths, seeds, strict=False))).view(x.shape)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def drop(rows: Tensor, probability: float, seeds: DropoutSeeds) -> Tensor:
    """rows [Σ of the seeds' rows, …] times their mask, over 1 - p; backward draws the mask again."""
    if not seeds:  # a batch of no examples
        return rows
    return _Drop.apply(rows, probability, seeds)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, probability: float, seeds: DropoutSeeds) -> Tensor:
        ctx.probability, ctx.seeds = probability, seeds
        return _dropped(rows, probability, seeds)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _dropped(grad, ctx.probability, ctx.seeds), None, None


def _dropped(rows: Tensor, probability: float, seeds: DropoutSeeds) -> Tensor:
    return drop_mask(rows, probability, seeds).mul_(rows).div_(1 - probability)
