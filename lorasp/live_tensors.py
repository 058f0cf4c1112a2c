"""Exact bytes of the tensors that operations made: what no allocator's habits change."""

import weakref
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class LiveTensors(TorchDispatchMode):
    """Exact bytes of the tensor storages that operations within `with LiveTensors() as live:` made, and their peak.

    Counts storages, not tensors: views and in-place results add nothing, and what autograd saved counts although no
    Python object shows it (`gc` can't see it). A storage leaves the count at the moment it is freed, also after the
    `with` block has ended. Not seen: temporaries inside a kernel; memory that no operation made (numpy, memory-mapped
    weights); meta tensors. What existed before is not counted.

    Dispatch modes belong to a thread. A CPU graph's backward runs in the thread that called it; for other devices
    autograd carries the mode over to its own threads.
    """

    def __init__(self) -> None:
        super().__init__()
        # By name without name space and overload: "mm", "_local_scalar_dense". Indexing by a boolean mask also counts
        # as the "nonzero" that its kernel runs out of sight.
        self.op_counts: Counter[str] = Counter()
        self.peak_bytes = 0
        self._live_bytes = 0
        # Weak references with a callback are exact: a storage's Python object lives as long as its memory does, since
        # C++ holds it once Python has let go. The object's id is therefore free for reuse only after the callback.
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def live_bytes(self) -> int:
        """Bytes live now; sizes are read again, since `storage.resize_` is no operation that a mode sees."""
        for reference in list(self._storages.values()):
            self._resize(reference())
        return self._live_bytes

    def take_peak(self) -> int:
        """The peak since the last call; the next one starts at what is live now."""
        peak, self.peak_bytes = self.peak_bytes, self.live_bytes
        return peak

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before = {id(storage): storage for storage in _storages((args, kwargs))}
        # torch.tensor() fills its memory out of sight and shows it first as the input of lift_fresh.
        brings_new = func is torch.ops.aten.lift_fresh.default
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self.op_counts[name] += 1
        if name in _INDEXING and any(_is_mask(leaf) for leaf in tree_iter(args[1])):
            self.op_counts["nonzero"] += 1
        for storage in before.values():
            self._resize(storage)
        for storage in _storages(result):
            if id(storage) in self._sizes:
                self._resize(storage)
            elif brings_new or id(storage) not in before:
                self._add(storage)
        if self._live_bytes > self.peak_bytes:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        self._storages[key] = weakref.ref(storage, partial(self._freed, key))
        self._sizes[key] = storage.nbytes()
        self._live_bytes += self._sizes[key]

    def _resize(self, storage: torch.UntypedStorage | None) -> None:
        key = id(storage)
        if key in self._sizes:
            self._live_bytes += storage.nbytes() - self._sizes[key]
            self._sizes[key] = storage.nbytes()

    def _freed(self, key: int, _: weakref.ref) -> None:
        self._live_bytes -= self._sizes.pop(key)
        del self._storages[key]


def _is_mask(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bool, torch.uint8)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """The storages with memory behind them of all tensors in `tree`."""
    found = []
    for leaf in tree_iter(tree):
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and leaf.device.type != "meta":
            found.append(leaf.untyped_storage())
        elif isinstance(leaf, torch.UntypedStorage):
            found.append(leaf)
    return found
