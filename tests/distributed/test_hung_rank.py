"""A rank that stands still, or raises, ends its run: told which one, with its stack."""

import time

import pytest

from lorasp.cli import HUNG
from tests.distributed.commands import TRAIN, accelerate_on_two, run
from tests.distributed.launching import ROOT

pytestmark = pytest.mark.slow

# Rank 1 fails in the middle of its third step.
FAILING = """
import os, runpy, sys, time
sys.path.insert(0, {root!r})
from lorasp import trainer
from lorasp.models.causal_lm import Head
step = trainer.train_step
def failing(engine, current, *rest):
    if current.step == 2 and os.environ["RANK"] == "1":
        def forward(self, *_):
            {fault}
        Head.forward = forward
    return step(engine, current, *rest)
trainer.train_step = failing
sys.argv[0] = {train!r}
runpy.run_path({train!r}, run_name="__main__")
"""


@pytest.mark.parametrize("fault", ["time.sleep(1000)", "raise RuntimeError('the loss of rank 1')"])
def test_a_rank_that_sleeps_or_raises_ends_all_and_is_named(fault, place, home, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT), train=TRAIN, fault=fault))
    command = accelerate_on_two(str(place / "tiny.yaml"), f"output_dir={tmp_path}", "health.hang_seconds=6")
    started = time.monotonic()
    done = run([str(script) if part == TRAIN else part for part in command], home)
    assert done.returncode != 0 and time.monotonic() - started < 90
    assert "step 2/4" in done.stdout and "step 3/4" not in done.stdout
    if "sleep" in fault:
        assert f"exitcode  : {HUNG}" in done.stderr
        assert "rank 1 holds up the others" in done.stderr
        assert 'failing.py", line 10 in forward' in done.stderr  # where it sleeps
    else:
        assert "RuntimeError: the loss of rank 1" in done.stderr and "local_rank: 1" in done.stderr
    assert not (tmp_path / "tiny" / "report.json").exists()
