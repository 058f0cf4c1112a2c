"""What would fail at minute 40 fails at minute 1: the worst step, evaluation and save of the run, before the first.

Every rank runs the largest micro batch that the data allows, with the most labels, forward, backward and through the
optimizer; then the largest evaluation batch; then saves to a directory that is removed. Weights, optimizer and random
numbers are afterwards what they were, bit for bit.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import distributed as dist

from lorasp.data.batches import Batch, TrainingStep, collate
from lorasp.data.examples import Example
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


def rehearse_step(engine: Engine, batch: Batch, *, dtype: torch.dtype, device: torch.device, world_size: int) -> None:
    """Forward, backward and optimizer step of `batch` on every rank, undone. Collective.

    Raises RecipeError if the loss or its gradient is NaN or infinite before anything was trained.
    """
    step = TrainingStep(
        step=0,
        micro_batches=[batch],
        label_count=max(1, len(batch.labels)) * world_size,
        token_count=sum(batch.lengths) * world_size,
        computed_count=sum(batch.lengths) * world_size,
    )
    engine.train_mode(True)
    with torch.random.fork_rng(), engine.without_trace():
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


def rehearse_save(run_dir: Path, save: Callable[[Path], None], *, is_main: bool) -> None:
    """Saves below `run_dir` and removes it again: shows that the disk takes it. Collective."""
    directory = run_dir / "rehearsal"
    try:
        save(directory)
        dist.barrier()
    finally:
        if is_main:
            shutil.rmtree(directory, ignore_errors=True)
