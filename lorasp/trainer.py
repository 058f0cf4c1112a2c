"""The training loop, and nothing else."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from lorasp.data.batches import TrainingStep
from lorasp.recipe import Training
from lorasp.schedule import learning_rate
from lorasp.timing import PartTimer
from lorasp.zero.engine import Engine

PARTS = ("data", "gather", "reduce", "optimizer", "compute")  # of a step's seconds; the last is the rest


class Diverged(RuntimeError):
    """The loss of `step` (from 1) or the one after its update was NaN, infinite or too high, or its gradient NaN.

    weights_are_good: whether the weights are still those before that step, and gave a sound loss.
    """

    def __init__(
        self, step: int, loss: float = math.nan, *, weights_are_good: bool = False, after_update: bool = False
    ) -> None:
        what = "gradient" if weights_are_good else "loss"
        when = "after the update of" if after_update else "at"
        fault = f"the {what} became NaN or infinite {when} step {step}"
        if math.isfinite(loss):
            fault = f"the loss became {loss:.4g}, above health.max_loss, {when} step {step}"
        super().__init__(
            f"{fault}; lower training.learning_rate or training.max_grad_norm, or look at the data of that step"
        )
        self.step, self.weights_are_good = step, weights_are_good


@dataclass(frozen=True)
class LogPoint:
    """What was measured over the optimizer steps since the last log point.

    step: steps done; loss: a label's mean at the last of them, in the task's unit; gradient_norm: before clipping;
    step_seconds: mean wall time of a step; tokens a second over all ranks, real (of examples), computed (real and
    dummies) and labelled. part_seconds: what of step_seconds this rank was at, by part: `data` (making
    batches), `gather`, `reduce` and `optimizer` (see zero/engine.py), and `compute`, which is the rest.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    step_seconds: float
    real_tokens_per_second: float
    computed_tokens_per_second: float
    labels_per_second: float
    part_seconds: dict[str, float]


def train(
    engine: Engine,
    steps: Iterable[TrainingStep],
    total_steps: int,
    training: Training,
    *,
    device: torch.device,
    world_size: int,
    max_loss: float,
    on_step: Callable[[int], None],
    on_log: Callable[[LogPoint], None],
    when: Iterable[tuple[Callable[[int], bool], Callable[[int], None]]],
) -> None:
    """Runs the optimizer `steps`. `when` pairs what tells, on all ranks alike, after which steps something is called
    with what that is; `on_step` and `on_log` come before that.

    The loss of a step is that of its global batch: the sum over all labelled tokens on all ranks and micro batches,
    divided by their number N. Raises Diverged on all ranks at the same step, also for a loss above `max_loss`. What is
    called of `when`, and the caller afterwards, finds weights whose own loss was sound: a step's loss is that of the
    weights before its update.
    """
    unread: list[tuple[Tensor, Tensor]] = []  # (loss, gradient norm) on the device: reading one synchronises
    tokens_real = tokens_computed = labels = 0
    engine.train_mode(True)
    engine.timer.take()  # the rehearsal's
    since = time.perf_counter()
    for current in _timed(steps, engine.timer):
        rate = learning_rate(current.step, total_steps, training)
        engine.set_learning_rate(rate)
        loss, norm = train_step(engine, current, device, world_size)
        if not engine.step_applied():
            (its_loss,), _ = _read([(loss, norm)])
            raise Diverged(current.step + 1, weights_are_good=its_loss <= max_loss)
        unread.append((loss, norm))
        tokens_real += current.token_count
        tokens_computed += current.computed_count
        labels += current.label_count

        step = current.step + 1
        on_step(step)
        # After the last step the caller does all of it anyway.
        due = [action for is_due, action in when if is_due(step)] if step < total_steps else []
        if step % training.log_every == 0 or step == total_steps or due:
            losses, norms = _read(unread)
            seconds = time.perf_counter() - since
            if not all(loss <= max_loss for loss in losses):  # though its gradient was finite; of NaN nothing is true
                first = next(index for index, loss in enumerate(losses) if not loss <= max_loss)
                raise Diverged(step - len(losses) + 1 + first, losses[first])
            point = LogPoint(
                step=step,
                loss=losses[-1],
                gradient_norm=norms[-1],
                learning_rate=rate,
                step_seconds=seconds / len(losses),
                real_tokens_per_second=tokens_real / seconds,
                computed_tokens_per_second=tokens_computed / seconds,
                labels_per_second=labels / seconds,
                part_seconds=_parts_of_a_step(engine.timer.take(), seconds, len(losses)),
            )
            on_log(point)
            unread, tokens_real, tokens_computed, labels = [], 0, 0, 0
            if (due or step == total_steps) and not (loss_now := _loss_now(engine, current, device)) <= max_loss:
                raise Diverged(step, loss_now, after_update=True)
            for action in due:
                action(step)
                engine.train_mode(True)
            since = time.perf_counter()


def every(steps: int | None) -> Callable[[int], bool]:
    """Whether a step is one of every so many; none is, of None."""
    return lambda step: steps is not None and step % steps == 0


def _timed(steps: Iterable[TrainingStep], timer: PartTimer) -> Iterator[TrainingStep]:
    iterator = iter(steps)
    while True:
        with timer.part("data", on_host=True):
            step = next(iterator, None)
        if step is None:
            return
        yield step


def _parts_of_a_step(parts: dict[str, float], seconds: float, steps: int) -> dict[str, float]:
    """Mean seconds of a step by part, from the sums over all steps."""
    named = {name: parts.get(name, 0.0) / steps for name in PARTS[:-1]}
    return named | {PARTS[-1]: max(0.0, seconds / steps - sum(named.values()))}


def train_step(engine: Engine, step: TrainingStep, device: torch.device, world_size: int) -> tuple[Tensor, Tensor]:
    """One optimizer step: (this rank's share of the global batch's loss, gradient norm), both on the device.

    DeepSpeed divides by the accumulation steps and averages over ranks; multiplying by both, and dividing by the N
    counted beforehand, gives the gradient of the global mean whatever the labels of a rank or a micro batch are.
    """
    micro_batches = step.micro_batches
    label_count = max(1, step.label_count)  # a batch without any label has a loss of 0
    share = torch.zeros((), device=device)
    for index, batch in enumerate(micro_batches):
        loss_sum = engine(**batch.model_inputs(device))
        share += loss_sum.detach() / label_count
        engine.backward(
            loss_sum * (world_size * len(micro_batches) / label_count), last=index == len(micro_batches) - 1
        )
    return share, engine.gradient_norm().to(device)


@torch.no_grad()
def _loss_now(engine: Engine, step: TrainingStep, device: torch.device) -> float:
    """The loss of the step's batch with the weights as they are, without dropout. Collective."""
    engine.train_mode(False)
    share = torch.zeros((), device=device)
    for batch in step.micro_batches:
        share += engine(**batch.model_inputs(device)) / max(1, step.label_count)
    engine.train_mode(True)
    [loss], _ = _read([(share, share)])
    return loss


def _read(unread: list[tuple[Tensor, Tensor]]) -> tuple[list[float], list[float]]:
    """Sums the ranks' shares of each loss and brings losses and norms to the host: the loop's only synchronisation."""
    losses = torch.stack([loss.float() for loss, _ in unread])
    dist.all_reduce(losses)
    norms = torch.stack([norm.float() for _, norm in unread])
    return losses.tolist(), norms.tolist()
