"""The README's first promise, unshortened: minutes on two CPU cores from an untrained model to one that answers."""

import json

import pytest

from lorasp.cpu_threads import available_cores
from tests.distributed.commands import accelerate, run


@pytest.mark.slow
@pytest.mark.timeout(2400)  # 5 minutes on two idle cores
def test_the_quickstart_teaches_a_real_model_what_it_could_not_do(home, tmp_path):
    """SmolLM2-135M on 64 held-out tickets, none of whose answers' rows were trained on."""
    command = accelerate("recipes/quickstart.yaml", f"output_dir={tmp_path}", "name=quickstart")
    done = run(command, home, timeout=2300, threads=None)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = json.loads((tmp_path / "quickstart" / "report.json").read_text())
    metrics = report["metrics"]
    assert report["status"] == "finished"
    assert report["versions"]["torch_threads"] == available_cores()  # all, though launchers set one
    assert metrics["exact_match_before"] < 0.10 and metrics["exact_match_after"] > 0.60, metrics
    assert metrics["held_out_loss_after"] < metrics["held_out_loss_before"]
    # LoRA-SP, not LoRA: half of the adapter's entries.
    assert report["parameters"]["adapter"] == 2 * report["parameters"]["trained"] > 0
