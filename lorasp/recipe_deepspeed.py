"""What a recipe asks of the DeepSpeed configuration that it names, checked without DeepSpeed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorasp.recipe_errors import RecipeError, shown

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
# Ranks that hold a whole set of shards among them, so that they gather from each other: "auto" is those of a node.
SHARD_GROUP = "zero_hpz_partition_size"
_AUTO = ("zero_optimization.stage3_prefetch_bucket_size", f"zero_optimization.{SHARD_GROUP}")
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
    if zero.get("stage") not in (2, 3):
        faults.append(
            f"{path}: ZeRO stage {shown(zero.get('stage', 0))} would keep the whole base and optimizer on every rank; "
            f"use stage 3, as zero3.json does, or 2, as zero2.json does"
        )
    if zero.get("stage") == 2:
        faults += [
            f"{path}: {key} is of ZeRO stage 3, where the base is sharded; remove it, or start from zero3.json"
            for key in zero
            if key.startswith(("stage3_", "zero_hpz", "offload_param"))
        ]
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
        f'{path}: {key} is "auto", which only {" and ".join(_AUTO)} may be; remove it, or write a number'
        for key in _auto_keys(config)
        if key not in _OWNED and key not in _AUTO
    ]
    size = zero.get(SHARD_GROUP, 1)
    if size != "auto" and not (type(size) is int and size >= 1):
        faults.append(f"{path}: {SHARD_GROUP} is {shown(size)}; write a number of ranks, or auto for those of a node")
    return faults


def keeps_base_whole(path: str) -> bool:
    """Whether the DeepSpeed JSON at `path` asks for ZeRO's stage 2: what is frozen stays whole on every rank."""
    return json.loads(Path(path).read_text())["zero_optimization"]["stage"] == 2


def shard_group_size(path: str, world_size: int, ranks_of_a_node: int) -> int:
    """What the DeepSpeed JSON at `path` says of SHARD_GROUP; 1 where all ranks form one group anyway.

    Raises RecipeError for a number that does not divide the ranks.
    """
    size = json.loads(Path(path).read_text())["zero_optimization"].get(SHARD_GROUP, 1)
    size = ranks_of_a_node if size == "auto" else size
    if world_size % size:
        raise RecipeError(
            f"deepspeed.config: {path}: {SHARD_GROUP} of {size} does not divide {world_size} ranks; write a number "
            f"that does"
        )
    return 1 if size == world_size else size


def _auto_keys(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in _OWNED:
            yield from _auto_keys(value, f"{prefix}{key}.")
        elif value == "auto":
            yield f"{prefix}{key}"
