"""Checkpoints on disk: whole or passed over, the last and the best kept, and of this run only."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from lorasp import resume
from lorasp.recipe import Checkpointing, Recipe, RecipeError
from lorasp.resume import Checkpoints, Found, RunState, agreed_checkpoint, find_checkpoint, newest_checkpoint


def recipe(tmp_path, **changes):
    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "name": "run", "output_dir": str(tmp_path)} | changes
    return Recipe(**tree)


def state(step, settings, loss=None):
    scores = [] if loss is None else [{"step": step, "held_out_loss": loss, "exact_match": 0.0}]
    log = {"history": [{"step": step}], "scores": scores, "metrics": {}, "samples": []}
    return RunState.of(step, settings, base_digest="b", data={"train": "d"}, world_size=2, log=log)


def write(settings, *steps, losses=(), told=print, **settings_of_checkpoints):
    """Checkpoints of a `full` run with two tensors each, written one after the other."""
    how = Checkpointing(every_steps=1, **settings_of_checkpoints)
    checkpoints = Checkpoints(settings.run_dir, how, is_main=True, warn=told)
    for step, loss in zip(steps, losses or [None] * len(steps), strict=True):
        tensors = [("master/w", torch.full((5,), float(step))), ("exp_avg/w", torch.zeros(5))]
        checkpoints._write(state(step, settings, loss), None, {}, tensors)
        checkpoints.wait()
    return settings.run_dir / "checkpoints"


def names(root):
    return [path.name for path in sorted(root.iterdir())]


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(resume, "_FILE_BYTES", 16)  # a file a tensor


@pytest.mark.parametrize("fault", ["truncated", "flipped", "deleted", "emptied"])
def test_each_file_that_is_not_as_written_is_found_out_and_the_older_one_is_used(fault, tmp_path, small_files):
    settings = recipe(tmp_path)
    root = write(settings, 1, 2)
    whole = root / "step-00000002"
    files = [path for path in sorted(whole.rglob("*")) if path.is_file()]
    assert [path.name for path in files] == [
        "manifest.json",
        "state-00000.safetensors",
        "state-00001.safetensors",
        "state.json",
    ]
    assert newest_checkpoint(settings.run_dir, pytest.fail).state.step == 2
    for file in files:
        content = bytearray(file.read_bytes())
        if fault == "deleted":
            file.unlink()
        elif fault == "flipped":
            file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        else:
            file.write_bytes(content[: len(content) - 1] if fault == "truncated" else b"")
        told = []
        found = newest_checkpoint(settings.run_dir, told.append)
        assert found.state.step == 1 and len(told) == 1 and "step-00000002 is passed over: it " in told[0], file
        if fault == "flipped" and file.name.startswith("state"):
            assert f"{file.name} is not what was written" in told[0]
        file.write_bytes(content)
    assert newest_checkpoint(settings.run_dir, pytest.fail).state.step == 2


def test_the_last_ones_and_the_best_stay(tmp_path):
    root = write(recipe(tmp_path), 1, 2, 3, 4, 5, losses=(3.0, 1.0, None, 2.0, 2.5), keep_last=2)
    assert names(root) == ["step-00000002", "step-00000004", "step-00000005"]
    settings = recipe(tmp_path, name="other")
    root = write(settings, 1, 2, 3, losses=(1.0, 2.0, 3.0), keep_last=1, keep_best=False)
    assert names(root) == ["step-00000003"]


def test_a_full_disk_costs_the_checkpoint_and_not_the_one_before(tmp_path, monkeypatch):
    settings, told = recipe(tmp_path), []
    root = write(settings, 1)

    def full(*_, **__):
        raise RecipeError("no space left on device")

    monkeypatch.setattr(resume, "write_tensors_whole", full)
    write(settings, 2, told=told.append)
    assert names(root) == ["step-00000001"]
    [line] = told
    assert "the checkpoint of step 2 could not be written (no space left on device); that of step 1 stays" in line
    shutil.rmtree(root / "step-00000001")
    write(settings, 3, told=told.append)
    assert "there is none yet" in told[1]


def test_what_makes_another_run_is_told_and_what_does_not_goes_on(tmp_path):
    settings = recipe(tmp_path)
    write(settings, 3)
    free = recipe(tmp_path, training={"micro_batch_size": 2, "log_every": 1}, checkpoint={"every_steps": 7})
    for same in (settings, free):
        assert find_checkpoint(same, pytest.fail).state.step == 3
    other = recipe(tmp_path, training={"learning_rate": 1e-3}, adapter={"rank": 8}, seed=1)
    with pytest.raises(RecipeError) as error:
        find_checkpoint(other, pytest.fail)
    for told in ("seed is 1, was 0", "adapter.rank is 8, was 16", "training.learning_rate is 0.001, was 2e-05"):
        assert told in str(error.value)
    assert find_checkpoint(other.model_copy(update={"overwrite": True}), pytest.fail) is None
    assert find_checkpoint(settings.model_copy(update={"resume": "never"}), pytest.fail) is None
    by_name = recipe(tmp_path / "elsewhere", resume=str(settings.run_dir / "checkpoints" / "step-00000003"))
    found = find_checkpoint(by_name, pytest.fail)
    assert found.state.step == 3 and found.is_of(settings.run_dir) and not found.is_of(by_name.run_dir)
    with pytest.raises(RecipeError, match=r"resume: nowhere is no whole checkpoint: manifest.json is missing"):
        find_checkpoint(recipe(tmp_path, resume="nowhere"), pytest.fail)


def test_a_named_one_is_gone_on_from_once_and_then_the_run_from_its_own(tmp_path, monkeypatch):
    """Given again, the same command goes on from what it saved; a run's own older one may be named all the same."""
    of = recipe(tmp_path, name="a")
    write(of, 4, 6)
    named = str(of.run_dir / "checkpoints" / "step-00000004")
    other, own = recipe(tmp_path, name="b", resume=named), recipe(tmp_path, name="a", resume=named)
    assert find_checkpoint(other, pytest.fail).path == find_checkpoint(own, pytest.fail).path == Path(named)
    for settings in (other, own):
        write(settings, 7)
        assert find_checkpoint(settings, pytest.fail).state.step == 7
        assert find_checkpoint(settings, pytest.fail).is_of(settings.run_dir)
    never = recipe(tmp_path, name="c", resume="never")
    write(never, 5)
    assert find_checkpoint(never, pytest.fail) is None  # by hand it begins anew, by Slurm it goes on
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert find_checkpoint(never, pytest.fail).state.step == 5
    assert find_checkpoint(recipe(tmp_path, name="a", resume="never"), pytest.fail) is None  # another command


def test_what_is_newer_than_where_the_run_goes_on_is_gone_and_so_is_what_was_cut_short(tmp_path):
    """Damaged ones counted among the last, and what was written next was removed at once."""
    settings, told = recipe(tmp_path), []
    root = write(settings, 4, 6, keep_last=2)
    (root / "step-00000006" / "state.json").write_text("{")
    (root / ".step-00000005.writing").mkdir()
    checkpoints = Checkpoints(settings.run_dir, Checkpointing(keep_last=1), is_main=True, warn=told.append)
    checkpoints.begin(newest_checkpoint(settings.run_dir, lambda _: None).state.step)
    assert names(root) == ["step-00000004"] and checkpoints.newest == 4
    assert told == [f"{root / 'step-00000006'} is removed: the run goes on after step 4"]
    write(settings, 5, keep_last=1, keep_best=False)
    assert names(root) == ["step-00000005"]


def test_a_rank_whose_host_does_not_have_the_checkpoint_says_so(tmp_path):
    class Ranks:
        is_main = False
        gather = staticmethod(lambda value: [Found(tmp_path / "step-00000004", None)])

    with pytest.raises(RecipeError, match=r"output_dir: .*step-00000004 is not there on .*; a run on several nodes"):
        agreed_checkpoint(Ranks(), pytest.fail)


def test_other_data_is_told(tmp_path):
    found = state(1, recipe(tmp_path))
    found.check_data({"train": "d"}, tmp_path)
    with pytest.raises(RecipeError, match=r"trained on other data: train differs"):
        found.check_data({"train": "e"}, tmp_path)


@pytest.mark.parametrize("status", ["finished", "stopped: the loss became NaN"])
def test_a_run_that_has_ended_does_not_go_on(status, tmp_path):
    settings = recipe(tmp_path)
    write(settings, 3)
    (settings.run_dir / "report.json").write_text(json.dumps({"status": status}))
    assert find_checkpoint(settings, pytest.fail) is None
    (settings.run_dir / "report.json").write_text("{")  # it was killed while it wrote
    assert find_checkpoint(settings, pytest.fail).state.step == 3


def test_due_by_steps_and_by_minutes(tmp_path, monkeypatch):
    def made(**settings):
        return Checkpoints(tmp_path, Checkpointing(**settings), is_main=True, warn=print)

    assert [step for step in range(1, 9) if made(every_steps=3).is_due(step)] == [3, 6]
    assert not made().is_due(4)
    timed, now = made(every_minutes=0.5), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 29)
    assert not timed.is_due(1)
    monkeypatch.setattr(time, "monotonic", lambda: now + 31)
    assert timed.is_due(1)


def test_room_for_a_new_one_before_an_old_one_goes(tmp_path):
    settings = recipe(tmp_path)
    write(settings, 1, 2)
    repeated = Checkpoints(settings.run_dir, Checkpointing(every_steps=5), is_main=True, warn=print)
    assert repeated.more_bytes(1000) == (2 + 1 + 1 - 2) * 12 * 1000
    once = Checkpoints(tmp_path / "new", Checkpointing(), is_main=True, warn=print)
    assert once.more_bytes(1000) == 2 * 12 * 1000
