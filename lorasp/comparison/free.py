"""Any runs side by side, a row for each set of settings in which they differ; seeds are averaged."""

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorasp.comparison.runs import METHODS, PHASES, Run
from lorasp.comparison.summary import Seeds, Value
from lorasp.comparison.tables import MISSING, format_value
from lorasp.memory import gib, mib
from lorasp.reporting.markdown import table
from lorasp.reporting.report_text import loss_unit

_DRAWN_FROM = ("train", "revision", "limit")
_PLACES = {"held_out_loss": 4}  # of a score's mean and deviation; 2 of others


@dataclass(frozen=True)
class Group(Seeds):
    """settings: the values by which the group differs from others."""

    settings: dict[str, Any]


def grouped(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """The groups in the order given, and a sentence for each run whose seed its group has already."""
    facts = [_facts(run) for run in runs]
    keys = list(dict.fromkeys(key for its in facts for key in its))
    differing = [key for key in keys if len({repr(its.get(key)) for its in facts}) > 1]
    cells: dict[str, list[Run]] = defaultdict(list)
    settings: dict[str, dict[str, Any]] = {}
    others = []
    for run, its in zip(runs, facts, strict=True):
        values = {key: its.get(key) for key in differing}
        name = repr(values)
        if run.seed in {there.seed for there in cells[name]}:
            others.append(f"{run.directory.name}: differs in nothing from a run before it, its seed neither")
            continue
        settings[name] = values
        cells[name].append(run)
    return [Group(tuple(its), settings[name]) for name, its in cells.items() if its], others


def _facts(run: Run) -> dict[str, Any]:
    """What makes a run another one: its settings without the seed, its model, and the rows that it read.

    Where the seed draws what is held out, runs of one source train on other rows: they are known by the source then.
    """
    facts = {key: value for key, value in run.settings.items() if key != "seed"}
    counts = {f"rows of {kind}": its["rows"] for kind, its in run.report["data"].items() if "rows" in its}
    data = run.recipe.data
    if isinstance(data.held_out, float):
        rows = {f"data.{key}": value for key, value in run.report["recipe"]["data"].items() if key in _DRAWN_FROM}
    else:
        rows = {f"digest of {kind}": digest[:12] for kind, digest in run.rows.items()}
    return {"model": run.model, **facts, **counts, **rows}


def score_names(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for run in group.runs for name in run.scores))


def format_groups(groups: Sequence[Group]) -> str:
    """Markdown."""
    keys, names = list(groups[0].settings), score_names(groups)
    header = [*keys, "seeds", *(_header(name, groups) for name in names), "trained", "optimizer (MiB)"]
    header += [f"peak of {phase} (GiB)" for phase in PHASES] + ["tokens/s"]
    lines = []
    for group in groups:
        lines.append(
            [
                *(_cell(key, group.settings[key]) for key in keys),
                ", ".join(map(str, group.seeds)),
                *(format_value(group.score(name), _PLACES.get(name, 2)) for name in names),
                f"{group.trained:,}",
                mib(group.optimizer_bytes),
                *(MISSING if peak is None else gib(peak) for peak in group.peaks().values()),
                format_value(group.tokens_per_second(), 0),
            ]
        )
    alignment = "l" * (len(keys) + 1) + "r" * (len(header) - len(keys) - 1)
    machines = sorted({machine for group in groups for machine in group.machines})
    note = (
        "Scores: mean ± sample deviation over seeds (their number). A setting without a value is none of that "
        "method's. Peaks: of the worst rank of all seeds, above what the process held before the model. Measured on "
        f"{'; '.join(machines)}."
    )
    return "\n\n".join([table(header, lines, alignment), note])


def _header(name: str, groups: Sequence[Group]) -> str:
    unit = "%"
    if name.endswith("loss"):
        runs = (run for group in groups for run in group.runs if name in run.scores)
        unit = " or ".join(dict.fromkeys(loss_unit(run.report["recipe"]) for run in runs))
    return f"{name.replace('_', ' ')} ({unit})"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "method":
        return METHODS[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def groups_csv(groups: Sequence[Group]) -> str:
    """A line a group; a score's mean, deviation and number of seeds are columns of their own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    keys, names = list(groups[0].settings), score_names(groups)
    parts = ("mean", "deviation", "n")
    writer.writerow(
        [*keys, "seeds", *(f"{name}_{part}" for name in names for part in parts), "trained", "optimizer_bytes"]
        + [*(f"peak_bytes_{phase}" for phase in PHASES), "tokens_per_second", "runs"]
    )
    for group in groups:
        scores = [value for name in names for value in _parts(group.score(name))]
        rate = group.tokens_per_second()
        writer.writerow(
            [*(group.settings[key] for key in keys), " ".join(map(str, group.seeds)), *scores]
            + [group.trained, group.optimizer_bytes]
            + [*group.peaks().values(), None if rate is None else rate.mean]
            + [" ".join(run.directory.name for run in group.runs)]
        )
    return out.getvalue()


def _parts(value: Value | None) -> tuple[float | None, float | None, int | None]:
    return (None, None, None) if value is None else (value.mean, value.deviation, value.n)
