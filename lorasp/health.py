"""What a run is told, or finds, about its own life; imports nothing heavy.

Signals: a run that must go leaves at its next step or evaluation batch, with its state on disk. Locks of builds that
were killed: torch compiles C++ (DeepSpeed's, for NVMe) under a file that nobody removes then, and waits while it is
there.
"""

import os
import select
import signal
import time
from pathlib import Path
from types import FrameType

# A scheduler's warning (Slurm's --signal), and what a launcher or a terminal sends to end a process.
_LEAVE = (signal.SIGUSR1, signal.SIGTERM)
_asked = False
_arrivals: int | None = None  # a pipe that has bytes once a signal has come

_BUILDS = Path("~/.cache/torch_extensions")  # as torch.utils.cpp_extension has it
_BUILD_TAKES_AT_MOST = 15 * 60  # seconds; those that DeepSpeed starts take one or two minutes


class Preempted(Exception):
    """The run was asked to leave, and its state after `step`, if it took one, is on its way to the disk."""

    def __init__(self, step: int) -> None:
        super().__init__(f"left after step {step}, as it was asked to")
        self.step = step


def listen_for_signals() -> None:
    """From now on SIGUSR1 and SIGTERM ask this process to leave at the next step, however often they come.

    To be called first of all: a signal before that ends the process.
    """
    global _arrivals
    for number in _LEAVE:
        signal.signal(number, _ask)
    if _arrivals is None:
        _arrivals, noted = os.pipe()
        os.set_blocking(noted, False)
        signal.set_wakeup_fd(noted, warn_on_full_buffer=False)


def stop_listening() -> None:
    """SIGTERM ends this process again: it is leaving already."""
    if signal.getsignal(signal.SIGTERM) is _ask:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _ask(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True


def asked_to_leave() -> bool:
    """Whether this process got such a signal; others may not have."""
    return _asked


def signal_has_arrived() -> bool:
    """As `asked_to_leave`, and true as well while a library keeps the main thread, which alone runs handlers."""
    return _arrivals is not None and bool(select.select([_arrivals], [], [], 0)[0])


def stale_build_locks() -> list[Path]:
    """Locks of torch's C++ extensions that are older than any build."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or _BUILDS).expanduser()
    found = []
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:  # its build has just ended
            continue
        if age > _BUILD_TAKES_AT_MOST:
            found.append(lock)
    return found
