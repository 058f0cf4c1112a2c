"""One run of a sweep as `accelerate launch launch/train.py …`: started, listened to, and brought to its end."""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from lorasp.recipe_errors import RecipeError

LOG = "log.txt"  # in a run's directory: all that its launcher and ranks say
_TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"
_LEAVES_WITHIN = 600  # seconds that ranks have for a step and a save before the launcher kills them
_LAST_LINES = 4000  # bytes


class Busy(Exception):
    """Another process is at this run."""


class Launcher:
    """Starts runs one after the other. A signal that asks this process to leave is handed to the run at hand.

    SIGTERM and SIGUSR1 (a scheduler's) and the first Ctrl-C have the run save and leave; the second Ctrl-C kills it.
    asked: the first signal that came, None so far.
    """

    def __init__(self, arguments: Sequence[str], tell: Callable[[str], None]) -> None:
        self.arguments, self._tell = list(arguments), tell
        self.asked: int | None = None
        self._process: subprocess.Popen | None = None

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._ask)

    def command(self, recipe: Path, overrides: Sequence[str]) -> list[str]:
        accelerate = str(Path(sys.executable).with_name("accelerate"))
        return [accelerate, "launch", *self.arguments, str(_TRAIN), str(recipe), *overrides]

    def run(self, command: Sequence[str], run_dir: Path) -> int:
        """Runs it to its end, all output going to its log; the exit code. Raises Busy, or RecipeError."""
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(run_dir / LOG, "ab") as log:
            # The ranks inherit the lock with their output: it is free once the last is gone, whoever was killed.
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy from None
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that Ctrl-C comes here first
                    env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_LEAVES_WITHIN), **os.environ},
                    # SIGUSR1 ends a launcher and orphans its ranks, unless it is born ignoring it.
                    preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
                )
            except OSError as error:
                raise RecipeError(
                    f"{command[0]} cannot be started ({error.strerror}); is accelerate installed?"
                ) from None
            try:
                if self.asked is not None:  # between the check of it and now
                    self._hand_on()
                code = self._process.wait()
            finally:
                log.close()
                if self.asked is not None:
                    self._wait_for_ranks(run_dir / LOG)
                self._process = None
        return code

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked == signal.SIGINT == number:
            self._tell("killed")
            self._kill()
            return
        first, self.asked = self.asked is None, self.asked or number
        if self._process is not None and first:
            self._tell("leaving: the run saves its state at its next step" + _again(number))
            self._hand_on()

    def _hand_on(self) -> None:
        """To the whole group: accelerate passes nothing on to a rank that it started without torchrun's agent."""
        _signal_group(self._process.pid, signal.SIGTERM)

    def _kill(self) -> None:
        if self._process is None:
            return
        try:
            family = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        _signal_group(self._process.pid, signal.SIGKILL)
        for process in family:  # torchrun's agent gives each rank a session of its own
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue

    def _wait_for_ranks(self, log: Path) -> None:
        """A launcher without an agent is gone before its rank is."""
        ends = time.monotonic() + _LEAVES_WITHIN
        with open(log, "ab") as opened:
            while time.monotonic() < ends and not _is_free(opened):
                time.sleep(0.1)


def last_words(run_dir: Path) -> str:
    """The line in which a run that failed says why, or the last one of its log."""
    try:
        with open(run_dir / LOG, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LAST_LINES))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    told = [line for line in lines if line.startswith("error")] or lines
    return told[-1] if told else ""


def ranks_of(arguments: Sequence[str]) -> int | None:
    """As `--num_processes` of the launcher's arguments has it; None where it is not there."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--num_processes", "--num-processes"):
            value = value if equals else next(iter(arguments[index + 1 :]), "")
            if not value.isdigit() or int(value) < 1:
                raise RecipeError(
                    f"launcher: {argument} {'' if equals else value}".rstrip() + " is no number of ranks"
                )
            return int(value)
    return None


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass


def _is_free(log: IO[bytes]) -> bool:
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _again(number: int) -> str:
    return "; Ctrl-C again kills it" if number == signal.SIGINT else ""
