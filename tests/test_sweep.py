"""A sweep's file, its runs and their names, the choice of a learning rate, and what becomes of runs that failed."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lorasp.recipe import RecipeError
from lorasp.recipe_loading import load_recipe
from lorasp.sweep.cells import candidates, check, final_cells, groups
from lorasp.sweep.choice import choose, read_choice
from lorasp.sweep.definition import read_sweep
from lorasp.sweep.launching import ranks_of
from lorasp.sweep.outcome import find_outcome
from tests.comparisons import finished_run, split

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))
RECIPE = """\
model: {path: some/model}
data: {train: some/data, held_out: {path: some/data, skip: 100, limit: 10}}
training: {global_batch_size: 8, micro_batch_size: 4}
"""
SWEEP = """\
recipe: tiny.yaml
variants:
  lorasp:
  full: {method: full, adapter: null, quantization: none}
  half: {method: lora, adapter.rank: 8, adapter.alpha: 16}
grid:
  data.max_length: [64]
seeds: [0, 1, 2]
choose:
  learning_rates: [1e-4, 1e-3]
  by: held_out
  settings: {data.held_out.skip: 200}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes s.yaml beside tiny.yaml, and works there."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(RECIPE)

    def write_sweep(text: str = SWEEP) -> Path:
        Path("s.yaml").write_text(text)
        return Path("s.yaml")

    return write_sweep


def faults(path: Path, *overrides: str, ranks: int | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        sweep = read_sweep(path, overrides)
        check(candidates(sweep) + final_cells(sweep, {}), ranks)
    return str(caught.value).splitlines()


def test_each_variant_meets_each_point_of_the_grid_each_rate_and_each_seed(write):
    sweep = read_sweep(write(SWEEP.replace("[64]", "[64, 128]")))
    first, second = candidates(sweep), final_cells(sweep, {})
    check(first + second, ranks=2)
    assert (len(groups(sweep)), len(first), len(second)) == (3 * 2, 3 * 2 * 2, 3 * 2 * 3)
    assert first[0].name == "choose-lorasp-max_length64-lr0.0001-seed0"
    assert {cell.seed for cell in first} == {0}
    half = final_cells(sweep, {"half-max_length128": 1e-3})[-1]
    assert half.name == "half-max_length128-lr0.001-seed2" and half.run_dir == Path("runs/s") / half.name
    assert (half.recipe.method, half.recipe.adapter.rank, half.recipe.adapter.alpha) == ("lora", 8, 16)
    assert (half.recipe.data.max_length, half.recipe.seed, half.recipe.training.learning_rate) == (128, 2, 1e-3)
    assert half.recipe.data.held_out.skip == 100 and first[-1].recipe.data.held_out.skip == 200
    # What a user would type is the same run.
    assert load_recipe("tiny.yaml", half.overrides) == half.recipe


def test_the_command_lines_settings_are_of_every_run_and_refused_where_the_sweep_varies_them(write):
    path = write()
    sweep = read_sweep(path, ["training.epochs=1", "output_dir=/scratch/my runs"])
    assert {cell.recipe.training.epochs for cell in candidates(sweep)} == {1}
    assert str(candidates(sweep)[0].recipe.run_dir.parent) == "/scratch/my runs/s"
    assert faults(path, "seed=3", "method=lora", "rank", "adapter.rank.x=1") == [
        'command line: "rank" is no setting; write key=value, e.g. data.limit=100',
        "command line: seed: is what seeds decides; change it there",
        "command line: method: is what variants.full decides; change it there",
        "command line: adapter.rank.x: is what variants.half decides; change it there",
    ]


def test_every_fault_of_every_runs_recipe_is_told_at_once_where_the_sweep_gives_it(write):
    text = SWEEP.replace("adapter: null, quantization: none", "\n    adapter.rank: 8")
    text = text.replace("alpha: 16", "alhpa: 16").replace("[64]", "[64, long]")
    assert faults(write(text), "training.epochz=1") == [
        "command line: training.epochz: unknown key, did you mean training.epochs? "
        "(run choose-lorasp-max_length64-lr0.0001-seed0)",
        's.yaml:8: data.max_length: "long" is not a whole number (run choose-lorasp-long-lr0.0001-seed0)',
        "s.yaml:5: adapter.rank: method full trains no adapter; remove this setting "
        "(run choose-full-max_length64-lr0.0001-seed0)",
        "s.yaml:6: adapter.alhpa: unknown key, did you mean adapter.alpha? "
        "(run choose-half-max_length64-lr0.0001-seed0)",
    ]


def test_a_variant_may_be_called_a_number(write):
    [cell] = final_cells(read_sweep(write("recipe: tiny.yaml\nvariants: {'8': {}}\n")), {})
    assert (cell.overrides[0], cell.recipe.name) == ('name="8"', "8")


def test_the_rows_behind_those_that_are_reported_may_choose(write):
    sweep = read_sweep(write(SWEEP.replace("skip: 200", "skip: 110")))
    check(candidates(sweep) + final_cells(sweep, {}), None)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("variants:", "variantz:"), "s.yaml:2: variantz: unknown key, did you mean variants?"),
        (("  by: held", "  bye: held"), "s.yaml:11: choose.bye: unknown key, did you mean choose.by?"),
        (("[1e-4, 1e-3]", "[1e-4]"), "s.yaml:10: choose.learning_rates: one value is no choice"),
        (("[0, 1, 2]", "[0, 1, 1]"), "s.yaml:8: seeds: [0, 1, 1] holds a value twice"),
        (("[0, 1, 2]", "3"), "s.yaml:8: seeds: 3 is no list; write [3]"),
        (("[64]", "[]"), "s.yaml:7: grid.data.max_length: has no values"),
        (
            ("{method: lora, ", "{seed: 3, "),
            "s.yaml:5: variants.half.seed: is what seeds decides",
        ),
        (("tiny.yaml", "tinny.yaml"), 's.yaml:1: recipe: "tinny.yaml" does not exist; did you mean tiny.yaml'),
        (
            ("skip: 200", "skip: 100"),
            "s.yaml:11: choose.by: the rows of data.held_out would choose",
        ),
        (
            ("skip: 200", "skip: 109"),
            "s.yaml:11: choose.by: the rows of data.held_out would choose",
        ),
        (
            ("data.held_out.skip: 200", "data.held_out.limit: 5"),
            "s.yaml:11: choose.by: the rows of data.held_out would choose",
        ),
        (
            ("{data.held_out.skip: 200}", "{data.held_out: 0.1}\nsettings: {data.held_out: 0.2}"),
            "s.yaml:11: choose.by: the rows of data.held_out would choose",
        ),
        (
            ("{data.held_out.skip: 200}", "{data: {held_out: {skip: 200}}, training: {learning_rate: 3}}"),
            "s.yaml:12: choose.settings.training: is what choose.learning_rates decides; remove one of the two",
        ),
        (
            ("{method: lora, ", "{data: {max_length: 3}, "),
            "s.yaml:5: variants.half.data: is what grid decides; remove one of the two",
        ),
        (
            ("{method: lora, ", "{data: null, "),
            "s.yaml:5: variants.half.data: is what grid decides; remove one of the two",
        ),
        (
            ("{method: lora, ", "{adapter: {rank: 4}, "),
            "s.yaml:5: variants.half.adapter.rank: is what variants.half.adapter decides; remove one of the two",
        ),
        (
            ("by: held_out", "by: selection"),
            "s.yaml:11: choose.by: no rows are set apart to choose on; set",
        ),
        (("half:", "'lorasp ':"), "s.yaml: two runs would both be called choose-lorasp-max_length64-lr0.0001-seed0"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_what_makes_no_sense_is_told_with_its_line(write, change, told):
    found = faults(write(SWEEP.replace(*change)))
    assert any(fault.startswith(told) for fault in found), found


def test_a_batch_that_does_not_divide_over_the_launchers_ranks_is_told_before_the_first_run(write):
    assert ranks_of(["--num_processes", "3"]) == ranks_of(["--num_processes=3", "--cpu"]) == 3
    assert ranks_of(["--use_deepspeed"]) is None
    [told] = faults(write(), ranks=3)
    assert told.startswith("training.global_batch_size: 8 examples do not divide over 3 ranks")


def test_a_sweep_that_varies_nothing_is_its_recipes_run(write):
    [cell] = final_cells(read_sweep(write("recipe: tiny.yaml\n")), {})
    assert cell.name == "tiny" and cell.recipe.seed == 0


def test_of_equal_scores_the_least_loss_chooses(write):
    """CoLA's Matthews is 0 at each rate while a classifier calls everything acceptable; its loss tells them apart."""
    sweep = read_sweep(write(SWEEP.replace("[1e-4, 1e-3]", "[1e-4, 1e-3, 1e-2]")))
    group = groups(sweep)[0]
    cells = [cell for cell in candidates(sweep) if cell.group == group]
    for cell, loss in zip(cells, (0.62, 0.61, 0.63), strict=True):
        finished_run(cell.run_dir, cell.recipe, reported=split("matthews", 0.0, loss=loss))
    chosen = choose(sweep, group, cells)
    assert chosen.learning_rate == 1e-3 and [its.loss for its in chosen.candidates] == [0.62, 0.61, 0.63]
    scores, losses = "(0.0001: 0, 0.001: 0, 0.01: 0)", "(0.0001: 0.62, 0.001: 0.61, 0.01: 0.63)"
    assert chosen.describe().endswith(f"matthews {scores}, of equal ones by the loss {losses}")


def end(cell, score: float | None, status: str = "finished") -> None:
    finished_run(cell.run_dir, cell.recipe, reported=split("held_out_loss", score), status=status)


def test_the_rate_with_the_best_score_is_chosen_once_and_stands(write):
    sweep = read_sweep(write(SWEEP.replace("[1e-4, 1e-3]", "[1e-4, 1e-3, 1e-2, 1e-1]")))
    group = groups(sweep)[0]
    cells = [cell for cell in candidates(sweep) if cell.group == group]
    assert choose(sweep, group, cells) == f"{cells[0].name} has not ended"
    end(cells[0], 2.5)
    end(cells[1], 2.25)
    end(cells[2], 2.25)  # of equals the lower rate
    end(cells[3], 0.1, status="stopped: the loss became NaN")  # whatever it says, it diverged
    chosen = choose(sweep, group, cells)
    assert (chosen.learning_rate, chosen.metric, chosen.seed) == (1e-3, "held_out_loss", 0)
    assert [candidate.score for candidate in chosen.candidates] == [2.5, 2.25, 2.25, None]
    assert chosen.reports == tuple(f"{group}-lr0.001-seed{seed}" for seed in range(3))
    path = sweep.directory / "chosen" / f"{group}.json"
    assert json.loads(path.read_text())["learning_rate"] == 1e-3 and list(path.parent.iterdir()) == [path]
    end(cells[0], 1.0)  # what comes later changes nothing
    assert choose(sweep, group, []) == read_choice(sweep, group) == chosen

    other = read_sweep(write(SWEEP))
    with pytest.raises(RecipeError, match=r"chose among .* by held_out, and the sweep says \[0.0001, 0.001\]"):
        read_choice(other, group)
    path.write_text("{")
    with pytest.raises(RecipeError, match="no choice that can be read"):
        read_choice(sweep, group)


def test_a_score_that_is_better_when_higher_chooses_the_highest_and_no_score_chooses_nothing(write):
    sweep = read_sweep(write())
    group, lost, _ = groups(sweep)
    cells = [cell for cell in candidates(sweep) if cell.group == group]
    for cell, score in zip(cells, (0.25, 0.5), strict=True):
        finished_run(cell.run_dir, cell.recipe, reported=split("matthews", score))
    assert choose(sweep, group, cells).learning_rate == cells[1].learning_rate == 1e-3
    cells = [cell for cell in candidates(sweep) if cell.group == lost]
    for cell in cells:
        end(cell, None)
    assert choose(sweep, lost, cells).startswith("none of its learning rates gave a score")
    assert not (sweep.directory / "chosen" / f"{lost}.json").exists()


def test_a_finished_run_of_other_settings_is_refused_and_what_does_not_matter_is_not(write):
    sweep = read_sweep(write())
    cell = candidates(sweep)[0]
    assert find_outcome(cell.run_dir, cell.recipe).kind == "absent"
    (cell.run_dir / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert find_outcome(cell.run_dir, cell.recipe).kind == "begun"
    end(cell, 2.0)
    assert find_outcome(cell.run_dir, cell.recipe).kind == "finished"
    elsewhere = load_recipe("tiny.yaml", [*cell.overrides, "output_dir=elsewhere", "checkpoint.every_steps=3"])
    assert find_outcome(cell.run_dir, elsewhere).kind == "finished"
    four = ({"train": 30},) * 4  # ranks, whose share of 8 examples is half of a micro batch
    finished_run(cell.run_dir, cell.recipe.on_ranks(4), reported=split("held_out_loss", 2.0), ranks=four)
    assert find_outcome(cell.run_dir, cell.recipe).kind == "finished"
    longer = load_recipe("tiny.yaml", [*cell.overrides, "training.epochs=9"])
    with pytest.raises(RecipeError, match=r"ended with other settings: training.epochs is 9.0, was 3.0\."):
        find_outcome(cell.run_dir, longer)
    (cell.run_dir / "report.json").write_text("{}")
    with pytest.raises(RecipeError, match="remove that directory to run it again"):
        find_outcome(cell.run_dir, cell.recipe)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_run_of_a_shipped_sweep_loads(path):
    sweep = read_sweep(path)
    first, second = candidates(sweep), final_cells(sweep, {})
    check(first + second, ranks=2)
    assert sweep.directory == Path("runs") / path.stem
    chooses = sweep.file.choose
    for cell in first if chooses and chooses.by == "held_out" else ():  # what chooses has no part in what is reported
        ours, reported = cell.recipe.data.held_out_source, second[0].recipe.data.held_out_source
        assert ours.path == reported.path and ours.skip >= reported.skip + reported.limit


@pytest.mark.parametrize("name", ["launch/slurm/sweep.sbatch", "launch/sweep.py", "README.md"])
def test_the_numbers_of_an_array_are_those_of_its_sweeps_stages(name):
    text = (ROOT / name).read_text().replace("\\\n#", "")
    commands = re.findall(r"sbatch (.*)--array (\d+)-(\d+) (.*)launch/slurm/sweep.sbatch +(\S+)", text)
    assert len(commands) == (2 if name.endswith(".sbatch") else 1)
    for *options, path in commands:
        sweep = read_sweep(ROOT / path)
        first, second = candidates(sweep), final_cells(sweep, {})
        stages = [(0, len(first) - 1), (len(first), len(first) + len(second) - 1)]
        before, start, stop, after = options
        assert (int(start), int(stop)) == stages["afterany" in after]
        assert "--cpus-per-task" in before + after  # or the run shares a core with whatever else is on its node
        check(first + second, ranks=int(re.search(r"--gpus-per-node (\d+)", before + after)[1]))


def script(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "sweep.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_listing_and_slurms_arguments_come_from_the_script_without_importing_torch(write):
    sweep = read_sweep(write())
    for cell in candidates(sweep)[:2]:
        end(cell, 2.0 + cell.learning_rate)
    done = script("s.yaml", "--list")
    lines = done.stdout.splitlines()
    assert len(lines) == 6 + 9 + 1 and "finished" in lines[0] and "waits" in lines[6]
    assert lines[-1] == "15 runs in runs/s: 0-5 to choose learning rates, then 6-14 to report"
    assert script("s.yaml", "--index", "0", "--arguments").stdout == ""  # it has ended
    done = script("s.yaml", "--index", "6", "--arguments")
    assert done.stdout.splitlines() == [
        "tiny.yaml",
        "data.max_length=64",
        "seed=0",
        "training.learning_rate=0.0001",
        "name=lorasp-max_length64-lr0.0001-seed0",
        "output_dir=runs/s",
    ]
    waits = script("s.yaml", "--index", "9", "--arguments")
    assert waits.returncode == 2
    assert waits.stderr == (
        "error: run 9 waits for the learning rate of full-max_length64: "
        "choose-full-max_length64-lr0.0001-seed0 has not ended\n"
    )


def test_a_slurm_array_hands_each_run_to_the_job_script_of_training(write, tmp_path):
    """With a stand-in for that script: spaces in a setting, and a run that has ended."""
    write(SWEEP.replace("[64]", "[64]\n  data.train: ['my data']"))
    (tmp_path / "launch" / "slurm").mkdir(parents=True)
    (tmp_path / "launch" / "sweep.py").symlink_to(ROOT / "launch" / "sweep.py")
    (tmp_path / "launch" / "slurm" / "train.sbatch").write_text('printf "<%s>" "$@"')
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    script = str(ROOT / "launch" / "slurm" / "sweep.sbatch")
    end(candidates(read_sweep("s.yaml"))[0], 2.0)

    def job(index: int) -> subprocess.CompletedProcess:
        array = environment | {"SLURM_ARRAY_TASK_ID": str(index)}
        return subprocess.run(["bash", script, "s.yaml"], capture_output=True, text=True, env=array)

    assert job(1).stdout.startswith(
        "<tiny.yaml><data.max_length=64><data.train=my data><data.held_out.skip=200><seed=0>"
    )
    assert job(0).stdout == "run 0 has ended already\n"
    waits = job(6)
    assert waits.returncode == 2 and "waits for the learning rate of lorasp-max_length64-my_data" in waits.stderr


def test_the_scripts_own_modules_import_nothing_heavy(write):
    """A sweep waits for hours beside runs that need the memory."""
    modules = "cells, choice, definition, launching, outcome"
    heavy = "('torch', 'transformers', 'deepspeed', 'numpy')"
    code = f"import sys; from lorasp.sweep import {modules}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_launcher_that_is_no_list_of_arguments_is_told():
    words = runpy.run_path(str(ROOT / "launch" / "sweep.py"))["_words"]
    assert words("--num_processes 2") == ["--num_processes", "2"]
    with pytest.raises(RecipeError, match="--launcher: '\"' is no list of arguments \\(No closing quotation\\)"):
        words('"')
