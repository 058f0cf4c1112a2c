"""From a recipe to other people's software by three commands, as the README says them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasp.cli import BAD_INPUT, INTERRUPTED
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


@pytest.fixture(scope="module")
def exported(trained, home) -> dict[str, Path]:
    """All three layouts, verified."""
    for kind in ("peft", "merged", "bnb4bit"):
        done = script("export", home, trained, "--to", kind, "--verify")
        assert done.returncode == 0, done.stderr
        assert "verified: largest difference" in done.stdout and f"exported {trained}/export/{kind}" in done.stdout
    return {kind: trained / "export" / kind for kind in ("peft", "merged", "bnb4bit")}


def test_a_trained_run_is_exported_and_verified_and_an_export_is_not_replaced(exported, trained, home):
    again = script("export", home, trained, "--to", "peft")
    assert again.returncode == BAD_INPUT and len(again.errors) == 1 and "is not empty" in again.errors[0]


def test_generate_writes_what_plain_peft_writes_on_the_exported_base(exported, trained, answers):
    """In the words of the recipe's template."""
    base = AutoModelForCausalLM.from_pretrained(exported["bnb4bit"])
    base.enable_input_require_grads()  # keeps bitsandbytes from rounding the scales on CPUs with AVX512-BF16
    model = PeftModel.from_pretrained(base, exported["bnb4bit"] / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(exported["bnb4bit"])
    template = read_run(trained).recipe.data.template
    assert template == "short"
    ids = tokenizer(format_prompt({"instruction": "oak elm", "input": ""}, template))["input_ids"]
    written = []
    while len(written) < 6:
        token = model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
    assert answers[0] == tokenizer.decode(written, skip_special_tokens=True) + "\n"


@pytest.fixture
def generate(trained, home):
    """Starts launch/generate.py on the trained run; stdin and stdout as given."""

    def start(*arguments: str, **streams) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "launch" / "generate.py"), str(trained), *arguments]
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "OMP_NUM_THREADS": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        # A background job of a shell inherits that Ctrl-C is ignored; a user at a terminal does not.
        heard = signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE, **streams)
        finally:
            signal.signal(signal.SIGINT, heard)

    return start


@pytest.fixture(scope="module")
def answers(trained, home) -> list[str]:
    """What it answers to two prompts, each asked for by a command of its own."""
    done = [script("generate", home, trained, prompt, "--max-new-tokens", "6") for prompt in ("oak elm", "ash")]
    assert [its.returncode for its in done] == [0, 0] and all(its.stdout.count("\n") == 1 for its in done)
    return [its.stdout for its in done]


def test_each_line_of_a_pipe_is_a_prompt_of_its_own(generate, answers):
    with generate("--max-new-tokens", "6", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as asked:
        out, err = asked.communicate("oak elm\n\nash\n", timeout=120)
    assert asked.returncode == 0 and out == "".join(answers)
    assert "> " not in err and "Traceback" not in err


def test_on_a_terminal_it_asks_answers_and_asks_again_until_the_end_of_input(generate, answers):
    """Each prompt is typed after the answer to the one before; then Ctrl-D."""
    ours, its = os.openpty()
    with generate("--max-new-tokens", "6", stdin=its, stdout=subprocess.PIPE) as asked:
        os.close(its)
        for prompt, answer in zip(("oak elm", "ash"), answers, strict=True):
            os.write(ours, f"{prompt}\n".encode())
            assert asked.stdout.read(len(answer)) == answer
        os.write(ours, b"\x04")
        assert asked.wait(60) == 0
        assert asked.stdout.read() == "" and asked.stderr.read().count("> ") == 3
    os.close(ours)


def test_ctrl_c_ends_it_without_a_traceback(generate):
    ours, its = os.openpty()
    with generate(stdin=its, stdout=subprocess.PIPE) as asked:
        os.close(its)
        said = ""
        while not said.endswith("> "):
            said += asked.stderr.read(1)
        asked.send_signal(signal.SIGINT)
        assert asked.wait(60) == INTERRUPTED
        assert asked.stderr.read().strip() == "" and "Traceback" not in said
    os.close(ours)


def test_training_on_the_4_bit_export_is_training_on_the_original(place, exported, trained, home, tmp_path):
    """Two ranks, of which one reads: the same codes give the same losses, to the last bit."""
    command = accelerate_on_two(
        str(place / "tiny.yaml"), f"output_dir={tmp_path}", f"model.path={exported['bnb4bit']}", "quantization=nf4"
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


def test_plain_peft_on_the_4_bit_export_scores_what_the_report_says(place, home, tmp_path):
    """Two ranks; uniform selection, A's unselected entries at their start, two of the seven linears."""
    settings = [
        "selection.strategy=uniform",
        "adapter.frozen_entries=init",
        "adapter.target_modules=[q_proj,down_proj]",
    ]
    settings += ["quantization=nf4", "evaluation.samples=0", "training.epochs=5", "training.max_steps=20"]
    done = run(accelerate_on_two(str(place / "tiny.yaml"), f"output_dir={tmp_path}", *settings), home)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "tiny" / "report.json").read_text())["metrics"]
    assert metrics["held_out_loss_after"] < metrics["held_out_loss_before"] - 0.1
    assert script("export", home, tmp_path / "tiny", "--to", "bnb4bit", "--out", tmp_path / "4bit").returncode == 0

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "4bit")
    base.enable_input_require_grads()  # keeps bitsandbytes from rounding the scales on CPUs with AVX512-BF16
    model = PeftModel.from_pretrained(base, tmp_path / "4bit" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "4bit")
    losses = []
    for row in json.loads((place / "held_out.json").read_text()):
        prompt = tokenizer(format_prompt(row, "short"))["input_ids"]
        ids = [*prompt, *tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].detach()
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[len(prompt) :]), reduction="none"))
    assert len(losses) == 9
    assert torch.cat(losses).mean().item() == pytest.approx(metrics["held_out_loss_after"], abs=1e-4)


def test_the_adapter_of_one_step_in_bf16_is_verified_or_said_not_to_be(place, home, tmp_path):
    """One step of 1e-4 moves logits by less than a step of bf16: shown in fp32, but not by weights stored in bf16."""
    settings = ["model.dtype=bfloat16", "quantization=none", "training.learning_rate=1e-4", "training.max_steps=1"]
    settings += ["evaluation.samples=0", "rehearse=false", f"output_dir={tmp_path}"]
    done = run([sys.executable, str(ROOT / "launch" / "train.py"), str(place / "tiny.yaml"), *settings], home)
    assert done.returncode == 0, done.stderr
    done = script("export", home, tmp_path / "tiny", "--to", "peft", "--verify")
    assert done.returncode == 0 and "verified: largest difference" in done.stdout and "warning" not in done.stdout
    done = script("export", home, tmp_path / "tiny", "--to", "merged", "--dtype", "bfloat16", "--verify")
    assert done.returncode == 0, done.stderr
    assert "warning: this verifies the base and proves little of the adapter, which moves logits by " in done.stdout
    assert "only: one that is lost would pass as well" in done.stdout
