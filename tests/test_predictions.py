"""Predictions on disk: what is whole counts, of the same evaluation only."""

from types import SimpleNamespace

import pytest

from lorasp.evaluation.predictions import Predictions
from lorasp.run import clear_run_directory

KEY = {"digest": "abc", "limit": None}
LINES = [{"place": 0, "log_likelihoods": [-1.5, -2.0]}, {"place": 3, "log_likelihoods": [-0.1, -9.0]}]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "mmlu" / "step-00000004.jsonl"


def begun(path, key=KEY, again=False):
    predictions = Predictions(path, key)
    return predictions, predictions.begin(again=again)


def test_a_killed_evaluation_goes_on_behind_the_last_whole_line(path):
    predictions, found = begun(path)
    assert found == []
    predictions.add(LINES)
    with open(f"{path}.part", "a") as file:
        file.write('{"place": 5, "log_li')
    predictions, found = begun(path, again=True)  # also where it is asked for anew: it had not ended
    assert found == LINES and not path.exists()
    predictions.add([{"place": 7}])
    predictions.finish()
    assert begun(path)[1] == [*LINES, {"place": 7}]


def test_a_finished_one_counts_unless_it_is_asked_for_anew(path):
    predictions, _ = begun(path)
    predictions.add(LINES)
    predictions.finish()
    assert path.exists() and not path.with_name(f"{path.name}.part").exists()
    assert begun(path, again=True)[1] == []


def test_another_model_s_predictions_do_not_count(path):
    predictions, _ = begun(path)
    predictions.add(LINES)
    predictions.leave()
    assert begun(path, key=KEY | {"digest": "other"})[1] == []


def test_a_damaged_file_does_not_count(path):
    predictions, _ = begun(path)
    predictions.add(LINES)
    predictions.leave()
    part = path.with_name(f"{path.name}.part")
    part.write_text(part.read_text().replace("place", 'pl"ace', 1))
    assert begun(path)[1] == []


def test_a_run_that_takes_another_s_place_keeps_what_was_interrupted_only(path):
    """The finished ones are the other model's; what is left of the other kind goes on if it is of this one."""
    finished, _ = begun(path)
    finished.add(LINES)
    finished.finish()
    interrupted, _ = begun(path.with_name("step-00000008.jsonl"))
    interrupted.add(LINES)
    interrupted.leave()
    clear_run_directory(path.parents[1], SimpleNamespace(is_main=True))
    assert not path.exists() and begun(interrupted.path, again=True)[1] == LINES
