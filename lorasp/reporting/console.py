"""The console of a run: a progress bar on a terminal, plain time-stamped lines in a log file, from rank 0 only."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Console:
    """Where a run's messages go. Other ranks than the main one have a console too, which stays silent."""

    def __init__(self, is_main: bool, stream: TextIO | None = None):
        self._stream = (stream or sys.stdout) if is_main else None
        on_terminal = self._stream is not None and self._stream.isatty()
        self._rich = RichConsole(file=self._stream) if on_terminal else None

    def info(self, text: str) -> None:
        """Print `text`; while a progress bar is shown, above it."""
        self._print(text, style=None)

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}", style="yellow")

    @contextmanager
    def progress(self, total: int, description: str, done: int = 0) -> Iterator["ProgressLine"]:
        """A bar of `total` steps for the time of the `with` block; in a log file only lines that `advance` is told.

        done: how many were done before.
        """
        if self._rich is None:
            yield ProgressLine(self, total, description, done)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}", markup=False),
        )
        with Progress(*columns, console=self._rich) as bar:
            yield ProgressLine(self, total, description, done, bar)

    def _print(self, text: str, style: str | None) -> None:
        if self._stream is None:
            return
        stamped = f"{datetime.now():%H:%M:%S} {text}"
        if self._rich is None:
            print(stamped, file=self._stream, flush=True)
        else:
            # Brackets in text from data and models are no markup; soft_wrap keeps tables whole.
            self._rich.print(stamped, style=style, markup=False, highlight=False, soft_wrap=True)


class ProgressLine:
    """The handle that `Console.progress` gives."""

    def __init__(self, console: Console, total: int, description: str, done: int, bar: Progress | None = None):
        self._console = console
        self._total = total
        self._description = description
        self._done = self._before = done
        self._started = time.perf_counter()
        self._bar = bar
        self._task = bar.add_task(description, total=total, completed=done, values="") if bar else None

    def advance(self, steps: int = 1, log: bool = False, **values: float | str) -> None:
        """`steps` more are done. `values` (loss, …) stand beside the bar; with `log`, a log file gets a line of them.

        A terminal never gets that line: its bar shows the last values that were given.
        """
        self._done += steps
        shown = "  ".join(f"{name} {_plain(value)}" for name, value in values.items())
        if self._bar is not None:
            # Steps between log points bring no values: the last ones stay in view.
            self._bar.update(self._task, advance=steps, **({"values": shown} if shown else {}))
        elif log:
            place = f"{self._description} {self._done:>{len(str(self._total))}}/{self._total}"
            self._console.info("  ".join(part for part in (place, shown, self._remaining()) if part))

    def _remaining(self) -> str:
        left = self._total - self._done
        here = self._done - self._before
        if not (left and here):
            return ""
        seconds = round((time.perf_counter() - self._started) / here * left)
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left"


def _plain(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
