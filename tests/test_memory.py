"""Peaks of a phase against allocations of known size; live bytes against hand-computed ones."""

import functools
import gc
import json
import math
import mmap
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lorasp import memory
from lorasp.host_memory import return_freed_memory
from lorasp.live_tensors import LiveTensors
from lorasp.memory import MemoryMeter, breakdown, free_bytes, gib

MB = 1_000_000
GB = 2**30
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def nothing_left_to_free():
    """Drops what earlier tests of this process left: freed within a phase, it would lower what the phase shows.

    Cycles that hold whole models wait for the collector, and glibc gives freed pages back when it pleases.
    """
    gc.collect()
    return_freed_memory()


def measured_again(test):
    """Repeats a test of resident memory twice at most: the kernel may drop pages of mapped libraries meanwhile.

    Machines that reclaim idle pages (DAMON) do so without any pressure. A wrong meter is wrong three times.
    """

    @functools.wraps(test)
    def repeated(*arguments, **fixtures):
        for _ in range(2):
            try:
                return test(*arguments, **fixtures)
            except AssertionError:
                gc.collect()
        return test(*arguments, **fixtures)

    return repeated


def resident(size: int, device: str = "cpu") -> torch.Tensor:
    """`size` bytes that were written to: untouched pages are not resident.

    On a CPU mapped by themselves: malloc may find them a hole in the heap of a process that ran other tests, and keep
    them there once freed.
    """
    if device == "cpu":
        own = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(own, dtype=torch.uint8).fill_(1)
    return torch.ones(size, dtype=torch.uint8, device=device)


@pytest.mark.parametrize("device", DEVICES)
@measured_again
def test_a_peak_is_seen_though_it_was_freed_within_the_phase(device):
    meter = MemoryMeter(device)
    with meter.phase("work"):
        tensor = resident(200 * MB, device)
        del tensor
    assert meter.peaks["work"].peak_bytes == pytest.approx(200 * MB, rel=0.05)
    assert meter.now_bytes() < 10 * MB


@LINUX
@measured_again
def test_a_host_peak_names_its_source_and_its_parts():
    meter = MemoryMeter("cpu")
    with meter.phase("work"):
        held = resident(50 * MB)
    peak = meter.peaks["work"]
    assert peak.source == "VmHWM of /proc/self/status, reset at phase start"
    assert peak.baseline_bytes == meter.baseline_bytes
    assert peak.peak_total_bytes == peak.baseline_bytes + peak.peak_bytes
    assert peak.reserved_bytes is None
    # At the phase's end nothing had been freed, so the two kinds of resident memory make up the peak.
    assert peak.anonymous_bytes_end + peak.file_bytes_end == pytest.approx(peak.peak_total_bytes, rel=0.02)
    assert peak.anonymous_bytes_end > held.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_peak_names_its_source_and_what_was_reserved():
    meter = MemoryMeter("cuda")
    with meter.phase("work"):
        resident(50 * MB, "cuda")
    peak = meter.peaks["work"]
    assert peak.source == "cuda max_memory_allocated"
    assert peak.reserved_bytes >= peak.peak_total_bytes
    assert peak.anonymous_bytes_end is None


@pytest.mark.parametrize("device", DEVICES)
@measured_again
def test_phases_do_not_leak_into_each_other(device):
    meter = MemoryMeter(device)
    with meter.phase("large"):
        resident(200 * MB, device)
    with meter.phase("small"):
        resident(50 * MB, device)
    assert meter.peaks["small"].peak_bytes == pytest.approx(50 * MB, rel=0.1)
    assert list(meter.peaks) == ["large", "small"]


@pytest.mark.parametrize("device", DEVICES)
@measured_again
def test_an_inner_phase_suspends_the_outer_one(device):
    meter = MemoryMeter(device)
    with meter.phase("train"):
        resident(100 * MB, device)
        with meter.phase("evaluate"):
            resident(250 * MB, device)
        resident(50 * MB, device)
    assert meter.peaks["train"].peak_bytes == pytest.approx(100 * MB, rel=0.1)
    assert meter.peaks["evaluate"].peak_bytes == pytest.approx(250 * MB, rel=0.1)


def test_a_phase_entered_again_keeps_its_greatest_peak_and_adds_up_seconds(monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 15.0])
    monkeypatch.setattr(memory.time, "perf_counter", lambda: next(clock))
    meter = MemoryMeter("cpu")
    for size in (150 * MB, 50 * MB):
        with meter.phase("evaluate"):
            resident(size)
    assert meter.peaks["evaluate"].peak_bytes == pytest.approx(150 * MB, rel=0.05)
    assert meter.peaks["evaluate"].seconds == 3.0 + 5.0


@measured_again
def test_a_phase_that_an_exception_leaves_is_recorded():
    meter = MemoryMeter("cpu")
    with pytest.raises(MemoryError), meter.phase("outer"), meter.phase("inner"):
        resident(100 * MB)
        raise MemoryError
    assert meter.peaks["inner"].peak_bytes == pytest.approx(100 * MB, rel=0.1)
    assert "outer" in meter.peaks
    with meter.phase("afterwards"):
        pass
    assert meter.peaks["afterwards"].peak_bytes < 10 * MB


@measured_again
def test_the_open_phase_tells_its_peak_so_far():
    meter = MemoryMeter("cpu")
    assert meter.peak_so_far_bytes() == 0
    with meter.phase("train"):
        resident(100 * MB)
        assert meter.peak_so_far_bytes() == pytest.approx(100 * MB, rel=0.1)
        with meter.phase("evaluate"):
            assert meter.peak_so_far_bytes() < 10 * MB
        assert meter.peak_so_far_bytes() == pytest.approx(100 * MB, rel=0.1)


CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from lorasp.memory import MemoryMeter
meter = MemoryMeter("cpu")
with meter.phase("idle"):
    pass
import resource
print(json.dumps([meter.peaks["idle"].peak_total_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""
FAT_PARENT = """
import os, sys
held = bytearray(1_200_000_000)
held[::4096] = b"x" * len(held[::4096])
# fork and exec, as a launcher may do; subprocess would use vfork
if os.fork() == 0:
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[2], sys.argv[1]])
os.wait()
"""


@LINUX
def test_a_fresh_child_does_not_inherit_its_parents_peak():
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", FAT_PARENT, root, CHILD]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    peak, maxrss = json.loads(output)
    assert peak < 800 * MB
    assert maxrss > 1200 * MB  # the trap is real here: ru_maxrss shows the child its parent's memory


def test_where_the_kernel_cannot_reset_the_peak_it_is_sampled_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    if not memory._STATUS.exists():
        pytest.skip("needs Linux's /proc/self/status")
    check_sampling(MemoryMeter("cpu"))


def test_without_proc_resident_memory_is_sampled_by_psutil(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "absent")
    check_sampling(MemoryMeter("cpu"))


def check_sampling(meter: MemoryMeter) -> None:
    threads = threading.active_count()
    with meter.phase("large"):
        held = resident(200 * MB)
        threading.Event().wait(0.1)
        del held
    with meter.phase("small"):
        pass
    assert "sampled" in meter.peaks["large"].source
    assert meter.peaks["large"].peak_bytes == pytest.approx(200 * MB, rel=0.05)
    assert meter.peaks["small"].peak_bytes < 20 * MB
    assert threading.active_count() == threads


def test_a_container_leaves_its_limit_and_the_files_that_its_kernel_would_drop(monkeypatch, tmp_path):
    """31 of 32 GiB are used, 28 of them by a checkpoint that was read: 29 are free, of two ranks 14.5 each."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100 * GB))
    assert free_bytes(torch.device("cpu"), 1) == 100 * GB
    for name, text in (
        ("max", f"{32 * GB}"),
        ("current", f"{31 * GB}"),
        ("stat", f"anon {3 * GB}\nactive_file {8 * GB}\ninactive_file {20 * GB}\n"),
    ):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_bytes(torch.device("cpu"), 2) == 29 * GB // 2
    (tmp_path / "memory.max").write_text("max")
    assert free_bytes(torch.device("cpu"), 2) == 50 * GB


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="cuda and cpu devices, not on 'meta'"):
        MemoryMeter("meta")


def test_a_breakdown_keeps_its_order_and_adds_up_to_the_peak():
    parts = breakdown(1000, {"base_shard": 600, "adapters": 100})
    assert list(parts.items()) == [("base_shard", 600), ("adapters", 100), ("workspace", 300)]


def test_a_breakdown_that_counts_more_than_was_resident_says_so():
    parts = breakdown(1000, {"base_shard": 1200})
    assert parts == {"base_shard": 1200, "workspace": 0, "counted_not_resident": -200}
    assert sum(parts.values()) == 1000
    with pytest.raises(ValueError, match="workspace"):
        breakdown(1, {"workspace": 1})


def test_gib_is_a_number_for_a_column_that_names_the_unit():
    assert gib(3 * 2**29) == "1.500"


@pytest.mark.parametrize("device", DEVICES)
def test_live_tensors_counts_what_autograd_saved(device):
    """y = tanh(x·Wᵀ) with x [4, 8], W [16, 8], float32: every byte by hand."""
    x = torch.randn(4, 8, device=device)
    weight = torch.randn(16, 8, device=device, requires_grad=True)
    with LiveTensors() as live:
        product = x @ weight.t()  # the transposed view of an older tensor adds nothing
        y = torch.tanh(product)
        assert live.live_bytes == 2 * 4 * 16 * 4
        del product  # nothing else needs it
        assert live.live_bytes == 4 * 16 * 4
        loss = y.sum()
        del y  # tanh's backward needs its result: only autograd holds it now
        assert live.live_bytes == 4 * 16 * 4 + 4
        loss.backward()
    # Left are the loss and the weight's gradient.
    assert live.live_bytes == 4 + 16 * 8 * 4
    # Most is live when the weight's gradient has been made: it, the product's gradient, the loss, and the 1.0 that
    # backward starts from (sum's own gradient is a view of that number, and y went when tanh's backward was done).
    assert live.peak_bytes == 16 * 8 * 4 + 4 * 16 * 4 + 4 + 4
    del loss
    assert live.live_bytes == weight.grad.nbytes
    assert live.op_counts["mm"] == 2
    assert live.op_counts["tanh_backward"] == 1


def test_live_tensors_ignores_views_and_in_place_results():
    old = torch.zeros(100)
    with LiveTensors() as live:
        old.add_(1)
        old.view(10, 10)[2:].t()
        assert live.live_bytes == 0
        new = torch.empty(100)
        part = new[10:].view(9, 10)
        new.mul_(2)
        torch.add(old, old, out=new)
        assert live.live_bytes == 400
        del new  # the view keeps the whole storage
        assert live.live_bytes == 400
        del part
        assert live.live_bytes == 0
    assert live.peak_bytes == 400


def test_live_tensors_follows_a_storage_that_changes_its_size():
    with LiveTensors() as live:
        tensor = torch.ones(100)
        tensor.untyped_storage().resize_(0)  # how sharding frees a gathered parameter
        assert live.live_bytes == 0
        other = torch.ones(50)
        assert live.peak_bytes == 400  # 0 + 200 now
        tensor.untyped_storage().resize_(4000)
        tensor.fill_(1)
        assert live.live_bytes == 4000 + other.nbytes
        assert live.peak_bytes == 4200
        tensor.resize_(2000)
        assert live.peak_bytes == 8200
    del tensor, other
    assert live.live_bytes == 0


def test_live_tensors_sees_tensors_made_from_data_and_multiple_results():
    with LiveTensors() as live:
        literal = torch.tensor([1.0, 2.0, 3.0])
        assert live.live_bytes == 12
        values, indices = literal.sort()
        assert live.live_bytes == 12 + 12 + 24
        torch.empty(10**9, device="meta")
        del values, indices
    assert live.peak_bytes == 48


def test_live_tensors_counts_the_operations_that_would_wait_for_a_gpu():
    x = torch.tensor([0.0, 1.0, 2.0])
    with LiveTensors() as live:
        x.sum().item()
        float(x[0])
        x.nonzero()
        x[torch.tensor([0, 2])]
        torch.masked_select(x, x > 0)
        assert live.op_counts["nonzero"] == 1
        x[x > 0]  # its nonzero is inside the kernel
        assert live.op_counts["nonzero"] == 2
        x[x > 0] = torch.ones(2)
        assert live.op_counts["nonzero"] == 3
    assert live.op_counts["_local_scalar_dense"] == 2
    assert live.op_counts["masked_select"] == 1


def test_backward_on_a_cpu_runs_in_the_calling_thread_where_the_mode_sees_it():
    seen = []
    x = torch.randn(3, requires_grad=True)
    y = x.exp()
    y.register_hook(lambda gradient: seen.append(threading.get_ident()))
    with LiveTensors() as live:
        y.sum().backward()
    assert seen == [threading.get_ident()]
    assert live.op_counts["mul"] == 1  # exp's backward
    assert math.isclose(x.grad[0], x.detach()[0].exp(), rel_tol=1e-6)
