"""The model card of an export: what it is, how it is loaded, what it was trained on, how well, and at which cost."""

import json
from typing import Any

import torch
import yaml

from lorasp.data.alpaca import format_prompt
from lorasp.finished_run import FinishedRun
from lorasp.reporting.report_text import format_peaks

_METHODS = {"lorasp": "LoRA-SP", "lora": "LoRA", "full": "full fine-tuning"}


def model_card(run: FinishedRun, kind: str, base: str, dtype: torch.dtype) -> str:
    """Markdown with the hub's front matter. base and dtype: of a merged model."""
    report, recipe = run.report, run.recipe
    front: dict[str, Any] = {
        "library_name": "peft" if kind == "peft" else "transformers",
        "tags": list(dict.fromkeys(("lorasp", recipe.method))),
    }
    if run.base_name == recipe.model.path:
        front["base_model"] = run.base_name
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {report['name']}",
        _what(run, kind, base, dtype),
        "## Use",
        _use(run, kind),
        _prompts(run.prompt_format),
    ]
    if report.get("status") != "finished":
        sections.insert(3, f"**The run did not finish ({report.get('status')}).**")
    scores = [
        f"| {name.replace('_', ' ')} | {value:.6g} |" for name, value in report["metrics"].items() if value is not None
    ]
    if scores:
        header = "| score (losses in nats a token, exact match as a share) | value |\n| --- | ---: |"
        sections += ["## Scores", "\n".join([header, *scores])]
    sections += [
        "## Training data",
        _code(json.dumps(report["data"], indent=2, ensure_ascii=False), "json"),
        "## Peak memory of the training run",
        _code(format_peaks(report)),
        "## How it was made",
        _code(f"{report['command']}\n{run_versions(report)}"),
        _code(yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True), "yaml"),
    ]
    return "\n\n".join(sections) + "\n"


def run_versions(report: dict[str, Any]) -> str:
    """One line: packages and the commit."""
    names = ("lorasp", "git_commit", "torch", "transformers", "deepspeed", "bitsandbytes")
    found = {name: report["versions"].get(name) for name in names}
    return "# " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.items() if value)


def _what(run: FinishedRun, kind: str, base: str, dtype: torch.dtype) -> str:
    recipe = run.recipe
    if run.saved is None:
        return f"`{recipe.model.path}` after full fine-tuning, in {_name(dtype)}."
    info = run.saved.info
    adapter = (
        f"A {_METHODS[recipe.method]} adapter of rank {info.rank} for `{info.base_model}` (digest "
        f"`{info.base_digest}`), trained for {info.step} optimizer steps"
    )
    trained_on = "its original weights"
    if run.quantized:
        trained_on = f"its {recipe.quantization.format.upper()} weights, quantized from {_name(run.dtype)}"
    if kind == "peft":
        frozen = "A's at their frozen start" if info.frozen_entries == "init" else "zero"
        return f"{adapter} on {trained_on}, in PEFT's layout. Entries that were not selected are {frozen}."
    if kind == "bnb4bit":
        return (
            f"{adapter} on {trained_on}. This directory holds that base, code by code and scale by scale, in the "
            f"layout of transformers and bitsandbytes; `adapter/` holds the adapter in PEFT's."
        )
    text = f"{adapter} on {trained_on}, merged into **the {base} base** in {_name(dtype)}."
    if base == "original" and run.quantized:
        text += (
            " The original weights differ from the quantized ones of training, by quantization's error; "
            "`--base dequantized` merges into those of training."
        )
    return text


def _use(run: FinishedRun, kind: str) -> str:
    quantization, dtype = run.recipe.quantization, _name(run.dtype)
    if kind == "merged":
        return _code(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")',
            "python",
        )
    imports, base, options, adapter = "AutoModelForCausalLM, AutoTokenizer", run.base_name, "", "."
    if kind == "bnb4bit":
        base, adapter = ".", "adapter"
    elif run.quantized:
        if quantization.block_size != 64:  # the only one that transformers can ask bitsandbytes for
            return (
                f"The base's weights have to be quantized as in training, with blocks of {quantization.block_size}, "
                f"which transformers cannot be told: `--to bnb4bit` exports them with the adapter."
            )
        imports += ", BitsAndBytesConfig"
        options = (
            f"\n    quantization_config=BitsAndBytesConfig(\n        load_in_4bit=True,\n"
            f'        bnb_4bit_quant_type="{quantization.format}",\n'
            f"        bnb_4bit_use_double_quant={quantization.double_quant},\n"
            f'        bnb_4bit_compute_dtype="{dtype}",\n    ),'
        )
    return _code(
        f"from peft import PeftModel\nfrom transformers import {imports}\n\n"
        f'base = AutoModelForCausalLM.from_pretrained(\n    "{base}",\n    dtype="{dtype}",{options}\n)\n'
        f'model = PeftModel.from_pretrained(base, "{adapter}")\ntokenizer = AutoTokenizer.from_pretrained(".")',
        "python",
    )


def _prompts(format: str) -> str:
    if format == "chat":
        return "It was trained on chats in the tokenizer's own template: `tokenizer.apply_chat_template`."
    if format == "none":
        return "It was trained on prompts as they stand, with nothing around them."
    prompt = format_prompt({"instruction": "{instruction}", "input": ""}, format)
    return f"It was trained on prompts that look so:\n\n{_code(prompt)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _code(text: str, language: str = "") -> str:
    return f"```{language}\n{text.rstrip()}\n```"
