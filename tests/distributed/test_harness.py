"""lm-evaluation-harness on a model that is sharded over two ranks scores what it scores on the whole one by itself."""

import json

import pytest

from tests.distributed.commands import EVALUATE, run, torchrun_on_two
from tests.test_harness import write_tasks

pytestmark = pytest.mark.slow

NAMES = ["tiny_choices", "tiny_rolling"]


def test_two_ranks_score_what_the_harness_scores_on_the_whole_model(place, home, tmp_path):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = write_tasks(tmp_path)
    asked = (f"lm_eval.tasks=[{','.join(NAMES)}]", f"lm_eval.include_path={tasks}", "lm_eval.max_length=60")
    command = torchrun_on_two(
        str(place / "tiny.yaml"), "name=lm_eval", "quantization=none", "data.held_out=null", *asked, script=EVALUATE
    )
    done = run(command, home)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = json.loads((place / "runs" / "lm_eval-evaluation" / "report.json").read_text())
    assert {rank["rank"] for rank in report["phases"]["evaluate_lm_eval"]["ranks"]} == {0, 1}

    model = HFLM(pretrained=str(place / "model"), dtype="float32", device="cpu", batch_size=1, max_length=60)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = lm_eval.simple_evaluate(model, tasks=NAMES, task_manager=manager, bootstrap_iters=0)["results"]
    assert set(report["lm_eval"]["tasks"]["tiny_choices"]["standard_errors"]) == {
        "acc,none",
        "acc_norm,none",
        "f1,none",
    }
    for name, count in zip(NAMES, (3, 2), strict=True):
        ours = report["lm_eval"]["tasks"][name]
        assert ours["documents"] == 8 and len(ours["metrics"]) == count
        for metric, value in ours["metrics"].items():
            assert value == pytest.approx(theirs[name][metric], rel=1e-4), metric
