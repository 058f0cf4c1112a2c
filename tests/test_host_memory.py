import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

GLIBC = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim") or not Path("/proc/self/status").exists(),
    reason="needs Linux with glibc",
)
ROOT = Path(__file__).resolve().parents[1]
MIB = 1024  # KiB
BEGIN = """
import re
def resident(): return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def kib_printed(code: str, **environment: str) -> int:
    """The one number that `code` prints."""
    [number] = kibs_printed(code, **environment)
    return number


def kibs_printed(code: str, **environment: str) -> list[int]:
    """What `code`, run in a process of its own where nothing else frees, prints."""
    free = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    command = [sys.executable, "-c", BEGIN + code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=free | environment)
    return [int(number) for number in done.stdout.split()]


@GLIBC
def test_freed_memory_between_blocks_in_use_is_returned():
    returned = kib_printed("""
import torch; from lorasp.host_memory import return_freed_memory
blocks = [torch.ones(16_384) for _ in range(1024)]  # 64 KiB each
del blocks[::2]
before = resident(); return_freed_memory(); print(before - resident())
""")
    assert 24 * MIB < returned < 40 * MIB  # of 32


@GLIBC
def test_what_a_step_frees_is_returned_once_more_is_held_than_before():
    """Of 80 MiB in blocks of 64 KiB every second one is freed; and then of 3, which is not looked for."""
    before, after, later = kibs_printed("""
import torch; from lorasp.memory import MemoryMeter
meter = MemoryMeter("cpu")
with meter.phase("work"):
    meter.settle()
    blocks = [torch.ones(16_384) for _ in range(1280)]
    del blocks[::2]
    print(resident()); meter.settle_if_grown(); print(resident())
    more = [torch.ones(16_384) for _ in range(48)]
    del more[::2]
    meter.settle_if_grown(); print(resident())
""")
    assert 30 * MIB < before - after < 50 * MIB  # of 40
    assert later - after > 2.5 * MIB


@GLIBC
def test_where_much_is_held_an_eighth_more_is_not_looked_for():
    """Beside 400 MiB: 36 of which half is freed, and then 72."""
    before, after, later = kibs_printed("""
import torch; from lorasp.memory import MemoryMeter
meter = MemoryMeter("cpu")
with meter.phase("work"):
    held = [torch.ones(16_384) for _ in range(6400)]
    meter.settle()
    some = [torch.ones(16_384) for _ in range(576)]
    del some[::2]
    print(resident()); meter.settle_if_grown(); print(resident())
    more = [torch.ones(16_384) for _ in range(1152)]
    del more[::2]
    meter.settle_if_grown(); print(resident())
""")
    assert abs(after - before) < 2 * MIB
    assert 10 * MIB < later - after < 45 * MIB  # the second's 36 that stay; what the first freed holds some of them


@GLIBC
def test_much_that_a_step_frees_is_kept_for_the_next_one_and_little_is_not():
    """In blocks of 64 KiB, freed after the step but for one above them. What was kept is not held, once settled."""
    little, much, again, settled, held = kibs_printed("""
import torch; from lorasp.memory import MemoryMeter
meter, above = MemoryMeter("cpu"), []
with meter.phase("train"):
    start = resident()
    def step(mib):
        blocks = [torch.ones(16_384) for _ in range(16 * mib)]
        above.append(torch.ones(16_384))
        blocks.clear()
        meter.settle_after_step(); meter.settle_if_grown(); print(resident() - start)
    step(200); step(300); step(300)
    meter.settle(); print(resident() - start); print(meter.now_bytes() // 1024)
""")
    assert little < 8 * MIB and settled < 8 * MIB and held < 8 * MIB
    assert 295 * MIB < much < 320 * MIB and abs(again - much) < 4 * MIB


# Blocks of 9 MiB are in glibc's heap once a larger one was freed; the small ones keep it from shrinking.
CHURN = """
from lorasp.host_memory import map_large_blocks_apart
if {mapped}: map_large_blocks_apart()
import torch
torch.ones(3 * 2**21)  # freed at once: glibc then has blocks of up to 24 MiB in its heap
blocks = [torch.ones(size) for _ in range(40) for size in (9 * 2**18, 2**10)]
before = resident()
del blocks[::2]
print(before - resident())
"""


@GLIBC
def test_large_blocks_are_given_back_as_they_are_freed():
    assert kib_printed(CHURN.format(mapped=True)) > 0.9 * 360 * MIB
    assert kib_printed(CHURN.format(mapped=False)) < 0.1 * 360 * MIB


@GLIBC
def test_a_users_own_settings_of_malloc_stand():
    own = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
    assert kib_printed(CHURN.format(mapped=True), **own) < 0.1 * 360 * MIB


def test_torch_is_asked_for_huge_pages_before_it_is_imported():
    code = """
import sys
from lorasp.cli import run_reporting_errors
def main():
    import os
    assert "torch" not in sys.modules
    print(os.environ["THP_MEM_ALLOC_ENABLE"])
    return 0
run_reporting_errors(main)
"""
    assert kib_printed(code) == 1
