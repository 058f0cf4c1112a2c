"""What the runs of one row and one task are together: means over seeds, worst peaks."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lorasp.comparison.runs import PHASES, Run


@dataclass(frozen=True)
class Value:
    """deviation: the sample's, over n seeds; None of a single one."""

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Value":
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Seeds:
    """Runs that differ in their seeds alone."""

    runs: tuple[Run, ...]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def trained(self) -> int:
        return self.runs[0].trained

    @property
    def optimizer_bytes(self) -> int:
        return max(run.optimizer_bytes for run in self.runs)

    @property
    def machines(self) -> list[str]:
        return sorted({run.machine for run in self.runs})

    def score(self, name: str) -> Value | None:
        """None where not every run has it."""
        values = [run.scores.get(name) for run in self.runs]
        if any(value is None or not math.isfinite(value) for value in values):
            return None
        return Value.of(values)

    def peaks(self) -> dict[str, int | None]:
        """Bytes of the worst rank of the worst run in each phase; None of a phase that no run had."""
        return {
            phase: max((peak for run in self.runs if (peak := run.peak_bytes(phase)) is not None), default=None)
            for phase in PHASES
        }

    def tokens_per_second(self) -> Value | None:
        rates = [rate for run in self.runs if (rate := run.tokens_per_second) is not None]
        return Value.of(rates) if rates else None


@dataclass(frozen=True)
class RowKey:
    """rank: None for full fine-tuning. head: how much of a classifier's is trained, where LoRA-SP has the choice."""

    model: str
    method: str
    rank: int | None
    head: str | None

    @classmethod
    def of(cls, run: Run) -> "RowKey":
        has_choice = run.method == "lorasp" and run.recipe.kind == "classification"
        return cls(run.model, run.method, run.rank, run.recipe.adapter.head if has_choice else None)

    @property
    def details(self) -> str:
        """`r = 8, head whole`; nothing for full fine-tuning."""
        parts = [] if self.rank is None else [f"r = {self.rank}"]
        return ", ".join([*parts, *([] if self.head is None else [f"head {self.head}"])])


@dataclass(frozen=True)
class Summary(Seeds):
    """A row's runs on one task, all at one learning rate."""

    row: RowKey
    task: str

    @property
    def learning_rate(self) -> float:
        return self.runs[0].learning_rate


def summarize(runs: Sequence[Run]) -> tuple[list[Summary], list[str]]:
    """The runs by row and task, in the order given, and a sentence for whatever of them cannot be averaged."""
    cells: dict[tuple[RowKey, str], list[Run]] = defaultdict(list)
    for run in runs:
        cells[RowKey.of(run), run.task].append(run)
    summaries, others = [], []
    for (row, task), its in cells.items():
        rates = sorted({run.learning_rate for run in its})
        if len(rates) > 1:
            told = ", ".join(f"{rate:g}" for rate in rates)
            names = ", ".join(run.directory.name for run in its)
            others.append(
                f"{names}: of several learning rates ({told}), of which none is the row's; choose one on rows that "
                f"are not reported, as launch/sweep.py does, and give its runs"
            )
            continue
        of_seed: dict[int, Run] = {}
        for run in its:
            if of_seed.setdefault(run.seed, run) is not run:
                others.append(
                    f"{run.directory.name}: has the seed of {of_seed[run.seed].directory.name}, which stands"
                )
        summaries.append(Summary(tuple(of_seed.values()), row, task))
    return summaries, others
