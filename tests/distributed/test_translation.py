"""T5 trained and asked to translate by the user's command: two ranks give one rank's losses and its very sentences."""

import json
import random
from pathlib import Path

import pytest

from lorasp.evaluation.translation import score_translations
from lorasp.memory import NOT_RESIDENT, WORKSPACE
from tests.distributed.commands import accelerate_on_two, python, run
from tests.tiny_models import save_model

pytestmark = pytest.mark.slow

_WORDS = {"one": "unu", "two": "doi", "red": "roșu", "house": "casă", "cat": "pisică", "and": "și", "here": "aici"}
_RECIPE = """\
output_dir: {place}/runs
task: wmt16_en_ro
model:
  path: model
adapter:
  rank: 4
data:
  train: .
  held_out: {{path: ., limit: 7}}
  max_length: 70
training:
  max_steps: 3
  global_batch_size: 8
  micro_batch_size: 2
  learning_rate: 2.0e-3
  eps: 1.0e-5
  log_every: 1
  evaluate_every: 2
translation:
  test: .
  beams: 3
evaluation:
  micro_batch_size: 2
  max_new_tokens: 12
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, home) -> dict[int, Path]:
    """A run on one rank and one on two, with NF4, `layer` and dropout. An odd number of sentences in each set."""
    place = tmp_path_factory.mktemp("translation")
    save_model("t5_dropout", place / "model")
    numbers = random.Random(0)
    for split, count in (("train", 30), ("val", 9), ("test", 9)):
        pairs = [numbers.choices(list(_WORDS), k=numbers.randint(1, 4)) for _ in range(count)]
        (place / f"{split}.source").write_text("".join(" ".join(words) + "\n" for words in pairs))
        (place / f"{split}.target").write_text(
            "".join(" ".join(_WORDS[word] for word in words) + "\n" for words in pairs)
        )
    (place / "pairs.yaml").write_text(_RECIPE.format(place=place))
    for ranks, command in ((1, python), (2, accelerate_on_two)):
        done = run(command(str(place / "pairs.yaml"), f"name=on{ranks}"), home)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {ranks: place / "runs" / f"on{ranks}" for ranks in (1, 2)}


def report(run_dir: Path) -> dict:
    return json.loads((run_dir / "report.json").read_text())


def test_what_was_planned_is_what_the_ranks_hold(runs):
    for run_dir in runs.values():
        its = report(run_dir)
        planned = its["planned"]["train"]
        for rank in its["phases"]["train"]["ranks"]:
            held = {part: size for part, size in rank["breakdown"].items() if part not in (WORKSPACE, NOT_RESIDENT)}
            assert held["optimizer"] > 0 and held == {part: planned[part] for part in held}


def test_two_ranks_train_and_translate_as_one_does(runs):
    one, two = report(runs[1]), report(runs[2])
    losses = [[row["loss"] for row in its["history"]] for its in (one, two)]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    held_out = [[row["held_out_loss"] for row in its["scores"]] for its in (one, two)]
    assert len(held_out[0]) == 3 and held_out[0][0] - held_out[0][2] > 0.1  # before, at step 2, at the end
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-5)
    texts = [(runs[ranks] / "translations.txt").read_text() for ranks in (1, 2)]
    assert texts[0] == texts[1] and len(texts[0].split("\n")) == 9 + 1
    assert len(set(texts[0].split("\n"))) > 2  # not one text for all


def test_the_scores_are_the_libraries_own_of_the_files_in_the_run(runs):
    place = runs[2].parents[1]
    texts = (runs[2] / "translations.txt").read_text().split("\n")[:-1]
    references = (place / "test.target").read_text().split("\n")[:-1]
    found = report(runs[2])["reported"]
    assert found["metric"] == "bleu" and found["count"] == 9
    directly = score_translations(texts, references)  # which tests/test_translation.py holds against the libraries
    assert found["metrics"] == directly.numbers and found["score"] == directly.bleu
    assert found["bleu_signature"] == directly.signature and "tok:13a" in directly.signature
    assert "bleu" not in report(runs[2])["scores"][0]  # at the end alone
    text = (runs[2] / "report.md").read_text()
    assert f"`{found['bleu_signature']}`, of 9 sentences" in text and "| bleu" in text
