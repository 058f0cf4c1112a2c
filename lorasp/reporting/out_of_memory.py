"""An out-of-memory error, told so that its reader knows what to change."""

from collections.abc import Iterator, Mapping

import torch

from lorasp.memory import PhasePeak
from lorasp.recipe import Recipe
from lorasp.reporting.run_report import by_phase, format_peaks, rank_phases

_ON_A_CPU = "DefaultCPUAllocator"  # of which torch raises a plain RuntimeError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an allocation that failed, on any device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and _ON_A_CPU in str(error)
    )


def describe_out_of_memory(
    error: BaseException,
    phase: str,
    recipe: Recipe,
    rank: int,
    peaks: Mapping[str, PhasePeak],
    held: Mapping[str, int],
) -> str:
    """What happened where, this rank's peaks by phase, what it held (bytes by part), and what to change."""
    lines = [
        f"out of memory on rank {rank} in phase {phase}: {str(error).strip().splitlines()[0]}",
        format_peaks({"phases": by_phase([rank_phases(rank, peaks, {})])}),
    ]
    if held:
        parts = ", ".join(f"{part.replace('_', ' ')} {size / 2**20:.1f} MiB" for part, size in held.items())
        lines.append(f"held between steps: {parts}")
    return "\n".join([*lines, "to fit, in this order:", *(f"  - {advice}" for advice in _advice(phase, recipe))])


def _advice(phase: str, recipe: Recipe) -> Iterator[str]:
    training, evaluation = recipe.training, recipe.evaluation
    if phase.endswith("evaluate") and evaluation.micro_batch_size > 1:
        yield f"evaluation.micro_batch_size={evaluation.micro_batch_size // 2} (now {evaluation.micro_batch_size})"
    if phase.endswith("train"):
        if training.activation_checkpointing == "none":
            yield "training.activation_checkpointing=layer keeps a layer's input only (now none)"
        if training.micro_batch_size > 1:
            yield (
                f"training.micro_batch_size={training.micro_batch_size // 2} (now {training.micro_batch_size}); "
                f"accumulation keeps the global batch and its loss"
            )
    if phase != "load":
        yield f"a smaller data.max_length (now {recipe.data.max_length})"
    if recipe.method == "full":
        yield "method=lorasp, whose optimizer holds a few thousandths of these states"
    elif recipe.quantization.format == "none":
        yield "quantization=nf4, a quarter of a 16-bit base (now none)"
    yield "more ranks: the base, gradients and optimizer are cut over them"
