"""Locks that killed builds leave behind; and what a rank tells that a library never lets go."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from lorasp.cli import HUNG
from lorasp.health import stale_build_locks


def test_only_a_lock_that_is_older_than_any_build_is_told(monkeypatch, tmp_path):
    """Where torch puts them: a build of its own directory, and, with TORCH_EXTENSIONS_DIR, one level up."""
    for variable, root in ((None, tmp_path / "home" / ".cache" / "torch_extensions"), ("set", tmp_path / "named")):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        if variable:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(root))
        assert stale_build_locks() == []
        locks = [Path(cpp_extension._get_build_directory(name, verbose=False)) / "lock" for name in ("old", "new")]
        for lock in locks:
            assert lock.is_relative_to(root)
            lock.touch()
        os.utime(locks[0], (time.time() - 3600,) * 2)
        assert stale_build_locks() == locks[:1]


# The one rank of a run, whose main thread waits in C++ for what never comes, as in a collective whose peer has died.
HELD = """
from datetime import timedelta
from torch import distributed as dist
from lorasp import watchdog
from lorasp.health import listen_for_signals

listen_for_signals()
dist.init_process_group("gloo", store=(store := dist.HashStore()), rank=0, world_size=1)
watchdog._STANDS_AFTER_SIGNAL = watchdog._OTHERS_FOLLOW = 1.0
with watchdog.Watchdog(0, 1, 3.0).watching():
    print("held", flush=True)
    store.wait(["never set"], timedelta(seconds=60))
"""


def test_a_rank_that_is_held_in_a_library_tells_its_stack_once_after_a_signal_and_ends():
    """Python's own handler never runs there. The watchdog ends it, as the launcher would."""
    with subprocess.Popen([sys.executable, "-c", HELD], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as held:
        assert held.stdout.readline() == b"held\n"
        held.send_signal(signal.SIGTERM)
        told = held.communicate(timeout=60)[1].decode()
    assert held.returncode == HUNG
    assert told.count("rank 0 was asked to end, and has not moved") == 1
    asked, ended = told.split("error: rank 0 has not moved")
    assert all('File "<string>", line 12, in <module>' in stacks for stacks in (asked, ended))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "on_exit"), reason="needs glibc")
def test_a_rank_that_has_ended_well_is_not_aborted_by_a_library():
    """One that aborts the process as it is taken apart: so one launch of some hundreds ended in CI."""
    code = """
import atexit, ctypes
from lorasp.cli import end_rank
libc = ctypes.CDLL(None)
libc.on_exit(libc.abort, None)
atexit.register(print, "cleaned")
print("said", end=", ")
"""
    for end, returncode in (("raise SystemExit(3)", -signal.SIGABRT), ("end_rank(3)", 3)):
        done = subprocess.run([sys.executable, "-c", code + end], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (returncode, "said, cleaned\n"), done.stderr
