"""The tests' own launches: none outlives its timeout, nor leaves a rank behind."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.commands import run, start
from tests.distributed.launching import ended_with_its_family, launch

# As torchrun's agent does, it gives its rank a session of its own; which holds the launcher's outputs open.
STAND_IN = """\
#!/bin/sh
setsid sleep 30 &
echo $! > "$0.new" && mv "$0.new" "$0.rank"
wait
"""


@pytest.fixture
def launcher(tmp_path) -> Path:
    path = tmp_path / "accelerate"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


def assert_no_rank_is_left(launcher: Path) -> None:
    rank = int(launcher.with_name("accelerate.rank").read_text())
    ends = time.monotonic() + 5
    while psutil.pid_exists(rank) and psutil.Process(rank).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < ends, f"rank {rank} lives"
        time.sleep(0.01)


def test_a_users_command_and_its_ranks_end_with_its_timeout(launcher, home):
    since = time.monotonic()
    assert run([str(launcher)], home, timeout=1).returncode == -9
    assert time.monotonic() - since < 10
    assert_no_rank_is_left(launcher)


def test_a_launch_and_its_ranks_end_with_its_timeout(launcher, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(launcher.with_name("python")))  # beside which its accelerate is
    since = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        launch(2, "script.py", timeout=1)
    assert time.monotonic() - since < 10
    assert_no_rank_is_left(launcher)


def test_a_test_that_fails_ends_what_it_started_with_its_ranks(launcher, home):
    since = time.monotonic()
    with pytest.raises(AssertionError, match="the test's"):
        with start([str(launcher)], home) as process, ended_with_its_family(process):
            while not launcher.with_name("accelerate.rank").exists():
                time.sleep(0.01)
            raise AssertionError("the test's")
    assert time.monotonic() - since < 10
    assert_no_rank_is_left(launcher)
