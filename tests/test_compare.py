"""Tables from runs made by hand: what stands where, over which seeds, and what is left out and why."""

import csv
import io
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from lorasp.comparison.comparable import comparable
from lorasp.comparison.figure import draw_table
from lorasp.comparison.free import format_groups, grouped, groups_csv
from lorasp.comparison.runs import read_runs
from lorasp.comparison.summary import summarize
from lorasp.comparison.tables import format_costs, format_table, table_csv, table_rows
from lorasp.recipe import RecipeError
from lorasp.reporting.paper import MODELS, TABLES
from lorasp.sweep.choice import Candidate, Choice
from tests.comparisons import MIB, finished_run, recipe, split

ROOT = Path(__file__).parents[1]
LLAMA = MODELS["LLaMA-7B"].parameters


def mmlu(accuracy: float, model: str | None = "LLaMA-7B") -> dict:
    score = {"step": 3, "micro": {"accuracy": accuracy, "questions": 100}}
    return {"asked": {}, "scores": [score], "paper": model and {"model": model, "accuracy": 0.39}}


def llama(directory: Path, accuracy: float, *, method="lorasp", seed=0, trained=79_953_920, **changes) -> Path:
    its = recipe(method=method, seed=seed, **({} if method == "full" else {"adapter__rank": 64}) | changes)
    return finished_run(
        directory, its, base=LLAMA, trained=LLAMA if method == "full" else trained, mmlu=mmlu(accuracy)
    )


def rows_of(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]


def the_table(paths: list[Path], number: int = 3) -> tuple[list[list[str]], list[str]]:
    """Its lines without the header, and what was left out."""
    runs, left_out = read_runs(paths)
    agreeing, others = comparable(runs)
    summaries, more = summarize(agreeing)
    return rows_of(format_table(number, table_rows(number, summaries)))[2:], left_out + others + more


def test_ours_stand_below_the_papers_rows_as_mean_and_sample_deviation_over_seeds(tmp_path):
    accuracies = (0.385, 0.391, 0.388)
    paths = [llama(tmp_path / f"s{seed}", value, seed=seed) for seed, value in enumerate(accuracies)]
    paths += [llama(tmp_path / "lora", 0.389, method="lora", trained=159_907_840)]
    paths += [llama(tmp_path / "half", 0.38, method="lora", adapter__rank=32, trained=79_953_920)]
    lines, left_out = the_table(paths)
    # 38.5, 39.1, 38.8: mean 38.8, and √(0.3² + 0.3²)/√2 = 0.3
    assert statistics.stdev(100 * value for value in accuracies) == pytest.approx(0.3)
    assert not left_out
    assert lines == [
        ["LLaMA-7B, FT", "paper", "6624.4", "39.8"],
        ["", "ours", "–", "–"],
        ["LLaMA-7B, LoRA", "paper", "157.3", "38.9"],
        ["", "ours, r = 64", "159.9", "38.9 (1)"],
        ["LLaMA-7B, LoRA", "ours, r = 32", "80.0", "38.0 (1)"],  # the control, which the paper does not have
        ["LLaMA-7B, LoRA-SP", "paper", "78.7", "39.0"],
        ["", "ours, r = 64", "80.0", "38.8 ± 0.3 (3)"],
        ["LLaMA-13B, FT", "paper", "12986.8", "47.8"],
        ["", "ours", "–", "–"],
        ["LLaMA-13B, LoRA", "paper", "248.6", "45.3"],
        ["", "ours", "–", "–"],
        ["LLaMA-13B, LoRA-SP", "paper", "124.3", "45.4"],
        ["", "ours", "–", "–"],
    ]


def test_a_model_of_the_same_size_that_mmlu_does_not_know_as_the_papers_is_a_row_of_its_own(tmp_path):
    its = recipe(model={"path": "meta-llama/Llama-2-7b-hf"}, adapter__rank=64)
    finished_run(tmp_path / "two", its, base=LLAMA, mmlu=mmlu(0.45, None))
    lines, _ = the_table([tmp_path / "two"])
    assert lines[-1] == ["meta-llama/Llama-2-7b-hf, LoRA-SP", "ours, r = 64", "0.000", "45.0 (1)"]
    assert ["", "ours, r = 64", "0.000", "45.0 (1)"] not in lines


def test_unfinished_stopped_and_unreadable_runs_are_named_and_left_out(tmp_path):
    sweep = tmp_path / "sweep"
    llama(sweep / "good", 0.39)
    finished_run(sweep / "stopped", recipe(), status="stopped: the loss became NaN at step 4")
    (sweep / "begun" / "checkpoints").mkdir(parents=True)
    (sweep / "failed").mkdir()
    (sweep / "failed" / "log.txt").touch()
    (sweep / "damaged").mkdir()
    (sweep / "damaged" / "report.json").write_text('{"status": "finished", "recipe": {"modle": 1}}')
    finished_run(sweep / "scored", recipe(), ranks=({"load": 1, "evaluate": 2},))
    (sweep / "notes").mkdir()
    lines, left_out = the_table([sweep])
    assert ["", "ours, r = 64", "80.0", "39.0 (1)"] in lines
    told = {line.partition(": ")[0].rpartition("/")[2]: line.partition(": ")[2] for line in left_out}
    assert told.pop("damaged").startswith("its report cannot be read by this version (")
    assert told == {
        "begun": "has not finished",
        "failed": "has not finished",
        "scored": "is an evaluation, which trained nothing",
        "stopped": "did not finish (stopped: the loss became NaN at step 4)",
    }
    with pytest.raises(RecipeError, match="no finished run to compare\n.*begun: has not finished"):
        read_runs([sweep / "begun"])
    with pytest.raises(RecipeError, match="nowhere is no directory"):
        read_runs([sweep / "nowhere"])


def test_runs_that_differ_in_more_than_method_rank_seed_and_rate_are_named(tmp_path):
    same = {"training__epochs": 3.0}
    paths = [llama(tmp_path / f"s{seed}", 0.39, seed=seed, **same) for seed in range(2)]
    paths += [llama(tmp_path / "full", 0.4, method="full", quantization__format="none", training__learning_rate=1e-6)]
    paths += [llama(tmp_path / "longer", 0.5, seed=2, training__epochs=9.0)]
    paths += [llama(tmp_path / "uniform", 0.5, seed=3, selection__strategy="uniform")]
    paths += [llama(tmp_path / "scaled", 0.5, seed=4, adapter__alpha=16.0)]
    other = recipe(seed=0, method="lora", adapter__rank=64)
    paths += [finished_run(tmp_path / "rows", other, base=LLAMA, mmlu=mmlu(0.5), digest="b" * 64)]
    lines, left_out = the_table(paths)
    assert ["", "ours, r = 64", "80.0", "39.0 ± 0.0 (2)"] in lines and ["", "ours", "6738.4", "40.0 (1)"] in lines
    assert left_out == [
        "longer: not comparable with the others (training.epochs is 9.0, not 3.0)",
        "uniform: not comparable with the others (selection.strategy is uniform, not balanced)",
        "scaled: not comparable with the others (adapter.alpha at rank 64 of lorasp is 16.0, not 32.0)",
        "rows: not comparable with the others (the rows of data.train with seed 0 is bbbbbbbbbbbb…, not "
        "aaaaaaaaaaaa…)",
    ]


def test_a_row_of_several_learning_rates_is_missing_and_two_runs_of_one_seed_are_not_averaged(tmp_path):
    paths = [llama(tmp_path / f"{rate:g}", 0.39, training__learning_rate=rate) for rate in (1e-4, 1e-3)]
    paths += [llama(tmp_path / f"lora{number}", 0.39, method="lora", seed=5) for number in range(2)]
    lines, left_out = the_table(paths)
    assert lines[5] == ["", "ours", "–", "–"] and lines[3] == ["", "ours, r = 64", "80.0", "39.0 (1)"]
    assert left_out[0].startswith(
        "0.0001, 0.001: of several learning rates (0.0001, 0.001), of which none is the row's"
    )
    assert left_out[1] == "lora1: has the seed of lora0, which stands"


def test_runs_that_only_chose_a_learning_rate_are_left_out_wherever_they_are_named(tmp_path):
    names = ["a-lr0.0001-seed0", "a-lr0.001-seed0", "a-lr0.001-seed1"]
    for name, rate, seed in zip(names, (1e-4, 1e-3, 1e-3), (0, 0, 1), strict=True):
        llama(tmp_path / name, 0.4 + rate, seed=seed, training__learning_rate=rate)
    candidates = tuple(Candidate(rate, name, 1.0, "finished") for name, rate in zip(names, (1e-4, 1e-3), strict=False))
    choice = Choice("a", "selection", "accuracy", True, 0, candidates, 1e-3, tuple(names[1:]))
    (tmp_path / "chosen").mkdir()
    (tmp_path / "chosen" / "a.json").write_text(json.dumps(asdict(choice)))
    for paths in ([tmp_path], sorted(tmp_path.iterdir())):
        lines, left_out = the_table(paths)
        assert ["", "ours, r = 64", "80.0", "40.1 ± 0.0 (2)"] in lines
        assert [line.rpartition("/")[2] for line in left_out] == [
            "a-lr0.0001-seed0: was run to choose a learning rate; 0.001 was chosen"
        ]


def test_what_it_took_is_of_the_worst_rank_of_the_worst_run(tmp_path):
    first = ({"load": 10, "train_first_step": 70, "train": 30, "save": 5}, {"load": 40, "train": 30})
    second = ({"load": 20, "train": 60, "evaluate": 1, "evaluate_mmlu": 90}, {"load": 20, "train": 60})
    for seed, (ranks, rate) in enumerate([(first, 40.0), (second, 60.0)]):
        its = recipe(seed=seed, training__learning_rate=1e-4)
        finished_run(
            tmp_path / f"s{seed}", its, mmlu=mmlu(0.3, None), ranks=ranks, tokens_per_second=rate, trained=MIB
        )
    [summary], _ = summarize(read_runs([tmp_path])[0])
    assert summary.peaks() == {"load": 40 * MIB, "train": 70 * MIB, "evaluate": 90 * MIB, "save": 5 * MIB}
    [line] = rows_of(format_costs([summary]))[2:]
    # 12 bytes of each of 2²⁰ entries; 40, 70, 90 and 5 MiB in GiB
    peaks = ["0.039", "0.068", "0.088", "0.005"]
    deviation = f"50 ± {math.sqrt(200):.0f} (2)"
    assert line[1:] == ["causal_lm", "0, 1", "0.0001", "32", "12.0", *peaks, deviation, "2 ranks on cpu"]


def test_a_task_is_a_column_and_the_mean_waits_for_all_of_them(tmp_path):
    base = MODELS["RoBERTa-base"].parameters + 769  # of a task with three labels
    scores = {"mnli": ("accuracy", 0.8), "cola": ("matthews", -0.05), "stsb": ("pearson", 0.9)}
    for task, (metric, score) in scores.items():
        its = recipe(task=task, adapter__rank=8, data__selection=0.1)
        reported = split(metric, score, loss=0.5)
        finished_run(tmp_path / task, its, base=base, trained=444_675, reported=reported)
    lines, left_out = the_table([tmp_path], 1)
    assert not left_out and [line[1] for line in lines].count("ours, r = 8, head selected") == 1
    assert lines[4] == [
        "RoBERTa-base, LoRA-SP",
        "paper",
        "0.45",
        *"86.2 93.6 91.1 62.5 91.4 90.4 70.3 90.2 84.5".split(),
    ]
    assert lines[5][2:] == ["0.445", "80.0 (1)", "–", "–", "-5.0 (1)", "–", "–", "–", "90.0 (1)", "–"]
    for task in ("sst2", "mrpc", "qnli", "qqp", "rte"):
        its = recipe(task=task, adapter__rank=8, data__selection=0.1)
        finished_run(tmp_path / task, its, base=base, trained=443_906, reported=split("accuracy", 0.75))
    lines, _ = the_table([tmp_path], 1)
    # (80 − 5 + 90 + 5 · 75) / 8
    assert lines[5][2] == "0.444–0.445" and lines[5][-1] == "67.5"


def test_bleu_and_rouge_are_in_percent_already(tmp_path):
    its = recipe(task="wmt16_en_ro", adapter__rank=8)
    reported = split("bleu", 31.25, rouge1=43.5, rouge2=27.75, rougeL=39.5)
    finished_run(tmp_path / "t5", its, base=MODELS["T5-base"].parameters, trained=442_368, reported=reported)
    lines, left_out = the_table([tmp_path], 2)
    assert not left_out
    assert lines[5] == ["", "ours, r = 8", "0.442", "31.2 (1)", "43.5 (1)", "27.8 (1)", "39.5 (1)"]


def test_the_csv_has_the_numbers_and_nothing_where_there_is_none(tmp_path):
    paths = [llama(tmp_path / f"s{seed}", 0.3 + seed / 10, seed=seed) for seed in range(2)]
    summaries, _ = summarize(read_runs(paths)[0])
    lines = list(csv.DictReader(io.StringIO(table_csv(3, table_rows(3, summaries)))))
    assert len(lines) == 6
    ours = lines[2]
    assert (float(ours["mean"]), float(ours["deviation"])) == pytest.approx((35, 50**0.5))
    assert (ours["n"], ours["paper"], ours["trained"], ours["runs"]) == ("2", "39.0", "79953920", "s0 s1")
    assert int(ours["optimizer_bytes"]) == 12 * 79_953_920 and int(ours["peak_bytes_train"]) == 30 * MIB
    assert lines[0]["mean"] == lines[0]["trained"] == "" and lines[0]["paper"] == "39.8"


def test_a_loss_is_headed_with_its_tasks_unit(tmp_path):
    for task in ("stsb", "mrpc"):
        its = recipe(task=task, seed=0)
        finished_run(tmp_path / task, its, reported=split("loss", 2.0) | {"majority": {}})
    header, *_ = rows_of(format_groups(grouped(read_runs([tmp_path / "stsb"])[0])[0]))
    assert "loss (squared error)" in header
    header, *_ = rows_of(format_groups(grouped(read_runs([tmp_path])[0])[0]))
    assert "loss (nats a row or squared error)" in header


def test_any_runs_stand_side_by_side_by_the_settings_in_which_they_differ(tmp_path):
    for strategy in ("balanced", "uniform"):
        for seed, loss in enumerate((2.0, 2.5)):
            its = recipe(seed=seed, selection__strategy=strategy)
            loss += strategy == "uniform"
            finished_run(tmp_path / f"{strategy}{seed}", its, reported=split("held_out_loss", loss, exact_match=0.5))
    finished_run(tmp_path / "z", recipe(seed=0, method="lora"), reported=split("held_out_loss", 1.0, exact_match=0.25))
    finished_run(tmp_path / "zz", recipe(seed=0, method="lora"), reported=split("held_out_loss", 9.0, exact_match=0.9))
    groups, left_out = grouped(read_runs([tmp_path])[0])
    assert left_out == ["zz: differs in nothing from a run before it, its seed neither"]
    header, _, *lines = rows_of(format_groups(groups))
    assert header[:2] == ["method", "adapter.frozen_entries"] and "selection.strategy" in header
    at = {name: header.index(name) for name in ("method", "selection.strategy", "held out loss (nats a token)")}
    assert [[line[index] for index in at.values()] for line in lines] == [
        ["LoRA-SP", "balanced", "2.2500 ± 0.3536 (2)"],
        ["LoRA-SP", "uniform", "3.2500 ± 0.3536 (2)"],
        ["LoRA", "", "1.0000 (1)"],
    ]
    assert lines[0][header.index("exact match (%)")] == "50.00 ± 0.00 (2)"
    written = list(csv.DictReader(io.StringIO(groups_csv(groups))))
    assert [(line["held_out_loss_mean"], line["held_out_loss_n"]) for line in written] == [
        ("2.25", "2"),
        ("3.25", "2"),
        ("1.0", "1"),
    ]


def test_a_damaged_choice_is_told(tmp_path):
    finished_run(tmp_path / "run", recipe())
    (tmp_path / "chosen").mkdir()
    (tmp_path / "chosen" / "a.json").write_text("{")
    with pytest.raises(RecipeError, match=r"chosen/a.json is no choice that can be read \(Expecting"):
        read_runs([tmp_path])


def test_runs_of_other_rows_are_never_one_row(tmp_path):
    def told(first, second):
        """Groups of three runs, two of which have one seed: of digest a, and twice b or of `second`'s data."""
        for name, its, digest in (
            ("x", first(0), "a"),
            ("y", second(0), "b"),
            ("z", second(1), "c" if first(1).data.held_out == 0.1 else "b"),
        ):
            finished_run(
                tmp_path / name, its, digest=digest * 64, reported=split("held_out_loss", 1.0, exact_match=0.5)
            )
        groups, left_out = grouped(read_runs([tmp_path])[0])
        assert left_out == []
        return [(group.settings, list(group.seeds)) for group in groups]

    def of(**data):
        return lambda seed: recipe(seed=seed, **data)

    assert told(of(data__train="a"), of(data__train="b")) == [
        ({"digest of train": "a" * 12}, [0]),
        ({"digest of train": "b" * 12}, [0, 1]),
    ]
    # A share that the seed draws: other rows with each seed, and all the same one row.
    share = {"data__held_out": 0.1}
    assert told(of(data__train="a", **share), of(data__train="b", **share)) == [
        ({"data.train": "a"}, [0]),
        ({"data.train": "b"}, [0, 1]),
    ]


def test_the_picture_has_a_bar_a_run_and_a_mark_a_figure_of_the_paper(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("lorasp.comparison.figure.save_figure", lambda figure, path: drawn.append(figure))
    paths = [llama(tmp_path / f"s{seed}", 0.3 + seed / 10, seed=seed) for seed in range(2)]
    draw_table(3, table_rows(3, summarize(read_runs(paths)[0])[0]), tmp_path / "t.png")
    [seven] = drawn[0].axes  # a model that was not run has no panel
    assert [bar.get_height() for bar in seven.patches] == [pytest.approx(35)]
    assert [line.get_ydata()[0] for line in seven.lines if line.get_marker() == "D"] == [39.8, 38.9, 39.0]
    assert seven.get_ylim()[0] == 0 and seven.get_ylim()[1] > 39
    draw_table(3, table_rows(3, []), tmp_path / "t.png")  # the paper's figures alone
    assert [len(axes.lines) for axes in drawn[1].axes] == [3, 3] and not any(axes.patches for axes in drawn[1].axes)


def test_the_papers_tables_are_as_printed():
    """Against sums that a slip of the pen would change, and against the means that the paper's text gives."""
    means = {(row.model, row.method): round(statistics.fmean(row.scores.values()), 1) for row in TABLES[1].rows}
    assert means["RoBERTa-base", "full"] == 83.8 and means["RoBERTa-base", "lorasp"] == 84.5
    assert means["RoBERTa-large", "full"] == 87.7 and means["RoBERTa-large", "lorasp"] == 88.1
    of = {(row.model, row.method): row for its in TABLES.values() for row in its.rows}
    assert of["T5-base", "full"].scores == {"bleu": 31.5, "rouge1": 42.6, "rouge2": 28.9, "rougeL": 40.3}
    assert of["T5-large", "lorasp"].scores == {"bleu": 33.5, "rouge1": 51.3, "rouge2": 33.6, "rougeL": 47.5}
    assert of["LLaMA-13B", "lorasp"].place == "Table 3, row 6" and len(of) == 18
    for model in MODELS:
        assert of[model, "lorasp"].trained == pytest.approx(of[model, "lora"].trained / 2, rel=0.005)


def test_the_script_writes_its_files_and_names_what_it_left_out(tmp_path):
    llama(tmp_path / "runs" / "a", 0.39)
    (tmp_path / "runs" / "b" / "checkpoints").mkdir(parents=True)
    command = [sys.executable, str(ROOT / "launch" / "compare.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    files = ["--csv", str(tmp_path / "t.csv"), "--png", str(tmp_path / "t.png")]
    done = subprocess.run(
        [*command, str(tmp_path / "runs"), "--table", "3", *files], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "## Table 3: LLaMA after Alpaca, 5-shot MMLU" in done.stdout and "159,907,840" in done.stdout
    assert "39.0 (1)" in done.stdout and "### What it took" in done.stdout
    assert done.stderr.splitlines()[-1].endswith("runs/b: has not finished")
    assert (tmp_path / "t.csv").read_text().startswith("table,model,method")
    assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"
    for arguments, told in (
        ([], "which runs?"),
        (["--counts", "--table", "1"], "--counts takes no runs"),
        (["x", "--png", "t.png"], "--png: write the name"),
    ):
        refused = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
        assert refused.returncode == 2 and refused.stderr.startswith(f"error: {told}")
