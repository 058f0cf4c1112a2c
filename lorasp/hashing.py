"""Randomness that no library version, device, world size or construction order changes.

A counter hash: the n-th number of a stream is a function of (key, n) alone. Used for S (Eq. 1), the start of A, and
the order of samples. The mixer is SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014).
"""

import hashlib

import torch

_GOLDEN_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def stream_key(*parts: object) -> int:
    """The signed 64-bit key of the stream named by `parts`, e.g. `stream_key(seed, "model.layers.0.q_proj", "A")`."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's `>>` on int64 is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def random_int64(key: int, count: int) -> torch.Tensor:
    """`count` uniform 64-bit integers, int64 [count] on the CPU; int64 products wrap, which the mixer relies on."""
    x = torch.arange(1, count + 1, dtype=torch.int64, device="cpu") * _GOLDEN_GAMMA + key
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def random_uniform(key: int, count: int, low: float, high: float) -> torch.Tensor:
    """`count` numbers in [low, high), float32 [count]: the top 24 bits of each hash, exact in float32."""
    unit = _shift_right(random_int64(key, count), 40).double() / (1 << 24)
    return (low + (high - low) * unit).float()


def permutation(key: int, count: int) -> torch.Tensor:
    """A random order of `range(count)`, int64 [count]; ties of the hash fall back to the index (stable sort)."""
    return torch.sort(random_int64(key, count), stable=True).indices
