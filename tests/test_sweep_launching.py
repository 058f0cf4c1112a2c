"""Signals, locks and failures of a sweep's runs: `launch/sweep.py` with a stand-in for training."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorasp.sweep.cells import candidates, final_cells
from lorasp.sweep.definition import read_sweep
from lorasp.sweep.launching import LOG, Busy, Launcher, last_words
from tests.comparisons import finished_run, split

ROOT = Path(__file__).parents[1]
# Its launcher is gone at SIGTERM before its rank is, as accelerate's is where one process needs no agent.
STAND_IN = """\
import json, os, pathlib, signal, subprocess, sys, time
settings = dict(argument.split("=", 1) for argument in sys.argv[2:] if "=" in argument)
run_dir = pathlib.Path(settings["output_dir"], settings["name"])
if settings["seed"] == "0":
    sys.exit("error: this one fails")
if sys.argv[1] == "launcher":
    sys.exit(subprocess.run([sys.executable, __file__, "rank", *sys.argv[2:]]).returncode)
def leave(number, frame):
    time.sleep(0.5)
    (run_dir / "left.json").write_text("{}")
    print("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, leave if settings["seed"] == "1" else signal.SIG_IGN)
print("trains", os.getpid(), flush=True)
time.sleep(60)
"""
DRIVER = """\
import runpy, sys
from lorasp.sweep.launching import Launcher
Launcher.command = lambda self, recipe, overrides: [sys.executable, "stand_in.py", "launcher", *overrides]
sys.argv = ["sweep.py", *sys.argv[1:]]
runpy.run_path("{script}", run_name="__main__")
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts the sweep of three seeds: one fails, one leaves as it is asked to, one does not listen."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text("model: {path: some/model}\ndata: {train: some/data}\n")
    Path("s.yaml").write_text("recipe: tiny.yaml\nseeds: [0, 1, 2]\n")
    Path("stand_in.py").write_text(STAND_IN)
    Path("driver.py").write_text(DRIVER.replace("{script}", str(ROOT / "launch" / "sweep.py")))
    started: list[subprocess.Popen] = []

    def start_sweep(*arguments: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "driver.py", "s.yaml", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        return process

    yield start_sweep
    for process in started:
        if process.poll() is None:
            process.kill()


def pid_of_rank(name: str) -> int:
    """Once it trains."""
    log = Path("runs/s") / name / LOG
    ends = time.monotonic() + 30
    while time.monotonic() < ends:
        trains = [line for line in (log.read_text() if log.exists() else "").splitlines() if line.startswith("trains")]
        if trains:
            return int(trains[-1].split()[1])
        time.sleep(0.05)
    pytest.fail(f"{name} did not start")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_run_that_fails_is_passed_and_the_one_at_hand_leaves_when_the_sweep_is_asked_to(start, number, code):
    sweep = start()
    rank = pid_of_rank("seed1")
    sweep.send_signal(number)
    out, _ = sweep.communicate(timeout=30)
    assert sweep.returncode == code, out
    assert not is_alive(rank) and "saved" in Path("runs/s/seed1", LOG).read_text()  # it was waited for
    lines = out.splitlines()
    assert "1/3 seed0: failed, exit code 1: error: this one fails" in lines
    assert lines[-3:] == [
        "2/3 seed1: left; the same command goes on",
        "0 runs have finished",
        "not finished: seed0: exit code 1: error: this one fails",
    ]
    assert not Path("runs/s/seed2").exists()


def test_a_second_interrupt_kills_a_run_that_does_not_leave(start):
    sweep = start("--index", "2")
    rank = pid_of_rank("seed2")
    for _ in range(2):
        sweep.send_signal(signal.SIGINT)
        time.sleep(0.3)
    out, _ = sweep.communicate(timeout=30)
    assert sweep.returncode == 130 and "Ctrl-C again kills it" in out and not is_alive(rank)


def test_a_run_that_another_process_is_at_is_left_to_it_even_when_its_sweep_was_killed(start):
    first = start("--index", "1")
    rank = pid_of_rank("seed1")
    first.kill()
    first.wait()
    second = start("--index", "1")
    out, _ = second.communicate(timeout=30)
    assert second.returncode == 1 and "1/1 seed1: another process is at it" in out and is_alive(rank)
    os.kill(rank, signal.SIGKILL)


def test_two_stages_in_one_start_and_nothing_is_run_twice(tmp_path, monkeypatch):
    """Trained by copying reports made beforehand: 3 rates, of which one diverges, then the best with both seeds."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text("task: rte\nmodel: {path: some/model}\ndata: {train: ., selection: 0.1}\n")
    choose = "choose: {learning_rates: [1e-4, 1e-3, 1e-2]}"
    Path("s.yaml").write_text(
        f"recipe: tiny.yaml\nvariants: {{a: {{}}, b: {{method: lora}}}}\nseeds: [0, 1]\n{choose}\n"
    )
    Path("stand_in.py").write_text(
        "import shutil, sys\nsettings = dict(argument.split('=', 1) for argument in sys.argv[2:])\n"
        "place = f\"{settings['output_dir']}/{settings['name']}/report.json\"\n"
        "shutil.copy('made/' + place, place)\n"
    )
    Path("driver.py").write_text(DRIVER.replace("{script}", str(ROOT / "launch" / "sweep.py")))
    sweep = read_sweep("s.yaml")
    scores = {1e-4: 0.6, 1e-3: 0.7, 1e-2: 0.9}  # by the selection rows; by those reported the first is the best
    for cell in [*candidates(sweep), *final_cells(sweep, {"a": 1e-3})]:
        if cell.is_chosen and cell.group == "a":
            rate = cell.learning_rate
            finished_run(
                Path("made") / cell.run_dir,
                cell.recipe,
                selection=split("accuracy", scores[rate]),
                reported=split("accuracy", 1 - scores[rate]),
                status="stopped: the loss became NaN at step 3" if rate == 1e-2 else "finished",
            )

    def start_sweep() -> tuple[int, list[str]]:
        command = [sys.executable, "driver.py", "s.yaml"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        return done.returncode, [re.sub(r" in \d+ s", " in T s", line) for line in done.stdout.splitlines()]

    code, lines = start_sweep()
    assert code == 1  # b's reports are not there: each of its runs fails
    assert [line for line in lines if "starts" not in line and "failed" not in line] == [
        "1/6 a-lr0.0001-seed0: finished in T s, selection accuracy 0.6",
        "2/6 a-lr0.001-seed0: finished in T s, selection accuracy 0.7",
        "3/6 a-lr0.01-seed0: stopped: the loss became NaN at step 3 in T s, selection accuracy 0.9",
        "chosen: a: 0.001 by selection accuracy (0.0001: 0.6, 0.001: 0.7, 0.01: none)",
        "1/2 a-lr0.001-seed0: finished already",
        "2/2 a-lr0.001-seed1: finished in T s, reported accuracy 0.3",
        "3 runs have finished",
        *(line for line in lines if line.startswith("not finished: b-lr")),
        "not finished: b: its learning rate is not chosen, as b-lr0.0001-seed0 has not ended",
    ]
    assert sum(line.startswith("not finished: b-lr") for line in lines) == 3
    _, again = start_sweep()
    assert [line for line in again if " a-lr" in line] == [
        "1/6 a-lr0.0001-seed0: finished already",
        "2/6 a-lr0.001-seed0: finished already",
        "3/6 a-lr0.01-seed0: stopped already",
        "1/2 a-lr0.001-seed0: finished already",
        "2/2 a-lr0.001-seed1: finished already",
    ]


def test_a_launch_that_is_not_there_is_told_and_the_log_keeps_all_starts(tmp_path):
    launcher = Launcher([], print)
    assert launcher.run(["false"], tmp_path) == 1
    assert launcher.run(["sh", "-c", "echo some words; echo error: no room >&2; echo more"], tmp_path) == 0
    assert (tmp_path / LOG).read_text().splitlines()[:2] == [
        "$ false",
        "$ sh -c 'echo some words; echo error: no room >&2; echo more'",
    ]
    assert last_words(tmp_path) == "error: no room"
    with open(tmp_path / LOG, "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Busy):
            launcher.run(["true"], tmp_path)
