"""What would fail at minute 40 fails at minute 1: the worst step, evaluation and save of the run, before the first.

Every rank runs the largest micro batch that the data allows, with the most labels, forward, backward and through the
optimizer, twice; then the largest evaluation batch, and all samples at their longest; then saves to a directory that
is removed. Weights, optimizer and random numbers are afterwards what they were, bit for bit.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import distributed as dist

from lorasp.data.batches import Batch, TrainingStep, collate
from lorasp.data.examples import Example
from lorasp.evaluation.answers import next_token_logits
from lorasp.recipe import RecipeError
from lorasp.trainer import train_step
from lorasp.zero.engine import Engine


def worst_batch(examples: Sequence[Example], micro_batch_size: int) -> Batch:
    """A micro batch as long as the `micro_batch_size` longest examples, with as many labels as their largest counts.

    No batch of these examples has more tokens or more labels; one may never come.
    """
    longest = sorted(examples, key=lambda example: -len(example.input_ids))[:micro_batch_size]
    most_labels = sorted((example.label_count for example in examples), reverse=True)
    worst = [
        Example(example.input_ids, max(1, len(example.input_ids) - labels))
        for example, labels in zip(longest, most_labels, strict=False)
    ]
    return collate(worst, range(len(worst)))


def rehearse_step(
    engine: Engine, batch: Batch, accumulation: int, *, dtype: torch.dtype, device: torch.device, world_size: int
) -> None:
    """Forward, backward and optimizer step of `batch` on every rank, twice, undone. Collective.

    Twice: ZeRO-3 gathers ahead of use only once it has seen a whole step, so the second holds a unit more. With two
    micro batches where the run accumulates any.

    Raises RecipeError if the loss or its gradient is NaN or infinite before anything was trained.
    """
    step = TrainingStep(
        step=0,
        micro_batches=[batch] * min(2, accumulation),  # the second finds the first one's gradients
        label_count=max(1, len(batch.labels)) * world_size,
        token_count=sum(batch.lengths) * world_size,
        computed_count=sum(batch.lengths) * world_size,
    )
    engine.train_mode(True)
    # Only this rank's device: all of a node's would be touched, with a warning.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), engine.without_trace():
        for _ in range(2):
            train_step(engine, step, device, world_size)
            if not engine.step_applied():
                raise RecipeError(
                    f"model.path: the untrained model's loss or gradient on the longest rows is NaN or infinite; its "
                    f"weights are damaged, or do not bear {dtype}"
                )


@torch.no_grad()
def rehearse_evaluation(engine: Engine, batch: Batch, device: torch.device) -> None:
    """The scoring forward of `batch` on every rank. Collective."""
    engine.train_mode(False)
    engine(**batch.model_inputs(device), score=True)


def rehearse_answers(engine: Engine, prompts: list[list[int]], max_new_tokens: int, device: torch.device) -> None:
    """The last, and so the longest, forward of answering the samples, where none ends early. Collective."""
    engine.train_mode(False)
    if prompts:
        # Which tokens an answer has is no matter of memory.
        next_token_logits(engine, [prompt + prompt[-1:] * (max_new_tokens - 1) for prompt in prompts], device)


def rehearse_save(run_dir: Path, save: Callable[[Path], None], *, more_bytes: int, is_main: bool) -> None:
    """Saves below `run_dir` and removes it again: shows that the disk takes it. Collective.

    more_bytes: of checkpoints besides. Raises RecipeError where the disk has no room for them.
    """
    directory = run_dir / "rehearsal"
    try:
        save(directory)
        if is_main and (free := shutil.disk_usage(run_dir).free) < more_bytes:
            raise RecipeError(
                f"checkpoint: {run_dir} is to hold up to {more_bytes / 2**30:.3g} GiB of checkpoints, and "
                f"{free / 2**30:.3g} GiB are free; free space, lower checkpoint.keep_last, or name another output_dir"
            )
        dist.barrier()
    finally:
        if is_main:
            shutil.rmtree(directory, ignore_errors=True)
