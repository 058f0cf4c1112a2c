"""The rehearsal in real launches: it leaves no trace, and stops before step 1 what would fail later."""

import json
import sys

import pytest

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
        assert not (place / "runs" / name / "rehearsal").exists()
    assert histories[0] == histories[1]
    assert adapter(place, "rehearse_true") == adapter(place, "rehearse_false")


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

    fits = _LIMITED.format(mib=160, argv=[TRAIN, *arguments, "evaluation.micro_batch_size=1", "evaluation.samples=0"])
    done = run([sys.executable, "-c", fits], tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_recipe_that_fits_only_with_short_batches_stops_before_step_1(place, tmp_path):
    """38 short rows fit into 160 MiB, 40 rows of 4,000 tokens at once do not: the rehearsal runs the longest first."""
    long_row = {"instruction": "Repeat.", "input": "ash birch " * 380, "output": "ash " * 30}
    train = tmp_path / "mixed.json"
    train.write_text(json.dumps(json.loads((place / "train.json").read_text()) + [long_row] * 40))
    arguments = [str(place / "tiny.yaml"), "name=mixed", "data.max_length=4096", "evaluation.samples=0"]
    batch = ["training.global_batch_size=40", "training.micro_batch_size=40"]
    script = _LIMITED.format(mib=160, argv=[TRAIN, *arguments, *batch, f"data.train={train}"])
    done = run([sys.executable, "-c", script], tmp_path)
    assert done.returncode == 2, done.stderr
    assert "out of memory on rank 0 in phase rehearse_train" in done.stderr
    assert "training.micro_batch_size=20 (now 40)" in done.stderr
    assert "step 1/" not in done.stdout and not (place / "runs" / "mixed" / "adapter").exists()

    short = _LIMITED.format(mib=160, argv=[TRAIN, *arguments, *batch, "training.max_steps=1"])
    done = run([sys.executable, "-c", short], tmp_path)
    assert done.returncode == 0, done.stderr
