"""An out-of-memory error, told so that its reader knows what to change."""

import errno
from collections.abc import Iterator, Mapping

import torch

from lorasp.memory import PhasePeak
from lorasp.recipe import Recipe
from lorasp.reporting.report_text import format_peaks
from lorasp.reporting.run_report import by_phase, rank_phases

ANSWERING = "answering the samples"  # the task of an evaluation whose size other settings decide

# What plain RuntimeErrors say of an allocation that failed. Libraries take their own memory beside torch's allocator,
# which then has nothing to do with it: CUDA's context, cuBLAS's and cuDNN's workspaces, NCCL's buffers.
_SAID = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "Cuda failure 2 'out of memory'",  # NCCL's words
    "Cuda failure 'out of memory'",
    "Failed to CUDA malloc",
    "Failed to CUDA calloc",
    "Failed to CUDA host alloc",
)

_LEANER = {"none": "selective", "selective": "lean", "lean": "layer"}  # the next policy that keeps less


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an allocation that failed, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


def describe_out_of_memory(
    error: BaseException,
    phase: str,
    recipe: Recipe,
    rank: int,
    peaks: Mapping[str, PhasePeak],
    held: Mapping[str, int],
    task: str | None = None,
    *,
    world_size: int = 1,
    policy: str | None = None,
) -> str:
    """What happened where, this rank's peaks by phase, what it held (bytes by part), and what to change.

    task: what of the phase it was, where a phase has several. policy: the activation policy in force, where a model
    has not the recipe's.
    """
    said = str(error).strip().splitlines() or [type(error).__name__]
    reason = next((line for line in said if any(mark in line for mark in _SAID)), said[0]).strip()
    lines = [
        f"out of memory on rank {rank} in phase {phase}{f' ({task})' if task else ''}: {reason}",
        format_peaks({"phases": by_phase([rank_phases(rank, peaks, {})])}),
    ]
    if held:
        parts = ", ".join(f"{part.replace('_', ' ')} {size / 2**20:.1f} MiB" for part, size in held.items())
        lines.append(f"held between steps: {parts}")
    policy = policy or recipe.training.activation_checkpointing
    advice = _advice(phase, task, recipe, world_size, policy)
    return "\n".join([*lines, "to fit, in this order:", *(f"  - {its}" for its in advice)])


def _advice(phase: str, task: str | None, recipe: Recipe, world_size: int, policy: str) -> Iterator[str]:
    """Settings that keep less here, none of which the recipe's check refuses."""
    training, evaluation = recipe.training, recipe.evaluation
    if task == ANSWERING:
        if evaluation.samples > 1:
            yield f"evaluation.samples={evaluation.samples // 2} (now {evaluation.samples}): all are answered at once"
        if evaluation.max_new_tokens > 1:
            yield f"evaluation.max_new_tokens={evaluation.max_new_tokens // 2} (now {evaluation.max_new_tokens})"
    elif phase.endswith("evaluate"):
        if evaluation.micro_batch_size > 1:
            yield f"evaluation.micro_batch_size={evaluation.micro_batch_size // 2} (now {evaluation.micro_batch_size})"
        beams = recipe.translation.beams
        if recipe.translation.test is not None and beams > 1:
            yield f"translation.beams={beams // 2} (now {beams}): of each sentence so many translations are kept"
    for section in ("mmlu", "lm_eval"):
        tokens = getattr(recipe, section).tokens
        if phase.endswith(section) and tokens > 1:
            yield f"{section}.tokens={tokens // 2} (now {tokens}): those of a forward pass"
    if "train" in phase:
        leaner = _LEANER.get(policy)
        if leaner is not None and not (leaner == "layer" and training.offload_activations):
            yield f"training.activation_checkpointing={leaner} keeps less of each layer for backward (now {policy})"
        of_a_rank = training.global_batch_size // world_size
        fitting = [size for size in range(1, training.micro_batch_size) if of_a_rank % size == 0]
        if fitting:
            yield (
                f"training.micro_batch_size={fitting[-1]} (now {training.micro_batch_size}); accumulation keeps the "
                f"global batch and its loss"
            )
    if phase.endswith("save"):
        if recipe.method != "full":
            yield f"a smaller adapter.rank (now {recipe.adapter.rank}): rank 0 holds the whole adapter while it writes"
        yield "more memory on rank 0's machine: what is saved is gathered there"
        return
    if phase != "load" and not phase.endswith(("mmlu", "lm_eval")):
        yield f"a smaller data.max_length (now {recipe.data.max_length})"
    if recipe.method == "full":
        yield "method=lorasp, whose optimizer holds a few thousandths of these states"
    elif recipe.quantization.format == "none":
        yield "quantization=nf4, a quarter of a 16-bit base (now none)"
    yield "more ranks: the base, gradients and optimizer are cut over them"
