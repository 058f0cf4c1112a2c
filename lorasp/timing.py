"""Where the seconds of a rank's step go, and what its device could do in them."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

_LARGEST_SQUARE = 8192
_LONG_ENOUGH = 0.02  # seconds of one product: the clock's steps and a kernel's start no longer matter
_TRIED_FOR = 1.0  # seconds: what a virtual machine gives of its cores differs by a third within a second


class PartTimer:
    """Adds up the seconds of named parts of a rank's work, without making its device wait.

    On a CPU by the host's clock. On a GPU between two events of the stream: what the stream stood or worked there,
    however far ahead the host was. Only `take` waits for them. Counts while `running`: an evaluation, whose
    seconds nobody takes, would pile up spans.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event if device.type == "cuda" else None
        self._spans: list[tuple[str, Any, Any]] = []
        self.running = False

    @contextmanager
    def part(self, name: str, *, on_host: bool = False) -> Iterator[None]:
        """on_host: what the host itself does, such as making batches, by its own clock on a GPU as well."""
        if not self.running:
            yield
            return
        start = self._mark(on_host)
        try:
            yield
        finally:
            self._spans.append((name, start, self._mark(on_host)))

    def timed(self, name: str, function: Callable) -> Callable:
        """`function`, each call of which is a part."""

        @wraps(function)
        def call(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        spans, self._spans = self._spans, []
        seconds: dict[str, float] = defaultdict(float)
        for name, start, end in spans:
            if isinstance(start, float):
                seconds[name] += end - start
            else:
                end.synchronize()
                seconds[name] += start.elapsed_time(end) / 1e3
        return dict(seconds)

    def _mark(self, on_host: bool) -> Any:
        if self._event is None or on_host:
            return time.perf_counter()
        event = self._event(enable_timing=True)
        event.record()
        return event


def matrix_product_limit(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of this rank in a large square matrix product in the compute dtype, 2n³ FLOPs: the best within a second.

    Measured, with the threads and neighbours that the run has, rather than read off a data sheet. Of random numbers: a
    GPU whose clock its power bounds multiplies constants 13 % faster (an H200, bf16).
    """
    generator = torch.Generator(device).manual_seed(0)  # the run's own draws stay what they are
    timer = PartTimer(device)
    timer.running = True

    def seconds_of_one() -> float:
        with timer.part("product"):
            left @ right
        return timer.take()["product"]

    n = 512
    while True:
        left, right = (torch.randn(n, n, device=device, dtype=dtype, generator=generator) for _ in range(2))
        seconds_of_one()
        seconds = min(seconds_of_one() for _ in range(3))
        if seconds >= _LONG_ENOUGH or n == _LARGEST_SQUARE:
            seconds = min(seconds, *(seconds_of_one() for _ in range(int(_TRIED_FOR / seconds))))
            del left, right
            torch.cuda.empty_cache()  # nothing of this is to be measured as the run's; without a GPU it does nothing
            return 2 * n**3 / seconds
        n *= 2
