"""Every command of the README runs as it stands; the two that take minutes in full are only made shorter here.

The commands of a `bash` block are run in order, one after the other, in one directory that looks like a clone. The two
install commands are tested by those who use them: `.ci/run` runs the one with the tests.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.distributed.commands import free_port
from tests.distributed.launching import ROOT

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
# Appended to training commands: the path is the same, the minutes are not.
SHORT = (
    "training.max_steps=2 training.log_every=1 evaluation.before=false evaluation.samples=1 "
    "evaluation.max_new_tokens=2 data.limit=48"
)
GENERATE = 'python launch/generate.py runs/my "Which tree is number 3?"'


def commands(block: str) -> list[str]:
    """A block's commands: lines, with here-documents kept together."""
    found: list[str] = []
    until = None
    for line in block.strip().splitlines():
        if until is not None:
            found[-1] += f"\n{line}"
            until = None if line == until else until
            continue
        found.append(line)
        opened = re.search(r"<<'(\w+)'", line)
        until = opened[1] if opened else None
    return found


def runnable() -> list[str]:
    """All commands in order. Of the install commands, what comes after the installation."""
    out = []
    for command in (command for block in BLOCKS for command in commands(block)):
        if command.startswith("python3 -m venv"):
            command = command.split(" && ")[-1]
            if command == "pytest":
                continue
        out.append(command)
    return out


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A directory with the project's folders, in which the README's commands are typed."""
    clone = tmp_path_factory.mktemp("clone")
    for name in ("launch", "lorasp", "recipes", "ds_configs", "README.md", "pyproject.toml"):
        (clone / name).symlink_to(ROOT / name)
    return clone


def type_in(clone: Path, command: str) -> str:
    """What `command` prints; fails the test where it does not succeed."""
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if "launch/train.py recipes/" in command or "launch/evaluate.py" in command:
        command += f" {SHORT}"
        if "runs/quickstart" not in command:
            command += " overwrite=true"  # three ways to start the same run
    done = subprocess.run(
        ["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.timeout(1500)  # a dozen real runs of a real model
def test_every_command_of_the_readme_runs_in_order(clone):
    ran = runnable()
    assert len(ran) > 12 and sum("launch/train.py" in command for command in ran) >= 5
    printed = {command: type_in(clone, command) for command in ran}
    (clone / "answer").write_text(printed[GENERATE])
    assert printed[GENERATE].startswith("The ")  # as all the user's rows about trees do


def test_the_users_adapter_answers_in_plain_peft(clone):
    """After the commands above: 20 rows, two ranks, exported; here nothing but transformers and peft."""
    peft = pytest.importorskip("peft")
    export = clone / "runs" / "my" / "export" / "peft"
    if not export.exists():
        pytest.skip("the commands before it did not run")
    from lorasp.models.demo import convert_demo_model

    base = AutoModelForCausalLM.from_pretrained(
        convert_demo_model(),
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    model = peft.PeftModel.from_pretrained(base, export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    # Without gradients bitsandbytes takes another path on CPUs with AVX512-BF16, which rounds the scales to bf16.
    model.enable_input_require_grads()
    ids = tokenizer("Which tree is number 3?", return_tensors="pt").input_ids  # prompt and completion: as they stand
    written: list[int] = []
    while len(written) < 8 and tokenizer.eos_token_id not in written:
        chosen = model(input_ids=ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, chosen], dim=1)
        written.append(chosen.item())
    answer = tokenizer.decode(written, skip_special_tokens=True)
    assert answer.strip() == (clone / "answer").read_text().strip()


def test_ci_runs_the_readmes_own_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    marker = re.search(r'grep -F "(.*?)" README.md', script)[1]
    [line] = [line for line in README.splitlines() if marker in line]
    assert line.endswith("&& pytest")


def test_the_command_for_two_machines_trains_on_two_launchers_of_one(place, tmp_path):
    """The README's command as it stands but for the host, the port, the ranks and the recipe, typed on both."""
    [command] = re.findall(r"```\n(accelerate launch .*?FIRST_HOST.*?)\n```", README, re.DOTALL)
    command = command.replace("\\\n", " ").replace("FIRST_HOST", "127.0.0.1").replace("29500", str(free_port()))
    command = command.replace("--num_processes 16", "--num_processes 2")
    command = command.replace("recipes/llama13b_alpaca.yaml", f"{place}/tiny.yaml name=machines")
    machines = [command, command.replace("--machine_rank 0", "--machine_rank 1")]
    assert machines[0] != machines[1]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    running = [
        subprocess.Popen(
            ["bash", "-c", f"exec {machine}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for machine in machines
    ]
    said = [machine.communicate(timeout=200)[0] for machine in running]
    assert [machine.returncode for machine in running] == [0, 0], said
    report = json.loads((place / "runs" / "machines" / "report.json").read_text())
    assert report["world_size"] == 2
    assert [rank["rank"] for rank in report["phases"]["train"]["ranks"]] == [0, 1]
