"""`launch/sweep.py` as a user starts it: a run that fails costs the others nothing, and the second start only it."""

import json
import sys

import pytest

from tests.distributed.commands import run
from tests.distributed.launching import ROOT

pytestmark = pytest.mark.slow

SWEEP = """\
recipe: {place}/tiny.yaml
output_dir: {root}
settings:
  training: {{max_steps: 2}}
  evaluation: {{before: false, samples: 0}}
  tracking.with: []
  rehearse: false
variants:
  fails: {{data.train: {root}/rows.json}}
  lora: {{method: lora, adapter.rank: 2, adapter.alpha: 16}}
"""


@pytest.mark.timeout(400)
def test_a_failed_run_is_named_and_repaired_and_the_finished_one_is_passed_over(place, home, tmp_path):
    (tmp_path / "s.yaml").write_text(SWEEP.format(place=place, root=tmp_path))
    rows = tmp_path / "rows.json"
    rows.write_text("[{}]")  # a fault that only the run itself finds
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), str(tmp_path / "s.yaml")]
    first = run(command, home)
    assert first.returncode == 1, first.stderr
    [failed] = [line for line in first.stdout.splitlines() if line.startswith("not finished: ")]
    assert failed.startswith(f"not finished: fails: exit code 1: error: {rows}: row 1"), failed
    reports = {name: tmp_path / "s" / name / "report.json" for name in ("fails", "lora")}
    assert not reports["fails"].exists()
    before = reports["lora"].read_bytes()
    assert json.loads(before)["status"] == "finished"

    rows.write_text((place / "train.json").read_text())
    second = run(command, home)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "2/2 lora: finished already" in second.stdout and "1/2 fails: finished in" in second.stdout
    assert reports["lora"].read_bytes() == before
    report = json.loads(reports["fails"].read_text())
    assert report["name"] == "fails" and report["recipe"]["data"]["train"] == str(rows)
    assert (report["history"][-1]["step"], report["world_size"]) == (2, 1)
