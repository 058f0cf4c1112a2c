"""Locks that killed builds leave behind."""

import os
import time
from pathlib import Path

from torch.utils import cpp_extension

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
