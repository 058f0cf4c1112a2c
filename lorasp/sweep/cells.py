"""The runs of a sweep: their names, their recipes, and the order in which they are numbered."""

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lorasp.recipe import Data, Recipe, RecipeError, Source
from lorasp.recipe_loading import load_recipe
from lorasp.sweep.definition import Change, Sweep, written

UNCHOSEN = "?"  # stands for a learning rate in the name of a run that waits for it


@dataclass(frozen=True)
class Cell:
    """One run. group: of those that differ in learning rate and seed alone. is_candidate: of the first stage.

    learning_rate: None for the recipe's, and of a run that waits for it (`is_chosen` is False).
    """

    sweep: Sweep
    group: str
    changes: tuple[Change, ...]
    learning_rate: float | None
    seed: int | None
    is_candidate: bool = False
    is_chosen: bool = True

    @property
    def name(self) -> str:
        parts = [self.group] if self.group else []
        if self.sweep.file.choose:
            parts.append(f"lr{self.learning_rate:g}" if self.is_chosen else f"lr{UNCHOSEN}")
        if self.seed is not None:
            parts.append(f"seed{self.seed}")
        apart = self.is_candidate and self.sweep.file.choose.settings  # it is no run of the second stage
        return "-".join((["choose"] if apart else []) + parts) or self.sweep.recipe.stem

    @property
    def run_dir(self) -> Path:
        return self.sweep.directory / self.name

    @property
    def settings(self) -> list[str]:
        """What makes it another run than the others, as `key=value`."""
        out = [change.text for change in self.changes]
        if self.seed is not None:
            out.append(f"seed={self.seed}")
        if self.learning_rate is not None:
            out.append(f"training.learning_rate={self.learning_rate!r}")
        return out

    @property
    def overrides(self) -> list[str]:
        """What `launch/train.py` is given behind the recipe."""
        return [*self.settings, f"name={written(self.name)}", f"output_dir={written(str(self.sweep.directory))}"]

    @cached_property
    def recipe(self) -> Recipe:
        """Raises RecipeError with all faults, each where the sweep gives what is at fault."""
        try:
            return load_recipe(self.sweep.recipe, self.overrides)
        except RecipeError as error:
            raise RecipeError("\n".join(map(self._placed, str(error).splitlines()))) from None

    def _placed(self, fault: str) -> str:
        """A recipe's fault on "the command line" is one of the sweep's file."""
        where, separator, rest = fault.partition(": ")
        if where != "command line" or not separator:
            return fault
        key = rest.partition(":")[0]
        # The last that sets this key, or one in its section, or the whole section.
        related = [change for change in self.changes if f"{change.key}.".startswith(f"{key}.")]
        related += [change for change in self.changes if f"{key}.".startswith(f"{change.key}.")]
        at = self.sweep.where(related[-1].place) if related else str(self.sweep.path)
        return f"{at}: {rest}"


def candidates(sweep: Sweep) -> list[Cell]:
    """The runs among which learning rates are chosen; none where the sweep chooses none."""
    if sweep.file.choose is None:
        return []
    its = tuple(sweep.changes(sweep.file.choose.settings, "choose.settings"))
    return [
        Cell(sweep, group, changes + its, rate, _seeds(sweep)[0], is_candidate=True)
        for group, changes in _groups(sweep)
        for rate in sweep.file.choose.learning_rates
    ]


def final_cells(sweep: Sweep, chosen: Mapping[str, float]) -> list[Cell]:
    """The runs to report. chosen: group -> its learning rate; those of a group that has none yet have no name yet."""
    choose = sweep.file.choose
    return [
        Cell(
            sweep,
            group,
            changes,
            chosen.get(group),
            seed,
            is_chosen=choose is None or group in chosen,
        )
        for group, changes in _groups(sweep)
        for seed in _seeds(sweep)
    ]


def groups(sweep: Sweep) -> list[str]:
    return [group for group, _ in _groups(sweep)]


def check(cells: Sequence[Cell], ranks: int | None) -> None:
    """Loads the recipe of every run. ranks: of each run, where the launcher's arguments tell.

    Raises RecipeError with all faults, each once, with the first run that has it.
    """
    faults: dict[str, str] = {}
    names: dict[tuple[Path, bool], Cell] = {}  # a candidate of the chosen rate is the first of those that are reported
    for cell in cells:
        if names.setdefault((cell.run_dir, cell.is_candidate), cell) is not cell:
            faults.setdefault(f"{cell.sweep.path}: two runs would both be called {cell.name}; rename a variant", "")
        try:
            if ranks is not None:
                cell.recipe.accumulation(ranks)
            if (fault := _unfit_to_choose(cell)) is not None:
                faults.setdefault(fault, cell.name)
        except RecipeError as error:
            for fault in str(error).splitlines():
                faults.setdefault(fault, cell.name)
    if faults:
        raise RecipeError("\n".join(f"{fault} (run {name})" if name else fault for fault, name in faults.items()))


def _unfit_to_choose(cell: Cell) -> str | None:
    """Why a learning rate cannot be chosen by this candidate's score, or not without the reported rows' part in it."""
    choose = cell.sweep.file.choose
    recipe = cell.recipe
    if not cell.is_candidate:
        return None
    at = cell.sweep.where("choose.by")
    if choose.by == "selection":
        wanted, there = {
            "classification": ("data.selection to a share of the training rows, like 0.1", recipe.data.selection),
            "translation": ("data.held_out, beside translation.test", recipe.data.held_out),
            "causal_lm": ("choose.by to held_out, with other rows in choose.settings", None),
        }[recipe.kind]
        return None if there else f"{at}: choose.by: no rows are set apart to choose on; set {wanted}"
    if recipe.kind != "causal_lm":
        return f"{at}: choose.by: task {recipe.task} reports what it calls held out; set choose.by: selection"
    if recipe.data.held_out is None:
        return f"{at}: choose.by: there is no data.held_out to choose by"
    reported = next(its for its in final_cells(cell.sweep, {}) if its.group == cell.group).recipe
    if _share_rows(reported.data, recipe.data):
        return (
            f"{at}: choose.by: the rows of data.held_out would choose the learning rate and be reported too; give "
            f"other rows in choose.settings, such as data.held_out.skip behind data.held_out.limit"
        )
    return None


def _share_rows(some: Data, other: Data) -> bool:
    """Whether what two recipes hold out has rows in common, as far as their settings tell."""
    its, others = some.held_out_source, other.held_out_source
    if its is None and others is None:  # the smaller of two shares is part of the larger one
        return some.train_sources == other.train_sources
    if its is None or others is None or _set_of(its) != _set_of(others):
        return False
    first, last = sorted((its, others), key=lambda source: source.skip)
    return first.limit is None or last.skip < first.skip + first.limit


def _set_of(source: Source) -> tuple[str | None, ...]:
    return os.path.normpath(source.path), source.revision, source.subset, source.split


def _groups(sweep: Sweep) -> list[tuple[str, tuple[Change, ...]]]:
    """(name, changes) of each variant at each point of the grid."""
    axes = []
    if sweep.file.variants:
        axes.append(
            [(name, sweep.changes(settings, f"variants.{name}")) for name, settings in sweep.file.variants.items()]
        )
    for key, values in sweep.file.grid.items():
        axes.append([(_label(key, value), sweep.changes({key: value}, "grid")) for value in values])
    common = [*sweep.changes(sweep.file.settings, "settings"), *sweep.given]
    return [
        ("-".join(_plain(name) for name, _ in point), (*common, *(c for _, changes in point for c in changes)))
        for point in itertools.product(*axes)
    ]


def _label(key: str, value: object) -> str:
    """`cola` of task=cola, `rank8` of adapter.rank=8."""
    return value if isinstance(value, str) else f"{key.rpartition('.')[2]}{written(value)}"


def _plain(name: str) -> str:
    return re.sub(r"[^\w.+]+", "_", name).strip("_") or "_"


def _seeds(sweep: Sweep) -> list[int | None]:
    return list(sweep.file.seeds) or [None]
