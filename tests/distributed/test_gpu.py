"""A run on one GPU beside the same run on the CPU: one code path, the same numbers."""

import json

import pytest
import torch

from tests.distributed.launching import ROOT, launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

POLICIES = ["selective", "lean", "layer", "none"]


@pytest.fixture(scope="module")
def report(place):
    """Trains once for each name, and gives its report.json."""
    reports = {}

    def train(name: str, *settings: str, **environment: str) -> dict:
        if name not in reports:
            arguments = (f"name={name}", "tracking.with=[]", *settings)
            # Some images turn TF32 on, which keeps 10 bits of a factor.
            environment |= {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
            done = launch(1, ROOT / "launch" / "train.py", str(place / "tiny.yaml"), *arguments, env=environment)
            assert done.returncode == 0, done.stderr[-4000:]
            reports[name] = json.loads((place / "runs" / name / "report.json").read_text())
        return reports[name]

    return train


def losses(report: dict) -> list[float]:
    return [row["loss"] for row in report["history"]]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_gpu_trains_as_the_cpu_does(policy, report):
    cpu = report("cpu", "model.dtype=float32", CUDA_VISIBLE_DEVICES="")
    gpu = report(policy, "model.dtype=float32", f"training.activation_checkpointing={policy}")
    assert cpu["device"] == "cpu" and gpu["device"].startswith("cuda")
    assert losses(gpu) == pytest.approx(losses(cpu), rel=1e-4)
    assert gpu["metrics"]["held_out_loss_after"] == pytest.approx(cpu["metrics"]["held_out_loss_after"], rel=1e-4)


def test_bf16_is_a_gpus_default_and_its_losses_are_those_of_fp32_rounded(report):
    cpu = report("cpu", "model.dtype=float32", CUDA_VISIBLE_DEVICES="")
    assert losses(report("bf16")) == pytest.approx(losses(cpu), rel=2e-3)  # 1.2e-4 on a CPU
    assert report("bf16")["phases"]["train"]["ranks"][0]["source"] == "cuda max_memory_allocated"


def test_a_gpus_run_repeats_to_the_bit_where_the_recipe_asks_for_it(report):
    first, second = (report(f"deterministic{i}", "deterministic=true") for i in range(2))
    assert losses(first) == losses(second)
