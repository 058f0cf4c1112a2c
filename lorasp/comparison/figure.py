"""The picture of a table, like the paper's Figure 2: bars of each method beside each other, a group a score."""

from collections.abc import Sequence
from pathlib import Path

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
    """Writes a panel a model: our means as bars, their sample deviation as whiskers, the paper's figures as marks.

    A bar that is not there was not run. Colours are the methods', in the order of their first appearance.
    """
    columns = TABLES[number].columns
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row.model, []).append(row)
    names = list(dict.fromkeys(_bar_name(row) for row in rows))
    colours = dict(zip(names, [COLOURS[index % len(COLOURS)] for index in range(len(names))], strict=True))
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(2.9 * len(by_model) + 0.6, nrows=len(by_model), squeeze=False)
        for (model, its), axes in zip(by_model.items(), panels[:, 0], strict=True):
            width = _BARS / len(its)
            lowest = 0.0
            for place, row in enumerate(its):
                for group, column in enumerate(columns):
                    x = group - _BARS / 2 + (place + 0.5) * width
                    if (value := row.score(column)) is not None:
                        axes.bar(x, value.mean, 0.92 * width, yerr=value.deviation, color=colours[_bar_name(row)])
                        lowest = min(lowest, value.mean)
                    if row.paper is not None:
                        axes.plot(
                            x, row.paper.scores[column], "D", color="black", markerfacecolor="white", markersize=5
                        )
                        lowest = min(lowest, row.paper.scores[column])
            axes.set_xticks(range(len(columns)), columns.values())
            axes.set_ylim(1.05 * lowest, None)
            axes.grid(axis="x", visible=False)
            axes.set(title=model, ylabel="%")
        handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
        mark = Line2D([], [], **_PAPERS, label="paper")
        figure.legend(handles=[*handles, mark], loc="outside lower center", ncols=5)
        save_figure(figure, path)


def _bar_name(row: Row) -> str:
    return METHODS[row.method] if row.paper else ", ".join(filter(None, (METHODS[row.method], row.key.details)))
