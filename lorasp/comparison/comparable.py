"""Which runs may stand in one table: those that differ in method, rank, seed and learning rate, and in no more."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from lorasp.comparison.runs import Run

_COMPARED = {"method", "task", "seed", "training.learning_rate", "adapter.rank", "adapter.alpha", "adapter.head"}


def comparable(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs that agree with most of their model and task, and a sentence for each of the others.

    Of settings that stand one to one, those of the runs that were given first count.
    """
    of_task: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        of_task[run.model, run.task].append(run)
    agree, others = [], []
    for its in of_task.values():
        common = _common(its)
        for run in its:
            differing = [(key, value) for key, value in _facts(run) if value != common[key]]
            if not differing:
                agree.append(run)
                continue
            told = "; ".join(f"{key} is {_short(value)}, not {_short(common[key])}" for key, value in differing)
            others.append(f"{run.directory.name}: not comparable with the others ({told})")
    return [run for run in runs if run in agree], others


def _common(runs: Sequence[Run]) -> dict[str, Any]:
    """Of each fact the value that most runs share. A rank's alpha, and one seed's rows, are facts of their own."""
    counts: dict[str, Counter] = defaultdict(Counter)
    values: dict[tuple[str, str], Any] = {}
    for run in runs:
        for key, value in _facts(run):
            counts[key][repr(value)] += 1  # a list is no key
            values[key, repr(value)] = value
    return {key: values[key, its.most_common(1)[0][0]] for key, its in counts.items()}


def _facts(run: Run) -> Iterator[tuple[str, Any]]:
    for key, value in run.settings.items():
        # Full fine-tuning quantizes nothing, whatever it is compared with.
        if key not in _COMPARED and not (run.method == "full" and key.startswith("quantization.")):
            yield key, value
    if run.method != "full":
        yield f"adapter.alpha at rank {run.rank} of {run.method}", run.recipe.adapter.alpha
    for kind, digest in run.rows.items():
        yield f"the rows of data.{kind} with seed {run.seed}", digest


def _short(value: Any) -> str:
    is_digest = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}…" if is_digest else str(value)
