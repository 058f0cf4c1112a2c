"""Finished runs as a comparison needs them, and those that have no part in one, each with the reason."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorasp.recipe import Recipe, RecipeError
from lorasp.recipe_settings import flat_settings
from lorasp.reporting.paper import MODELS
from lorasp.sweep.choice import CHOSEN

METHODS = {"full": "FT", "lora": "LoRA", "lorasp": "LoRA-SP"}  # as the paper has them
PHASES = ("load", "train", "evaluate", "save")
# Settings in which runs may differ and stay comparable: where things lie and what is told of them. Models and rows are
# known by other means than their paths.
_NO_MATTER = set(
    """
    name output_dir overwrite resume rehearse tracking profile memory health checkpoint lm_eval quantization.cache
    model.path model.revision model.trust_remote_code data.train data.held_out data.revision data.limit mmlu.data
    mmlu.revision evaluation.before evaluation.samples evaluation.max_new_tokens training.log_every
    training.evaluate_every
    """.split()
)
_SAME_SIZE = 1e-3  # of all parameters: a classifier has a row of its head a label


@dataclass(frozen=True)
class Run:
    """A finished training run. report: its report.json."""

    directory: Path
    report: Mapping[str, Any]
    recipe: Recipe

    @property
    def method(self) -> str:
        return self.recipe.method

    @property
    def rank(self) -> int | None:
        return None if self.method == "full" else self.recipe.adapter.rank

    @property
    def seed(self) -> int:
        return self.recipe.seed

    @property
    def learning_rate(self) -> float:
        return self.recipe.training.learning_rate

    @property
    def task(self) -> str:
        return self.recipe.task

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Those that its numbers follow from, by dotted name, without those that its method has no use for."""
        return flat_settings(self.recipe.to_dict(), without=_NO_MATTER)

    @cached_property
    def rows(self) -> dict[str, str]:
        """Digest of each data set that it read."""
        return {kind: its["digest"] for kind, its in self.report["data"].items() if "digest" in its}

    @cached_property
    def model(self) -> str:
        """The paper's name of a model that has the parameters of its own, else what the recipe calls it."""
        if self.recipe.model.weights == "stored":
            total = self.report["parameters"]["total"] - self.report["parameters"]["adapter"]
            for name, its in MODELS.items():
                if abs(total - its.parameters) <= _SAME_SIZE * its.parameters and not self._is_no_model_of_mmlu(name):
                    return name
        return self.recipe.model.path

    def _is_no_model_of_mmlu(self, name: str) -> bool:
        """Llama 2 has LLaMA's parameters, and is none of the paper's: a report of MMLU knows which it is."""
        mmlu = self.report.get("mmlu")
        return mmlu is not None and (mmlu["paper"] is None or mmlu["paper"]["model"] != name)

    @cached_property
    def scores(self) -> dict[str, float]:
        """Its reported scores by name, in % unless they are losses; of MNLI `mismatched_accuracy` besides.

        The score that counts of a GLUE task goes by the task's name too, as Table 1 has it.
        """
        found: dict[str, float | None] = {}
        for split in ("reported", "reported_mismatched"):
            before = split.removeprefix("reported").removeprefix("_")
            for name, value in self.report.get(split, {}).get("metrics", {}).items():
                found[f"{before}_{name}" if before else name] = _in_percent(name, value)
        if self.recipe.kind == "classification" and (reported := self.report.get("reported")):
            found[self.task] = _in_percent(reported["metric"], reported["score"])
        if (mmlu := self.report.get("mmlu")) is not None:
            found["mmlu"] = 100 * mmlu["scores"][-1]["micro"]["accuracy"]
        return {name: value for name, value in found.items() if value is not None}

    @property
    def trained(self) -> int:
        return self.report["parameters"]["trained"]

    @property
    def optimizer_bytes(self) -> int:
        """Of all ranks together."""
        return self.report["parameters"]["optimizer_state_bytes"]

    @property
    def tokens_per_second(self) -> float | None:
        """Real ones, over all ranks."""
        return self.report["throughput"].get("real_tokens_per_second")

    def peak_bytes(self, phase: str) -> int | None:
        """Of the worst rank, above what its process held before; of all phases of a kind, such as `evaluate_mmlu`."""
        peaks = [
            rank["peak_bytes"]
            for name, its in self.report["phases"].items()
            if name == phase or name.startswith(f"{phase}_")
            for rank in its["ranks"]
        ]
        return max(peaks, default=None)

    @property
    def machine(self) -> str:
        """On what its memory and speed were measured."""
        ranks = self.report["world_size"]
        return f"{ranks} rank{'s' if ranks > 1 else ''} on {self.report['device'].partition(':')[0]}"


def _in_percent(metric: str, value: float | None) -> float | None:
    is_in_percent = metric == "bleu" or metric.startswith("rouge") or metric.endswith("loss")
    return value if value is None or is_in_percent else 100 * value


def read_runs(paths: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """The finished runs in `paths`, and a sentence for each that is left out. A path is a run's, or of several's.

    Raises RecipeError for a path that is no directory, or where none is left.
    """
    found: list[Run] = []
    left_out: list[str] = []
    directories: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_file():  # runs/* names what lies beside the runs, too
            continue
        if not path.is_dir():
            raise RecipeError(f"{path} is no directory; give those of runs, or of a sweep")
        inside = [] if _is_run(path) else sorted(child for child in path.iterdir() if _is_run(child))
        directories |= dict.fromkeys([child.absolute() for child in inside or [path]])
    for directory in directories:
        if directory.name == CHOSEN:
            continue
        run = _read_run(directory)
        if isinstance(run, Run):
            found.append(run)
        else:
            left_out.append(f"{_shown(directory)}: {run}")
    if not found:
        raise RecipeError("\n".join(["no finished run to compare", *left_out]))
    return found, left_out


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in ("report.json", "checkpoints", "log.txt"))


def _read_run(directory: Path) -> Run | str:
    path = directory / "report.json"
    if not path.is_file():
        return "has not finished" if _is_run(directory) else "is no run"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        recipe = Recipe(**report["recipe"])
        status, phases = report["status"], report["phases"]
    except (OSError, ValueError, LookupError, TypeError) as error:  # ValueError: JSON's and pydantic's
        return f"its report cannot be read by this version ({' '.join(str(error).split()):.200})"
    if status != "finished":
        return f"did not finish ({status})"
    if "train" not in phases:
        return "is an evaluation, which trained nothing"
    if (why := _not_chosen(directory)) is not None:
        return why
    return Run(directory, report, recipe)


def _not_chosen(directory: Path) -> str | None:
    """Why a run of a sweep's first stage is none to report, by the choice that it had a part in."""
    for path in sorted((directory.parent / CHOSEN).glob("*.json")):
        try:
            choice = json.loads(path.read_text(encoding="utf-8"))
            candidates, reports, rate = (
                [its["run"] for its in choice["candidates"]],
                choice["reports"],
                choice["learning_rate"],
            )
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise RecipeError(
                f"{path} is no choice that can be read ({error}); the sweep makes it again once it is removed"
            ) from None
        if directory.name in candidates and directory.name not in reports:
            return f"was run to choose a learning rate; {rate:g} was chosen"
    return None


def _shown(directory: Path) -> str:
    return str(directory.relative_to(Path.cwd()) if directory.is_relative_to(Path.cwd()) else directory)
