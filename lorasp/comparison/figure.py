"""The picture of a table, like the paper's Figure 2: bars of each method beside each other, a group a score."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lorasp.comparison.runs import METHODS
from lorasp.comparison.tables import Row
from lorasp.reporting.paper import TABLES
from lorasp.reporting.plots import COLOURS, STYLE, new_figure, save_figure

_BARS = 0.84  # of a group's width
_PAPERS = {"color": "black", "marker": "D", "markerfacecolor": "white", "markersize": 5, "linestyle": ""}


def draw_table(number: int, rows: Sequence[Row], path: Path) -> None:
    """Writes a panel a model that was run: our means as bars, their sample deviation as whiskers, the paper's figures
    as marks. A bar that is not there was not run. Without any run of ours the paper's figures stand alone.
    """
    columns = TABLES[number].columns
    run = {row.model for row in rows if row.key} or {row.model for row in rows}
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        if row.model in run:
            by_model.setdefault(row.model, []).append(row)
    names = dict.fromkeys(_name(row) for its in by_model.values() for row in its if row.key)
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(2.9 * len(by_model) + 0.6, nrows=len(by_model), squeeze=False)
        for (model, its), axes in zip(by_model.items(), panels[:, 0], strict=True):
            _draw_model(axes, its, list(columns), colours)
            axes.set_xticks(range(len(columns)), columns.values())
            axes.set_xlim(-0.5, len(columns) - 0.5)
            axes.set(title=model, ylabel="%")
            axes.grid(axis="x", visible=False)
        handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
        mark = Line2D([], [], **_PAPERS, label="paper")
        figure.legend(handles=[*handles, mark], loc="outside lower center", ncols=4)
        save_figure(figure, path)


def _draw_model(axes: Any, rows: list[Row], columns: list[str], colours: dict[str, str]) -> None:
    width = _BARS / len(rows)
    lowest, highest = 0.0, 1.0
    for place, row in enumerate(rows):
        for group, column in enumerate(columns):
            x = group - _BARS / 2 + (place + 0.5) * width
            value, paper = row.score(column), row.paper.scores[column] if row.paper else None
            if value is not None:
                axes.bar(x, value.mean, 0.92 * width, yerr=value.deviation, color=colours[_name(row)])
            if paper is not None:
                axes.plot(x, paper, **_PAPERS)
            shown = [its for its in (value and value.mean, paper) if its is not None]
            lowest, highest = min([lowest, *shown]), max([highest, *shown])
    axes.set_ylim(1.08 * lowest, 1.08 * highest)


def _name(row: Row) -> str:
    return ", ".join(filter(None, (METHODS[row.method], row.key.details)))
