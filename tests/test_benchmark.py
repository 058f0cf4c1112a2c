"""The benchmark's arithmetic: ratios to the stack, medians over rounds, peaks above an empty process."""

import importlib.util
import json
import random
from types import SimpleNamespace

import pytest

from lorasp.data.load import load_data
from lorasp.models.weights import load_tokenizer
from lorasp.recipe import Recipe, RecipeError
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


@pytest.mark.parametrize(("ours", "refused"), [(2020.0, False), (1900.0, True)])
def test_full_rows_of_fewer_labels_are_found_out(ours, refused, monkeypatch):
    made = bench()
    monkeypatch.setattr(benchmark, "Workload", lambda *_: None)
    labels = {benchmark.STACK: 2040.0, "ours, selective": ours, "ours, lean": ours}
    losses = {benchmark.STACK: 3.0, "ours, selective": 2.0, "ours, lean": 2.0}  # by its tokens' other neighbours

    def run(side, work, measured):
        measured.labels, measured.first_loss = labels[side], losses[side]

    monkeypatch.setattr(made, "_run", run)
    if refused:
        with pytest.raises(RecipeError, match=r"do not train as many labels: \[2040.0, 1900.0, 1900.0\] a step"):
            made.run(benchmark.CASES["full_rows"])
    else:
        assert len(made.run(benchmark.CASES["full_rows"])) == 3


@pytest.fixture
def alpaca(tmp_path, monkeypatch):
    """Rows in Alpaca's layout, a tenth of them too long for 256 tokens."""
    (tmp_path / "alpaca").mkdir()
    drawn = random.Random(0)
    rows = []
    for number in range(400):
        words = drawn.choice([10, 20, 40, 80, 120]) if number % 10 else 400
        output = " ".join(drawn.choice(["tree", "house", "of", "the", "river"]) for _ in range(words))
        rows.append({"instruction": f"Say number {number}.", "input": "", "output": output})
    (tmp_path / "alpaca" / "alpaca_data.json").write_text(json.dumps(rows))
    monkeypatch.setenv("LORASP_DATA", str(tmp_path))


@pytest.mark.parametrize("name", ["full_rows", "same_examples"])
def test_both_sides_get_the_same_tokens_and_label_all_of_them(name, alpaca, tmp_path):
    case = benchmark.CASES[name]
    options = SimpleNamespace(ranks=2, batch=4, length=256, steps=2, layers=1)
    work = benchmark.Workload(case, options, tmp_path)
    recipe = Recipe(**work._settings())
    tokenizer = load_tokenizer(work._model, recipe.model)
    data = load_data(recipe, tokenizer)
    order = data.order(recipe)
    assert order.total_steps == 4
    examples = data.train.examples
    steps = [[row for unit in order.global_batch(step) for row in unit] for step in range(4)]
    assert all(example.label_count == len(example.input_ids) - 1 for example in examples)

    rows = json.loads((tmp_path / case.model / "stack.json").read_text())
    texts = [f"{row['instruction']}\n{row['input']}\n{row['output']}{tokenizer.eos_token}" for row in rows]
    theirs = [tokenizer(text).input_ids[:256] for text in texts]
    assert theirs[: sum(map(len, steps))] == [list(examples[row].input_ids) for step in steps for row in step]
    if case.packed:
        joined = tokenizer("".join(texts)).input_ids
        assert joined == [token for ids in theirs for token in ids]  # no example is cut
        assert len(joined) > 4 * 8 * 256 and len(rows) == len(examples) == 360
        labels = sum(examples[row].label_count for step in steps for row in step) / 4
        assert labels == pytest.approx(8 * 255, rel=benchmark._FULL_APART)
