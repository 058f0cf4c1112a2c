"""Faults of a recipe, collected with the lines that they stand in and worded for the person who wrote it."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

COMMAND_LINE = math.inf  # where an override stands; so faults are told in the file's order, overrides last

_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text (if it is meant as text, put it in quotes)",
    "bool_type": "true or false",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


class RecipeError(ValueError):
    """What is wrong with a run's input, for the person at the keyboard: what, where, what to do."""


class Report:
    """Faults found so far.

    lines: dotted key -> line in the recipe, or COMMAND_LINE. faulty: keys that a fault was told of. suggested: valid
    keys that an unknown one was probably meant as; that they are missing needs no telling.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, float] = {}
        self.faulty: set[str] = set()
        self.suggested: set[str] = set()
        self._faults: list[tuple[float, str]] = []

    def add(self, key: str, message: str, line: float | None = None) -> None:
        """A fault of `key`, in its own line, else in that of the section around it. Without a key: of the file."""
        self.faulty.add(key)
        if line is None:
            line = self.lines.get(key, self.lines.get(key.partition(".")[0], 0))
        where = "command line" if line == COMMAND_LINE else f"{self.path}:{line}" if line else f"{self.path}"
        self._faults.append((line, ": ".join(part for part in (where, key, message) if part)))

    def text(self) -> str:
        """All faults, one a line, in the order of the file; empty if there are none."""
        return "\n".join(dict.fromkeys(text for _, text in sorted(self._faults, key=lambda fault: fault[0])))

    def add_unknown(self, key: str, valid: Sequence[str]) -> None:
        """`key` is none of the `valid` ones; the likest of the whole tree is suggested, wherever it stands."""
        section, _, last = key.rpartition(".")
        if key in valid and "." in key:
            return self.add(key, f"write this as {last}, indented below {section}:")

        def likeness(candidate: str) -> float:
            its_section, _, its_last = candidate.rpartition(".")
            alike = difflib.SequenceMatcher(None, _plain(last), _plain(its_last)).ratio()
            return alike + 0.1 * (its_section == section)

        best = max(valid, key=likeness)
        if likeness(best) >= 0.7:
            self.suggested.add(best)
            return self.add(key, f"unknown key, did you mean {best}?")
        here = [name.rpartition(".")[2] for name in valid if name.rpartition(".")[0] == section]
        if not here:  # an unknown section, like nothing that there is
            section, here = "a recipe", [name for name in valid if "." not in name]
        self.add(key, f"unknown key; {section or 'a recipe'} has {', '.join(here)}")


def sentence(error: dict[str, Any], descriptions: dict[str, str]) -> str:
    """pydantic's `error` in a recipe's own words; `descriptions` tell what a required key wants."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "tuple_type" or kind == "too_long" or (kind == "missing" and isinstance(error["loc"][-1], int)):
        return f"{shown(value)} is not a pair of numbers, like [0.9, 0.999]"
    if kind == "missing":
        return f"is missing; give {descriptions['.'.join(error['loc'])]}"
    if kind == "model_type":
        return f"{shown(value)} is no section; write its settings indented below it"
    if kind == "literal_error":
        choices = re.sub(r"'|,? or ", lambda found: "" if found[0] == "'" else ", ", context["expected"])
        return f"has no value; give one of {choices}" if value is None else f"{shown(value)} is not one of {choices}"
    if kind in _KINDS:
        if value is None:
            return f"has no value; give {_KINDS[kind].partition(' (')[0]}"
        whole = kind == "int_type" and isinstance(value, float) and value.is_integer()
        return f"{shown(value)} is not {_KINDS[kind]}" + (f"; write {int(value)}" if whole else "")
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{shown(value)} is not {words} {context[name]:g}"
    if kind == "finite_number":
        return f"{value} is not a finite number"
    return f"{shown(value)}: {error['msg']}"


def shown(value: Any) -> str:
    """A value as one would write it in the recipe."""
    return json.dumps(value, ensure_ascii=False, default=str)


def near_files(name: str, directories: Iterable[Path], suffixes: Sequence[str]) -> str:
    """The end of a sentence about a missing file: which others there are, the likest first."""
    there = {
        path.name: path
        for directory in directories
        if directory.is_dir()
        for path in sorted(directory.iterdir())
        if not suffixes or path.suffix in suffixes
    }
    likely = difflib.get_close_matches(name, there, n=3, cutoff=0.6)
    if likely:
        return f"did you mean {' or '.join(likely)}?"
    if not there:
        return "there is no such file near it"
    names = list(there)
    return f"there are {', '.join(names[:6])}{' …' if len(names) > 6 else ''}"


def _plain(key: str) -> str:
    return key.lower().replace("-", "_")
