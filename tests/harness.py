"""lm-evaluation-harness itself on our MMLU files, by its own model class: what ours is compared with."""

import csv
import json
from pathlib import Path


def harness_scores(
    model: Path, tree: Path, subjects: list[str], work: Path, *, limit: int, shots: int = 5, **how
) -> dict[tuple[str, int], list[float]]:
    """(subject, index) -> the log-likelihoods of the four answers. how: of `HFLM`, such as max_length."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    work.mkdir(parents=True, exist_ok=True)
    for subject in subjects:
        write_task(subject, tree, work, shots)
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=str(model), dtype="float32", device="cpu", **how),
        tasks=[f"local_{subject}" for subject in subjects],
        limit=limit,
        log_samples=True,
        task_manager=TaskManager(include_path=str(work), include_defaults=False),
        bootstrap_iters=0,
    )
    return {
        (subject, sample["doc_id"]): [float(value[0]) for value in sample["filtered_resps"]]
        for subject in subjects
        for sample in results["samples"][f"local_{subject}"]
    }


def write_task(subject: str, tree: Path, work: Path, shots: int) -> None:
    """The harness's own template of MMLU, over local files."""
    from lm_eval import tasks

    template = Path(tasks.__file__).parent / "mmlu" / "default" / "_default_template_yaml"
    files = {}
    for split in ("dev", "test"):
        with open(tree / split / f"{subject}_{split}.csv", newline="") as file:
            rows = [
                {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])} for row in csv.reader(file)
            ]
        files[split] = str(work / f"{subject}_{split}.jsonl")
        Path(files[split]).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    about = subject.replace("_", " ")
    task = {
        "include": str(template),
        "task": f"local_{subject}",
        "description": f"The following are multiple choice questions (with answers) about {about}.\n\n",
        "num_fewshot": shots,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(work / "cache")},
    }
    (work / f"{subject}.yaml").write_text(json.dumps(task))
