"""From a recipe to other people's software by three commands, as the README says them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasp.cli import BAD_INPUT
from lorasp.data.alpaca import format_prompt
from lorasp.finished_run import read_run
from tests.distributed.commands import Done, accelerate_on_two, run
from tests.distributed.launching import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(place, home, tmp_path_factory) -> Path:
    """Two ranks, 4 steps, NF4."""
    runs = tmp_path_factory.mktemp("exported")
    done = run(accelerate_on_two(str(place / "tiny.yaml"), f"output_dir={runs}", "quantization=nf4"), home)
    assert done.returncode == 0, done.stderr
    return runs / "tiny"


def script(name: str, home: Path, *arguments: str | Path) -> Done:
    return run([sys.executable, str(ROOT / "launch" / f"{name}.py"), *map(str, arguments)], home)


@pytest.mark.parametrize("kind", ["peft", "merged", "bnb4bit"])
def test_a_trained_run_is_exported_and_verified(kind, trained, home):
    done = script("export", home, trained, "--to", kind, "--verify")
    assert done.returncode == 0, done.stderr
    assert "verified: largest difference" in done.stdout and f"exported {trained}/export/{kind}" in done.stdout
    again = script("export", home, trained, "--to", kind)
    assert again.returncode == BAD_INPUT and len(again.errors) == 1 and "is not empty" in again.errors[0]


def test_generate_writes_what_plain_peft_writes_on_the_exported_base(trained, home, tmp_path):
    """From a pipe, a line a prompt, in the words of the recipe's template."""
    assert script("export", home, trained, "--to", "bnb4bit", "--out", tmp_path / "4bit").returncode == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "4bit")
    base.enable_input_require_grads()  # keeps bitsandbytes from rounding the scales on CPUs with AVX512-BF16
    model = PeftModel.from_pretrained(base, tmp_path / "4bit" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "4bit")
    template = read_run(trained).recipe.data.template
    assert template == "short"
    ids = tokenizer(format_prompt({"instruction": "oak elm", "input": ""}, template))["input_ids"]
    written = []
    while len(written) < 6:
        token = model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
    done = script("generate", home, trained, "oak elm", "--max-new-tokens", "6")
    assert done.returncode == 0, done.stderr
    assert done.stdout == tokenizer.decode(written, skip_special_tokens=True) + "\n"


def test_training_on_the_4_bit_export_is_training_on_the_original(place, trained, home, tmp_path):
    """Two ranks, of which one reads: the same codes give the same losses, to the last bit."""
    assert script("export", home, trained, "--to", "bnb4bit", "--out", tmp_path / "4bit").returncode == 0
    command = accelerate_on_two(
        str(place / "tiny.yaml"), f"output_dir={tmp_path}", f"model.path={tmp_path}/4bit", "quantization=nf4"
    )
    done = run(command, home)
    assert done.returncode == 0, done.stderr
    losses = [
        [point["loss"] for point in json.loads((run_dir / "report.json").read_text())["history"]]
        for run_dir in (trained, tmp_path / "tiny")
    ]
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_bad_input_is_one_sentence(trained, home, tmp_path):
    for command, sentence in (
        (("export", tmp_path / "nowhere", "--to", "peft"), "is no directory"),
        (("export", ROOT, "--to", "peft"), "is no run"),
        (("export", trained, "--to", "gguf"), "invalid choice"),
        (("export", trained, "--to", "peft", "--dtype", "float16"), "--base and --dtype are of --to merged"),
        (("generate", trained, "x", "--max-new-tokens", "0"), "at least 1"),
    ):
        done = script(command[0], home, *command[1:])
        assert done.returncode == BAD_INPUT and sentence in done.stderr and "Traceback" not in done.stderr
