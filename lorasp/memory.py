"""Measured memory of one process (one rank): peaks by phase, and what is free.

All sizes are bytes. Peaks are measured where the system keeps them (CUDA's allocator on a GPU, the kernel's high-water
mark of resident memory on a Linux CPU) and sampled only elsewhere. Every peak carries its `source`, since these are
different things: a CPU rank's counts the interpreter, the libraries and what the C allocator has not given back.

Never `ru_maxrss`: it survives exec, so a child would report its parent's peak.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorasp import host_blocks
from lorasp.host_memory import return_freed_memory

GATHERED_AT_ONCE = 16_000_000  # elements a rank, when trained values are read to be saved
WORKSPACE = "workspace"
NOT_RESIDENT = "counted_not_resident"

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc_pid_clear_refs(5): set VmHWM to the present VmRSS; touches nothing else
_SAMPLE_SECONDS = 0.005
_CGROUP = Path("/sys/fs/cgroup")  # of the second version: a container's own
# What a process may come to hold more, besides blocks, before its freed memory is looked for, or an eighth of what it
# holds: that takes a millisecond or two, and to fill the memory anew takes as much again.
_GROWTH = 2**24
# Left free by a step, so much is kept for the next one: glibc fits most of it in, and to fill it anew takes 0.1 s.
_WORTH_KEEPING = 2**28


def gib(size: int) -> str:
    """`size` bytes as a number of GiB with three places, without the unit: the header or the sentence names it."""
    return f"{size / 2**30:.3f}"


def mib(size: int) -> str:
    """`size` bytes as a number of MiB with one place, for parts that would be 0.00 GiB."""
    return f"{size / 2**20:,.1f}"


@dataclass(frozen=True)
class PhasePeak:
    """What one phase held at most. Sizes in bytes.

    `peak_total_bytes` is what the source reports, `peak_bytes` the same above `baseline_bytes` (not below 0).
    `reserved_bytes`: peak of what CUDA's caching allocator took from the GPU, None elsewhere. `anonymous_bytes_end`
    and `file_bytes_end`: resident memory at the phase's end, apart (a memory-mapped weights file is of the second
    kind, which the system can drop), None where the source doesn't tell.
    """

    name: str
    seconds: float
    peak_bytes: int
    peak_total_bytes: int
    baseline_bytes: int
    source: str
    reserved_bytes: int | None = None
    anonymous_bytes_end: int | None = None
    file_bytes_end: int | None = None


class MemoryMeter:
    """Peaks by phase of this process on `device`. What is held when the first phase begins is the baseline.

    Phases may nest (an evaluation within training): the inner one suspends the outer one, so each second and each peak
    belongs to one phase only. A phase entered again keeps its greatest peak and adds up its seconds. Seconds are wall
    time of the host; the meter does not wait for work queued on a GPU.
    """

    def __init__(self, device: torch.device | str):
        self._probe = _probe(torch.device(device))
        self.source = self._probe.source
        self.baseline_bytes: int | None = None
        self.peaks: dict[str, PhasePeak] = {}
        self._open: list[str] = []
        self._started = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs within as `name`; it is recorded when an exception passes as well."""
        if self.baseline_bytes is None:
            return_freed_memory()  # given back within a phase, it would have its peak lie below the baseline
            self.baseline_bytes = self._probe.now()
        if self._open:
            self._record()
        self._open.append(name)
        self._start()
        try:
            yield
        finally:
            self._record()
            self._open.pop()
            if self._open:
                self._start()

    def now_bytes(self) -> int:
        """Bytes held now above the baseline (not below 0); 0 before the first phase."""
        return 0 if self.baseline_bytes is None else max(0, self._probe.now() - self.baseline_bytes)

    def settle(self) -> None:
        """To be called before `now_bytes`: freed memory that the C library keeps is then not held; blocks at hand are
        never. On a CPU, as the next two: CUDA's allocator counts tensors, and finds an equal block again.
        """
        self._probe.settle()

    def settle_after_step(self) -> None:
        """To be called after each step of a loop: what one freed is given back, for the next one may not fit into it,
        unless it is so much that to fill new memory would take longer than it is worth.
        """
        self._probe.settle_after_step()

    def settle_if_grown(self) -> None:
        """To be called often within a step, where little is in use: what its layers freed is not kept beside what the
        next ones need, which may not fit into it.

        Costs nothing to speak of while no more is held than before.
        """
        self._probe.settle_if_grown()

    def peak_so_far_bytes(self) -> int:
        """Peak above the baseline of the phase that is open, up to now; 0 outside any phase."""
        if not self._open:
            return 0
        recorded = self.peaks.get(self._open[-1])
        now = max(0, self._probe.peak() - self.baseline_bytes)
        return max(now, recorded.peak_bytes if recorded else 0)

    def _start(self) -> None:
        self._probe.start()
        self._started = time.perf_counter()

    def _record(self) -> None:
        """Add the stretch since the last `_start` to the innermost open phase."""
        seconds = time.perf_counter() - self._started
        total = self._probe.stop()
        name = self._open[-1]
        peak = PhasePeak(
            name=name,
            seconds=seconds,
            peak_bytes=max(0, total - self.baseline_bytes),
            peak_total_bytes=total,
            baseline_bytes=self.baseline_bytes,
            source=self.source,
            **self._probe.details(),
        )
        earlier = self.peaks.get(name)
        if earlier is not None:
            greater = max(earlier, peak, key=lambda p: p.peak_total_bytes)
            peak = replace(
                peak,
                seconds=earlier.seconds + peak.seconds,
                peak_bytes=greater.peak_bytes,
                peak_total_bytes=greater.peak_total_bytes,
                reserved_bytes=_greater(earlier.reserved_bytes, peak.reserved_bytes),
            )
        self.peaks[name] = peak


def free_bytes(device: torch.device, processes: int) -> int:
    """What each of `processes` on this machine can still take: of its GPU, or its share of the host's free memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        used_for = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # Files that were read, such as a checkpoint, count as used; the kernel drops them for whoever asks for more.
        free = min(free, limit - used + int(used_for["active_file"]) + int(used_for["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no cgroup of the second version, or no limit ("max")
        pass
    return free // processes


def breakdown(peak_bytes: int, counted: Mapping[str, int]) -> dict[str, int]:
    """The parts of a peak: what was counted, in its order, then `workspace`, the remainder. They add up to the peak.

    The remainder is everything nobody counted: activations, kernels' buffers, libraries, what the allocator keeps.
    Where more was counted than was resident (pages never written, or swapped out), `workspace` is 0 and a negative
    `counted_not_resident` says how much.
    """
    for name in (WORKSPACE, NOT_RESIDENT):
        if name in counted:
            raise ValueError(f"{name!r} is computed by breakdown() and can't be counted")
    remainder = peak_bytes - sum(counted.values())
    parts = {**counted, WORKSPACE: max(0, remainder)}
    if remainder < 0:
        parts[NOT_RESIDENT] = remainder
    return parts


def _greater(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else max(a, b)


# ---- Where the numbers come from. A probe has: source; now(), bytes held; start(), which forgets the peak so far;
# peak(), bytes since start(); stop(), the same and no more measuring; settle(), after which what was freed isn't held;
# settle_after_step() and settle_if_grown(), the same where it pays; details(), further fields of PhasePeak.


def _probe(device: torch.device) -> "_CudaAllocator | _HighWaterMark | _SampledHost":
    """The one place that chooses by device."""
    if device.type == "cuda":
        return _CudaAllocator(device)
    if device.type != "cpu":
        raise ValueError(f"memory can be measured on cuda and cpu devices, not on {device.type!r}")
    if not _STATUS.exists():
        import psutil

        process = psutil.Process()
        return _SampledHost(lambda: process.memory_info().rss, "resident set size (psutil)", lambda: {})
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except (
        OSError
    ):  # /proc mounted read-only, as some containers have it, or a kernel without CONFIG_PROC_PAGE_MONITOR
        return _SampledHost(lambda: _host_status()["VmRSS"], f"VmRSS of {_STATUS}", _host_details)
    return _HighWaterMark()


class _CudaAllocator:
    """Bytes of tensors, as the caching allocator counts them: without the CUDA context and libraries' own memory."""

    source = "cuda max_memory_allocated"

    def __init__(self, device: torch.device):
        torch.cuda.init()  # resetting the peak before anything used the device would fail
        self._device = device

    def now(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    stop = peak

    def settle(self) -> None:
        """It counts tensors, and finds an equal block again."""

    settle_after_step = settle_if_grown = settle

    def details(self) -> dict[str, int]:
        return {"reserved_bytes": torch.cuda.max_memory_reserved(self._device)}


class _Host:
    """Resident memory. Free blocks serve the next step and do not count as held; the heap's free memory does, until
    `settle`.
    """

    _at_start = 0  # what the heap held when the phase began
    _settled = 0  # and when freed memory was last given back, or kept

    def now(self) -> int:
        return self.resident() - host_blocks.idle_bytes()

    def start(self) -> None:
        """What the phase before freed is not this one's."""
        host_blocks.release()
        self.settle()
        self._at_start = self._settled

    def settle(self) -> None:
        return_freed_memory()
        self._settled = self._of_the_heap()

    def settle_if_grown(self) -> None:
        if self._of_the_heap() > self._settled + max(_GROWTH, (self._settled - self._at_start) // 8):
            self.settle()

    def settle_after_step(self) -> None:
        self._settled = self._of_the_heap()
        if self._settled < self._at_start + _WORTH_KEEPING:
            self.settle()

    def _of_the_heap(self) -> int:
        """And of all else but the blocks."""
        return self.resident() - host_blocks.held_bytes()


class _HighWaterMark(_Host):
    """Resident bytes of this process; the kernel keeps the peak, so no spike is missed, however short.

    Exact to some pages a core: the kernel sums its counters in batches.
    """

    source = f"VmHWM of {_STATUS}, reset at phase start"

    def resident(self) -> int:
        return _host_status()["VmRSS"]

    def start(self) -> None:
        super().start()
        _CLEAR_REFS.write_text(_RESET_PEAK)

    def peak(self) -> int:
        return _host_status()["VmHWM"]

    stop = peak

    def details(self) -> dict[str, int]:
        return _host_details()


class _SampledHost(_Host):
    """Resident bytes of this process, sampled by a thread while a phase is open: short spikes can be missed."""

    def __init__(self, read: Callable[[], int], what: str, details: Callable[[], dict[str, int]]):
        self.source = f"{what}, sampled every {_SAMPLE_SECONDS * 1000:.0f} ms: short spikes are missed"
        self.resident = read
        self.details = details
        self._peak = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        super().start()
        self._peak = self.resident()
        self._done.clear()
        self._thread = threading.Thread(target=self._sample, name="memory-sampler", daemon=True)
        self._thread.start()

    def peak(self) -> int:
        # Only the thread writes _peak: two writers could lose the greater value.
        return max(self._peak, self.resident())

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self.peak()

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, self.resident())


def _host_status() -> dict[str, int]:
    """The memory lines of /proc/self/status, in bytes."""
    text = _STATUS.read_text()
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _host_details() -> dict[str, int]:
    status = _host_status()
    return {"anonymous_bytes_end": status["RssAnon"], "file_bytes_end": status["RssFile"]}
