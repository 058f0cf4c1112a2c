"""One rank of a test: trains each job's recipe for a few steps and writes what it measured, a JSON file a job."""

import json
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from bitsandbytes import functional as bnb
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file

from lorasp.accounting import held_bytes
from lorasp.adapter import model_selection_digest
from lorasp.cli import end_rank
from lorasp.data.batches import collate, training_batches
from lorasp.data.examples import Example
from lorasp.data.order import SampleOrder
from lorasp.isolation import check_isolation
from lorasp.live_tensors import LiveTensors
from lorasp.quantization import ShardedLinear
from lorasp.recipe import Recipe
from lorasp.resume import Checkpoints, RunState, newest_checkpoint
from lorasp.run import adapter_info, compute_dtype, load_model
from lorasp.schedule import learning_rate
from lorasp.trainer import train_step
from lorasp.zero import sharding
from lorasp.zero.engine import Engine
from lorasp.zero.launch import start_ranks, stop_ranks
from lorasp.zero.sharding import gathered, shard_bytes

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
    sharding._LARGE = job.get("large", 2**24)
    examples = [Example(tuple(ids), prompt) for ids, prompt in job["examples"]]
    resumed = newest_checkpoint(Path(job["resume"]), print) if "resume" in job else None
    with LiveTensors() as loading:
        loaded = load_model(recipe, Path(recipe.model.path), ranks, dtype, resumed=resumed)
    engine = Engine(ranks, loaded.model, recipe.training)
    if resumed is not None:
        check_isolation(engine, dtype, ranks.device)  # as train.py does: a forward of what is then replaced
        resumed.restore(engine)
    engine.train_mode(True)
    found: dict = {
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "ds_config": recipe.deepspeed.config,
        "counts": [loaded.counts.total, loaded.counts.adapter, loaded.counts.trained],
        "selection_digest": model_selection_digest(loaded.model),
        "base_digest": loaded.base_digest,
        "rows": [],
        "labels": [],
        "losses": [],
        "norms": [],
        "load_peak": loading.peak_bytes,
    }
    order = SampleOrder(
        [len(example.input_ids) for example in examples],
        seed=recipe.seed,
        epochs=recipe.training.epochs,
        global_batch_size=recipe.training.global_batch_size,
        max_steps=recipe.training.max_steps,
        pack_to=recipe.data.max_length if recipe.data.packing else None,
    )
    steps = list(
        training_batches(
            examples,
            order,
            micro_batch_size=recipe.training.micro_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            start_step=resumed.state.step if resumed else 0,
        )
    )
    if job.get("live"):
        found |= live_bytes(engine, loaded.model, examples, ranks)
    for step in steps:
        engine.set_learning_rate(learning_rate(step.step, order.total_steps, recipe.training))
        if step.step == job.get("gradients_of"):
            found["gradients"] = gradients(engine, step, ranks)
        is_last = step is steps[-1]
        with (
            Gathers(loaded.model) if is_last and job.get("gathers") else nullcontext() as gathers,
            LiveTensors() if is_last and job.get("count_operations") else nullcontext() as counted,
        ):
            share, norm = train_step(engine, step, ranks.device, ranks.world_size)
        if gathers is not None:
            found["gathers"] = gathers.of_units()
            found["gathered_in_backward"] = gathers.most_in_backward
            found["gathered"] = gathers.bytes()
        if counted is not None:
            found["synchronising"] = {op: counted.op_counts[op] for op in _SYNCHRONISING if counted.op_counts[op]}
            found["operations"] = sum(counted.op_counts.values())
            found["step_peak"] = counted.peak_bytes
            found["step_rows"] = [row for batch in step.micro_batches for row in batch.rows]
        loss = share.clone()
        torch.distributed.all_reduce(loss)
        found["losses"].append(loss.item())
        found["norms"].append(norm.item())
        found["rows"].append([row for batch in step.micro_batches for row in batch.rows])
        found["labels"].append([sum(batch.label_counts) for batch in step.micro_batches])
        if step.step + 1 == job.get("save_at"):
            found["saved_bytes"] = save(Path(job["save_to"]), step.step + 1, recipe, loaded, engine, ranks)
    found["held"] = held_bytes(loaded.model, engine)
    found["largest_unit"] = largest_unit(loaded.model, ranks)
    found["base"] = base_shards(loaded.model)
    found["optimizer"] = [(kind, tensor.numel(), str(tensor.dtype)) for kind, tensor in engine.optimizer_tensors()]
    found["trained"] = [(n, p.ds_numel) for n, p in loaded.model.named_parameters() if p.requires_grad]
    values = dict(engine.trained_values())
    found["values"] = {name: value.flatten().tolist() for name, value in values.items()}
    if job.get("codes"):
        found["codes"] = differences_from_bitsandbytes(loaded.model, recipe)
    return found


def save(run_dir: Path, step: int, recipe: Recipe, loaded, engine: Engine, ranks) -> int:
    """Bytes of the checkpoint's files, on rank 0."""
    checkpoints = Checkpoints(run_dir, recipe.checkpoint, is_main=ranks.is_main, warn=print)
    log = {"history": [], "scores": [], "metrics": {}, "samples": []}
    state = RunState.of(step, recipe, base_digest=loaded.base_digest, data={}, world_size=ranks.world_size, log=log)
    checkpoints.save(state, engine, adapter_info(recipe, loaded, step), loaded.model)
    checkpoints.wait()
    torch.distributed.barrier()
    return sum(path.stat().st_size for path in checkpoints.path(step).rglob("*.safetensors"))


class Gathers:
    """Within the `with` block: how often each parameter was gathered, and the most bytes whole at once in backward."""

    def __init__(self, model) -> None:
        self.model, self.counts, self.most_in_backward = model, Counter(), 0

    def __enter__(self):
        # The one place where DeepSpeed starts gathers of a forward or backward, ahead of use or not.
        name = "_PartitionedParameterCoordinator__all_gather_params"
        self.patched, gather = name, getattr(PartitionedParameterCoordinator, name)
        self.original = gather

        def counted(coordinator, params, forward):
            self.counts.update(id(p) for p in params if p.ds_status.name == "NOT_AVAILABLE")
            gather(coordinator, params, forward)
            if torch._C._current_graph_task_id() != -1:  # within autograd's backward
                whole = [p for p in self.model.parameters() if p.ds_status.name != "NOT_AVAILABLE"]
                held = sum(p.ds_numel * p.element_size() for p in whole)
                self.most_in_backward = max(self.most_in_backward, held)

        setattr(PartitionedParameterCoordinator, name, counted)
        return self

    def __exit__(self, *_):
        setattr(PartitionedParameterCoordinator, self.patched, self.original)

    def bytes(self) -> int:
        """As stored, of all that was gathered."""
        return sum(self.counts[id(p)] * p.ds_numel * p.element_size() for p in self.model.parameters())

    def of_units(self) -> dict[str, list[int]]:
        """The different counts among the parameters of each decoder layer; one, where it is gathered as one."""
        layers = self.model.model.get_decoder().layers
        return {str(i): sorted({self.counts[id(p)] for p in layer.parameters()}) for i, layer in enumerate(layers)}


def differences_from_bitsandbytes(model, recipe: Recipe) -> dict[str, list[str]]:
    """Of each linear: which of its gathered codes and scales are not bitsandbytes' own of the stored weight."""
    stored = load_file(Path(recipe.model.path) / "model.safetensors")
    found = {}
    for name, module in model.model.named_modules():
        if isinstance(module, ShardedLinear):
            codes, state = bnb.quantize_4bit(
                stored[f"{name}.weight"], blocksize=64, quant_type="nf4", compress_statistics=True
            )
            expected = {"codes": codes.view(-1), "scales": state.absmax}
            expected |= {"scale_scales": state.state2.absmax, "scale_offset": state.offset}
            with gathered(module.codes), gathered(module.scales):
                found[name] = [
                    part for part, value in expected.items() if not torch.equal(getattr(module, part), value)
                ]
    return found


def base_shards(model) -> dict:
    """Of each quantized tensor: (whole elements, this rank's, dtype)."""
    return {
        f"{name}.{part}": (tensor.ds_numel, tensor.ds_tensor.numel(), str(tensor.ds_tensor.dtype))
        for name, module in model.named_modules()
        if isinstance(module, ShardedLinear)
        for part, tensor in module.base_tensors()
        if part in ("codes", "scales") and hasattr(tensor, "ds_tensor")
    }


def gradients(engine: Engine, step, ranks) -> dict:
    """The gradient of the global batch's loss for each trained parameter, without stepping."""
    micro_batches = step.micro_batches
    for batch in micro_batches:
        loss = engine(**batch.model_inputs(ranks.device))
        engine.backward(loss * (ranks.world_size * len(micro_batches) / max(1, step.label_count)), last=False)
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
        # Of whatever is called: with `selective` and `lean` linears and norms are not, but their layer is.
        module.register_forward_hook(lambda m, a, output: dtypes.add(str(output.dtype)))
        for module in model.model.get_decoder().modules()
        if isinstance(module, ShardedLinear) or "Norm" in type(module).__name__ or "Layer" in type(module).__name__
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
    found["all_units"] = sum(shard_bytes(p) for p in model.parameters()) * ranks.world_size
    found["activation_dtypes"] = sorted(dtypes)
    return found


def largest_unit(model, ranks) -> int:
    """Bytes of the largest unit, whole (with padding)."""
    return max(
        sum(shard_bytes(p) for p in unit.parameters()) * ranks.world_size
        for unit in [*model.model.get_decoder().layers, model.model.get_input_embeddings()]
    )


def gathered_bytes(model) -> int:
    """Bytes of parameters that are whole on this rank at this moment."""
    return sum(p.data.numel() * p.element_size() for p in model.parameters() if p.ds_status.name == "AVAILABLE")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_rank(0)
