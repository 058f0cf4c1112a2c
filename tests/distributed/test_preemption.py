"""A run that is asked to leave, twice and in two ways, and goes on: the run that nothing disturbed."""

import json
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorasp.cli import PREEMPTED
from tests.distributed.commands import accelerate_on_two, python, run, start

pytestmark = pytest.mark.slow

STEPS = 60
SETTINGS = (f"training.max_steps={STEPS}", "training.epochs=20", "adapter.dropout=0.1", "evaluation.samples=1")


def history(run_dir: Path) -> list[dict]:
    return json.loads((run_dir / "report.json").read_text())["history"]


def leave(command: list[str], home: Path, step: int, send) -> tuple[int, str]:
    """Starts `command`, calls `send` with its process once it tells of `step`; (exit code, both outputs)."""
    with start(command, home) as process:
        told = []
        for line in process.stdout:
            told.append(line)
            if send is not None and f"step {step:>2}/{STEPS}" in line:
                send(process)
                send = None
        process.wait(60)
    return process.returncode, "".join(told)


def to_rank_1(process: subprocess.Popen) -> None:
    ranks = psutil.Process(process.pid).children(recursive=True)
    [its] = [rank for rank in ranks if rank.environ().get("RANK") == "1" and "train.py" in " ".join(rank.cmdline())]
    its.send_signal(signal.SIGUSR1)


def to_the_launcher(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def runs(place, home, tmp_path_factory) -> dict[str, Path]:
    """`calm` ran through on two ranks; `left` left twice and ended on one."""
    root = tmp_path_factory.mktemp("left")
    common = (str(place / "tiny.yaml"), f"output_dir={root}", *SETTINGS)
    done = run(accelerate_on_two(*common, "name=calm"), home)
    assert done.returncode == 0, done.stderr
    left = root / "left"
    code, told = leave(accelerate_on_two(*common, "name=left"), home, 5, to_rank_1)
    assert code != 0 and f"exitcode: {PREEMPTED}" in told.replace("exitcode : ", "exitcode: "), told[-4000:]
    marker = json.loads((left / "left.json").read_text())
    assert 5 <= marker["step"] < 40 and Path(marker["checkpoint"]).is_dir() and not (left / "report.json").exists()
    assert f"left after step {marker['step']}, as it was asked to" in told
    code, told = leave(accelerate_on_two(*common, "name=left"), home, marker["step"] + 5, to_the_launcher)
    assert code != 0 and f"resumed after step {marker['step']} of 2 rank(s)" in told, told[-4000:]
    second = json.loads((left / "left.json").read_text())["step"]
    assert marker["step"] + 5 <= second < STEPS
    done = run(python(*common, "name=left"), home)
    assert done.returncode == 0 and f"resumed after step {second} of 2 rank(s)" in done.stdout, done.stderr
    return {"calm": root / "calm", "left": left, "second": second}


def test_every_step_is_there_once_and_is_the_undisturbed_runs(runs):
    """To the bit on as many ranks; on one, after that, to 1e-5."""
    calm, left = history(runs["calm"]), history(runs["left"])
    assert [row["step"] for row in left] == [row["step"] for row in calm] == list(range(1, STEPS + 1))
    same = runs["second"]
    assert [row["loss"] for row in left[:same]] == [row["loss"] for row in calm[:same]]
    for ours, theirs in zip(left[same:], calm[same:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert not (runs["left"] / "left.json").exists()


def test_scores_and_answers_from_before_the_run_left_are_in_its_report(runs):
    calm, left = (json.loads((runs[name] / "report.json").read_text()) for name in ("calm", "left"))
    assert left["metrics"]["held_out_loss_before"] == calm["metrics"]["held_out_loss_before"]
    assert left["metrics"]["held_out_loss_after"] == pytest.approx(calm["metrics"]["held_out_loss_after"], rel=1e-5)
    assert [sample["before"] for sample in left["samples"]] == [sample["before"] for sample in calm["samples"]]


def test_tensorboard_shows_one_curve(runs):
    events = EventAccumulator(str(runs["left"] / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    points = events.Scalars("train/loss")
    assert [point.step for point in points] == list(range(1, STEPS + 1))
