"""`launch/slurm/` on two nodes: a run that is preempted, requeued, and ends as the undisturbed one; and others."""

import json
import time
from pathlib import Path

import pytest

from tests.distributed.commands import accelerate_on_two, run

pytestmark = pytest.mark.slow

SCRIPT = "launch/slurm/train.sbatch"
STEPS = 240  # some 20 s: it must still train when Slurm has made up its mind
SETTINGS = (f"training.max_steps={STEPS}", "training.epochs=100", "adapter.dropout=0.1", "evaluation.samples=1")


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in json.loads((run_dir / "report.json").read_text())["history"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def calm(place, home, root) -> dict[int, float]:
    """Losses by step of the run that nothing disturbs, on two ranks of this machine."""
    done = run(accelerate_on_two(str(place / "tiny.yaml"), f"output_dir={root}", "name=calm", *SETTINGS), home)
    assert done.returncode == 0, done.stderr
    return losses(root / "calm")


@pytest.fixture
def submit(slurm, place, root):
    """Submits the run of a name on two nodes; (its job, its directory, a function that reads its log)."""

    def submit(name: str):
        log = root / f"{name}.log"
        settings = (f"output_dir={root}", f"name={name}", *SETTINGS)
        job = slurm.submit("--nodes", "2", "--output", str(log), SCRIPT, str(place / "tiny.yaml"), *settings)
        return job, root / name, lambda: log.read_text() if log.exists() else ""

    return submit


def signalled(slurm, job):
    slurm.do("scancel", "--batch", "--signal=USR1", job)


def preempted(slurm, job):
    """By a job that takes both nodes, and has them for a second."""
    slurm.submit("--partition", "hi", "--nodes", "2", "--output", "/dev/null", "--wrap", "sleep 1")


@pytest.mark.parametrize("disturb", [signalled, preempted])
def test_a_job_leaves_is_requeued_and_ends_as_the_undisturbed_run(disturb, slurm, submit, calm):
    job, run_dir, log = submit(disturb.__name__)
    slurm.wait_until(lambda: "step  10/" in log())
    disturb(slurm, job)
    slurm.wait_until(lambda: "left as asked; requeued" in log())
    left = json.loads((run_dir / "left.json").read_text())["step"]
    assert 10 <= left < STEPS and f"step {STEPS}/{STEPS}" not in log()
    slurm.wait_until(lambda: slurm.state(job) == "PENDING")
    # Slurm waits two minutes before it starts it again: in the second of its end a node refuses it as revoked.
    time.sleep(2)
    slurm.do("scontrol", "update", f"JobId={job}", "StartTime=now")
    assert slurm.end(job) == "COMPLETED", log()
    assert "start 0 on n[1-2], 1 rank(s) and 1 CPU(s) a node" in log() and "start 1 on n[1-2]" in log()
    assert f"resumed after step {left} of 2 rank(s)" in log()
    report = json.loads((run_dir / "report.json").read_text())
    assert report["hosts"] == ["n1", "n2"] and report["world_size"] == 2 and report["status"] == "finished"
    assert losses(run_dir) == calm and len(calm) == STEPS
    ranks = list((run_dir / "ranks").rglob("stdout.log"))
    assert len(ranks) == 4 and any("step  10/" in path.read_text() for path in ranks)  # two starts of two nodes


def test_a_recipe_with_a_fault_ends_the_job_before_the_nodes_load_anything(slurm, submit, root, place):
    log = root / "fault.log"
    job = slurm.submit("--nodes", "2", "--output", str(log), SCRIPT, str(place / "tiny.yaml"), "adapter.rnak=3")
    assert slurm.end(job) == "FAILED"
    assert "did you mean adapter.rank" in log.read_text() and "start 0" not in log.read_text()


def test_a_saved_adapter_is_scored_on_two_nodes(slurm, calm, root, place):
    arguments = (str(place / "tiny.yaml"), f"output_dir={root}", f"adapter.init_from={root / 'calm'}")
    log = root / "evaluate.log"
    job = slurm.submit("--nodes", "2", "--output", str(log), "launch/slurm/evaluate.sbatch", *arguments)
    assert slurm.end(job) == "COMPLETED", log.read_text()
    report, trained = (json.loads((root / name / "report.json").read_text()) for name in ("tiny-evaluation", "calm"))
    assert report["hosts"] == ["n1", "n2"]
    loss = trained["metrics"]["held_out_loss_after"]
    assert report["metrics"]["held_out_loss"] == pytest.approx(loss, rel=1e-6)


def test_each_job_of_an_array_is_a_run_of_a_sweep_and_one_that_has_ended_is_passed_over(slurm, root, place):
    sweep = root / "ranks.yaml"
    sweep.write_text(
        f"recipe: {place}/tiny.yaml\nvariants:\n  two: {{adapter.rank: 2, training.max_steps: 2}}\n"
        f"  three: {{adapter.rank: 3}}\n"
    )
    log = str(root / "sweep-%A-%a.log")
    submit = ("--array", "0-1", "--output", log, "launch/slurm/sweep.sbatch", str(sweep), f"output_dir={root}")

    def told(job: str, index: int) -> str:
        return Path(log.replace("%A", job).replace("%a", str(index))).read_text()

    job = slurm.submit(*submit)
    for index, (name, rank, steps) in enumerate([("two", 2, 2), ("three", 3, 4)]):
        assert slurm.end(f"{job}_{index}") == "COMPLETED", told(job, index)
        report = json.loads((root / "ranks" / name / "report.json").read_text())
        assert (report["recipe"]["adapter"]["rank"], len(report["history"])) == (rank, steps)
    again = slurm.submit(*submit)
    for index in range(2):
        assert slurm.end(f"{again}_{index}") == "COMPLETED"
        assert told(again, index) == f"run {index} has ended already\n"
