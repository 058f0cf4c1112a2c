"""The paper's tables from our runs, the paper's figures beside them: Markdown for people, CSV for programs."""

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorasp.comparison.runs import METHODS, PHASES
from lorasp.comparison.summary import RowKey, Summary, Value
from lorasp.memory import gib, mib
from lorasp.reporting.markdown import table
from lorasp.reporting.paper import TABLES, PaperRow, PaperTable

MISSING = "–"


@dataclass(frozen=True)
class Row:
    """A row of the paper, of ours, or both. summaries: by task; key: None where nothing of ours is there."""

    model: str
    method: str
    paper: PaperRow | None
    key: RowKey | None
    summaries: Mapping[str, Summary]

    @property
    def name(self) -> str:
        return f"{self.model}, {METHODS[self.method]}"

    @property
    def trained(self) -> list[int]:
        """Of each task: a classifier's head has a row a label."""
        return sorted({its.trained for its in self.summaries.values()})

    def score(self, column: str) -> Value | None:
        values = (its.score(column) for its in self.summaries.values())
        return next((value for value in values if value is not None), None)


def table_rows(number: int, summaries: Sequence[Summary]) -> list[Row]:
    """The paper's rows in its order, each with the row of ours whose method is the same and whose trained parameters
    are nearest; behind each model's, our others. Models that the paper does not have follow.
    """
    ours: dict[RowKey, dict[str, Summary]] = {}
    for summary in summaries:
        ours.setdefault(summary.row, {})[summary.task] = summary
    rows, taken = [], set()
    for paper in TABLES[number].rows:
        alike = [key for key in ours if (key.model, key.method) == (paper.model, paper.method)]
        key = min(alike, key=lambda k: abs(_trained(ours[k]) - 1e6 * paper.trained), default=None)
        taken |= {key}
        rows.append(Row(paper.model, paper.method, paper, key, ours.get(key, {})))
    rows += [Row(key.model, key.method, None, key, its) for key, its in ours.items() if key not in taken]
    models = dict.fromkeys([*(row.model for row in TABLES[number].rows), *(row.model for row in rows)])
    order = list(models)
    methods = list(METHODS)
    return sorted(
        rows,
        key=lambda row: (
            order.index(row.model),
            methods.index(row.method),
            row.paper is None,
            -(row.key.rank or 0) if row.key else 0,
        ),
    )


def _trained(summaries: Mapping[str, Summary]) -> int:
    return max(its.trained for its in summaries.values())


def scored_in(number: int, summary: Summary) -> bool:
    """Whether a summary has a score of the table."""
    return any(summary.score(column) is not None for column in TABLES[number].columns)


def format_table(number: int, rows: Sequence[Row]) -> str:
    """Markdown: scores and trained parameters, the paper's rows above ours."""
    paper = TABLES[number]
    header = ["model, method", "from", "trained (M)", *paper.columns.values()]
    header += ["mean"] if paper.averages else []
    lines = []
    for row in rows:
        if row.paper is not None:
            values = [f"{row.paper.scores[column]:.1f}" for column in paper.columns]
            values += [f"{statistics.fmean(row.paper.scores.values()):.1f}"] if paper.averages else []
            lines.append([row.name, "paper", f"{row.paper.trained:g}", *values])
        lines.append(["" if row.paper else row.name, _from(row), _millions(row.trained), *_our_cells(paper, row)])
    title = f"## Table {number}: {paper.title}"
    note = "Scores in %; ours: mean ± sample deviation over seeds (their number). – : there is no run of it."
    return "\n\n".join([title, table(header, lines, "ll" + "r" * (len(header) - 2)), note])


def _from(row: Row) -> str:
    return ", ".join(["ours", *([row.key.details] if row.key and row.key.details else [])])


def _our_cells(paper: PaperTable, row: Row) -> Iterator[str]:
    scores = [row.score(column) for column in paper.columns]
    yield from (format_value(score) for score in scores)
    if paper.averages:
        yield f"{statistics.fmean(score.mean for score in scores):.1f}" if all(scores) else MISSING


def format_value(value: Value | None, places: int = 1) -> str:
    if value is None:
        return MISSING
    deviation = "" if value.deviation is None else f" ± {value.deviation:.{places}f}"
    return f"{value.mean:.{places}f}{deviation} ({value.n})"


def _millions(counts: Sequence[int]) -> str:
    if not counts:
        return MISSING
    texts = dict.fromkeys(f"{count / 1e6:.3f}" if count < 1e7 else f"{count / 1e6:.1f}" for count in counts)
    return "–".join(list(texts)[:: max(1, len(texts) - 1)])  # from the least to the most


def format_costs(summaries: Sequence[Summary]) -> str:
    """Markdown: what each row took on each task."""
    header = ["model, method", "task", "seeds", "learning rate", "alpha", "optimizer (MiB)"]
    header += [f"peak of {phase} (GiB)" for phase in PHASES] + ["tokens/s", "measured on"]
    lines = []
    for its in summaries:
        alpha = "" if its.row.rank is None else f"{its.runs[0].recipe.adapter.alpha:g}"
        peaks = [MISSING if peak is None else gib(peak) for peak in its.peaks().values()]
        lines.append(
            [
                ", ".join(filter(None, (its.row.model, METHODS[its.row.method], its.row.details))),
                its.task,
                ", ".join(map(str, its.seeds)),
                f"{its.learning_rate:g}",
                alpha or MISSING,
                mib(its.optimizer_bytes),
                *peaks,
                format_value(its.tokens_per_second(), 0),
                "; ".join(its.machines),
            ]
        )
    note = (
        "Peaks: of the worst rank of all seeds, above what the process held before the model; optimizer: masters and "
        "moments of all ranks together; tokens/s: real ones, over all ranks."
    )
    if len({machine for its in summaries for machine in its.machines}) > 1:
        note += " Memory and speed were not all measured on the same ranks and devices: see the last column."
    return "\n\n".join(["### What it took", table(header, lines, "llll" + "r" * (len(header) - 5) + "l"), note])


_CSV = ["table", "model", "method", "rank", "head", "score", "task", "mean", "deviation", "n", "paper", "trained"]
_CSV += ["paper_trained_millions", "learning_rate", "seeds", "optimizer_bytes"]
_CSV += [*(f"peak_bytes_{phase}" for phase in PHASES), "tokens_per_second", "machines", "runs"]


def table_csv(number: int, rows: Sequence[Row]) -> str:
    """A line a score of each row; a number that is not there is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _CSV, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for column in TABLES[number].columns:
            summary = next((its for its in row.summaries.values() if its.score(column) is not None), None)
            line = {
                "table": number,
                "model": row.model,
                "method": row.method,
                "rank": "" if row.key is None or row.key.rank is None else row.key.rank,
                "head": row.key.head if row.key and row.key.head else "",
                "score": column,
                "paper": row.paper.scores[column] if row.paper else "",
                "paper_trained_millions": row.paper.trained if row.paper else "",
            }
            writer.writerow(line | (_csv_of(summary, column) if summary else {}))
    return out.getvalue()


def _csv_of(summary: Summary, column: str) -> dict[str, object]:
    value, rate = summary.score(column), summary.tokens_per_second()
    return {
        "task": summary.task,
        "mean": value.mean,
        "deviation": "" if value.deviation is None else value.deviation,
        "n": value.n,
        "trained": summary.trained,
        "learning_rate": summary.learning_rate,
        "seeds": " ".join(map(str, summary.seeds)),
        "optimizer_bytes": summary.optimizer_bytes,
        **{f"peak_bytes_{phase}": "" if peak is None else peak for phase, peak in summary.peaks().items()},
        "tokens_per_second": "" if rate is None else rate.mean,
        "machines": "; ".join(summary.machines),
        "runs": " ".join(run.directory.name for run in summary.runs),
    }
