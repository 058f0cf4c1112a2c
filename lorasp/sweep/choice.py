"""The learning rate of each group, chosen by scores of rows that are not reported, and kept with what led to it.

`SWEEP/chosen/GROUP.json` is whole or absent. Once it is there the choice stands: a sweep that goes on reads it again.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasp.recipe import RecipeError
from lorasp.sweep.cells import Cell, final_cells
from lorasp.sweep.definition import Sweep
from lorasp.sweep.outcome import find_outcome
from lorasp.whole_files import write_text_whole

CHOSEN = "chosen"  # in the directory of a sweep
_SPLIT = {"selection": "selection", "held_out": "reported"}  # choose.by -> whose score of report.json


@dataclass(frozen=True)
class Candidate:
    """score: None of a run that its loss stopped, or whose score is no number. loss: of the same rows, where the score
    is of another kind.
    """

    learning_rate: float
    run: str
    score: float | None
    status: str
    loss: float | None = None

    @property
    def tie_breaker(self) -> float:
        return math.inf if self.loss is None else self.loss


@dataclass(frozen=True)
class Choice:
    """metric: of which the scores are; learning_rate: the best one's, of equal ones that of the least loss (a
    classifier that answers alike everywhere scores the same at each), then the lowest; reports: the names of the runs
    to report, which train at it.
    """

    group: str
    by: str
    metric: str
    higher_is_better: bool
    seed: int | None
    candidates: tuple[Candidate, ...]
    learning_rate: float
    reports: tuple[str, ...]

    def describe(self) -> str:
        rates = [its.learning_rate for its in self.candidates]
        told = f"{self.group or 'learning rate'}: {self.learning_rate:g} by {self.by} {self.metric}"
        told += f" ({_by_rate(self.candidates, 'score')})"
        equal = [its for its in self.candidates if its.score == self.candidates[rates.index(self.learning_rate)].score]
        if len(equal) > 1:
            told += f", of equal ones by the loss ({_by_rate(equal, 'loss')})"
        edge = {min(rates): "lowest", max(rates): "highest"}.get(self.learning_rate)
        return f"{told}; it is the {edge} that was tried" if edge else told


def _by_rate(candidates: Sequence[Candidate], name: str) -> str:
    numbers = ((its.learning_rate, getattr(its, name)) for its in candidates)
    return ", ".join(f"{rate:g}: {'none' if number is None else f'{number:.4g}'}" for rate, number in numbers)


def choice_file(sweep: Sweep, group: str) -> Path:
    return sweep.directory / CHOSEN / f"{group or 'all'}.json"


def read_choice(sweep: Sweep, group: str) -> Choice | None:
    """None where nothing was chosen yet. Raises RecipeError for one that was made as the sweep does not say."""
    path = choice_file(sweep, group)
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        its = tuple(Candidate(**candidate) for candidate in tree["candidates"])
        found = Choice(**tree | {"candidates": its, "reports": tuple(tree["reports"])})
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RecipeError(f"{path} is no choice that can be read ({error}); remove it to choose again") from None
    choose = sweep.file.choose
    rates = [candidate.learning_rate for candidate in found.candidates]
    if (rates, found.by) != (choose.learning_rates, choose.by):
        raise RecipeError(
            f"{path} chose among {rates} by {found.by}, and the sweep says {choose.learning_rates} by {choose.by}; "
            f"set that back, or remove it to choose again"
        )
    return found


def choose(sweep: Sweep, group: str, cells: list[Cell]) -> Choice | str:
    """The choice of a group, read again or made and written; or why there is none yet. cells: its candidates.

    Raises RecipeError for reports that cannot be compared.
    """
    if (found := read_choice(sweep, group)) is not None:
        return found
    candidates, splits = [], []
    for cell in cells:
        outcome = find_outcome(cell.run_dir, cell.recipe)
        if outcome.report is None:
            return f"{cell.name} has not ended"
        split = score_to_choose_by(outcome.report, sweep.file.choose.by)
        if outcome.kind == "finished":
            if split is None:
                raise RecipeError(f"{cell.run_dir}: its report has no score to choose by ({sweep.file.choose.by})")
            splits.append(split)
        of_run = {} if outcome.kind == "stopped" else split
        score, loss = (_number(of_run.get("score")), _number(of_run.get("metrics", {}).get("loss")))
        candidates.append(Candidate(cell.learning_rate, cell.name, score, outcome.report["status"], loss))
    scored = [candidate for candidate in candidates if candidate.score is not None]
    if not scored:
        return f"none of its learning rates gave a score ({', '.join(cell.name for cell in cells)})"
    higher = splits[0]["higher_is_better"]
    best = min(scored, key=lambda its: (-its.score if higher else its.score, its.tie_breaker, its.learning_rate))
    seed = cells[0].recipe.seed
    by, metric = sweep.file.choose.by, splits[0]["metric"]
    reports = tuple(its.name for its in final_cells(sweep, {group: best.learning_rate}) if its.group == group)
    chosen = Choice(group, by, metric, higher, seed, tuple(candidates), best.learning_rate, reports)
    write_text_whole(choice_file(sweep, group), json.dumps(asdict(chosen), indent=1) + "\n")
    return chosen


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def score_to_choose_by(report: Mapping[str, Any], by: str) -> Mapping[str, Any] | None:
    """The split of a report (`tasks.base.Score.splits`) whose score chooses: `metric`, `score`, `higher_is_better`."""
    return report.get(_SPLIT[by])
