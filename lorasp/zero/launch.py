"""From a recipe and the launcher's environment to ranks that agree on what they are."""

import difflib
import json
import logging
import os
import socket
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from lorasp.hashing import stream_key
from lorasp.recipe import Recipe, RecipeError
from lorasp.recipe_deepspeed import SHARD_GROUP, keeps_base_whole, shard_group_size

# What an Accelerate default config (~/.cache/huggingface/accelerate) may hold that a recipe decides; the launcher
# hands it on as variables, which DeepSpeedPlugin would read. RANK, WORLD_SIZE and the like are not among them.
_LAUNCHER_SETTINGS = "ACCELERATE_"

# Stage 2 on the engine of stage 3, whose state is what we read and write: what is trained stays gathered, and is
# gathered again once a step, when it has changed. What is frozen never becomes ZeRO's (sharding.keep_unit_whole).
_STAGE_2 = {"stage": 3, "stage3_param_persistence_threshold": 2**40, "stage3_max_reuse_distance": 0}

# How many elements are gathered ahead of use, and so also kept between forward and backward. "auto": the largest
# unit's. DeepSpeed counts elements as stored, packed codes among them: its default is the whole of a small model.
PREFETCH = "stage3_prefetch_bucket_size"
LIVE = "stage3_max_live_parameters"  # elements beyond which nothing is gathered ahead


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the ranks, and the Accelerator that binds them.

    overruled: settings of the launcher's environment that the recipe overruled, as `NAME=value`.
    """

    accelerator: Any
    overruled: list[str]

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """`value` (plain data) of every rank, in rank order. Collective."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered


def start_ranks(recipe: Recipe, dtype: torch.dtype, *, trains: bool = True) -> Ranks:
    """Joins the process group and builds the Accelerator with DeepSpeed's plugin from the recipe.

    Works under `accelerate launch` with or without flags, under torchrun, and as a plain `python launch/train.py`. One
    process without a launcher becomes rank 0 of 1.

    Raises RecipeError when the batch does not fit the world size, where it `trains` at all, or a launcher's processes
    do not form one world.
    """
    overruled = _take_over_environment()
    if trains:
        recipe.accumulation(int(os.environ["WORLD_SIZE"]))  # refuse a batch that does not fit before all else
    _quiet_libraries()

    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True, warn_only=True)

    # Imported here: deepspeed reads the environment at import.
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # Its shared-memory collectives are compiled with g++ at first use, leave a lock behind when killed, and serve
    # all_reduce only; gloo does that too.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    cuda = torch.cuda.is_available()
    check_zero_settings(recipe)
    config = deepspeed_config(recipe, dtype, int(os.environ["WORLD_SIZE"]), trains=trains)
    accelerator = Accelerator(
        # The plugin and the backend are given here because the user's launch command need not name them. Without the
        # backend, and without a GPU, each process would take itself for rank 0 of 1 while DeepSpeed shards over all.
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
        kwargs_handlers=[
            InitProcessGroupKwargs(
                backend="nccl" if cuda else "gloo",
                timeout=timedelta(seconds=recipe.deepspeed.collective_timeout_seconds),
            )
        ],
    )
    # A live HfDeepSpeedConfig would make transformers initialise the ZeRO-3 way, which fails on the meta device.
    unset_hf_deepspeed_config()
    ranks = Ranks(accelerator, overruled)
    launched = int(os.environ["WORLD_SIZE"])
    if not dist.get_world_size() == ranks.world_size == launched:
        raise RecipeError(
            f"the launcher started {launched} processes, torch.distributed counts {dist.get_world_size()} and "
            f"Accelerate {ranks.world_size}: launch with `accelerate launch` or `torchrun`"
        )
    # Dropout alone draws from torch's generator: other numbers on each rank, the same in each run.
    torch.manual_seed(stream_key(recipe.seed, "rank", ranks.rank))
    return ranks


def deepspeed_config(recipe: Recipe, dtype: torch.dtype, world_size: int, *, trains: bool = True) -> dict[str, Any]:
    """The JSON of `ds_configs/` with what the recipe decides filled in; where nothing `trains`, any batch will do."""
    config = json.loads(Path(recipe.deepspeed.config).read_text())
    config["train_micro_batch_size_per_gpu"] = recipe.on_ranks(world_size).training.micro_batch_size
    config["gradient_accumulation_steps"] = recipe.accumulation(world_size) if trains else 1
    config["gradient_clipping"] = recipe.training.max_grad_norm
    config["bf16"] = {"enabled": dtype == torch.bfloat16}
    # Adapters are tiny: bf16 sums of their gradients lose bits and save nothing.
    config["communication_data_type"] = "fp32"
    config["data_types"] = {"grad_accum_dtype": "fp32"}
    # Otherwise zero.Init replaces torch.nn.functional.linear for the whole process.
    config["zero_optimization"]["memory_efficient_linear"] = False
    config["steps_per_print"] = 2**31 - 1
    if keeps_base_whole(recipe.deepspeed.config):
        config["zero_optimization"] |= _STAGE_2
    of_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    config["zero_optimization"][SHARD_GROUP] = shard_group_size(recipe.deepspeed.config, world_size, of_node)
    return config


def check_zero_settings(recipe: Recipe) -> None:
    """Raises RecipeError for a setting of the DeepSpeed config's ZeRO section that the installed DeepSpeed lacks."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = {*fields, *(field.alias for field in fields.values() if field.alias)}
    for key in json.loads(Path(recipe.deepspeed.config).read_text())["zero_optimization"]:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise RecipeError(
                f"deepspeed.config: {recipe.deepspeed.config}: zero_optimization.{key}: DeepSpeed has no such setting"
                f"{f', did you mean {near[0]}?' if near else ''}"
            )


def stop_ranks(ranks: Ranks) -> None:
    """Leaves the process group in step with the other ranks."""
    ranks.accelerator.wait_for_everyone()
    ranks.accelerator.end_training()  # destroys the process group


def _take_over_environment() -> list[str]:
    """Drops Accelerate's variables, returns those that set something, and completes a lone process's rendezvous."""
    unset = {"", "no", "none", "None", "false", "False", "NO", "auto", "default"}
    agreed = {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_CONFIG_DS_FIELDS"}  # the latter lists the names of the others
    overruled = []
    for name in sorted(name for name in os.environ if name.startswith(_LAUNCHER_SETTINGS)):
        value = os.environ.pop(name)
        if value not in unset and name not in agreed:
            overruled.append(f"{name}={value}")
    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return overruled


def _quiet_libraries() -> None:
    """Only rank 0 talks, and what it says is ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    # It is the rank's own: Accelerate has made it the current one.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    for name in ("deepspeed", "DeepSpeed", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
