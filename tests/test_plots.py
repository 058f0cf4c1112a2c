"""The pictures of the report: what they show is what was measured, and no run is too short for them."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from matplotlib.colors import same_color

from lorasp.reporting import plots
from lorasp.reporting.plots import draw_plots
from lorasp.reporting.run_report import write_report
from tests.test_reporting import MIB, two_rank_report

PICTURES = ["loss", "memory", "memory_parts", "throughput"]


def history(losses: list[float]) -> list[dict[str, float]]:
    return [
        {
            "step": 10 * (index + 1),
            "loss": loss,
            "step_seconds": 2.0,
            "real_tokens_per_second": 100.0 + index,
            "computed_tokens_per_second": 120.0,
        }
        for index, loss in enumerate(losses)
    ]


def timeline(ranks: int) -> list[dict[str, Any]]:
    """Load from 1 to 9 s, train from 10 to 60 s with an evaluation within it; rank r holds r MiB more."""
    phases = ["load", "load", "", "train", "train", "evaluate", "evaluate", "train", "train", ""]
    seconds = [1, 9, 9, 10, 30, 30, 40, 40, 60, 60]
    now = [10, 50, 50, 50, 90, 90, 70, 70, 80, 80]
    peak = [10, 60, 0, 50, 200, 90, 110, 200, 210, 0]
    return [
        {
            "rank": rank,
            "phase": phases,
            "seconds": seconds,
            "now_bytes": [(size + rank) * MIB for size in now],
            "peak_bytes": [(size + rank) * MIB for size in peak],
        }
        for rank in range(ranks)
    ]


def report(**changes: Any) -> dict[str, Any]:
    measured = {
        "history": history([2.0, 1.5, 1.0]),
        "scores": [{"step": step, "held_out_loss": loss, "exact_match": 0.0} for step, loss in ((0, 3.0), (30, 1.2))],
        "timeline": timeline(2),
    }
    return two_rank_report(**{**measured, **changes})


def test_every_picture_lies_beside_the_report_that_shows_it_and_fits_githubs_column(tmp_path):
    text = write_report(tmp_path, report()).read_text()
    for name in PICTURES:
        assert f"](plots/{name}.png)" in text
        height, width, _ = matplotlib.image.imread(tmp_path / "plots" / f"{name}.png").shape
        assert width == 1350 and height < width  # 9 inches, so that 10.5 points stay legible when shown at 900 pixels


def test_the_memory_picture_shows_each_ranks_own_bytes_up_to_the_last_measurement():
    (axes,) = plots._memory(report()).axes
    assert axes.get_ylabel() == "MiB" and axes.get_xlabel() == "seconds since the start"
    held = [line for line in axes.lines if len(line.get_ydata()) == 10]
    assert [list(line.get_ydata())[:5] for line in held] == [[10, 50, 50, 50, 90], [11, 51, 51, 51, 91]]
    for rank in range(2):
        colour = held[rank].get_color()
        peaks = [
            max(line.get_ydata()) for line in axes.lines if line not in held and same_color(line.get_color(), colour)
        ]
        # load, train, evaluation, train: the time between phases has no peak
        assert peaks == [60 + rank, 200 + rank, 110 + rank, 210 + rank]


def test_phases_are_shaded_from_their_beginning_to_their_end_and_named():
    figure = plots._memory(report())
    shades = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in figure.axes[0].patches]
    assert shades == [(1, 9), (10, 30), (30, 40), (40, 60)]
    assert [text.get_text() for text in figure.axes[0].texts] == ["load", "train", "evaluate", "train"]
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named[:2] == ["rank 0", "rank 1"] and named[-3:] == ["load", "train", "evaluate"]


def test_a_bars_parts_add_up_to_the_peak_that_stands_at_its_end():
    (axes,) = plots._memory_parts(report()).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[2:4] == ["train, rank 0", "train, rank 1"]
    widths = [
        sum(patch.get_width() for patch in axes.patches if abs(patch.get_y() + patch.get_height() / 2 - row) < 0.1)
        for row in range(6)
    ]
    assert widths[2:4] == pytest.approx([742, 753])
    assert [float(text.get_text()) for text in axes.texts][2:4] == [742, 753]


def test_the_loss_picture_has_training_and_held_out_points_and_leaves_out_what_is_no_number():
    (axes,) = plots._loss(report(history=history([2.0, math.nan, 1.0]))).axes
    train, held_out = axes.lines
    assert (list(train.get_xdata()), list(train.get_ydata())) == ([10, 30], [2.0, 1.0])
    assert (list(held_out.get_xdata()), list(held_out.get_ydata())) == ([0, 30], [3.0, 1.2])


def test_a_loss_over_several_orders_is_drawn_on_a_logarithmic_scale():
    assert plots._loss(report()).axes[0].get_yscale() == "linear"
    assert plots._loss(report(history=history([6.0, 0.002]))).axes[0].get_yscale() == "log"


@pytest.mark.parametrize(
    "changes, drawn",
    [
        ({"scores": []}, PICTURES),
        ({"history": history([1.0])}, PICTURES),
        ({"history": history([math.nan]), "scores": []}, ["memory", "memory_parts", "throughput"]),
        ({"history": []}, ["loss", "memory", "memory_parts"]),
        ({"history": [], "scores": [], "ranks": [], "timeline": [], "status": "stopped: early"}, []),
        ({"timeline": [{**rank, **{key: rank[key][:1] for key in list(rank)[1:]}} for rank in timeline(2)]}, PICTURES),
        ({"timeline": timeline(64)}, PICTURES),
    ],
    ids=["no held-out", "one point", "only NaN", "not trained", "nothing", "one measurement", "64 ranks"],
)
def test_a_run_that_left_little_gets_the_pictures_that_there_is_data_for(changes, drawn, tmp_path):
    text = write_report(tmp_path, report(**changes)).read_text()
    assert [name for name in PICTURES if f"plots/{name}.png" in text] == drawn
    assert sorted(path.stem for path in tmp_path.glob("plots/*.png")) == sorted(drawn)


def test_many_bars_become_those_of_the_highest_phase():
    one = report()["phases"]
    many = {
        name: {**phase, "ranks": [{**phase["ranks"][0], "rank": rank} for rank in range(32)]}
        for name, phase in one.items()
    }
    (axes,) = plots._memory_parts({**report(), "phases": many}).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == 24 and labels[0] == "train, rank 0"
    assert "train, the highest phase, the 24 highest of 32 ranks" in axes.get_title()


def test_a_picture_that_fails_costs_neither_report(tmp_path, monkeypatch, capsys):
    def fail(*_: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(plots, "_loss", fail)
    text = write_report(tmp_path, report()).read_text()
    assert "## Peak memory" in text and "plots/" not in text
    assert (tmp_path / "report.json").is_file()
    assert capsys.readouterr().err == "the report has no pictures: RuntimeError: no fonts\n"


def test_matplotlib_is_not_part_of_a_runs_memory():
    code = "import sys; import lorasp.reporting.run_log; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=120)


def test_an_earlier_reports_pictures_are_not_shown_as_this_ones(tmp_path):
    write_report(tmp_path, report())
    text = write_report(tmp_path, report(history=[], scores=[])).read_text()
    assert "plots/loss.png" not in text and not (tmp_path / "plots" / "loss.png").exists()
    assert draw_plots(report(), tmp_path / "plots")["loss"].exists()
