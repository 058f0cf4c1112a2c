"""A rank that dies takes its run with it, at once and not by a timeout."""

import json
import os
import signal
import threading
import time

import psutil
import pytest

from tests.distributed.commands import accelerate_on_two, start

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
    with start(command, home) as process:
        clock = threading.Timer(180, os.killpg, (process.pid, signal.SIGKILL))
        clock.start()
        killed = None
        for line in process.stdout:
            lines.append(line)
            if killed is None and "planned peak" in line:
                time.sleep(2)  # well into loading
                os.kill(_of_rank(process.pid, rank), signal.SIGKILL)
                killed = time.monotonic()
        code = process.wait()
        seconds = time.monotonic() - killed
        clock.cancel()
    told = "".join(lines)
    assert code != 0 and seconds < 60
    assert "SIGKILL" in told and f"local_rank: {rank}" in told
    assert "model:" not in told  # it was loading
    assert not (tmp_path / "runs" / "run" / "report.json").exists()


def _of_rank(launcher: int, rank: int) -> int:
    for process in psutil.Process(launcher).children(recursive=True):
        if process.environ().get("RANK") == str(rank):
            return process.pid
    raise AssertionError(f"no process of rank {rank}")
