"""A classifier by the user's command on two ranks, gone on with on one, against plain steps of it in one process."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score

from lorasp.recipe import Recipe
from lorasp.tasks import task_of
from tests.distributed.commands import accelerate_on_two, python, run
from tests.test_classifier import CPU, build, trained_losses
from tests.tiny_encoders import recipe_tree, save_encoder, write_rte

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A RoBERTa with dropout, NF4, half of the head; 32 rows to train on, 8 to choose on, 17 of dev: uneven shares."""
    root = tmp_path_factory.mktemp("glue")
    save_encoder("roberta", root / "model", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    tree = recipe_tree(
        root / "model",
        write_rte(root),
        data={"selection": 0.2},
        training={
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "max_grad_norm": 1e3,
            "epochs": 2.0,
            "micro_batch_size": 2,
            "activation_checkpointing": "layer",
        },
        checkpoint={"every_steps": 2},
        evaluation={"micro_batch_size": 4},
        tracking={"with": []},
        output_dir=str(root / "runs"),
    )
    (root / "rte.yaml").write_text(yaml.safe_dump(tree))
    return root, Recipe(**tree)


@pytest.fixture(scope="module")
def two(settings, home):
    root, _ = settings
    done = run(accelerate_on_two(str(root / "rte.yaml"), "name=two"), home)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((root / "runs" / "two" / "report.json").read_text())


def losses(report) -> list[float]:
    return [point["loss"] for point in report["history"]]


def test_two_ranks_train_and_score_as_one_process_does(settings, two):
    """Losses with dropout of each step, and the scores of the trained model over all rows of dev, each once."""
    _, recipe = settings
    model = build(recipe)
    assert losses(two) == pytest.approx(trained_losses(recipe, model), rel=1e-5)
    data = task_of(recipe).read_data(Path(recipe.model.path))
    for name, rows in data.scored.items():
        batch = task_of(recipe).collate(rows.examples, range(len(rows.examples)))
        with torch.no_grad():
            logits = model.eval()(**batch.model_inputs(CPU), score=True).double().numpy()
        found = two[name]
        assert (found["metric"], found["count"]) == ("accuracy", len(rows.rows))
        assert found["score"] == found["metrics"]["accuracy"] == accuracy_score(rows.labels, logits.argmax(-1))
        loss = -log_softmax(logits, axis=-1)[range(len(rows.labels)), rows.labels].mean()
        assert found["metrics"]["loss"] == pytest.approx(loss, rel=1e-5)
        majority = max(data.train.labels.count(label) for label in (0, 1))
        answer = int(data.train.labels.count(1) == majority)
        assert found["majority"]["accuracy"] == rows.labels.count(answer) / len(rows.labels)
    assert two["reported"]["count"] == 17 and two["metrics"]["accuracy_after"] == two["reported"]["score"]
    counts = two["parameters"]
    assert counts["trained_head"] == (36 * 36 + 36 * 2) // 2 + 36 + 2 < counts["trained"] < counts["total"]


def test_a_classifier_goes_on_on_another_number_of_ranks(settings, two, home):
    """From step 2 of the two ranks' run on one: the steps after it, dropout too, and the head are the same."""
    root, _ = settings
    checkpoint = root / "runs" / "two" / "checkpoints" / "step-00000002"
    done = run(python(str(root / "rte.yaml"), "name=one", f"resume={checkpoint}", "rehearse=false"), home)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    one = json.loads((root / "runs" / "one" / "report.json").read_text())
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    for name in ("selection", "reported"):
        assert one[name]["metrics"] == pytest.approx(two[name]["metrics"], rel=1e-5)
    assert "## Scores" in (root / "runs" / "one" / "report.md").read_text()
