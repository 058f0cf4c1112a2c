"""The rehearsal in real launches: it leaves no trace, and stops before step 1 what would fail later."""

import json
import os
import re
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.commands import TRAIN, accelerate_on_two, run

pytestmark = pytest.mark.slow


def adapter(place, name):
    return (place / "runs" / name / "adapter" / "adapter.safetensors").read_bytes()


def test_a_rehearsed_run_is_the_unrehearsed_one_to_the_bit(place, tmp_path):
    """Two ranks with dropout: the adapter's fp32 values, every logged loss and gradient norm."""
    histories = []
    for rehearse in ("true", "false"):
        name = f"rehearse_{rehearse}"
        done = run(
            accelerate_on_two(str(place / "tiny.yaml"), f"name={name}", f"rehearse={rehearse}", "adapter.dropout=0.1"),
            tmp_path,
        )
        assert done.returncode == 0, done.stderr
        report = json.loads((place / "runs" / name / "report.json").read_text())
        histories.append([(point["loss"], point["gradient_norm"]) for point in report["history"]])
        phases = [phase for phase in report["phases"] if phase.startswith("rehearse")]
        assert phases == (["rehearse_train", "rehearse_evaluate", "rehearse_save"] if rehearse == "true" else [])
        for phase in phases:
            assert [rank["rank"] for rank in report["phases"][phase]["ranks"]] == [0, 1]
            assert all(rank["peak_bytes"] > 0 for rank in report["phases"][phase]["ranks"])
            # One line a phase with the very peaks of the report.
            told = re.search(f"{phase.replace('_', ' ')}: peak above baseline (.*)", done.stdout)[1]
            peaks = [rank["peak_bytes"] for rank in report["phases"][phase]["ranks"]]
            assert told == f"rank 0 {peaks[0] / 2**30:.3f} GiB, rank 1 {peaks[1] / 2**30:.3f} GiB"
        assert not (place / "runs" / name / "rehearsal").exists()
    assert histories[0] == histories[1]
    assert adapter(place, "rehearse_true") == adapter(place, "rehearse_false")


_COUNTED = """
import json, os, runpy, sys
sys.path.insert(0, os.getcwd())
import lorasp.rehearsal, lorasp.trainer
from lorasp.live_tensors import LiveTensors

# Peak of the tensors that each optimizer step makes, those of the gathers among them.
step, peaks = lorasp.trainer.train_step, {{"rehearsed": [], "trained": []}}
def counted(what):
    def train_step(*arguments):
        with LiveTensors() as live:
            result = step(*arguments)
        peaks[what].append(live.peak_bytes)
        open({out!r} + os.environ["RANK"], "w").write(json.dumps(peaks))
        return result
    return train_step
lorasp.rehearsal.train_step, lorasp.trainer.train_step = counted("rehearsed"), counted("trained")
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_no_step_of_two_ranks_holds_more_than_the_rehearsed_ones(place, tmp_path):
    """Four micro batches a step: those after the first find its gradients, and ZeRO-3 gathers ahead from step 2 on."""
    script = tmp_path / "counted.py"
    arguments = [str(place / "tiny.yaml"), "name=counted", "evaluation.samples=0", "training.micro_batch_size=1"]
    script.write_text(_COUNTED.format(out=f"{tmp_path}/peaks", argv=[TRAIN, *arguments, "data.limit=16"]))
    command = accelerate_on_two()
    done = run([*command[: command.index(TRAIN)], str(script)], tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        peaks = json.loads((tmp_path / f"peaks{rank}").read_text())
        assert len(peaks["rehearsed"]) == 2 and len(peaks["trained"]) == 4
        # As much, and not more than the longest rows explain.
        assert max(peaks["trained"]) <= max(peaks["rehearsed"]) < 1.1 * max(peaks["trained"])


_LIMITED = """
import re, resource, runpy, sys
import lorasp.reporting.run_log as run_log

# When the model is loaded, the process may grow by that much and no more.
loaded = run_log.RunLog.model_loaded
def limit(self, *arguments):
    loaded(self, *arguments)
    size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + {mib} * 2**20, -1))
run_log.RunLog.model_loaded = limit
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_recipe_that_fits_in_training_but_not_in_evaluation_stops_before_step_1(place, tmp_path):
    """160 MiB are left after loading: enough for 8 short rows, not for 40 rows of 4,000 tokens at once."""
    long_row = {"instruction": "Repeat.", "input": "ash birch " * 380, "output": "ash " * 30}
    held_out = tmp_path / "long.json"
    held_out.write_text(json.dumps([long_row] * 40))
    arguments = [str(place / "tiny.yaml"), "name=long", f"data.held_out={held_out}", "data.max_length=4096"]
    script = _LIMITED.format(mib=160, argv=[TRAIN, *arguments, "evaluation.micro_batch_size=40"])
    done = run([sys.executable, "-c", script], tmp_path)
    assert done.returncode == 2, done.stderr
    assert "out of memory on rank 0 in phase rehearse_evaluate" in done.stderr
    assert "evaluation.micro_batch_size=20 (now 40)" in done.stderr
    assert "rehearse_train" in done.stderr  # its peak stands in the table: training did fit
    assert "step 1/4" not in done.stdout and not (place / "runs" / "long" / "adapter").exists()


def test_a_recipe_that_fits_only_with_short_batches_stops_before_step_1(place, tmp_path):
    """38 short rows fit into 480 MiB, 40 rows of 4,000 tokens at once do not: the rehearsal runs the longest first."""
    long_row = {"instruction": "Repeat.", "input": "ash birch " * 380, "output": "ash " * 30}
    train = tmp_path / "mixed.json"
    train.write_text(json.dumps(json.loads((place / "train.json").read_text()) + [long_row] * 40))
    arguments = [str(place / "tiny.yaml"), "name=mixed", "data.max_length=4096", "evaluation.samples=0"]
    batch = ["training.global_batch_size=40", "training.micro_batch_size=40"]
    script = _LIMITED.format(mib=480, argv=[TRAIN, *arguments, *batch, f"data.train={train}"])
    done = run([sys.executable, "-c", script], tmp_path)
    assert done.returncode == 2, done.stderr
    assert "out of memory on rank 0 in phase rehearse_train" in done.stderr
    assert "training.micro_batch_size=20 (now 40)" in done.stderr
    assert "step 1/" not in done.stdout and not (place / "runs" / "mixed" / "adapter").exists()

    short = _LIMITED.format(mib=480, argv=[TRAIN, *arguments, *batch, "training.max_steps=1"])
    done = run([sys.executable, "-c", short], tmp_path)
    assert done.returncode == 0, done.stderr


def test_answers_that_do_not_fit_stop_before_step_1(place, tmp_path):
    """330 MiB hold training, and the scoring of nine rows one at a time, not nine answers of 16,384 tokens."""
    arguments = [str(place / "tiny.yaml"), "name=answers", "evaluation.micro_batch_size=1", "evaluation.samples=9"]
    script = _LIMITED.format(mib=330, argv=[TRAIN, *arguments, "evaluation.max_new_tokens=16384"])
    done = run([sys.executable, "-c", script], tmp_path)
    assert done.returncode == 2, done.stderr
    assert "out of memory on rank 0 in phase rehearse_evaluate (answering the samples): " in done.stderr
    first, second = re.findall("  - (evaluation.*)", done.stderr)
    assert first == "evaluation.samples=4 (now 9): all are answered at once"
    assert second == "evaluation.max_new_tokens=8192 (now 16384)"
    assert "step 1/4" not in done.stdout and not (place / "runs" / "answers" / "adapter").exists()


_ONE_RANK = """
import os, pathlib, runpy, sys
sys.path.insert(0, os.getcwd())
import torch
import lorasp.trainer

step = lorasp.trainer.train_step
def train_step(engine, current, *rest):
    if os.environ["RANK"] == {rank!r} and current.step == 2:
        pathlib.Path({marker!r}).touch()
        torch.empty(2**60)
    return step(engine, current, *rest)
lorasp.trainer.train_step = train_step
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_one_rank_that_runs_out_of_memory_in_training_is_told_once_and_ends_both(place, tmp_path):
    """Rank 1 alone, in the third step, without a rehearsal; rank 0 waits for it in a collective."""
    script, marker = tmp_path / "one_rank.py", tmp_path / "failed"
    arguments = [str(place / "tiny.yaml"), "name=one", "rehearse=false"]
    script.write_text(_ONE_RANK.format(rank="1", marker=str(marker), argv=[TRAIN, *arguments]))
    command = accelerate_on_two()
    done = run([*command[: command.index(TRAIN)], str(script)], tmp_path)
    seconds = time.time() - os.stat(marker).st_mtime
    assert done.returncode != 0 and seconds < 30
    [line] = done.errors
    assert (
        line.startswith("error on rank 1: out of memory on rank 1 in phase train: ") and "DefaultCPUAllocator" in line
    )
    block = done.stderr[done.stderr.index(line) :]
    assert re.search(r"^train .*\d\.\d{3}", block, re.MULTILINE), block
    assert "held between steps: base shard " in block
    assert "  - training.micro_batch_size=2 (now 4); accumulation keeps the global batch and its loss" in block
    assert "[rank" not in done.stderr  # how torch marks the traceback of a rank
    # TensorBoard's writer holds them back for 15 s, and the process ends without any clean-up of its own.
    assert steps_on_tensorboard(place / "runs" / "one") == [1, 2]


def steps_on_tensorboard(run_dir) -> list[int]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]
