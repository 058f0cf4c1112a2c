"""Where a step's seconds go, and what they are compared with."""

import time

import pytest
import torch

from lorasp import timing
from lorasp.timing import PartTimer, matrix_product_limit

CPU = torch.device("cpu")


def test_seconds_add_up_by_part_until_they_are_taken(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 20.5, 30.0, 34.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = PartTimer(CPU)
    timer.running = True
    gather = timer.timed("gather", lambda value, *, plus: value + plus)
    assert gather(1, plus=2) == 3 and gather(3, plus=4) == 7
    with pytest.raises(KeyError), timer.part("data", on_host=True):
        raise KeyError
    assert timer.take() == {"gather": 3.0, "data": 0.5}
    with timer.part("data"):
        pass
    assert timer.take() == {"data": 4.0} and timer.take() == {}
    timer.running = False
    assert gather(1, plus=2) == 3 and timer.take() == {}  # and the clock was not asked, which has no more to tell


@pytest.mark.gpu
def test_a_gpus_part_is_what_its_stream_took_and_not_what_the_host_did():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    timer = PartTimer(torch.device("cuda"))
    timer.running = True
    with timer.part("sleep"):
        torch.cuda._sleep(10**8)
    started = time.perf_counter()
    assert timer.take()["sleep"] == pytest.approx(time.perf_counter() - started, rel=0.5)


def test_the_limit_is_that_of_the_best_of_products_that_take_long_enough(monkeypatch):
    # Of each size a first one and three, of the second as many as a second holds besides.
    products = [0.5, 0.004, 0.003, 0.005, 0.5, 0.035, 0.03, 0.036, *[0.04] * 20, 0.025, *[0.04] * 12]
    taken = []

    def take(_):
        taken.append(products[len(taken)])
        return {"product": taken[-1]}

    monkeypatch.setattr(timing.PartTimer, "take", take)
    drawn = torch.get_rng_state()
    assert matrix_product_limit(CPU, torch.float32) == 2 * 1024**3 / 0.025  # products of 512 are over too soon
    assert taken == products
    assert torch.equal(torch.get_rng_state(), drawn)
