"""lm-evaluation-harness through our model interface gives what it gives through its own."""

import functools
import json

import pytest
import torch
from torch import distributed as dist
from transformers import AutoTokenizer

from lorasp.recipe import LmEval, RecipeError
from tests.test_evaluation import Unsharded
from tests.test_models import build
from tests.tiny_models import save_model

pytest.importorskip("lm_eval")

WORDS = "ash birch cedar elm fir hazel larch oak pine rowan".split()
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "Which tree is it? {{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "num_fewshot": 2,
        "fewshot_split": "test",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "f1"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "bypass"}],
    },
}


@pytest.fixture(scope="module")
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Alone:
    rank, world_size, is_main, device = 0, 1, True, torch.device("cpu")

    def gather(self, value):
        return [value]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def write_tasks(directory):
    """Task files of our own over a few rows, short and long ones, and `tiny_gone` over a file that is not there."""
    rows = [
        {
            "text": " ".join(WORDS[: 1 + n] * (1 + n % 3)),
            "choices": [WORDS[n], WORDS[n - 1] + " tree"],
            "answer": n % 2,
        }
        for n in range(8)
    ]
    (directory / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, task in TASKS.items():
        data = {"data_files": {"test": str(directory / "rows.jsonl")}, "cache_dir": str(directory / "cache")}
        common = {"task": f"tiny_{name}", "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (directory / f"{name}.yaml").write_text(json.dumps({**common, **task}))
    data = data | {"data_files": {"test": str(directory / "gone.jsonl")}}
    gone = {**common, **TASKS["choices"], "task": "tiny_gone", "dataset_kwargs": data}
    (directory / "gone.yaml").write_text(json.dumps(gone))
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize("max_length", [512, 60], ids=["whole", "truncated"])
def test_results_and_answers_are_those_of_the_harness_s_own_model(
    max_length, directory, tasks, one_process, monkeypatch
):
    """Log-likelihoods of answers of several tokens, rolling ones over windows, and greedy texts up to their stop."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from lorasp.evaluation import harness

    names = [f"tiny_{name}" for name in TASKS]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    settings = LmEval(tasks=names, include_path=str(tasks), max_length=max_length, tokens=150)
    engine = Unsharded(build(directory))
    engine.train_mode(False)
    ours_model = harness._sharded_lm(engine, settings, AutoTokenizer.from_pretrained(directory), Alone())
    theirs_model = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=1, max_length=max_length)
    ours, theirs = (
        lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, limit=7)
        for model in (ours_model, theirs_model)
    )
    for name in names:
        for a, b in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert a["arguments"] == b["arguments"]
            if name == "tiny_writing":
                assert a["resps"] == b["resps"]
            elif name == "tiny_rolling":
                assert a["resps"][0][0] == pytest.approx(b["resps"][0][0], rel=1e-4)
            else:
                for (x, x_greedy), (y, y_greedy) in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
                    assert x == pytest.approx(y, rel=1e-4) and x_greedy == y_greedy


@pytest.fixture(scope="module")
def managers():
    """The harness's own, of each include_path once: to read all of its task files takes 5 s each time."""
    import lm_eval.tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.tasks, "TaskManager", functools.cache(lm_eval.tasks.TaskManager))
        yield


@pytest.mark.slow
def test_results_are_plain_data_with_their_standard_errors(directory, tasks, one_process, managers, monkeypatch):
    from lorasp.evaluation.harness import run_harness

    monkeypatch.setattr("multiprocessing.Pool", lambda *_: pytest.fail("a rank must not fork"))
    settings = LmEval(tasks=["tiny_choices"], include_path=str(tasks), limit=5)
    found = run_harness(Unsharded(build(directory)), settings, AutoTokenizer.from_pretrained(directory), Alone())
    its = json.loads(json.dumps(found))["tasks"]["tiny_choices"]
    assert set(its["metrics"]) == {"acc,none", "acc_norm,none", "f1,none"} and its["documents"] == 5
    assert all(0 <= value <= 1 for value in its["metrics"].values())
    errors = its["standard_errors"]
    errors.pop("f1,none")  # bootstrapped
    assert errors == {
        metric: pytest.approx((its["metrics"][metric] * (1 - its["metrics"][metric]) / 4) ** 0.5)
        for metric in ("acc,none", "acc_norm,none")
    }


@pytest.mark.slow
def test_an_unknown_task_is_told(tasks, managers):
    from lorasp.evaluation.harness import check_harness

    check_harness(LmEval(tasks=["tiny_choices", "tiny_rolling"], include_path=str(tasks)))
    with pytest.raises(RecipeError, match='the harness has no task "tiny_choice"'):
        check_harness(LmEval(tasks=["tiny_choice"], include_path=str(tasks)))


@pytest.mark.slow
def test_data_that_cannot_be_had_is_told(tasks, managers):
    from lorasp.evaluation.harness import check_harness

    with pytest.raises(RecipeError, match="the harness cannot load tiny_gone"):
        check_harness(LmEval(tasks=["tiny_gone"], include_path=str(tasks)))
