"""The learning rate, against transformers' schedules."""

import pytest
import torch
from transformers import get_scheduler

from lorasp.recipe import Training
from lorasp.schedule import learning_rate


@pytest.mark.parametrize(("ours", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant")])
@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_after_warm_up_it_is_transformers_schedule(ours, theirs, warmup):
    training = Training(learning_rate=0.5, schedule=ours, warmup_ratio=warmup)
    total, warmup_steps = 50, round(50 * warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    # Theirs counts from 0 in warm-up, so that the first step changes nothing; ours from 1.
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total)
    for step in range(total):
        if step >= warmup_steps:
            assert learning_rate(step, total, training) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        else:
            assert learning_rate(step, total, training) == pytest.approx(0.5 * (step + 1) / warmup_steps)
        optimizer.step()
        scheduler.step()
