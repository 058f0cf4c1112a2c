"""A rank that dies, raises or stands still takes its run with it, and is named; what was lost is trained again."""

import json
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from lorasp.cli import HUNG
from tests.distributed.commands import TRAIN, accelerate_on_two, run, start
from tests.distributed.launching import ROOT, ended_with_its_family

pytestmark = pytest.mark.slow

WIDE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "vocab_size": 1000,
}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_while_loading_ends_the_other_with_a_message(rank, tmp_path, home):
    """400 M weights are made and quantized for some 20 s, of which the killing leaves most."""
    (tmp_path / "wide.json").write_text(json.dumps(WIDE))
    (tmp_path / "wide.yaml").write_text(
        json.dumps(
            {
                "output_dir": str(tmp_path / "runs"),
                "model": {"path": str(tmp_path / "wide.json"), "weights": "random"},
                "data": {"train": "random", "max_length": 16, "limit": 8},
                "training": {"epochs": 1, "global_batch_size": 2, "micro_batch_size": 1},
            }
        )
    )
    command = accelerate_on_two(str(tmp_path / "wide.yaml"))
    lines: list[str] = []
    with start(command, home) as process, ended_with_its_family(process, timeout=180):
        killed = None
        for line in process.stdout:
            lines.append(line)
            if killed is None and "planned peak" in line:
                time.sleep(2)  # well into loading
                os.kill(_of_rank(process.pid, rank), signal.SIGKILL)
                killed = time.monotonic()
        code = process.wait()
        seconds = time.monotonic() - killed
    told = "".join(lines)
    assert code != 0 and seconds < 60
    assert "SIGKILL" in told and f"local_rank: {rank}" in told
    assert "model:" not in told  # it was loading
    assert f"rank {1 - rank} ended here" in told and "in load_model" in told  # where the other one stood
    assert not (tmp_path / "runs" / "run" / "report.json").exists()


def _of_rank(launcher: int, rank: int) -> int:
    for process in psutil.Process(launcher).children(recursive=True):
        if process.environ().get("RANK") == str(rank):
            return process.pid
    raise AssertionError(f"no process of rank {rank}")


# launch/train.py, of which one rank fails at the n-th time that it comes to a place.
FAILING = """
import itertools, os, pathlib, runpy, signal, sys, time
sys.path.insert(0, {root!r})
place, rank, nth, how, marker = sys.argv[1:6]
sys.argv = [{train!r}, *sys.argv[6:]]
times = itertools.count(1)

def die():
    if os.environ["RANK"] == rank and next(times) == int(nth):
        pathlib.Path(marker).touch()
        if how == "sleeps":
            time.sleep(1000)
        if how == "raises":
            raise RuntimeError("the fault of this rank")
        os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, also=None):
    original = getattr(owner, name)
    def called(*arguments, **named):
        also(*arguments) if also else die()
        return original(*arguments, **named)
    setattr(owner, name, called)

if place == "loading":
    from lorasp.quantization import ShardedLinear
    before(ShardedLinear, "load")
elif place == "forward":
    from lorasp.models.causal_lm import Head
    before(Head, "forward")
elif place == "backward":
    from lorasp.zero.engine import Engine
    before(Engine, "backward", lambda engine, loss, **_: loss.register_hook(lambda gradient: die()))
elif place == "saving":
    from lorasp import resume
    before(resume, "write_tensors_whole")
elif place == "evaluating":
    from lorasp.agreement import Agreement
    before(Agreement, "to_leave")
runpy.run_path({train!r}, run_name="__main__")
"""

HANG_SECONDS = 10

# place -> (ranks that come there, how often at most before the death)
PLACES = {
    "loading": ((0, 1), 8),
    "forward": ((0, 1), 16),
    "backward": ((0, 1), 8),
    "saving": ((0,), 3),
    "evaluating": ((0, 1), 10),
}
SETTINGS = (
    "rehearse=false",  # so that a rank lives long enough to train
    "training.max_steps=40",
    "training.epochs=20",
    "training.evaluate_every=4",
    "checkpoint.every_steps=2",
    "adapter.dropout=0.1",
    "evaluation.samples=1",
    "evaluation.micro_batch_size=1",
)


def moments(count: int, seed: int) -> list[tuple[str, int, int, str]]:
    """(place, rank, how often the rank comes there first, how): each place as often as the others, else at random."""
    numbers = random.Random(seed)
    drawn = []
    for index in range(count):
        ranks, often = PLACES[place := list(PLACES)[index % len(PLACES)]]
        drawn.append((place, numbers.choice(ranks), numbers.randint(1, often), "killed"))
    numbers.shuffle(drawn)
    return drawn


def run_failing(
    command: list[str], moment: tuple[str, int, int, str], script: Path, home: Path
) -> tuple[int, float, str]:
    """(exit code, seconds from the failure to the end, what was told) of the launch."""
    marker = script.with_suffix(".failed")
    marker.unlink(missing_ok=True)
    where = command.index(TRAIN)
    failing = [*command[:where], str(script), *map(str, moment), str(marker), *command[where + 1 :]]
    with start(failing, home) as process, ended_with_its_family(process):
        told, _ = process.communicate(timeout=180)
        ended = time.time()
    assert marker.exists(), f"{moment} never came:\n{told}"
    return process.returncode, ended - marker.stat().st_mtime, told


def report(run_dir: Path) -> dict:
    return json.loads((run_dir / "report.json").read_text())


def test_a_run_that_loses_a_rank_at_any_moment_goes_on_to_the_undisturbed_runs_end(place, home, tmp_path):
    """One run, ended seven times: each time both ranks end within a minute, and at most two steps are lost."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT), train=TRAIN))
    recipe = (str(place / "tiny.yaml"), f"output_dir={tmp_path}", *SETTINGS)
    calm = run(accelerate_on_two(*recipe, "name=calm"), home)
    assert calm.returncode == 0, calm.stderr
    for moment in [*moments(5, seed=0), ("forward", 1, 6, "sleeps"), ("backward", 0, 5, "raises")]:
        _, rank, _, how = moment
        patience = [f"health.hang_seconds={HANG_SECONDS}"] if how == "sleeps" else []
        code, seconds, told = run_failing(accelerate_on_two(*recipe, "name=killed", *patience), moment, script, home)
        assert code != 0 and seconds < 60, (moment, code, seconds)
        assert f"local_rank: {rank}" in told
        if how == "killed":
            assert "Signal 9 (SIGKILL)" in told
        elif how == "raises":
            assert f"rank {rank} ended here" in told and "RuntimeError: the fault of this rank" in told
        else:
            assert f"exitcode  : {HUNG}" in told and f"rank {rank} holds up the others" in told
            assert seconds > HANG_SECONDS and '/failing.py", line 12, in die' in told  # where it sleeps
        # And where the other one stood: in a collective that failed, or that it waited for.
        other = f"rank {1 - rank} " + ("has not moved" if how == "sleeps" else "ended here")
        assert other in told and "most recent call" in told
        assert not (tmp_path / "killed" / "report.json").exists()
    done = run(accelerate_on_two(*recipe, "name=killed"), home)
    assert done.returncode == 0 and "resumed after step" in done.stdout, done.stderr
    calm, killed = report(tmp_path / "calm"), report(tmp_path / "killed")
    losses = [[(row["step"], row["loss"]) for row in its["history"]] for its in (calm, killed)]
    assert losses[0] == losses[1] and len(losses[0]) == 40
    assert calm["scores"] == killed["scores"] and [its["step"] for its in calm["scores"]] == list(range(0, 41, 4))
    for name in ("held_out_loss_after", "final_train_loss"):
        assert calm["metrics"][name] == killed["metrics"][name]
