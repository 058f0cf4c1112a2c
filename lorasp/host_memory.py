"""The host's C library, and what it keeps of what a process frees.

On a CPU rank tensors come from glibc's heap, where a step's differ in size and lifetime from the next one's. glibc
2.36 cannot put an aligned block where an equal one was: it cuts it out of a larger one, and small objects settle in
the slivers beside it. Its heap tears, so that a rank holds half as much again as its tensors, and more each step.
"""

import ctypes
import os

_LARGE_BYTES = 2**23  # at 1 MiB a step takes 4 % longer: a dequantized weight of SmolLM2 is new memory each time
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_USERS_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_ARENA_MAX")
_USERS_OWN += ("GLIBC_TUNABLES", "LD_PRELOAD")


def map_large_blocks_apart() -> None:
    """Has large blocks mapped apart, in huge pages where the kernel gives them, and so given back when freed.

    To be called before torch is imported, which looks at its environment once. What a step makes and frees most is not
    of malloc at all (host_blocks.py). Nothing is changed where the user's environment says how malloc is to behave, or
    the C library is not glibc.
    """
    if any(name in os.environ for name in _USERS_OWN):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's: asks for huge pages from 2 MiB on
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_TRIM_THRESHOLD, _LARGE_BYTES)


def return_freed_memory() -> None:
    """Gives the system what glibc keeps of what this process freed, between blocks in use as well; elsewhere nothing.

    Some milliseconds. It keeps large amounts after much came and went: three times the shards of a model, once loaded.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
