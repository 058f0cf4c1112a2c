"""What a recipe asks of the DeepSpeed configuration that it names, checked without DeepSpeed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorasp.recipe_errors import shown

# Settings of DeepSpeed's that follow from the recipe, and what to set there instead.
_OWNED = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.learning_rate, weight_decay, betas and eps",
    "scheduler": "training.schedule and training.warmup_ratio",
    "bf16": "model.dtype",
    "fp16": "model.dtype (float16 is not supported)",
}
_REQUANTIZING = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def check_deepspeed_config(path: Path) -> list[str]:
    """What keeps DeepSpeed's JSON at `path` from being used, a sentence each."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: JSON's and Unicode's
        return [f"{path} cannot be read as JSON ({error})"]
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict):
        return [f"{path} has no section zero_optimization; start from ds_configs/zero3.json"]
    faults = []
    if zero.get("stage") != 3:
        faults.append(
            f"{path}: ZeRO stage {shown(zero.get('stage', 0))} would keep the whole base on every rank; use stage 3, "
            f"as zero3.json does"
        )
    faults += [
        f"{path}: {key} would quantize again what is 4-bit already, and round what is trained; remove it"
        for key in _REQUANTIZING
        if zero.get(key)
    ]
    faults += [
        f"{path}: {key} is the recipe's to say; remove it and set {ours}"
        for key, ours in _OWNED.items()
        if key in config
    ]
    offload = zero.get("offload_optimizer")
    if isinstance(offload, dict) and offload.get("device", "none") != "none":
        faults.append(
            f"{path}: offload_optimizer would take the masters and moments out of the optimizer that saves them; "
            f"remove it: an adapter's are small"
        )
    faults += [
        f'{path}: {key} is "auto", which only zero_optimization.stage3_prefetch_bucket_size may be; remove it, or '
        f"write a number"
        for key in _auto_keys(config)
        if key not in _OWNED and key != "zero_optimization.stage3_prefetch_bucket_size"
    ]
    return faults


def _auto_keys(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in _OWNED:
            yield from _auto_keys(value, f"{prefix}{key}.")
        elif value == "auto":
            yield f"{prefix}{key}"
