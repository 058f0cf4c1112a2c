"""One rank of a test: trains each job's recipe for a few steps and writes what it measured, a JSON file a job."""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from deepspeed.utils import safe_get_full_grad

from lorasp.accounting import held_bytes
from lorasp.adapter import model_selection_digest
from lorasp.data.batches import collate, training_batches
from lorasp.data.examples import Example
from lorasp.data.order import SampleOrder
from lorasp.memory import LiveTensors
from lorasp.quantization import ShardedLinear
from lorasp.recipe import Recipe
from lorasp.run import compute_dtype, load_model
from lorasp.schedule import learning_rate
from lorasp.trainer import train_step
from lorasp.zero.engine import Engine
from lorasp.zero.launch import start_ranks, stop_ranks
from lorasp.zero.sharding import shard_bytes

_SYNCHRONISING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


def main(directory: Path) -> None:
    jobs = json.loads((directory / "jobs.json").read_text())
    for name, job in jobs.items():
        recipe = Recipe(**job["recipe"])
        ranks = start_ranks(recipe, compute_dtype(recipe))
        found = run(job, recipe, ranks)
        (directory / f"{name}.{ranks.rank}.json").write_text(json.dumps(found))
        ranks.accelerator.wait_for_everyone()
        if name != list(jobs)[-1]:
            # Another recipe in the same processes: a new Accelerator on the same process group.
            AcceleratorState._reset_state()
            GradientState._reset_state()
    stop_ranks(ranks)


def run(job: dict, recipe: Recipe, ranks) -> dict:
    dtype = compute_dtype(recipe)
    examples = [Example(tuple(ids), prompt) for ids, prompt in job["examples"]]
    loaded = load_model(recipe, Path(recipe.model.path), ranks, dtype)
    engine = Engine(ranks, loaded.model, recipe.training)
    engine.train_mode(True)
    found: dict = {
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "counts": [loaded.counts.total, loaded.counts.adapter, loaded.counts.trained],
        "selection_digest": model_selection_digest(loaded.model),
        "base_digest": loaded.base_digest,
        "rows": [],
        "labels": [],
        "losses": [],
        "norms": [],
    }
    order = SampleOrder(
        [len(example.input_ids) for example in examples],
        seed=recipe.seed,
        epochs=recipe.training.epochs,
        global_batch_size=recipe.training.global_batch_size,
        max_steps=recipe.training.max_steps,
    )
    steps = list(
        training_batches(
            examples,
            order,
            micro_batch_size=recipe.training.micro_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
    )
    if job.get("gradients"):
        found["gradients"] = first_gradients(engine, steps[0], ranks)
    if job.get("live"):
        found |= live_bytes(engine, loaded.model, examples, ranks)
    for step in steps:
        engine.set_learning_rate(learning_rate(step.step, len(steps), recipe.training))
        if job.get("count_operations") and step.step == len(steps) - 1:
            with LiveTensors() as counted:
                share, norm = train_step(engine, step, ranks.device, ranks.world_size)
            found["synchronising"] = {op: counted.op_counts[op] for op in _SYNCHRONISING if counted.op_counts[op]}
            found["operations"] = sum(counted.op_counts.values())
        else:
            share, norm = train_step(engine, step, ranks.device, ranks.world_size)
        loss = share.clone()
        torch.distributed.all_reduce(loss)
        found["losses"].append(loss.item())
        found["norms"].append(norm.item())
        found["rows"].append([row for batch in step.micro_batches for row in batch.rows])
        found["labels"].append([sum(batch.label_counts) for batch in step.micro_batches])
    found["held"] = held_bytes(loaded.model, engine)
    found["base"] = base_shards(loaded.model)
    found["optimizer"] = [(kind, tensor.numel(), str(tensor.dtype)) for kind, tensor in engine.optimizer_tensors()]
    found["trained"] = [(n, p.ds_numel) for n, p in loaded.model.named_parameters() if p.requires_grad]
    values = dict(engine.trained_values())
    found["values"] = {name: value.flatten().tolist() for name, value in values.items()}
    return found


def base_shards(model) -> dict:
    """Of each quantized tensor: (whole elements, this rank's, dtype)."""
    return {
        f"{name}.{part}": (tensor.ds_numel, tensor.ds_tensor.numel(), str(tensor.ds_tensor.dtype))
        for name, module in model.named_modules()
        if isinstance(module, ShardedLinear)
        for part, tensor in module.base_tensors()
        if part in ("codes", "scales")
    }


def first_gradients(engine: Engine, step, ranks) -> dict:
    """The gradient of the global batch's loss for each trained parameter, without stepping."""
    micro_batches = step.micro_batches
    for batch in micro_batches:
        loss = engine(**batch.model_inputs(ranks.device))
        engine.backward(loss * (ranks.world_size * len(micro_batches) / step.label_count), last=False)
    grads = {
        name: safe_get_full_grad(parameter).float().flatten().tolist()
        for name, parameter in engine.model.named_parameters()
        if parameter.requires_grad
    }
    engine._engine.optimizer.zero_grad()
    return grads


def live_bytes(engine: Engine, model, examples, ranks) -> dict:
    """Bytes that a training forward leaves alive, for one token and for many: what grows is activations."""
    dtypes: set[str] = set()
    handles = [
        module.register_forward_hook(lambda m, a, output: dtypes.add(str(output.dtype)))
        for module in model.modules()
        if isinstance(module, ShardedLinear)
    ]
    short = Example(examples[0].input_ids[:2], 1)
    found = {}
    for kind, batch in (("short", collate([short], [0])), ("long", collate(examples, range(4)))):
        with LiveTensors() as live:
            loss = engine(**batch.model_inputs(ranks.device))
        found[f"live_{kind}"] = live.live_bytes
        found[f"gathered_{kind}"] = gathered_bytes(model)
        engine.backward(loss * 0, last=False)
        del loss, live
        found[f"{kind}_tokens"] = sum(batch.lengths)
    for handle in handles:
        handle.remove()
    engine._engine.optimizer.zero_grad()
    layers = model.model.get_decoder().layers
    found["largest_unit"] = max(
        sum(shard_bytes(p) for p in unit.parameters()) * ranks.world_size
        for unit in [*layers, model.model.get_input_embeddings()]
    )
    found["all_units"] = sum(shard_bytes(p) for p in model.parameters()) * ranks.world_size
    found["activation_dtypes"] = sorted(dtypes)
    return found


def gathered_bytes(model) -> int:
    """Bytes of parameters that are whole on this rank at this moment."""
    return sum(p.data.numel() * p.element_size() for p in model.parameters() if p.ds_status.name == "AVAILABLE")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
