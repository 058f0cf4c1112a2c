"""The benchmark's arithmetic: ratios to the stack, medians over rounds, peaks above an empty process."""

import importlib.util
from types import SimpleNamespace

import pytest

from lorasp.recipe import RecipeError
from tests.distributed.launching import ROOT

_spec = importlib.util.spec_from_file_location("benchmark", ROOT / "launch" / "benchmark.py")
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)

GIB = 2**30


def bench() -> "benchmark.Benchmark":
    made = object.__new__(benchmark.Benchmark)
    made._options = SimpleNamespace(
        rounds=2, steps=1, ranks=2, threads=1, batch=4, length=256, live=False, policies=["selective", "lean"]
    )
    made.empty, made._directory = GIB // 2, None
    return made


def test_the_table_gives_medians_ranges_and_ratios_above_an_empty_process():
    stack = benchmark.Measured([20.0, 18.0, 22.0], int(1.5 * GIB), int(2.5 * GIB), 3 * GIB, 2.0, 700.0)
    ours = benchmark.Measured([5.0, 4.0, 9.0], int(0.75 * GIB), int(1.5 * GIB), GIB, 2.0, 700.0, mfu=[0.5, 0.6, 0.9])
    made = bench()
    rows = made.table({"same_examples": {benchmark.STACK: stack, "ours": ours}}).splitlines()
    assert "0.50 GiB" in rows[0]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[-2:]]
    # The stack's MFU follows from the same tokens in four times the seconds.
    assert cells[0][2:] == ["20.00 (18.00–22.00)", "1.00", "2.00", "1.00", "1.00", "1.00", "700", "0.15"]
    assert cells[1][1:] == ["ours", "5.00 (4.00–9.00)", "0.25", "1.00", "0.50", "0.25", "0.25", "700", "0.60"]
    made._options.live = True
    assert "| 1.00 | 0.33 |" in made.table({"same_examples": {benchmark.STACK: stack, "ours": ours}})


@pytest.mark.parametrize(
    ("theirs", "on_gpu", "refused"),
    [(2.001, False, False), (2.005, False, True), (2.005, True, False), (2.01, True, True)],
)
def test_sides_that_train_other_examples_are_found_out(theirs, on_gpu, refused, monkeypatch):
    made = bench()
    monkeypatch.setattr(benchmark, "_has_gpu", lambda: on_gpu)
    monkeypatch.setattr(benchmark, "Workload", lambda *_: None)
    losses = {benchmark.STACK: theirs, "ours": 2.0}
    monkeypatch.setattr(made, "_run", lambda side, work, measured: setattr(measured, "first_loss", losses[side]))
    if refused:
        with pytest.raises(RecipeError, match="do not train the same examples"):
            made.run(benchmark.CASES["same_examples"])
    else:
        assert set(made.run(benchmark.CASES["same_examples"])) == {benchmark.STACK, "ours"}
