"""The steps pass through whole; which of them are traced, and what a disk that refuses costs."""

import gzip
import json

import pytest
import torch

from lorasp.data.batches import TrainingStep
from lorasp.profiling import check_profile, profiled
from lorasp.recipe import Profile, RecipeError

CPU = torch.device("cpu")


def run(settings, run_dir, count=6):
    """Runs `count` steps, the n-th (from 1) of which multiplies matrices of n rows; (steps seen, warnings)."""
    warnings, seen = [], []
    steps = (TrainingStep(step, [], 1, 1, 1) for step in range(count))
    for step in profiled(steps, settings, run_dir, rank=1, device=CPU, warn=warnings.append):
        with torch.profiler.record_function(f"step {step.step + 1}"):
            torch.ones(8, 8) @ torch.ones(8, 8)
        seen.append(step.step)
    return seen, warnings


@pytest.mark.parametrize(("first", "steps", "traced"), [(2, 3, [2, 3, 4]), (5, 9, [5, 6]), (1, 1, [1])])
def test_the_steps_asked_for_are_traced_and_all_are_run(first, steps, traced, tmp_path):
    assert run(Profile(first_step=first, steps=steps), tmp_path) == (list(range(6)), [])
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "rank_1_trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {name for name in names if name and name.startswith("step ")} == {f"step {number}" for number in traced}
    assert {"aten::mm", "[memory]"} <= names


def test_without_a_first_step_nothing_is_written(tmp_path):
    assert run(Profile(), tmp_path) == (list(range(6)), []) and list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_costs_the_profile_and_not_the_run(tmp_path):
    (tmp_path / "profile").touch()
    seen, [warning] = run(Profile(first_step=2), tmp_path)
    assert seen == list(range(6)) and "the profile of rank 1 could not be written" in warning


def test_a_first_step_behind_the_last_is_refused():
    check_profile(Profile(first_step=6), 6)
    check_profile(Profile(), 6)
    with pytest.raises(RecipeError, match="profile.first_step: 7 is behind the last step, 6"):
        check_profile(Profile(first_step=7), 6)
