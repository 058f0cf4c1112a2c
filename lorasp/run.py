"""The stages of a run that launch scripts share: a directory of its own, data, a model that is built and sharded."""

import contextlib
import fcntl
import gc
import io
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lorasp.accounting import ParameterCounts, TrainingFlops, count_flops, count_parameters
from lorasp.adapter import adapted_linears, model_selection_digest
from lorasp.checkpoint import (
    CHECKPOINTS,
    AdapterInfo,
    SavedAdapter,
    load_adapter,
    replacing_whole,
    save_adapter,
    save_model,
)
from lorasp.data.mmlu import download_mmlu
from lorasp.evaluation.mmlu import PREDICTIONS, MmluEvaluation
from lorasp.evaluation.translation import TRANSLATIONS
from lorasp.host_memory import return_freed_memory
from lorasp.memory import free_bytes
from lorasp.models.build import build_on_meta, fill_and_shard
from lorasp.models.classes import model_class, open_weights
from lorasp.models.packed_base import PackedBaseWriter, RunBaseWriter, use_run_base
from lorasp.models.quantized_cache import DAMAGED, WORTH_KEEPING, QuantizedCache
from lorasp.models.random_weights import RandomWeights
from lorasp.models.recompute import set_recomputation
from lorasp.models.task_model import TaskModel
from lorasp.models.weights import DEMO_MODEL, Checkpoint, load_config, locate_model
from lorasp.planning import Plan, excess, plan
from lorasp.quantization import ShardedLinear
from lorasp.recipe import Recipe, RecipeError
from lorasp.recipe_deepspeed import keeps_base_whole
from lorasp.resume import LEFT, Found
from lorasp.tasks import task_of
from lorasp.tasks.base import ItemBatch, TaskData
from lorasp.tracing import NoPlan
from lorasp.uncompiled import uncompiled
from lorasp.zero.engine import Engine
from lorasp.zero.launch import PREFETCH, Ranks, deepspeed_config
from lorasp.zero.sharding import bring_to_first, broadcast_buffer, keep_unit_whole, shard_unit

with uncompiled():
    import bitsandbytes  # noqa: F401  (what its import takes is no part of the load phase, in which it is first used)

_LAST_RUN_ENDS = 10.0  # seconds that it may take, killed as it may be
_RESULTS = ("report.json", "adapter", "model")  # what a user would miss; a run that failed early leaves none of it
_OURS = (*_RESULTS, CHECKPOINTS, LEFT, "base", "report.md", "plots", "tensorboard", "profile", "export", TRANSLATIONS)


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """The compute precision: `auto` is bf16 on a GPU that has it, fp32 elsewhere (a CPU's bf16 is 6 times slower).

    Raises RecipeError for bf16 on a GPU without it.
    """
    on_gpu = torch.cuda.is_available()
    has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if recipe.model.dtype == "bfloat16" and not has_bf16:
        raise RecipeError(
            f"model.dtype: {torch.cuda.get_device_name()} has no bfloat16; set model.dtype=float32 (twice the memory)"
        )
    if recipe.model.dtype == "auto":
        return torch.bfloat16 if on_gpu and has_bf16 else torch.float32
    return getattr(torch, recipe.model.dtype)


def claim_run_directory(recipe: Recipe, ranks: Ranks, resumes: bool = False) -> Path:
    """The run's directory, made, writable and this run's alone; what an earlier run left there is not touched.

    Raises RecipeError if that is so without `overwrite`, unless this one `resumes` it, if another run writes there at
    this time, or if the directory cannot be written.
    """
    run_dir = recipe.run_dir
    found = [name for name in _RESULTS if (run_dir / name).exists()]
    if any((run_dir / CHECKPOINTS).glob("step-*")):
        found.append(CHECKPOINTS)
    if found and not (recipe.overwrite or resumes):
        raise RecipeError(
            f"{run_dir} holds another run ({', '.join(found)}); give this one a name=… of its own, or set "
            f"overwrite=true to replace that one"
        )
    start = recipe.adapter.init_from
    if start is not None and not resumes and (run_dir / CHECKPOINTS).resolve() in Path(start).resolve().parents:
        raise RecipeError(
            f"adapter.init_from: {start} lies in what this run would replace; give this run a name=… of its own"
        )
    if ranks.is_main:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / ".writable").touch()
            (run_dir / ".writable").unlink()
        except OSError as error:
            raise RecipeError(f"{run_dir} cannot be written ({error.strerror}); name another output_dir") from None
        _lock(run_dir)
    return run_dir


@cache  # a directory that this process has
def _lock(run_dir: Path) -> None:
    """Keeps other runs out of the directory for as long as this process lives, however it ends.

    Ranks can outlive their launcher, and the same command given again would write among their files. Where the file
    system has no locks on directories, as NFS, nobody is kept out. Raises RecipeError.
    """
    directory = os.open(run_dir, os.O_RDONLY)  # never closed: that would let go of it
    until = time.monotonic() + _LAST_RUN_ENDS
    while True:
        try:
            return fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise RecipeError(
                    f"{run_dir} is being written by another run that has not ended (look for launch/train.py in "
                    f"`ps ax`; SIGTERM has it save and leave); wait for it, or give this one a name=… of its own"
                ) from None
            time.sleep(0.5)
        except OSError:
            return


def clear_run_directory(run_dir: Path, ranks: Ranks, init_from: str | None = None) -> None:
    """Removes what an earlier run of this name left there (with `overwrite`; otherwise there is nothing).

    To be called once the model is loaded: a run that is refused must not have cost the earlier one. init_from: an
    adapter there that this run starts from stays until its own takes the place, or its loss would be this run's too.
    Predictions of an evaluation that was interrupted stay: it may be this one, which their first line tells
    (evaluation/predictions.py).
    """
    if ranks.is_main:
        kept = None if init_from is None else Path(init_from).resolve()
        for path in (run_dir / name for name in _OURS):
            if path.name == "adapter" and kept in (run_dir.resolve(), path.resolve()):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for path in (run_dir / PREDICTIONS).glob("*.jsonl"):
            path.unlink()


def find_model(recipe: Recipe, ranks: Ranks) -> Path:
    """The model's directory; one process a node downloads or converts it, the others wait for that one."""
    if int(os.environ["LOCAL_RANK"]) == 0 or recipe.model.path == DEMO_MODEL:
        directory = locate_model(recipe.model)
    ranks.accelerator.wait_for_everyone()
    return directory if int(os.environ["LOCAL_RANK"]) == 0 else locate_model(recipe.model, download=False)


def read_data(recipe: Recipe, directory: Path) -> TaskData:
    """The data of the recipe's task in the tokens of the model at `directory`. Raises RecipeError."""
    model_class(recipe).configured(load_config(directory, recipe.model), recipe)  # a model of another family
    return task_of(recipe).read_data(directory)


def fetch_data(recipe: Recipe, ranks: Ranks, *, trains: bool = True) -> None:
    """Downloads the hub data sets of the recipe, once a node. Collective. Raises RecipeError.

    trains: False where only benchmarks are asked, and nothing of `data` is read.
    """
    if int(os.environ["LOCAL_RANK"]) == 0:
        if trains:
            task_of(recipe).download()
        if recipe.mmlu.data is not None:
            download_mmlu(recipe.mmlu)
    ranks.accelerator.wait_for_everyone()


def read_mmlu_questions(recipe: Recipe, directory: Path, tokenizer: PreTrainedTokenizerBase) -> MmluEvaluation | None:
    """MMLU's questions in the tokens of the model at `directory`; None where none are asked. Raises RecipeError."""
    if recipe.mmlu.data is None:
        return None
    return MmluEvaluation(recipe.mmlu, tokenizer, load_config(directory, recipe.model))


def plan_memory(
    recipe: Recipe,
    directory: Path,
    ranks: Ranks,
    dtype: torch.dtype,
    batch: ItemBatch,
    mmlu: MmluEvaluation | None,
    *,
    warn: Callable[[str], None],
) -> Plan | None:
    """The run's plan, for micro batches as large as `batch`. Raises RecipeError for one that cannot fit.

    None for a model that cannot be planned, told through `warn`.
    """
    of_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    how = {"world_size": ranks.world_size, "dtype": dtype, "device": ranks.device.type}
    how |= {"batch": batch, "ranks_of_a_node": of_node}
    how["mmlu"] = None if mmlu is None else mmlu.heaviest(ranks.world_size)
    try:
        planned = plan(recipe, load_config(directory, recipe.model), **how)
    except NoPlan as reason:
        warn(f"memory: there is no plan, {reason}")
        return None
    finally:
        gc.collect()  # models without memory are many objects, in cycles: what loads would find them in its way
        return_freed_memory()
    too_much = excess(planned, free_bytes(ranks.device, of_node))
    if too_much and recipe.memory.check == "refuse":
        raise RecipeError(too_much)
    if too_much:
        warn(too_much)
    return planned


@dataclass(frozen=True)
class LoadedModel:
    """A sharded model, its counts, the digest of the base weights that it was made of, and the adapter it starts from.

    start: None where training starts from the base. recomputation: the activation policy in force, which is not the
    recipe's where `fallback` tells why. start_errors: of each linear whose adapter was fitted to what quantization
    loses, see `AdaptedLinear`. own_base: what rank 0 wrote of a base that only this run's adapter has.
    """

    model: TaskModel
    counts: ParameterCounts
    base_digest: str
    start: AdapterInfo | None
    flops: TrainingFlops
    recomputation: str
    fallback: str | None
    start_errors: dict[str, tuple[float, float]]
    own_base: RunBaseWriter | None


def load_model(
    recipe: Recipe,
    directory: Path,
    ranks: Ranks,
    dtype: torch.dtype,
    tell: Callable[[str], None] = lambda line: None,
    run_dir: Path | None = None,
    resumed: Found | None = None,
) -> LoadedModel:
    """Builds the recipe's model unit by unit, each sharded as soon as it is filled. Collective. Raises RecipeError.

    tell: is given a line about where the quantized base comes from, or is kept. run_dir: where a base is written that
    `quantization.init: residual` makes; None where it is there, or nothing is trained on it. resumed: from whose
    adapter, if it has one, the model starts; the rest of its state is the engine's.
    """
    config = load_config(directory, recipe.model)
    checkpoint = open_weights(directory, recipe)
    saved: SavedAdapter | None = None
    starts_from = resumed.adapter if resumed else recipe.adapter.init_from
    if starts_from is not None:
        saved = load_adapter(starts_from, recipe)
    model = build_on_meta(config, recipe, dtype)
    if saved is not None:
        saved.apply(model)
    counts, flops = count_parameters(model), count_flops(model)
    # Accumulation and prefetching are no matters of sharding; "auto" is known only to the engine.
    ds_config = deepspeed_config(recipe, dtype, ranks.world_size, trains=False)
    ds_config["zero_optimization"][PREFETCH] = 0
    place = keep_unit_whole if keeps_base_whole(recipe.deepspeed.config) else shard_unit
    keeps: PackedBaseWriter | None = None
    if recipe.quantization.init == "residual":
        if saved is not None:
            use_run_base(checkpoint, saved.own_base_of)
        keeps = RunBaseWriter(run_dir) if run_dir is not None and ranks.is_main else None
    else:
        cache = _quantized_cache(recipe, model, checkpoint, dtype, ranks, tell)
        manifest, cached_at = ranks.gather((cache.found(), cache.path) if cache else (None, None))[0]
        if manifest is None:
            keeps = cache
        else:
            checkpoint.replace(cached_at, manifest, DAMAGED)
            tell(f"base: what was quantized before is read from {cached_at}")
    fill_and_shard(
        model,
        checkpoint,
        device=ranks.device,
        rank=ranks.rank,
        world_size=ranks.world_size,
        shard=lambda unit: place(unit, ds_config),
        bring_to_first=bring_to_first,
        broadcast=broadcast_buffer,
        keep=keeps.keep if keeps else None,
    )
    start_errors: dict[str, tuple[float, float]] = {}
    for digests, errors in ranks.gather((checkpoint.digests, _start_errors(model))):  # each read its part
        checkpoint.digests |= digests
        start_errors |= errors
    base_digest = checkpoint.digest()
    if keeps is not None:
        keeps.finish(checkpoint.stored_digests())
    if resumed is not None and resumed.state.base_digest != base_digest:
        raise RecipeError(
            f"resume: {resumed.path} was trained on another base than {directory} holds now (digest "
            f"{resumed.state.base_digest[:12]}, now {base_digest[:12]}); give the weights that it began with"
        )
    if saved is not None:
        saved.check_base(base_digest)
    _check_agreement(model_selection_digest(model.model), ranks)
    policy, fallback = set_recomputation(model.model, recipe.training.activation_checkpointing)
    start = saved.info if saved else None
    if start and resumed:  # this run counts on from its own first step
        start = replace(start, step=start.step - resumed.state.step)
    own_base = keeps if isinstance(keeps, RunBaseWriter) else None
    return LoadedModel(model, counts, base_digest, start, flops, policy, fallback, start_errors, own_base)


def _start_errors(model: TaskModel) -> dict[str, tuple[float, float]]:
    return {m.name: m.start_errors for m in adapted_linears(model) if m.start_errors is not None}


def _quantized_cache(
    recipe: Recipe,
    model: TaskModel,
    checkpoint: Checkpoint | RandomWeights,
    dtype: torch.dtype,
    ranks: Ranks,
    tell: Callable[[str], None],
) -> QuantizedCache | None:
    """On rank 0, where the recipe wants one and enough is quantized for it to be worth while."""
    linears = [module for module in model.modules() if isinstance(module, ShardedLinear)]
    weights = sum(m.in_features * m.out_features for m in linears if m.quantization.format != "none")
    stored = isinstance(checkpoint, Checkpoint) and not checkpoint.is_packed
    if not (ranks.is_main and recipe.quantization.cache and stored and weights >= WORTH_KEEPING):
        return None
    return QuantizedCache(checkpoint, recipe.quantization, dtype, ranks.device, tell)


def _check_agreement(selection_digest: str, ranks: Ranks) -> None:
    """Raises RecipeError unless each rank drew the same S: other libraries on one node would train another model."""
    digests = ranks.gather(selection_digest)
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise RecipeError(
            f"rank(s) {', '.join(others)} select other entries of the adapters than rank 0; install the same versions "
            f"of lorasp and torch on every node"
        )


def data_digests(data: TaskData) -> dict[str, str]:
    """By which a checkpoint knows the rows that it was trained on."""
    return {kind: its["digest"] for kind, its in data.report().items() if "digest" in its}


def adapter_info(recipe: Recipe, loaded: LoadedModel, step: int) -> AdapterInfo | None:
    """Of the adapter after `step` of this run; None with `method: full`."""
    start = loaded.start
    if recipe.method == "full":
        return None
    return AdapterInfo.of(
        recipe,
        loaded.model,
        base_digest=loaded.base_digest,
        selection_seed=start.seed if start else recipe.seed,
        step=step + (start.step if start else 0),
    )


def save_result(
    run_dir: Path,
    recipe: Recipe,
    loaded: LoadedModel,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase | None,
    step: int,
    *,
    writes: bool,
) -> Path:
    """Writes what the run trained: `adapter/`, or with `method: full` the whole model as `model/`. Collective."""
    values = engine.trained_values()
    info = adapter_info(recipe, loaded, step)
    if info is not None:
        save_adapter(run_dir / "adapter", info, loaded.model, values, writes=writes)
        return run_dir / "adapter"
    with replacing_whole(run_dir / "model", writes=writes) as directory:
        save_model(directory, values, compute_dtype(recipe), prefix="model.", writes=writes)
        if writes:
            with contextlib.redirect_stdout(io.StringIO()):
                loaded.model.model.config.save_pretrained(directory)
                if tokenizer is not None:
                    tokenizer.save_pretrained(directory)
    return run_dir / "model"
