"""MMLU after training and alone, on sharded NF4: the same numbers on one rank and on two, left and gone on with."""

import json
import signal
from pathlib import Path

import pytest

from tests.distributed.commands import EVALUATE, accelerate_on_two, python, run, start, torchrun_on_two
from tests.test_mmlu import write_tree

pytestmark = pytest.mark.slow

COUNTS = {"anatomy": 60, "astronomy": 1, "high_school_us_history": 30}
ALONE = ("data.held_out=null", "evaluation.samples=0")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return write_tree(tmp_path_factory.mktemp("mmlu"), COUNTS)


@pytest.fixture(scope="module")
def settings(tree) -> tuple[str, ...]:
    return (f"mmlu.data={tree}", f"mmlu.subjects=[{','.join(COUNTS)}]", "mmlu.max_length=3000", "mmlu.tokens=600")


@pytest.fixture(scope="module")
def trained(place, home, settings) -> Path:
    """Two ranks, scored before, after step 2 (some questions) and at the end (all)."""
    more = ("mmlu.before=true", "mmlu.every_steps=2", "mmlu.every_steps_limit=3", "evaluation.samples=0")
    done = run(accelerate_on_two(str(place / "tiny.yaml"), "name=mmlu", *settings, *more), home)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return place / "runs" / "mmlu"


def predictions(run_dir: Path, step: int) -> dict[tuple[str, int], list[float]]:
    lines = (run_dir / "mmlu" / f"step-{step:08d}.jsonl").read_text().splitlines()[1:]
    return {(line["subject"], line["index"]): line["log_likelihoods"] for line in map(json.loads, lines)}


def flat(found: dict[tuple[str, int], list[float]]) -> list[float]:
    return [value for question in sorted(found) for value in found[question]]


def test_a_run_scores_before_while_and_after_it_trains(trained):
    report = json.loads((trained / "report.json").read_text())
    scores = report["mmlu"]["scores"]
    assert [(score["step"], score["micro"]["questions"]) for score in scores] == [(0, 91), (2, 7), (4, 91)]
    assert {rank["rank"] for rank in report["phases"]["evaluate_mmlu"]["ranks"]} == {0, 1}
    assert {rank["rank"] for rank in report["phases"]["rehearse_evaluate_mmlu"]["ranks"]} == {0, 1}
    for when, score in (("before", scores[0]), ("after", scores[2])):
        assert report["metrics"][f"mmlu_accuracy_{when}"] == score["micro"]["accuracy"]
        assert score["micro"]["low"] < score["micro"]["accuracy"] < score["micro"]["high"]
        assert set(score["subjects"]) == set(COUNTS) and set(score["categories"]) == {"stem", "humanities"}
    before, after = predictions(trained, 0), predictions(trained, 4)
    assert len(before) == 91 and max(abs(a - b) for a, b in zip(flat(before), flat(after), strict=True)) > 0.01
    text = (trained / "report.md").read_text()
    assert "## MMLU" in text and "| high school us history" in text and "has no figure for this model" in text


def test_the_adapter_scores_alike_on_one_rank(trained, place, home, settings):
    """NF4 sharded over two ranks, after training, against NF4 on one, loaded from the run's adapter."""
    arguments = (str(place / "tiny.yaml"), "name=mmlu", f"adapter.init_from={trained}", *ALONE, *settings)
    done = run(python(*arguments, script=EVALUATE), home)
    assert done.returncode == 0, done.stderr
    alone = predictions(place / "runs" / "mmlu-evaluation", 4)
    assert flat(alone) == pytest.approx(flat(predictions(trained, 4)), abs=1e-4)


def test_one_question_on_two_ranks(trained, place, home, settings):
    odd = ("training.global_batch_size=5", "training.micro_batch_size=5")  # which two ranks could not train
    one = ("mmlu.subjects=[astronomy]", "name=one", *odd)
    done = run(torchrun_on_two(str(place / "tiny.yaml"), *ALONE, *settings, *one, script=EVALUATE), home)
    assert done.returncode == 0, done.stderr
    found = predictions(place / "runs" / "one-evaluation", 0)
    assert flat(found) == pytest.approx(predictions(trained, 0)["astronomy", 0], abs=1e-4)


def test_an_evaluation_that_is_told_to_leave_goes_on_on_another_number_of_ranks(trained, place, home, settings):
    arguments = (str(place / "tiny.yaml"), "name=left", *ALONE, *settings)
    with start(torchrun_on_two(*arguments, script=EVALUATE), home) as process:
        told = []
        for line in process.stdout:
            told.append(line)
            if "MMLU question" in line and len([1 for its in told if "MMLU question" in its]) == 1:
                process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert process.returncode != 0 and "left within an evaluation" in "".join(told), told
    part = place / "runs" / "left-evaluation" / "mmlu" / "step-00000000.jsonl.part"
    lines = part.read_text().splitlines()
    assert 1 < len(lines) < 92
    done = run(python(*arguments, script=EVALUATE), home)
    assert done.returncode == 0, done.stderr
    assert part.with_suffix("").read_text().splitlines()[: len(lines)] == lines
    found = predictions(place / "runs" / "left-evaluation", 0)
    assert flat(found) == pytest.approx(flat(predictions(trained, 0)), abs=1e-4)
