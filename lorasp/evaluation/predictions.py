"""Predictions on disk as they come, a JSON line each: what a killed evaluation has done is not done again.

While it runs the file is called `NAME.jsonl.part`; its first line tells what is evaluated. How many ranks wrote it is
no part of that, so any number goes on.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Predictions:
    """On rank 0. key: plain data that tells model, data and settings; lines of another key are dropped."""

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path, self._part = path, path.with_name(f"{path.name}.part")
        self._key = json.loads(json.dumps(key))
        self._file = None

    def begin(self, *, again: bool) -> list[dict[str, Any]]:
        """What is there already, of the same key; from then on `add` appends to it.

        again: a finished file does not count, as one was asked for anew.
        """
        found = self._read(self._part)
        if not found and not again:
            found = self._read(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Written again as a whole: a killed process may have left half a line.
        lines = [json.dumps(self._key), *(json.dumps(line) for line in found)]
        beside = self.path.with_name(f"{self.path.name}.new")
        beside.write_text("".join(f"{line}\n" for line in lines))
        os.replace(beside, self._part)
        self._file = open(self._part, "a", encoding="utf-8")
        return found

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """On the disk when this returns."""
        self._file.write("".join(f"{json.dumps(line)}\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def leave(self) -> None:
        """The evaluation goes on another time."""
        self._file.close()

    def finish(self) -> None:
        """All are there: the file gets its name."""
        self._file.close()
        os.replace(self._part, self.path)

    def _read(self, path: Path) -> list[dict[str, Any]]:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what has no line end is half a line
            values = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return []
        return values[1:] if values and values[0] == self._key else []
