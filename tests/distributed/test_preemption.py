"""A run that is asked to leave, twice and in two ways, and goes on: the run that nothing disturbed."""

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorasp.cli import PREEMPTED
from tests.distributed.commands import TRAIN, accelerate_on_two, python, run, start
from tests.distributed.launching import ROOT, ended_with_its_family

pytestmark = pytest.mark.slow

STEPS = 40
SETTINGS = (f"training.max_steps={STEPS}", "training.epochs=20", "adapter.dropout=0.1", "evaluation.samples=1")


# launch/train.py, whose rank 1 gets SIGTERM in the third batch of the second evaluation.
ASKED = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
from lorasp.evaluation import held_out
evaluations, batches = [], held_out.evaluation_batches
def asked(*arguments):
    evaluations.append(1)
    for index, batch in enumerate(batches(*arguments)):
        if len(evaluations) == 2 and index == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch
held_out.evaluation_batches = asked
sys.argv[0] = {train!r}
runpy.run_path({train!r}, run_name="__main__")
"""


def history(run_dir: Path) -> list[dict]:
    return json.loads((run_dir / "report.json").read_text())["history"]


def leave(command: list[str], home: Path, step: int, send) -> tuple[int, str]:
    """Starts `command`, calls `send` with its process once it tells of `step`; (exit code, both outputs)."""
    with start(command, home) as process, ended_with_its_family(process, timeout=180):
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
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):  # the later ones while it saves
        its.send_signal(number)
        time.sleep(0.03)


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
    assert 5 <= marker["step"] < STEPS - 15 and Path(marker["checkpoint"]).is_dir()
    assert not (left / "report.json").exists()
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


def test_a_run_leaves_in_the_middle_of_an_evaluation_and_repeats_it(runs, place, home, tmp_path):
    """The one after the last step, whose result is on the disk by then; one rank is asked, and both leave."""
    script = tmp_path / "asked.py"
    script.write_text(ASKED.format(root=str(ROOT), train=TRAIN))
    left = (str(place / "tiny.yaml"), f"output_dir={tmp_path}", *SETTINGS, "evaluation.micro_batch_size=1")
    command = accelerate_on_two(*left, "name=left")
    done = run([str(script) if part == TRAIN else part for part in command], home)
    assert done.returncode != 0 and f"left after step {STEPS}, as it was asked to" in done.stdout, done.stderr
    assert json.loads((tmp_path / "left" / "left.json").read_text())["step"] == STEPS
    assert (tmp_path / "left" / "adapter" / "adapter.safetensors").is_file()
    done = run(command, home)
    assert done.returncode == 0 and f"resumed after step {STEPS}" in done.stdout, done.stderr
    ours, calm = (json.loads((of / "report.json").read_text()) for of in (tmp_path / "left", runs["calm"]))
    assert [(row["step"], row["loss"]) for row in ours["history"]] == [
        (row["step"], row["loss"]) for row in calm["history"]
    ]
    assert ours["metrics"]["held_out_loss_after"] == pytest.approx(calm["metrics"]["held_out_loss_after"], rel=1e-6)
    assert ours["samples"] == calm["samples"]
