"""Directories of finished runs, made by hand: their reports are built by the code that builds real ones."""

import json
from pathlib import Path
from typing import Any

from lorasp.memory import PhasePeak
from lorasp.recipe import Recipe
from lorasp.reporting.run_report import build_report, rank_phases

MIB = 2**20


def peaks(**mib: int) -> dict[str, PhasePeak]:
    """A rank's, by phase, in MiB above the baseline."""
    return {
        name: PhasePeak(
            name=name,
            seconds=1.0,
            peak_bytes=size * MIB,
            peak_total_bytes=(size + 400) * MIB,
            baseline_bytes=400 * MIB,
            source="by hand",
        )
        for name, size in mib.items()
    }


def recipe(**changes: Any) -> Recipe:
    """changes: by dotted name with two underscores for the dot."""
    tree: dict[str, Any] = {"model": {"path": "some/model"}, "data": {"train": "some/data"}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    return Recipe(**tree)


def finished_run(
    directory: Path,
    its: Recipe,
    *,
    base: int = 1000,
    trained: int = 100,
    reported: dict[str, Any] | None = None,
    selection: dict[str, Any] | None = None,
    mmlu: dict[str, Any] | None = None,
    ranks: tuple[dict[str, int], ...] = ({"load": 10, "train": 30, "evaluate": 20, "save": 5},),
    status: str = "finished",
    tokens_per_second: float = 50.0,
    digest: str = "a" * 64,
) -> Path:
    """Writes report.json. base: parameters without the adapter; ranks: MiB by phase of each."""
    adapter = 0 if its.method == "full" else trained
    report = build_report(
        recipe=its.to_dict(),
        world_size=len(ranks),
        device="cpu",
        parameters={
            "total": base + adapter,
            "adapter": adapter,
            "trained": trained,
            "optimizer_state_bytes": 12 * trained,
        },
        ranks=[rank_phases(rank, peaks(**mib), {}) for rank, mib in enumerate(ranks)],
        throughput={"real_tokens_per_second": tokens_per_second},
        metrics={},
        data={"train": {"digest": digest, "rows": 8}},
        samples=[],
        history=[],
        status=status,
        mmlu=mmlu,
        command="by hand",
        versions={},
    )
    splits = {"reported": reported, "selection": selection}
    directory.mkdir(parents=True, exist_ok=True)
    report |= {name: split for name, split in splits.items() if split is not None}
    (directory / "report.json").write_text(json.dumps(report))  # without the pictures, which take seconds
    return directory


def split(metric: str, score: float, **others: float) -> dict[str, Any]:
    """As `tasks.base.Score.splits` has it."""
    return {
        "metric": metric,
        "score": score,
        "higher_is_better": not metric.endswith("loss"),
        "metrics": {metric: score, **others},
        "count": 10,
    }
