"""A sweep's file: which runs one recipe makes, what each changes of it, and how their learning rate is chosen.

    recipe: ../quickstart.yaml
    variants:
      lorasp: {}
      half: {method: lora, adapter.rank: 8, adapter.alpha: 16}
    grid:
      data.max_length: [64, 128]
    seeds: [0, 1, 2]
    choose:
      learning_rates: [1e-3, 2e-3]

Read as recipes are: every fault at once with its line, and of each run's recipe too, before the first run starts.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import Field, ValidationError

from lorasp.recipe import Positive, Section
from lorasp.recipe_errors import COMMAND_LINE, RecipeError, Report, near_files, sentence, shown
from lorasp.recipe_yaml import read_yaml

Settings = dict[str, Any]  # of a recipe, by dotted name; a null empties a section, as on the command line


class Choose(Section):
    """In a first stage each rate trains once, with the first seed; the best one then trains with all seeds."""

    learning_rates: Annotated[list[Positive], Field(min_length=2)] = Field(
        description="the values of training.learning_rate to try, as a list"
    )
    # selection: the score of the rows that data.selection sets apart; held_out: that of data.held_out, of which the
    # first stage must then have other rows (settings) than the runs that are reported.
    by: Literal["selection", "held_out"] = "selection"
    settings: Settings = {}  # of the first stage only


class SweepFile(Section):
    recipe: str = Field(description="a recipe's file, from this one's directory or the working one")
    name: str = "sweep"  # of a file: its stem
    output_dir: str = "runs"  # the runs are OUTPUT_DIR/NAME/RUN
    settings: Settings = {}  # of every run
    variants: dict[str, Settings | None] = {}  # name -> what it changes
    grid: dict[str, list[Any]] = {}  # setting -> its values; each with each other, and with each variant
    seeds: list[int] = []  # none: the recipe's
    choose: Choose | None = None  # none: the recipe's learning rate
    launcher: list[str | int] = []  # arguments of `accelerate launch`


_KEYS = [*SweepFile.model_fields, *(f"choose.{key}" for key in Choose.model_fields)]
_REQUIRED = {
    "recipe": SweepFile.model_fields["recipe"].description,
    "choose.learning_rates": Choose.model_fields["learning_rates"].description,
}


@dataclass(frozen=True)
class Change:
    """A setting of some runs, as `key=value`, and where the sweep says so: a dotted name in its file, or ""."""

    text: str
    place: str

    @property
    def key(self) -> str:
        return self.text.partition("=")[0]


@dataclass(frozen=True)
class Sweep:
    """A sweep's file, read, under what the command line gave. lines: where in the file each of its keys stands."""

    path: Path
    recipe: Path
    file: SweepFile
    given: tuple[Change, ...]
    lines: dict[str, float]

    @property
    def directory(self) -> Path:
        """Of its runs, and of the learning rates that were chosen."""
        return Path(os.path.expanduser(self.file.output_dir)) / self.file.name

    def where(self, place: str) -> str:
        """The file and line of a key, for a message; of "", the command line."""
        at = place
        while at and at not in self.lines:
            at = at.rpartition(".")[0]
        return f"{self.path}:{self.lines[at]}" if at else str(self.path) if place else "command line"

    def changes(self, settings: Settings | None, place: str) -> list[Change]:
        return [Change(f"{key}={written(value)}", f"{place}.{key}") for key, value in (settings or {}).items()]


def read_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep of a YAML file. overrides: settings of every run, and `output_dir=…`.

    Raises RecipeError with all faults of the file itself; those of its runs' recipes are told by `cells.check`.
    """
    path = Path(path)
    report = Report(path)
    tree = {"name": path.stem} | read_yaml(path, report, kind="sweep", depth=3)
    given = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not (key and equals):
            report.add("", f"{shown(override)} is no setting; write key=value, e.g. data.limit=100", COMMAND_LINE)
        elif key == "output_dir":
            tree["output_dir"] = value
        else:
            given.append(Change(override, ""))
    for name in [name for name in tree if name not in SweepFile.model_fields]:
        report.add_unknown(str(name), _KEYS)
        del tree[name]
    if isinstance(tree.get("choose"), dict):
        for key in [key for key in tree["choose"] if key not in Choose.model_fields]:
            report.add_unknown(f"choose.{key}", _KEYS)
            del tree["choose"][key]
    file = _validate(tree, report)
    if file is not None:
        _check(file, given, report)
        recipe = _find_recipe(file, path, report)
    if report.text():
        raise RecipeError(report.text())
    return Sweep(path, recipe, file, tuple(given), dict(report.lines))


def _validate(tree: dict[str, Any], report: Report) -> SweepFile | None:
    try:
        return SweepFile(**tree)
    except ValidationError as errors:
        for error in errors.errors(include_url=False):
            key = ".".join(map(str, error["loc"][:2]))
            if key not in report.suggested:
                report.add(key, _sentence(error))
    return None


def _sentence(error: dict[str, Any]) -> str:
    if error["type"] == "dict_type":
        return f"{shown(error['input'])} is no set of settings; write {{key: value}}"
    if error["type"] == "list_type":
        return f"{shown(error['input'])} is no list; write [{error['input']}]"
    if error["type"] == "too_short":
        return "one value is no choice; give several, or set training.learning_rate"
    return sentence(error, _REQUIRED)


def _check(file: SweepFile, given: Sequence[Change], report: Report) -> None:
    """What is well-formed and makes no sense."""
    if file.name in ("", ".", "..") or "/" in file.name:
        report.add("name", f"{shown(file.name)} cannot name the directory of the runs")
    lists = {"seeds": file.seeds, **{f"grid.{key}": values for key, values in file.grid.items()}}
    lists |= {"choose.learning_rates": file.choose.learning_rates} if file.choose else {}
    for place, values in lists.items():
        if any(value in values[:index] for index, value in enumerate(values)):
            report.add(place, f"{shown(values)} holds a value twice")
        if not values and place != "seeds":
            report.add(place, "has no values; give some, or remove it")
    places = {"settings": file.settings, "grid": file.grid}
    places |= {f"variants.{name}": changes or {} for name, changes in file.variants.items()}
    places |= {"choose.settings": file.choose.settings} if file.choose else {}
    varied = {name: "grid" for key, values in file.grid.items() for value in values for name in _names(key, value)}
    varied |= {"name": "the sweep", "output_dir": "the sweep"}
    varied |= {"seed": "seeds"} if file.seeds else {}
    varied |= {"training.learning_rate": "choose.learning_rates"} if file.choose else {}
    for place, settings in places.items():
        before: dict[str, str] = {}
        for key, value in settings.items():
            names = [name for its in (value if place == "grid" else [value]) for name in _names(key, its)]
            others = [
                by for name in names for by in (*_deciding(name, varied), *_deciding(name, before)) if by != place
            ]
            if others:
                report.add(f"{place}.{key}", f"is what {others[0]} decides; remove one of the two")
            before |= dict.fromkeys(names, f"{place}.{key}")
    for place in [place for place in places if place.startswith("variants.")]:
        varied = {name: place for key, value in places[place].items() for name in _names(key, value)} | varied
    for change in given:
        if others := list(_deciding(change.key, varied)):
            report.add(change.key, f"is what {others[0]} decides; change it there", COMMAND_LINE)


def _names(key: str, value: Any) -> Iterator[str]:
    """Dotted names of all that a setting sets: those within a section, whose others stay as they are."""
    if not (isinstance(value, dict) and value):
        yield key
        return
    for inner, its in value.items():
        yield from _names(f"{key}.{inner}", its)


def _deciding(name: str, decided: Mapping[str, str]) -> Iterator[str]:
    """What of `decided` (name -> what decides it) is `name`, the section that it is in, or a setting within it."""
    for other, by in decided.items():
        if f"{other}.".startswith(f"{name}.") or f"{name}.".startswith(f"{other}."):
            yield by


def _find_recipe(file: SweepFile, path: Path, report: Report) -> Path:
    given = os.path.expanduser(file.recipe)
    candidates = [base / given for base in (path.absolute().parent, Path.cwd())]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        near = near_files(Path(given).name, dict.fromkeys(c.parent for c in candidates), (".yaml", ".yml"))
        report.add("recipe", f"{shown(file.recipe)} does not exist; {near}")
        return candidates[0]
    return Path(os.path.relpath(found)) if found.resolve().is_relative_to(Path.cwd()) else found


def written(value: Any) -> str:
    """A value as `key=value` has it: text alone where that is read as the same text."""
    if isinstance(value, str) and OmegaConf.from_dotlist([f"x={value}"]).get("x") == value:
        return value
    return json.dumps(value, ensure_ascii=False)
