"""A rank that stands still ends with its stack, and the run with it, told which rank held up the others.

Every gather, reduction and update is counted. A rank whose count has stood for too long asks for the others': the
ranks with the lowest one are those that the others wait for.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed as dist

from lorasp.cli import HUNG

_LOOKS_EVERY = 1.0  # seconds
_OTHERS_FOLLOW = 5.0  # seconds: they stood still at about the same time


class Watchdog:
    """One a rank, a thread beside its main one. seconds: without a count for so long, a rank has stopped."""

    def __init__(self, rank: int, world_size: int, seconds: float) -> None:
        self._rank, self._world_size, self._seconds = rank, world_size, seconds
        self._count, self._since, self._limit = 0, time.monotonic(), float("inf")
        self._store = dist.distributed_c10d._get_default_store().clone()  # a connection of its own
        threading.Thread(target=self._watch, daemon=True).start()

    def count(self) -> None:
        """The main thread goes on. In the same order on each rank."""
        self._count += 1
        self._since = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it the rank must count; outside, as while it loads or saves, it may take its time."""
        self._since, self._limit = time.monotonic(), self._seconds
        try:
            yield
        finally:
            self._limit = float("inf")
            faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Within `watching`: what takes its time and does not count, such as writing a checkpoint."""
        limit, self._limit = self._limit, float("inf")
        try:
            yield
        finally:
            self._since, self._limit = time.monotonic(), limit

    def _watch(self) -> None:
        while True:
            time.sleep(_LOOKS_EVERY)
            limit = self._limit
            if limit == float("inf"):
                faulthandler.cancel_dump_traceback_later()
                continue
            # Where the main thread never lets go of the interpreter, this thread does not run either.
            faulthandler.dump_traceback_later(limit + 2 * _OTHERS_FOLLOW, exit=True)
            if time.monotonic() - self._since > limit:
                self._end()

    def _end(self) -> None:
        count = self._count
        self._store.set(self._key(self._rank), str(count))
        time.sleep(_OTHERS_FOLLOW)
        if self._count != count:  # it goes on after all
            return
        counts = {}
        for rank in range(self._world_size):
            # One that counted on, or answers no more, has set nothing.
            if self._store.check([self._key(rank)]):
                counts[rank] = int(self._store.get(self._key(rank)))
        faulthandler.cancel_dump_traceback_later()
        silent = [rank for rank in range(self._world_size) if rank not in counts]
        behind = silent or [rank for rank, its in counts.items() if its == min(counts.values())]
        names = " and ".join(map(str, behind))
        told = f"rank {self._rank} has not moved for {time.monotonic() - self._since:.0f} s (health.hang_seconds)"
        if len(behind) < self._world_size:
            told += (
                f"; rank {names} holds up the others" if len(behind) == 1 else f"; ranks {names} hold up the others"
            )
        print(f"error: {told}. Its stack:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(HUNG)

    def _key(self, rank: int) -> str:
        return f"lorasp stands still/{rank}"
