"""Large tensors of a step on a CPU, in memory that the next ones take over.

glibc maps a large block anew each time, or tears its heap with it (see host_memory.py). New memory comes a page at a
time, 2 µs each on a virtual machine: for the tensors of SmolLM2's layers that was a fifth of a step. Blocks here are
kept when their tensor is freed, and given to the next one of about its size, also in the next step. On a GPU that is
what torch's caching allocator does, and `empty` is torch's.
"""

import contextlib
import ctypes
import math
import mmap
from functools import cache

import torch
from torch import Tensor, nn

_SMALLEST = 2**18  # bytes; below it glibc's heap serves as well
_HUGE_PAGE = 2**21
_CLASS_BITS = 3  # eight sizes from a power of two to the next: a block is at most an eighth too long


class _Blocks:
    """Those of a process. A tensor may be freed in another thread, or by the collector amid any line here: so the
    lists change by single appends and pops.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}  # by their size
        self.held_bytes = 0  # of all of them, leased or free

    def lease(self, size: int) -> ctypes.Array:
        """At least `size` bytes, free again with the last reference to what is returned."""
        step = 1 << (size.bit_length() - _CLASS_BITS - 1)
        size = -(-size // step) * step
        free = self._free.setdefault(size, [])
        try:
            block = free.pop()
        except IndexError:
            self._make_room(size)
            block = _mapped(size)
            self.held_bytes += size
        lease = _lease_type(size).from_buffer(block)
        lease.block, lease.free = block, free
        return lease

    def idle_bytes(self) -> int:
        """Of those that are free, what is in memory: the end of a block, or all of it, may never have been filled."""
        return sum(_resident_bytes(block) for blocks in list(self._free.values()) for block in list(blocks))

    def release(self) -> None:
        """Gives the system those that are free."""
        self._make_room(self.held_bytes)

    def _make_room(self, size: int) -> None:
        """Gives up free blocks of `size` bytes: no more is held than was in use at once, whatever sizes came."""
        for its, blocks in list(self._free.items()):
            with contextlib.suppress(IndexError):
                while size > 0:
                    blocks.pop()
                    self.held_bytes -= its
                    size -= its


class _Lease:
    """What a tensor's storage holds of a block; mixed into a ctypes array over its bytes."""

    block: mmap.mmap
    free: list[mmap.mmap]

    def __del__(self) -> None:
        self.free.append(self.block)


@cache
def _lease_type(size: int) -> type:
    return type("Lease", (_Lease, ctypes.c_ubyte * size), {})


def _mapped(size: int) -> mmap.mmap:
    """New memory, in huge pages where the kernel gives them, but for its end, which they would round up.

    Linux puts a mapping where huge pages fit if it is as long as some of them; what is not used is never there.
    """
    huge, rest = divmod(size, _HUGE_PAGE)
    length = (huge + bool(rest)) * _HUGE_PAGE if huge else size
    block = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE, 0, huge * _HUGE_PAGE)
    return block


def _resident_bytes(block: mmap.mmap) -> int:
    """By mincore(2); its length where that cannot be asked."""
    pages = ctypes.create_string_buffer(-(-len(block) // mmap.PAGESIZE))
    start = ctypes.c_char.from_buffer(block)
    mincore = getattr(ctypes.CDLL(None), "mincore", None)
    if mincore is None or mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(block)), pages):
        return len(block)
    return mmap.PAGESIZE * int(torch.frombuffer(pages, dtype=torch.uint8).bitwise_and_(1).sum())


_blocks = _Blocks()


def empty(shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
    """Uninitialised and contiguous, of `like`'s device and dtype: for an `out=`.

    For what a step makes and frees: a view of it keeps the whole block.
    """
    dtype, count = like.dtype, math.prod(shape)
    is_real = type(like) in (Tensor, nn.Parameter)  # a plan's FakeTensor says that it is on a CPU
    if like.device.type != "cpu" or not is_real or count * dtype.itemsize < _SMALLEST:
        return torch.empty(shape, dtype=dtype, device=like.device)
    return torch.frombuffer(_blocks.lease(count * dtype.itemsize), dtype=dtype, count=count).view(shape)


def held_bytes() -> int:
    """Of the blocks, in use or free, whether or not they were ever filled."""
    return _blocks.held_bytes


def idle_bytes() -> int:
    """Of the blocks that no tensor uses, what is in memory for the next ones."""
    return _blocks.idle_bytes()


def release() -> None:
    """Gives the system the blocks that are free."""
    _blocks.release()
