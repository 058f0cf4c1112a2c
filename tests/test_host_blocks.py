"""Memory that tensors take over from one another: never two at once, and no more than was in use at once."""

import gc
import re
import threading
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lorasp.host_blocks import _SMALLEST, empty, held_bytes, idle_bytes, release
from lorasp.memory import MemoryMeter

LIKE = torch.empty(0)
MIB = 2**20


@pytest.fixture(autouse=True)
def _nothing_held():
    gc.collect()
    release()
    assert held_bytes() == 0
    yield
    gc.collect()
    release()
    assert held_bytes() == 0, "a tensor outlived its test"


def resident() -> int:
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_a_tensor_is_as_torch_would_make_it(dtype):
    made = empty((3, 500, 401), torch.empty(0, dtype=dtype))
    assert (made.shape, made.dtype, made.device.type) == ((3, 500, 401), dtype, "cpu")
    assert made.is_contiguous() and made.data_ptr() % 64 == 0
    assert made.untyped_storage().nbytes() == made.numel() * dtype.itemsize
    assert held_bytes() >= made.numel() * dtype.itemsize


def test_a_freed_ones_memory_goes_to_the_next_of_about_its_size():
    first = empty((1024, 1024), LIKE)
    address = first.data_ptr()
    del first
    second = empty((1024, 1000), LIKE)  # within an eighth
    assert second.data_ptr() == address
    assert empty((1024, 1024), LIKE).data_ptr() != address
    assert held_bytes() == 8 * MIB


def test_a_view_keeps_the_memory_of_the_whole():
    whole = empty((1024, 1024), LIKE).fill_(1)
    view = whole[5:6]
    del whole
    empty((1024, 1024), LIKE).fill_(2)
    assert torch.all(view == 1)
    del view
    assert held_bytes() == 8 * MIB  # both are free


@pytest.mark.parametrize("rows", [[100, 300, 200, 900], [900, 100, 500, 700], [333, 334, 335, 380]])
def test_no_more_is_held_than_was_in_use_at_once(rows):
    """Ten tensors of each size in turn, as the micro batches of a step bring them."""
    most = 0
    for count in rows:
        tensors = [empty((count, 1024), LIKE) for _ in range(10)]
        most = max(most, 10 * count * 4096)
        assert sum(tensor.nbytes for tensor in tensors) <= held_bytes() <= 1.125 * most + 4096 * max(rows)
        del tensors


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_what_is_free_stays_at_hand_until_it_is_released():
    before = resident()
    tensors = [empty((1024, 600), LIKE).fill_(1) for _ in range(40)]  # of 2.3 MiB: a huge page and some small ones
    assert resident() - before > 0.95 * 40 * 2.34 * MIB
    del tensors
    assert resident() - before > 0.95 * 40 * 2.34 * MIB
    release()
    assert held_bytes() == 0 and resident() - before < 4 * MIB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_of_the_free_ones_what_is_in_memory_is_counted():
    used = empty((1024, 600), LIKE).fill_(1)
    full, half, never = (empty((1024, 600), LIKE) for _ in range(3))
    full.fill_(1)
    half[:256].fill_(1)  # 0.6 of 2.3 MiB, or the huge page around it
    assert idle_bytes() == 0
    block = held_bytes() // 4
    del full, half, never
    assert block <= idle_bytes() - 0.6 * MIB <= block + 2 * MIB
    del used
    assert 2 * block <= idle_bytes() - 0.6 * MIB <= 2 * block + 2 * MIB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_they_serve_the_next_step_and_are_not_held_between_steps():
    meter = MemoryMeter("cpu")
    with meter.phase("train"):
        before, addresses = meter.now_bytes(), []
        for _ in range(3):
            step = empty((4096, 4096), LIKE).fill_(1)
            addresses.append(step.data_ptr())
            assert meter.now_bytes() - before > 63 * MIB
            del step
            meter.settle_after_step()
            meter.settle()
            assert meter.now_bytes() - before < 2 * MIB and held_bytes() == 64 * MIB
        assert len(set(addresses)) == 1
        with meter.phase("evaluate"):
            assert held_bytes() == 0
    assert meter.peaks["evaluate"].peak_bytes < 32 * MIB < 63 * MIB < meter.peaks["train"].peak_bytes


def test_small_ones_and_other_devices_are_torchs():
    assert empty((_SMALLEST // 4 - 1,), LIKE).numel() and empty((0, 5), LIKE).shape == (0, 5)
    assert empty((4096, 4096), torch.empty(0, device="meta")).is_meta
    with FakeTensorMode() as fakes:
        assert empty((4096, 4096), torch.empty(0)).fake_mode is fakes
    assert held_bytes() == 0


def test_it_may_be_freed_by_another_thread_and_by_the_collector():
    tensors = [empty((1024, 256), LIKE) for _ in range(8)]
    thread = threading.Thread(target=tensors.clear)
    thread.start()
    thread.join()
    loop = [empty((1024, 256), LIKE)]
    loop.append(loop)
    del loop
    gc.collect()
    assert held_bytes() == 8 * MIB
    again = [empty((1024, 256), LIKE) for _ in range(8)]
    assert held_bytes() == 8 * MIB and len({tensor.data_ptr() for tensor in again}) == 8
