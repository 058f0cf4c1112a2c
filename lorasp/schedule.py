"""The learning rate as a pure function of the step, so that a resumed run or another world size cannot shift it."""

import math

from lorasp.recipe import Training


def learning_rate(step: int, total_steps: int, training: Training) -> float:
    """The rate of optimizer step `step` (0-based) out of `total_steps`.

    Linear warm-up over the first ⌈warmup_ratio · total_steps⌉ steps, whose last has the full rate; then constant, a
    straight line, or a half cosine that would reach 0 one step after the last.
    """
    warmup = math.ceil(training.warmup_ratio * total_steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[training.schedule]
    return training.learning_rate * factor
