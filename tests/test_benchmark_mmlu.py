"""What the MMLU benchmark calls agreement."""

import importlib.util
import sys

import pytest

from lorasp.recipe import RecipeError
from tests.distributed.launching import ROOT

_spec = importlib.util.spec_from_file_location("benchmark_mmlu", ROOT / "launch" / "benchmark_mmlu.py")
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)

THEIRS = {
    ("a", 0): [-1.0, -2.0, -3.0, -4.0],
    ("a", 1): [-1.0, -1.0005, -3.0, -4.0],
    ("b", 0): [-9.0, -1.0, -3.0, -4.0],
}


def test_another_choice_counts_where_the_best_two_differ_by_more():
    worst, others, close = benchmark.compare(THEIRS, THEIRS)
    assert (worst, others, close) == (0, 0, 0)
    ours = THEIRS | {("a", 1): [-1.0006, -1.0005, -3.0, -4.0], ("b", 0): [-0.5, -1.0, -3.0, -4.0]}
    worst, others, close = benchmark.compare(ours, THEIRS)
    assert worst == 8.5 and (others, close) == (1, 1)


def test_other_questions_are_no_comparison():
    with pytest.raises(ValueError, match="1 questions were scored by one side only"):
        benchmark.compare({key: THEIRS[key] for key in [("a", 0), ("a", 1)]}, THEIRS)


def test_what_failed_is_named_by_its_script_whatever_launches_it():
    command = [sys.executable, "-c", "raise SystemExit('no room')", "--standalone", "launch/evaluate.py", "mmlu.yaml"]
    with pytest.raises(RecipeError, match="^launch/evaluate.py failed:\nno room"):
        benchmark._run(command, threads=1)
