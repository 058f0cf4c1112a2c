"""The pictures of a run report, from the report's own data.

Colours are Okabe and Ito's, which colour-blind readers tell apart. No pyplot: it would choose a backend for the
whole process. Import this module only once a run's memory has been measured: matplotlib takes some 40 MB.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lorasp.memory import NOT_RESIDENT, WORKSPACE
from lorasp.reporting.report_text import loss_unit

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
_GREY = "#9A9A9A"
_PHASES = {"load": "#56B4E9", "rehearse": "#CC79A7", "evaluate": "#E69F00", "train": "#009E73", "save": "#000000"}
_WIDTH = 9.0  # inches: at 100 dots an inch as wide as GitHub's column
STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
_MOST_ROWS = 24  # bars that one picture shows
_NAMED_RANKS = len(COLOURS)


def draw_plots(report: Mapping[str, Any], directory: Path) -> dict[str, Path]:
    """Writes `loss.png`, `memory.png`, `memory_parts.png` and `throughput.png` into `directory`: name -> file.

    report: as `build_report` makes it. A picture for which the run left no data is neither drawn nor named.
    """
    drawings: dict[str, Callable[[Mapping[str, Any]], Figure | None]] = {
        "loss": _loss,
        "memory": _memory,
        "memory_parts": _memory_parts,
        "throughput": _throughput,
    }
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name, draw in drawings.items():
            figure, path = draw(report), directory / f"{name}.png"
            path.unlink(missing_ok=True)  # an earlier run's
            if figure is not None:
                save_figure(figure, path)
                drawn[name] = path
    return drawn


def draw_sweep(peaks: Mapping[int, Mapping[int, int]], path: Path) -> None:
    """Writes a plan's sweep: a line a length in tokens, of the bytes that a rank holds at most, by ranks."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(4.0)
        for (length, of_ranks), colour in zip(peaks.items(), _cycle(), strict=False):
            sizes = [size / 2**30 for size in of_ranks.values()]
            axes.plot(list(of_ranks), sizes, "o-", color=colour, label=f"{length} tokens a row")
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(next(iter(peaks.values()))))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_ylim(bottom=0)
        axes.set(title="Planned peak of a rank", xlabel="ranks", ylabel="GiB")
        axes.legend()
        save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.writing")
    try:
        figure.savefig(beside, dpi=150, format="png")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def new_figure(height: float, **subplots: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots(**subplots)


def _loss(report: Mapping[str, Any]) -> Figure | None:
    train = _points(report["history"], "loss")
    held_out = _points(report["scores"], "held_out_loss")
    if not train and not held_out:
        return None
    figure, axes = new_figure(3.6)
    if train:
        axes.plot(*zip(*train, strict=True), color=COLOURS[0], marker=_marker(train), label="training batch")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), color=COLOURS[1], marker="D", markersize=7, linestyle=":", label="held out"
        )
    values = [loss for _, loss in train + held_out]
    if min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if max(values) < 100 * min(values) else "")
    axes.set(
        title="Loss",
        xlabel="optimizer step",
        ylabel=loss_unit(report.get("recipe", {})).replace("a token", "a labelled token"),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def _throughput(report: Mapping[str, Any]) -> Figure | None:
    real = _points(report["history"], "real_tokens_per_second")
    computed = _points(report["history"], "computed_tokens_per_second")
    seconds = _points(report["history"], "step_seconds")
    if not real or not seconds:
        return None
    figure, (tokens, steps) = new_figure(3.2, ncols=2)
    if computed != real:
        tokens.plot(
            *zip(*computed, strict=True), color=COLOURS[1], marker=_marker(computed), linestyle="--", label="computed"
        )
    tokens.plot(*zip(*real, strict=True), color=COLOURS[0], marker=_marker(real), label="of examples")
    tokens.set(title="Throughput, all ranks", xlabel="optimizer step", ylabel="tokens a second")
    if computed != real:
        tokens.legend()
    steps.plot(*zip(*seconds, strict=True), color=COLOURS[2], marker=_marker(seconds))
    steps.set(title="Time of an optimizer step", xlabel="optimizer step", ylabel="seconds")
    for axes in (tokens, steps):
        axes.set_ylim(0, 1.08 * axes.dataLim.y1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _memory(report: Mapping[str, Any]) -> Figure | None:
    """Memory of each rank over time: the peak of the phase so far, and what was held at each measurement."""
    timeline = [rank for rank in report["timeline"] if rank["seconds"]]
    if not timeline:
        return None
    ends = max(rank["seconds"][-1] for rank in timeline)
    every, label = next(
        (size, name)
        for limit, size, name in ((300, 1, "seconds"), (4 * 3600, 60, "minutes"), (math.inf, 3600, "hours"))
        if ends <= limit
    )
    unit, unit_name = _unit(max(max(rank["peak_bytes"]) for rank in timeline))

    figure, axes = new_figure(4.3)
    kinds = {}
    for kind, begin, end in _stretches(timeline[0]):
        colour = _PHASES.get(kind, _GREY)
        axes.axvspan(begin / every, end / every, color=colour, alpha=0.16, linewidth=0)
        kinds[kind] = Patch(color=colour, alpha=0.25, label=kind)
        if end - begin > 0.012 * len(kind) * ends:  # wide enough for its name
            axes.text(
                (begin + end) / 2 / every, 0.98, kind, transform=axes.get_xaxis_transform(), ha="center", va="top"
            )
    for rank, colour in zip(timeline, _rank_colours(len(timeline)), strict=True):
        times = [second / every for second in rank["seconds"]]
        for begin, end in _runs(rank["phase"]):
            peaks = [size / unit for size in rank["peak_bytes"][begin:end]]
            # A peak that a measurement finds was reached since the one before.
            peaks[0] = peaks[min(1, len(peaks) - 1)]
            axes.plot(times[begin:end], peaks, color=colour, drawstyle="steps-pre")
        held = [size / unit for size in rank["now_bytes"]]
        axes.plot(times, held, color=colour, linewidth=1.2, linestyle=(0, (2, 1.5)))
    axes.set(
        title="Memory of each rank, above what the process held before the run",
        xlabel=f"{label} since the start",
        ylabel=unit_name,
        xlim=(0, max(ends / every, 1e-9)),
    )
    axes.set_ylim(0, 1.15 * axes.dataLim.y1)
    lines = [
        Line2D([], [], color="#444444", label="peak of the phase so far"),
        Line2D([], [], color="#444444", linewidth=1.2, linestyle=(0, (2, 1.5)), label="held at that moment"),
    ]
    figure.legend(
        handles=[*_rank_handles(timeline), *lines, *kinds.values()],
        loc="outside lower center",
        ncols=5,
        columnspacing=1.4,
        handlelength=1.8,
    )
    return figure


def _memory_parts(report: Mapping[str, Any]) -> Figure | None:
    """Stacked bars: what each rank's peak of each phase consists of."""
    bars = [(phase, rank) for phase, entry in report["phases"].items() for rank in entry["ranks"]]
    if not bars:
        return None
    title = "What the peaks consist of"
    if len(bars) > _MOST_ROWS:
        highest = max(bars, key=lambda bar: bar[1]["peak_bytes"])[0]
        bars = [bar for bar in bars if bar[0] == highest]
        title += f": {highest.replace('_', ' ')}, the highest phase"
        if len(bars) > _MOST_ROWS:
            title += f", the {_MOST_ROWS} highest of {len(bars)} ranks"
            bars = sorted(bars, key=lambda bar: -bar[1]["peak_bytes"])[:_MOST_ROWS]
    parts = list(dict.fromkeys(part for _, rank in bars for part in rank["breakdown"]))
    parts = [part for part in parts if part not in (WORKSPACE, NOT_RESIDENT)]  # the latter is negative
    colours = dict(zip(parts, _cycle(), strict=False)) | {WORKSPACE: "#D0D0D0"}
    unit, unit_name = _unit(max(rank["peak_bytes"] for _, rank in bars))

    # In inches, since constrained layout gives the bars what the words leave over.
    figure, axes = new_figure(1.5 + 0.3 * len(bars))
    for row, (_, rank) in enumerate(bars):
        left = 0.0
        for part, colour in colours.items():
            size = rank["breakdown"].get(part, 0) / unit
            hatch = "///" if part == WORKSPACE else None
            axes.barh(row, size, left=left, height=0.72, color=colour, edgecolor="white", linewidth=0.6, hatch=hatch)
            left += size
        peak = rank["peak_bytes"] / unit
        axes.text(max(left, peak), row, f" {peak:.3g}", va="center", fontsize=9.5)
    axes.set_yticks(range(len(bars)), [f"{phase.replace('_', ' ')}, rank {rank['rank']}" for phase, rank in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.set(title=title, xlabel=f"peak above the baseline, {unit_name}")
    handles = [
        Patch(
            facecolor=colour,
            hatch="///" if part == WORKSPACE else None,
            edgecolor="white",
            label="workspace (the remainder)" if part == WORKSPACE else part.replace("_", " "),
        )
        for part, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.4)
    return figure


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that have a finite value."""
    return [
        (row["step"], row[name])
        for row in rows
        if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])
    ]


def _marker(points: Sequence[Any]) -> str:
    """Few points are shown as such; a single one has no line at all."""
    return "o" if len(points) <= 40 else ""


def _unit(largest: int) -> tuple[int, str]:
    return (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")


def _stretches(rank: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(kind of phase, begin, end) in seconds; `rehearse_train` is a kind of rehearsal.

    The time between two measurements belongs to the phase of the first.
    """
    kinds = [phase.partition("_")[0] for phase in rank["phase"]]
    for begin, end in _runs(kinds):
        yield kinds[begin], rank["seconds"][begin], rank["seconds"][min(end, len(kinds) - 1)]


def _runs(phases: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Index ranges of neighbours in one phase; outside any, a phase's peak means nothing."""
    begin = 0
    for end in range(1, len(phases) + 1):
        if end == len(phases) or phases[end] != phases[begin]:
            if phases[begin]:
                yield begin, end
            begin = end


def _cycle() -> Iterator[str]:
    while True:
        yield from COLOURS


def _rank_colours(ranks: int) -> list[Any]:
    if ranks <= _NAMED_RANKS:
        return list(COLOURS[:ranks])
    return [matplotlib.colormaps["viridis"](0.9 * rank / (ranks - 1)) for rank in range(ranks)]


def _rank_handles(timeline: Sequence[Mapping[str, Any]]) -> list[Line2D]:
    """A legend entry a rank; of more than a legend holds, the first and the last."""
    entries = list(zip(timeline, _rank_colours(len(timeline)), strict=True))
    if len(entries) > _NAMED_RANKS:
        entries = [entries[0], entries[-1]]
    return [Line2D([], [], color=colour, linewidth=3, label=f"rank {rank['rank']}") for rank, colour in entries]
