"""The adapter in PEFT's layout: dense A⊙S and B⊙S, and a configuration by which PEFT adapts the same linears."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorasp.adapter import AdaptedLinear, adapted_linears
from lorasp.checkpoint import SavedAdapter, write_tensors_whole
from lorasp.finished_run import FinishedRun
from lorasp.whole_files import write_text_whole


def write_peft(directory: Path, run: FinishedRun, model: nn.Module, base_name: str) -> None:
    """`adapter_model.safetensors` (fp32) and `adapter_config.json`. base_name: what PEFT is to take for the base."""
    tensors = {}
    for linear in adapted_linears(model):
        A, B = dense_factors(run.saved, linear)
        tensors[f"base_model.model.{linear.name}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{linear.name}.lora_B.weight"] = B.contiguous()
    write_tensors_whole(directory / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = json.dumps(peft_config(run, model, base_name), indent=2, ensure_ascii=False)
    write_text_whole(directory / "adapter_config.json", config + "\n")


def dense_factors(saved: SavedAdapter, linear: AdaptedLinear) -> tuple[Tensor, Tensor]:
    """A⊙S (with A's frozen start under `frozen_entries: init`) [r, in] and B⊙S [out, r], as saved: fp32 on the CPU."""
    of = {part: saved.tensors.get(f"{linear.name}.{part}") for part in ("A", "A_bits", "A_rest", "B", "B_bits")}
    A = linear.A_selection.expand(of["A"], of["A_bits"], of["A_rest"])
    return A, linear.B_selection.expand(of["B"], of["B_bits"])


def peft_config(run: FinishedRun, model: nn.Module, base_name: str) -> dict[str, Any]:
    """What `peft.LoraConfig` needs to compute the same update; PEFT's own defaults fill in the rest."""
    adapter, info = run.recipe.adapter, run.saved.info
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": run.recipe.model.revision,
        "inference_mode": True,
        "r": info.rank,
        "lora_alpha": int(info.alpha) if info.alpha == int(info.alpha) else info.alpha,
        "use_rslora": info.rslora,
        "lora_dropout": adapter.dropout,
        "target_modules": _target_modules(
            {linear.name for linear in adapted_linears(model)}, [name for name, _ in model.model.named_modules()]
        ),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _target_modules(adapted: set[str], modules: Iterable[str]) -> list[str]:
    """Last names (`q_proj`) where these say exactly what is adapted, whole names otherwise.

    PEFT adapts a module if its name is listed, or ends in "." and a listed name.
    """
    last = {name.rpartition(".")[2] for name in adapted}
    matched = {name for name in modules if name.rpartition(".")[2] in last}
    return sorted(last if matched == adapted else adapted)
