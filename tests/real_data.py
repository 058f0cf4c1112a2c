"""Where the real data are, which are not this project's to ship."""

import os
from pathlib import Path

import pytest

_DATA = Path(os.environ.get("LORASP_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def real_data(name: str) -> Path:
    """A file or directory of LORASP_DATA (else ../shared/data); the test that asks is skipped where it is absent."""
    path = _DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not here (set LORASP_DATA)")
    return path
