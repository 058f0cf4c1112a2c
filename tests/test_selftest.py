"""The self-test: passes where all is right, on any number of ranks; says what is wrong where it is not."""

import json
import os
import runpy
import subprocess
import sys

import pytest
import torch

import lorasp.quantization
import lorasp.selftest as selftest
from lorasp.selftest import TABLES, CheckFailed, Outcome, over_ranks, run_check
from tests.distributed.launching import ROOT, launch

SCRIPT = ROOT / "launch" / "selftest.py"
CPU = torch.device("cpu")
CHECKS = [
    *("libraries", "launch", "device", "collectives", "memory counters", "nf4 kernels", "fp4 kernels"),
    *("adapter", "loss", "ZeRO-3 shards"),
]


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_the_published_tables_are_those_of_bitsandbytes(format):
    from bitsandbytes.functional import get_4bit_type

    assert list(TABLES[format]) == pytest.approx(get_4bit_type(format, device="cpu").tolist(), abs=1e-6)


@pytest.mark.parametrize(
    "check",
    [
        lambda: selftest.check_4bit("nf4", CPU),
        lambda: selftest.check_4bit("fp4", CPU),
        lambda: selftest.check_adapter(CPU),
        lambda: selftest.check_loss(CPU),
    ],
    ids=["nf4", "fp4", "adapter", "loss"],
)
def test_sound_kernels_pass_and_a_cpu_alone_is_called_so(check):
    assert "the device is the CPU: no other to compare with" in check()


def test_memory_counters_see_an_allocation_and_its_end():
    assert "64 MiB seen as 6" in selftest.check_memory_counters(CPU)


def test_a_kernel_that_is_one_percent_off_fails(monkeypatch):
    right = lorasp.quantization._bnb().dequantize_4bit
    monkeypatch.setattr(lorasp.quantization._bnb(), "dequantize_4bit", lambda *given: right(*given) * 1.01)
    with pytest.raises(CheckFailed, match=r"nf4 dequantized on cpu, against the table: differs by 1.0e-02"):
        selftest.check_4bit("nf4", CPU)


def test_a_kernel_with_the_other_order_of_halves_fails(monkeypatch):
    right = lorasp.quantization._bnb().quantize_4bit

    def swapped(*given, **named):
        codes, state = right(*given, **named)
        return codes << 4 | codes >> 4, state

    monkeypatch.setattr(lorasp.quantization._bnb(), "quantize_4bit", swapped)
    with pytest.raises(CheckFailed, match="of the nf4 codes on cpu are not the nearest value"):
        selftest.check_4bit("nf4", CPU)


def test_an_adapter_whose_gradient_is_wrong_fails(monkeypatch):
    from lorasp.selection import Selection

    right = Selection.select
    monkeypatch.setattr(Selection, "select", lambda self, dense, bits: right(self, dense, bits).flip(0))
    with pytest.raises(CheckFailed, match="balanced adapter on cpu, gradient of A, against dense masked LoRA"):
        selftest.check_adapter(CPU)


def test_an_adapter_whose_inputs_gradient_is_wrong_fails(monkeypatch):
    right = lorasp.quantization.ShardedLinear._backward_of_base
    monkeypatch.setattr(
        lorasp.quantization.ShardedLinear, "_backward_of_base", lambda self, *given: right(self, *given) * 1.01
    )
    with pytest.raises(CheckFailed, match="balanced adapter on cpu, gradient of x, against dense masked LoRA"):
        selftest.check_adapter(CPU)


def test_a_loss_that_leaves_out_a_chunk_fails(monkeypatch):
    from lorasp.models import causal_lm

    right = causal_lm._CrossEntropySum.apply
    monkeypatch.setattr(
        causal_lm._CrossEntropySum,
        "apply",
        lambda hidden, weight, bias, labels: right(hidden[:256], weight, bias, labels[:256]),
    )
    with pytest.raises(CheckFailed, match="chunked loss on cpu, sum, against cross_entropy"):
        selftest.check_loss(CPU)


def test_counters_that_miss_an_allocation_fail(monkeypatch):
    from lorasp import memory

    monkeypatch.setattr(memory._HighWaterMark, "peak", lambda self: self.now())
    monkeypatch.setattr(memory._HighWaterMark, "stop", lambda self: self.now())
    with pytest.raises(CheckFailed, match="64 MiB were allocated and"):
        selftest.check_memory_counters(CPU)


def test_a_device_that_differs_from_the_cpu_fails():
    def check(device: torch.device):
        return {"result": torch.ones(1000) * (1.001 if device.type == "cuda" else 1)}, 0.0

    assert selftest._on_cpu_and_device(check, torch.device("cuda", 0), 1e-2).endswith("differs from the CPU by 0.001")
    with pytest.raises(CheckFailed, match="result, cuda:0 against the CPU: differs by 1.0e-03"):
        selftest._on_cpu_and_device(check, torch.device("cuda", 0), 1e-4)


def test_not_a_number_is_never_equal():
    with pytest.raises(CheckFailed):
        selftest._equal(torch.tensor([1.0, float("nan")]), torch.ones(2), 1e9, "x")


def test_an_old_and_a_missing_library_are_named_with_the_command_that_helps(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["torch>=2.13", "rich>=99.1", "no-such-package>=1.2", "pydantic[email]>=2"]'
    )
    monkeypatch.setattr(selftest, "_PYPROJECT", tmp_path / "pyproject.toml")
    outcome = run_check("libraries", selftest.check_libraries, "")
    assert not outcome.passed
    rich, missing = outcome.found.split("; ")
    assert rich.startswith("rich is ") and rich.endswith(", 99.1 or newer is needed")
    assert missing == "no-such-package is not installed, 1.2 or newer is needed"
    assert outcome.advice == "pip install 'rich>=99.1' 'no-such-package>=1.2'"


@pytest.mark.parametrize(
    "version, minimum, enough", [("2.13.0+cpu", "2.13", True), ("2.9.1", "2.13", False), ("3", "2.13", True)]
)
def test_versions_compare_as_numbers(version, minimum, enough):
    assert (selftest._numbers(version) >= selftest._numbers(minimum)) == enough


def test_a_check_that_raises_is_an_outcome_with_advice():
    def broken() -> str:
        raise OSError("libbitsandbytes_cuda.so: no such file")

    outcome = run_check("nf4", broken, "install it")
    assert (outcome.passed, outcome.found, outcome.advice) == (
        False,
        "OSError: libbitsandbytes_cuda.so: no such file",
        "install it",
    )


def test_one_rank_that_fails_speaks_for_all():
    good, bad = Outcome("a", True, "fine", "", 1.0), Outcome("a", False, "broken", "mend it", 2.0)
    assert over_ranks([good, bad, bad]) == Outcome("a", False, "rank 1 (and 1 more): broken", "mend it", 2.0)
    assert over_ranks([good, good]) == good


def test_the_script_tells_of_a_missing_library_without_importing_it(tmp_path):
    code = (
        "import runpy, sys; from pathlib import Path; import lorasp.selftest as s\n"
        "s._PYPROJECT = Path(sys.argv[1]); sys.argv = ['selftest.py']\n"
        "sys.modules['torch'] = None\n"  # an import of it raises
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\ndependencies = ["torch>=999"]')
    done = subprocess.run([sys.executable, "-c", code, project], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "FAILED libraries" in done.stdout and "-> pip install 'torch>=999'" in done.stdout


# As a library's C++ thread does now and then that outlives Python: all checks passed, and the launch had failed.
ABORTED_AT_ITS_END = """
import ctypes, runpy, sys
libc = ctypes.CDLL(None)
if hasattr(libc, "on_exit"):  # glibc
    libc.on_exit(libc.abort, None)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_all_is_right_on_real_ranks(ranks, tmp_path):
    written = tmp_path / "selftest.json"
    if ranks == 1:
        done = subprocess.run(
            [sys.executable, "-c", ABORTED_AT_ITS_END, SCRIPT, "--json", written],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    else:
        done = launch(ranks, SCRIPT, "--json", str(written), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "FAILED"))]
    assert [line[7:24].strip() for line in told] == CHECKS  # once, from rank 0
    # Each was named before it ran.
    begun = [line[7:].strip() for line in done.stdout.splitlines() if line.startswith("...")]
    assert begun == CHECKS
    content = json.loads(written.read_text())
    assert content["passed"] and content["world_size"] == ranks
    assert [check["name"] for check in content["checks"]] == CHECKS
    assert sum(check["seconds"] for check in content["checks"]) < 60
    assert content["versions"]["torch"] == torch.__version__
    # Two linears of 96·64 weights, rank 8, half of 8·(96 + 64) entries trained, over the ranks.
    codes, scales = 2 * 96 * 64 // 2 // ranks, 96 * 64 // 64 * (1 + 4) // ranks
    assert f"codes {codes:,}, scales {scales:,}, adapters {2 * 640 * 4 // ranks:,}" in content["checks"][-1]["found"]


@pytest.mark.slow
def test_a_kernel_that_is_broken_on_one_rank_alone_fails_the_launch(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        f"import os, runpy, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from bitsandbytes import functional\n"
        "right = functional.dequantize_4bit\n"
        "if os.environ['RANK'] == '1':\n"
        "    functional.dequantize_4bit = lambda *given: right(*given) * 1.01\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = launch(2, script, timeout=120)
    assert done.returncode != 0
    assert "FAILED nf4 kernels      rank 1: nf4 dequantized on cpu" in done.stdout
    assert "-> install bitsandbytes anew" in done.stdout
    assert "ok     collectives" in done.stdout and "ok     loss" in done.stdout


@pytest.mark.slow
def test_a_check_that_hangs_on_one_rank_is_named_at_once_and_fails_in_the_end(tmp_path):
    """Rank 1 never ends its adapter check; rank 0 waits for it as long as a collective may take, here 5 s."""
    script = tmp_path / "hangs.py"
    script.write_text(
        f"import os, sys, time; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'launch')!r}]\n"
        "import lorasp.selftest as lorasp_selftest, selftest\n"
        "selftest._COLLECTIVE_SECONDS = 5\n"
        "if os.environ['RANK'] == '1':\n"
        "    lorasp_selftest.check_adapter = lambda device: time.sleep(600)\n"
        "sys.exit(selftest.main())\n"
    )
    done = launch(2, script, timeout=120)
    assert done.returncode != 0
    lines = [line for line in done.stdout.splitlines() if line.startswith(("...", "ok ", "FAILED"))]
    assert lines[-2] == "...    adapter" and lines[-3].startswith("ok     fp4 kernels")
    assert lines[-1].startswith("FAILED ranks in step    adapter: passed on rank 0; no answer from another rank (")
    assert "9 checks failed" not in done.stdout and "1 of 8 checks failed" in done.stdout


def test_a_place_for_the_json_that_is_not_there_is_told_before_the_checks(tmp_path):
    command = [sys.executable, SCRIPT, "--json", tmp_path / "nowhere" / "selftest.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"selftest.py: error: --json: {tmp_path}/nowhere is no directory"


def test_help_shows_how_to_launch_it(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["selftest.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 0
    assert "torchrun --nproc_per_node 2 launch/selftest.py --json selftest.json" in capsys.readouterr().out
