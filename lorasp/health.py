"""Signals: a run that must go leaves at its next step, with its state on disk. Imports nothing heavy."""

import signal
from types import FrameType

# A scheduler's warning (Slurm's --signal), and what a launcher or a terminal sends to end a process.
_LEAVE = (signal.SIGUSR1, signal.SIGTERM)
_asked = False


class Preempted(Exception):
    """The run was asked to leave, and its state after `step`, if it took one, is on its way to the disk."""

    def __init__(self, step: int) -> None:
        super().__init__(f"left after step {step}, as it was asked to")
        self.step = step


def listen_for_signals() -> None:
    """From now on SIGUSR1 and SIGTERM ask this process to leave at the next step, however often they come.

    To be called first of all: a signal before that ends the process.
    """
    for number in _LEAVE:
        signal.signal(number, _ask)


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
