"""What each rank will hold at most, by phase and part, told from a recipe before anything is loaded.

What is kept between steps is counted from the model on the meta device, by ZeRO-3's own rule: a rank keeps ⌈n/N⌉
elements of a parameter of n. What a step needs besides is traced (tracing.py) with few layers of each kind, and with
one more of each; the difference is what a layer adds. No weight, no GPU, no deepspeed and no bitsandbytes is needed,
and no constant is fitted to a run.

A plan counts tensors: not the CUDA context and NCCL's buffers on a GPU (0.5 to 1.5 GiB outside torch's allocator), nor
what an allocator keeps of what was freed; and those on the rank's device: what is offloaded from a GPU is the host's.
"""

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lorasp.data import glue
from lorasp.data.batches import Batch, collate
from lorasp.data.examples import Example
from lorasp.data.pairs import PairBatch, collate_pairs
from lorasp.evaluation.mmlu_prompts import assumed_forward
from lorasp.evaluation.scoring import Forward, ScoredRow
from lorasp.glue import GLUE
from lorasp.memory import GATHERED_AT_ONCE, gib
from lorasp.models.gathers import gathered_bytes
from lorasp.models.task_model import TaskModel
from lorasp.quantization import ShardedLinear
from lorasp.recipe import DS_CONFIGS, Recipe
from lorasp.recipe_deepspeed import keeps_base_whole, shard_group_size
from lorasp.tracing import Traces, largest_layer, layer_kinds

_ADAPTER = ("A", "B", "A_rest", "W", "W_rest")  # as accounting.py has it, which imports deepspeed


@dataclass(frozen=True)
class Plan:
    """Peaks of one rank (the worst), in bytes: phase -> part -> bytes. A phase's peak is the sum of its parts.

    received_bytes: of shards that a rank gathers from others in one micro batch, forward and backward.
    """

    world_size: int
    phases: dict[str, dict[str, int]]
    received_bytes: int = 0

    def peak(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def highest(self) -> int:
        """Of all phases."""
        return max(map(self.peak, self.phases))


def plan(
    recipe: Recipe,
    config: PreTrainedConfig,
    *,
    world_size: int,
    dtype: torch.dtype,
    device: str = "cuda",
    batch: Batch | None = None,
    mmlu: tuple[Forward, Sequence[ScoredRow]] | None = None,
    ranks_of_a_node: int = 8,
    traces: Traces | None = None,
) -> Plan:
    """The plan for micro batches like `batch`; without one, of `training.micro_batch_size` rows of `data.max_length`
    tokens, all of them labelled (of a classifier, each row once; of T5, as long on either side).

    mmlu: its heaviest forward, and the rows of that, where the recipe asks for MMLU; None: about as heavy a one.
    dtype: of computation. device: "cuda", or "cpu", from which nothing can be offloaded. ranks_of_a_node: for a
    DeepSpeed configuration that keeps a set of shards in each node. traces: shared by plans of one model, method and
    precision, so that nothing is built or traced twice.
    Raises RecipeError for a model that cannot be built, NoPlan for one that cannot be traced.
    """
    batch = _full_batch(recipe) if batch is None else batch
    if mmlu is None and recipe.mmlu.data is not None:
        mmlu = assumed_forward(recipe.mmlu, config)
    base_whole = keeps_base_whole(recipe.deepspeed.config)
    group = shard_group_size(recipe.deepspeed.config, world_size, min(ranks_of_a_node, world_size))
    activations_away = device != "cpu" and recipe.training.offload_activations
    shards_away = device != "cpu" and _offloads_shards(recipe)
    traces = Traces() if traces is None else traces

    whole = traces.whole(recipe, config, dtype)
    kinds = layer_kinds(whole)

    def traced(counts: Sequence[int]) -> dict[str, int]:
        layers = [name for kind, count in zip(kinds, counts, strict=True) for name in kind[:count]]
        model = traces.model(recipe, config, dtype, layers)
        step = traces.step(model, batch, activations_away=activations_away)
        return step if mmlu is None else step | traces.scoring(model, *mmlu)

    found = _count(whole, recipe, world_size, group, base_whole)
    few = _few_layers(kinds, scores=mmlu is not None)
    least = traced(few)
    needed = dict(least)
    for kind, its in enumerate(kinds):
        if rest := len(its) - few[kind]:
            more = traced([count + (kind == other) for other, count in enumerate(few)])
            needed = {key: value + rest * (more[key] - least[key]) for key, value in needed.items()}
    found |= needed
    layer = largest_layer(whole)
    if shards_away:
        found["base_shard"] = found["adapters"] = 0
    # Nothing is gathered where a rank's shard is the whole.
    is_whole = base_whole or (world_size == 1 and not shards_away)
    gathered, head = (0, 0) if is_whole else (layer, found["head"])
    held = {part: found[part] for part in ("base_shard", "adapters", "masks", "buffers", "gradients")}
    trained = {**held, "optimizer": 3 * found["masters"] + 4}
    # The head's weight is whole while the last layer is gathered for its backward; then layer by layer, the next one
    # on its way.
    at_head = {"gathered": head + gathered, "activations": found["peak_at_head"]}
    in_backward = {"gathered": 2 * gathered, "activations": max(found["peak_in_backward"], found["peak_in_encoder"])}
    train = max(at_head, in_backward, key=lambda parts: sum(parts.values()))
    # The last unit is filled while the adapters of all are still whole; then the optimizer takes its masters.
    unit = max(layer, found["embedding"]) + found["largest_filled"]
    filling = {**held, "adapters": found["adapters_whole"], "gradients": 0, "unit": unit}
    ready = {**held, "optimizer": found["masters"]}
    load = max(filling, ready, key=lambda parts: sum(parts.values()))
    save = {**trained, "gathered": 4 * min(found["trained"], world_size * GATHERED_AT_ONCE)}
    phases = {"load": load, "train": {**trained, **train}, "save": save}
    if mmlu is not None:
        phases["evaluate_mmlu"] = {
            **trained,
            "gathered": gathered + max(gathered, head),
            "kept_shots": found["kept_in_scoring"],
            "activations": found["peak_in_scoring"],
        }
    received = 0 if base_whole else found["gathered_in_step"] * (world_size - 1) // world_size
    return Plan(world_size, phases, received)


def _few_layers(kinds: list[list[str]], scores: bool) -> list[int]:
    """How many layers of each kind are traced, from which on one more adds the same.

    Two of a model that scores: what the embedding gave stays until the end, beside the input of each other layer.
    """
    return [min(1 + scores, len(kind)) for kind in kinds]


def _full_batch(recipe: Recipe) -> Batch | glue.GlueBatch | PairBatch:
    length, count = recipe.data.max_length, recipe.training.micro_batch_size
    if recipe.kind == "classification":
        rows = [glue.GlueExample((0,) * length, (0,) * length, 0)] * count
        return glue.collate(rows, range(count), is_regression=GLUE[recipe.task].is_regression)
    if recipe.kind == "translation":
        return collate_pairs([Example((0,) * 2 * length, prompt_length=length)] * count, range(count))
    return collate([Example((0,) * length, prompt_length=1)] * count, range(count))


def with_whole_base(recipe: Recipe) -> Recipe:
    """The same run with ZeRO's stage 2, which gathers nothing of the base, as every rank holds all of it."""
    config = str(DS_CONFIGS / "zero2.json")
    return recipe.model_copy(update={"deepspeed": recipe.deepspeed.model_copy(update={"config": config})})


def as_method(recipe: Recipe, method: str) -> Recipe:
    """The same run by another method: `lorasp`, `lora` at the same rank, or `full`.

    What the recipe's own method has no use for, such as an adapter's rank beside `full`, is the default.
    """
    tree = recipe.to_dict() | {"method": method}
    if recipe.method == "full" != method:
        del tree["quantization"]  # it says none, as full fine-tuning must
    if method != "lorasp":
        tree.pop("selection", None)
        for key in ("frozen_entries", "head"):
            tree.get("adapter", {}).pop(key, None)
    if method == "full":
        for section in ("adapter", "quantization"):
            tree.pop(section, None)
    return Recipe(**tree)


# From the fastest: nothing is gathered, or within a node, or over all, or it comes from the host; what is computed
# again, and then what is moved.
_CONFIGS = ("zero2.json", "zero3_hpz.json", "zero3.json", "zero3_offload.json")
_POLICIES = (("selective", False), ("lean", False), ("layer", False), ("lean", True))
_OTHER_POLICIES = (("none", False), ("layer", False), ("none", True))  # where layers cannot be taken apart


def plans_that_fit(
    recipe: Recipe,
    config: PreTrainedConfig,
    *,
    world_size: int,
    dtype: torch.dtype,
    limit_bytes: int,
    device: str = "cuda",
    ranks_of_a_node: int = 8,
) -> Iterator[tuple[list[str], Plan]]:
    """(overrides of the recipe, their plan) of what stays within `limit_bytes` a rank, the fastest first.

    Of each shard group, activation policy and offload the largest micro batch that fits, up to twice the recipe's.
    """
    training = recipe.training
    sizes = [size for size in range(2 * training.micro_batch_size, 0, -1) if _divides(recipe, size, world_size)]
    how = {"world_size": world_size, "dtype": dtype, "device": device, "ranks_of_a_node": ranks_of_a_node}
    how["traces"] = Traces()
    policies = [its for its in _policies(recipe, config, dtype, how["traces"]) if device != "cpu" or not its[1]]
    for path in _configurations(recipe, world_size, device, ranks_of_a_node):
        for policy, away in policies:
            settings = {"activation_checkpointing": policy, "offload_activations": away}
            update = {"training": training.model_copy(update=settings)}
            update["deepspeed"] = recipe.deepspeed.model_copy(update={"config": path})
            found = _largest_micro_batch(recipe.model_copy(update=update), config, sizes, limit_bytes, **how)
            if found is not None:
                size, its_plan = found
                overrides = [f"training.activation_checkpointing={policy}", f"training.micro_batch_size={size}"]
                if away != training.offload_activations:
                    overrides.append(f"training.offload_activations={str(away).lower()}")
                if path != recipe.deepspeed.config:
                    overrides.append(f"deepspeed.config={Path(path).name}")
                yield overrides, its_plan


def _policies(
    recipe: Recipe, config: PreTrainedConfig, dtype: torch.dtype, traces: Traces
) -> tuple[tuple[str, bool], ...]:
    """(activation_checkpointing, offload_activations) that make a difference to this model."""
    training = recipe.training.model_copy(update={"activation_checkpointing": "selective"})
    layers = [kind[0] for kind in layer_kinds(traces.whole(recipe, config, dtype))]
    few = traces.model(recipe.model_copy(update={"training": training}), config, dtype, layers)
    return _OTHER_POLICIES if traces.fallback(few) else _POLICIES


def _largest_micro_batch(
    recipe: Recipe, config: PreTrainedConfig, sizes: list[int], limit_bytes: int, **how: Any
) -> tuple[int, Plan] | None:
    """The first of `sizes` (descending) that fits, and its plan: whatever a larger one needs is more."""
    plans: dict[int, Plan] = {}

    def fits(size: int) -> bool:
        training = recipe.training.model_copy(update={"micro_batch_size": size})
        plans[size] = plan(recipe.model_copy(update={"training": training}), config, **how)
        return plans[size].highest <= limit_bytes

    first = bisect_left(sizes, True, key=fits)
    return (sizes[first], plans[sizes[first]]) if first < len(sizes) else None


def _configurations(recipe: Recipe, world_size: int, device: str, ranks_of_a_node: int) -> list[str]:
    """DeepSpeed's files to try: the shipped ones where the recipe names one of them, else its own alone."""
    own = Path(recipe.deepspeed.config)
    if own.parent != DS_CONFIGS:
        return [recipe.deepspeed.config]
    useless = set() if world_size > 1 else {"zero2.json"}  # on one rank, zero3.json gathers nothing either
    if world_size <= ranks_of_a_node or world_size % ranks_of_a_node:
        useless.add("zero3_hpz.json")
    if device == "cpu":
        useless.add("zero3_offload.json")
    return [str(own.with_name(name)) for name in _CONFIGS if name not in useless]


def _divides(recipe: Recipe, micro_batch_size: int, world_size: int) -> bool:
    return recipe.training.global_batch_size % (micro_batch_size * world_size) == 0


def excess(plan: Plan, free_bytes: int) -> str | None:
    """A sentence where a rank's tensors alone would take more than `free_bytes`."""
    if plan.highest <= free_bytes:
        return None
    phase = max(plan.phases, key=plan.peak)
    parts = ", ".join(f"{part.replace('_', ' ')} {gib(size)}" for part, size in plan.phases[phase].items())
    return (
        f"memory: by the plan a rank holds {gib(plan.highest)} GiB at the peak of {phase} ({parts}), and has "
        f"{gib(free_bytes)} GiB free; `launch/plan.py … --world-size {plan.world_size} --fit "
        f"{free_bytes / 2**30:.1f}GiB` tells what fits; memory.check=warn starts all the same"
    )


def _count(model: TaskModel, recipe: Recipe, world_size: int, group: int, base_whole: bool) -> dict[str, int]:
    """Bytes (and `trained` entries) of what a rank keeps and gathers of the model."""
    found = dict.fromkeys(("base_shard", "adapters", "adapters_whole", "masks", "buffers", "trained"), 0)
    masters = 0
    for name, parameter in model.named_parameters():
        shard = kept = -(-parameter.numel() // world_size)
        if base_whole:  # of what is trained, the shard besides
            kept = parameter.numel() + (shard if parameter.requires_grad else 0)
        elif group > 1 and not parameter.requires_grad:  # also of the node's set, cut from what is padded for all
            kept += shard * world_size // group
        part = "adapters" if name.rpartition(".")[2] in _ADAPTER else "base_shard"
        found[part] += kept * parameter.element_size()
        if part == "adapters":
            found["adapters_whole"] += parameter.numel() * parameter.element_size()
        if parameter.requires_grad:
            masters += shard
            found["trained"] += parameter.numel()
    for name, buffer in model.named_buffers():
        found["masks" if name.endswith("_bits") else "buffers"] += buffer.numel() * buffer.element_size()
    found["masters"] = 4 * masters  # fp32, as are gradients and both moments
    found["gradients"] = 4 * masters + 4 * _bucket_elements(recipe)
    found["head"] = sum(_bytes(p) for module in model.label_modules() for p in module.parameters())
    found["gathered_in_step"] = gathered_bytes(model)
    found["embedding"] = _bytes(model.model.get_input_embeddings().weight)
    found["largest_filled"] = _largest_filled(model, recipe)
    return found


def _bucket_elements(recipe: Recipe) -> int:
    """Of the buffer in which gradients are reduced."""
    return int(_zero_settings(recipe).get("reduce_bucket_size", 5e8))  # DeepSpeed's default


def _offloads_shards(recipe: Recipe) -> bool:
    return _zero_settings(recipe).get("offload_param", {}).get("device", "none") != "none"


def _zero_settings(recipe: Recipe) -> dict[str, Any]:
    return json.loads(Path(recipe.deepspeed.config).read_text())["zero_optimization"]


def _largest_filled(model: TaskModel, recipe: Recipe) -> int:
    """What the largest matrix takes before it is quantized: as it is read, in 16 bits; where adapters are fitted to
    what that loses (`AdaptedLinear`), also as W and W - Q in fp32 and Q in the compute precision.
    """
    linears = [module for module in model.modules() if isinstance(module, ShardedLinear)]
    fitted = recipe.quantization.init == "residual"
    return max((m.in_features * m.out_features * (2 + fitted * (8 + m.dtype.itemsize)) for m in linears), default=0)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
