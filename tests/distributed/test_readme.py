"""Every command of the README runs as it stands; those that take minutes in full are only made shorter here.

The commands of a `bash` block are run in order, one after the other, in one directory that looks like a clone. The two
install commands are tested by those who use them: `.ci/run` runs the one with the tests. The first, the quickstart's,
is run in full by test_quickstart.py, and not again.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml

from lorasp.models.demo import convert_demo_model
from lorasp.recipe_loading import load_recipe
from lorasp.sweep.cells import candidates, check, final_cells
from lorasp.sweep.definition import read_sweep
from tests.distributed.commands import free_port
from tests.distributed.launching import ROOT, ended_with_its_family, run_whole

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
# Appended to training commands: the path is the same, the minutes are not.
SHORT = (
    "training.max_steps=2 training.log_every=1 training.global_batch_size=4 training.micro_batch_size=2 "
    "evaluation.before=false evaluation.samples=1 evaluation.max_new_tokens=2 data.limit=48 data.held_out=0.1 "
    "rehearse=false"
)
GENERATE = 'python launch/generate.py runs/my "Which tree is number 3?"'
ANSWER = "The elm."  # ash, birch, cedar, elm: from 0


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


def environment(threads: int = 1) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }


def type_in(clone: Path, command: str) -> str:
    """What `command` prints; fails the test where it does not succeed."""
    if "launch/train.py recipes/" in command or "launch/evaluate.py" in command:
        command += f" {SHORT}"
        if "runs/quickstart" not in command:
            command += " overwrite=true"  # two more ways to start the same run
    elif "launch/generate.py" in command:
        command += " --max-new-tokens 16"
    threads = 1 if re.search(r"--(num_processes|nproc_per_node) 2", command) else 2
    done = run_whole(["bash", "-c", command], 900, cwd=clone, env=environment(threads))
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.timeout(2400)  # a dozen real runs of a real model
def test_every_command_of_the_readme_runs_in_order(clone):
    first, *ran = runnable()
    assert first == "accelerate launch launch/train.py recipes/quickstart.yaml"  # unshortened in test_quickstart.py
    assert len(ran) > 12 and sum("launch/train.py" in command for command in ran) >= 4
    printed = {command: type_in(clone, command) for command in ran}
    assert printed[GENERATE] == f"{ANSWER}\n"


def test_the_users_adapter_answers_in_plain_peft(clone, monkeypatch):
    """After the commands above: 20 rows, two ranks, exported; loaded by the lines of its model card, word for word."""
    pytest.importorskip("peft")
    export = clone / "runs" / "my" / "export" / "peft"
    if not export.exists():
        pytest.skip("the commands before it did not run")
    [lines] = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)
    assert "lorasp" not in lines.replace(str(convert_demo_model()), "")  # nothing of ours
    monkeypatch.chdir(export)
    loaded: dict = {}
    exec(lines, loaded)
    model, tokenizer = loaded["model"], loaded["tokenizer"]
    # Without gradients bitsandbytes takes another path on CPUs with AVX512-BF16, which rounds the scales to bf16.
    model.enable_input_require_grads()

    def answer() -> str:
        ids = tokenizer("Which tree is number 3?", return_tensors="pt").input_ids  # as it stands
        written: list[int] = []
        while len(written) < 8 and tokenizer.eos_token_id not in written:
            chosen = model(input_ids=ids).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, chosen], dim=1)
            written.append(chosen.item())
        return tokenizer.decode(written, skip_special_tokens=True).strip()

    assert answer() == ANSWER
    with model.disable_adapter():
        assert not answer().startswith("The elm")  # a thing that the base cannot know


def test_an_answer_is_printed_while_it_is_written(clone):
    if not (clone / "runs" / "quickstart" / "report.json").exists():
        pytest.skip("the commands before it did not run")
    command = ["launch/generate.py", "runs/quickstart", "Once upon a time", "--template", "none"]
    with subprocess.Popen(
        [sys.executable, *command, "--max-new-tokens", "40"], cwd=clone, env=environment(), stdout=subprocess.PIPE
    ) as writing:
        reads = iter(lambda: os.read(writing.stdout.fileno(), 4096), b"")
        arrived = [(time.monotonic(), text) for text in reads]
    assert writing.returncode == 0
    words = b"".join(text for _, text in arrived).split()
    # Not all at once: dozens of words, a few at a time, over a good part of a second.
    assert len(words) > 15 and len(arrived) > len(words) / 2
    assert arrived[-1][0] - arrived[0][0] > 0.2


def test_tensorboard_shows_the_runs(clone):
    assert "`tensorboard --logdir runs`" in README
    if not (clone / "runs" / "quickstart" / "tensorboard").exists():
        pytest.skip("the commands before it did not run")
    port = free_port()
    command = [str(Path(sys.executable).with_name("tensorboard")), "--logdir", "runs", "--port", str(port)]
    server = subprocess.Popen(command, cwd=clone, env=environment(), stderr=subprocess.DEVNULL)

    def fetch(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
            return answer.read().decode()

    try:
        tags: dict = {}
        for _ in range(120):  # seconds; it answers before it has read the files
            with contextlib.suppress(OSError):
                tags = json.loads(fetch("data/plugin/scalars/tags"))
            if "memory/rank_0_peak_gib" in tags.get("quickstart/tensorboard", ()):
                break
            time.sleep(1)
        assert {"train/loss", "memory/highest_peak_gib", "throughput/real_tokens_per_second"} <= set(
            tags["quickstart/tensorboard"]
        )
        assert "<title>TensorBoard</title>" in fetch("")
        assert "peak of every rank (GiB)" in fetch("data/plugin/custom_scalars/layout")
    finally:
        server.terminate()
        server.wait(30)


def test_every_yaml_block_is_a_recipe_or_a_part_of_one(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    for name in ("my_rows.jsonl", "my_held_out.jsonl"):
        (tmp_path / name).touch()
    recipes = []
    for block in blocks:
        if "recipe" in (tree := yaml.safe_load(block)):
            sweeps = ROOT / "recipes" / "sweeps"  # from where the block names its recipe
            (tmp_path / "sweep.yaml").write_text(block.replace(tree["recipe"], str(sweeps / tree["recipe"])))
            sweep = read_sweep(tmp_path / "sweep.yaml")
            check(candidates(sweep) + final_cells(sweep, {}), ranks=2)
            continue
        whole = {"model": {"path": "x"}, "data": {"train": "y"}} | tree
        (tmp_path / "block.yaml").write_text(yaml.safe_dump(whole))
        recipes.append(load_recipe(tmp_path / "block.yaml", []))
    first, data, tracking = recipes
    assert (first.adapter.rank, first.training.learning_rate) == (16, 2e-5)
    assert [source.weight for source in data.data.train_sources] == [1.0, 0.5] and data.data.packing
    assert tracking.tracking.with_ == ["tensorboard", "wandb"]
    [overrides] = re.findall(r"Override on the command line: `(.*?)`", README)
    assert load_recipe(tmp_path / "block.yaml", overrides.split()).run_dir.name == "wide"


def test_every_message_of_the_troubleshooting_table_is_one_that_we_print():
    """Its words, but for … and the capitals that stand for what varies, are in our source."""
    table = README[README.index("| it says | do |") : README.index("## How it is built")]
    messages = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    assert len(messages) >= 7
    source = "\n".join(path.read_text() for path in (ROOT / "lorasp").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # literals that Python joins
    for message in messages:
        parts = [re.escape(part.strip()) for part in re.split(r"…|\b[A-Z]\b", message) if part.strip()]
        # What varies is a replacement field, with other literals in it perhaps.
        assert re.search(r"\s*\{.{1,90}?\}\s*".join(parts), source), message


def test_every_link_within_the_readme_leads_to_a_heading():
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#(.*?)\)", README)
    assert len(links) >= 3 and set(links) <= anchors


def test_ci_runs_the_readmes_own_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    marker = re.search(r'grep -F "(.*?)" README.md', script)[1]
    [line] = [line for line in README.splitlines() if marker in line]
    assert line.endswith("&& pytest")


def test_files_for_accelerate_say_where_ranks_are_and_nothing_that_a_recipe_decides():
    places = {"compute_environment", "distributed_type", "deepspeed_config", "num_machines", "num_processes"}
    for file in (ROOT / "launch" / "accelerate").iterdir():
        config = yaml.safe_load(file.read_text())
        assert set(config) <= places | {"main_process_port", "main_training_function"}, file
        assert set(config.get("deepspeed_config", {})) <= {"deepspeed_multinode_launcher"}, file


def test_the_command_for_two_machines_trains_on_two_launchers_of_one(place, tmp_path):
    """The README's command as it stands but for the host, the port, the ranks and the recipe, typed on both."""
    [command] = re.findall(r"```\n(accelerate launch [^`]*?FIRST_HOST[^`]*?)\n```", README)
    command = command.replace("\\\n", " ").replace("FIRST_HOST", "127.0.0.1")
    command = command.replace(
        "launch/train.py", f"--num_processes 2 --main_process_port {free_port()} launch/train.py"
    )
    command = command.replace("recipes/llama13b_alpaca.yaml", f"{place}/tiny.yaml name=machines")
    machines = [command, command.replace("--machine_rank 0", "--machine_rank 1")]
    assert machines[0] != machines[1]
    running = [
        subprocess.Popen(
            ["bash", "-c", f"exec {machine}"],
            cwd=ROOT,
            env=environment() | {"HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for machine in machines
    ]
    with contextlib.ExitStack() as ended:
        for machine in running:
            ended.enter_context(ended_with_its_family(machine))
        said = [machine.communicate(timeout=200)[0] for machine in running]
    assert [machine.returncode for machine in running] == [0, 0], said
    report = json.loads((place / "runs" / "machines" / "report.json").read_text())
    assert report["world_size"] == 2
    assert [rank["rank"] for rank in report["phases"]["train"]["ranks"]] == [0, 1]
