"""A rank that stands still ends with its stack, and the run with it, told which rank held up the others.

Every gather, reduction, update and agreement is counted. A rank whose count has stood for too long asks for the
others': the ranks with the lowest one are those that the others wait for.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import distributed as dist

from lorasp.cli import HUNG
from lorasp.health import signal_has_arrived
from lorasp.last_words import print_stacks

_LOOKS_EVERY = 1.0  # seconds
_OTHERS_FOLLOW = 5.0  # seconds: they stood still at about the same time
# Where a peer has died, a collective on GPUs may never fail: the launcher's SIGTERM finds this rank within it, and
# SIGKILL follows after 30 s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT). Until then the rank tells where it stands.
_STANDS_AFTER_SIGNAL = 15.0  # seconds


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

    def watching(self) -> AbstractContextManager[None]:
        """Within it the rank must count; outside, as while it loads or saves, it may take its time."""
        return self._limited_to(self._seconds)

    def patient(self) -> AbstractContextManager[None]:
        """Within `watching`: what takes its time and does not count, such as writing a checkpoint."""
        return self._limited_to(float("inf"))

    @contextmanager
    def _limited_to(self, seconds: float) -> Iterator[None]:
        before = self._limit
        self._since, self._limit = time.monotonic(), seconds
        try:
            yield
        finally:
            self._since, self._limit = time.monotonic(), before

    def _watch(self) -> None:
        shown = False
        while True:
            time.sleep(_LOOKS_EVERY)
            limit = self._limit
            if limit == float("inf"):
                faulthandler.cancel_dump_traceback_later()
                continue
            # Where the main thread never lets go of the interpreter, this thread does not run either.
            faulthandler.dump_traceback_later(limit + 2 * _OTHERS_FOLLOW, exit=True)
            stands = time.monotonic() - self._since
            if stands > limit:
                self._end()
            elif stands > _STANDS_AFTER_SIGNAL and not shown and signal_has_arrived():
                shown = True  # it may be a long step yet: the rank goes on if it can
                print_stacks(f"rank {self._rank} was asked to end, and has not moved for {stands:.0f} s")

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
        print_stacks(f"error: {told}")
        os._exit(HUNG)

    def _key(self, rank: int) -> str:
        return f"lorasp stands still/{rank}"
