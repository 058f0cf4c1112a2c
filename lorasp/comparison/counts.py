"""Trained parameters of every row of the paper's tables, counted on the architectures' real shapes, beside its own.

The models are built by the code that trains them, on the meta device: no weight is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lorasp.accounting import count_parameters
from lorasp.comparison.notes import notes_of
from lorasp.comparison.runs import METHODS
from lorasp.models.build import build_on_meta
from lorasp.models.weights import load_config, locate_model
from lorasp.recipe import Recipe
from lorasp.reporting.markdown import table
from lorasp.reporting.paper import MODELS, TABLES, PaperRow

_TASKS = {1: "mrpc", 2: "wmt16_en_ro", 3: "causal_lm"}  # of two labels, as most of GLUE's
_RANKS = {1: 8, 2: 8, 3: 64}  # by which the printed numbers come out


@dataclass(frozen=True)
class Count:
    """trained: parameters that are updated. total: of the model with its adapter."""

    paper: PaperRow
    trained: int
    total: int

    @property
    def more(self) -> float:
        """Ours against the paper's, as a share of the paper's."""
        return self.trained / (1e6 * self.paper.trained) - 1


def recipe_of(row: PaperRow) -> Recipe:
    """The run that a row's printed number of parameters means, with random weights and no data."""
    tree: dict = {
        "method": row.method,
        "model": {"path": MODELS[row.model].shape, "weights": "random"},
        "data": {"train": "random" if row.table == 3 else "."},
        "quantization": {"format": "none"},
    }
    if row.table != 3:
        tree["task"] = _TASKS[row.table]
    if row.method != "full":
        tree["adapter"] = {"rank": _RANKS[row.table]}
    return Recipe(**tree)


def count_row(row: PaperRow) -> Count:
    recipe = recipe_of(row)
    config = load_config(locate_model(recipe.model), recipe.model)
    counts = count_parameters(build_on_meta(config, recipe, torch.float32, draws=False))
    return Count(row, counts.trained, counts.total)


def count_rows() -> Iterator[Count]:
    for its in TABLES.values():
        for row in its.rows:
            yield count_row(row)


def format_counts(counts: list[Count]) -> str:
    """Markdown: a table of all rows, and why ours are other numbers."""
    lines = [
        [
            its.paper.place,
            f"{its.paper.model}, {METHODS[its.paper.method]}",
            "–" if its.paper.method == "full" else str(_RANKS[its.paper.table]),
            f"{its.paper.trained:g}",
            f"{its.trained / 1e6:.3f}" if its.trained < 1e7 else f"{its.trained / 1e6:.1f}",
            f"{its.trained:,}",
            f"{its.more:+.1%}",
        ]
        for its in counts
    ]
    header = ["paper", "model, method", "r", "printed (M)", "counted (M)", "counted", "counted against printed"]
    notes = [note for number in dict.fromkeys(its.paper.table for its in counts) for note in notes_of(number)]
    return "\n\n".join(["## Trained parameters", table(header, lines, "llrrrrr"), *notes])
