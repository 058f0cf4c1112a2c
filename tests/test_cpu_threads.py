"""Who sets a rank's threads: the user; else its share of the cores, not the one that launchers set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorasp import cpu_threads

ROOT = Path(__file__).resolve().parents[1]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
RANK = "from lorasp.cpu_threads import share_cores_among_ranks; share_cores_among_ranks()\n"
RANK += "import os, sys, torch; variable = os.environ.get('OMP_NUM_THREADS')\n"
# one write a line: torchrun starts ranks with `python -u`, whose print() writes each word alone, among another rank's
RANK += "sys.stdout.write(f'threads {variable} {torch.get_num_threads()}\\n')"
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux")


def printed(tmp_path, command: list[str], **environment: str) -> list[list[str]]:
    """The lines that the ranks print, as words: what the variable holds, and torch's threads."""
    script = tmp_path / "rank.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{RANK}")
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [str(Path(sys.executable).with_name(command[0])), *command[1:], str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=free | environment, cwd=tmp_path)
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("threads")]


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "launcher"),
    [(1, ["accelerate", "launch"]), (2, ["torchrun", "--standalone", "--nproc_per_node", "2"])],
)
def test_the_cores_are_shared_among_the_ranks_of_a_launcher(ranks, launcher, tmp_path):
    share = max(1, cpu_threads.available_cores() // ranks)
    found = printed(tmp_path, launcher, HOME=str(tmp_path))
    assert [int(variable) for variable, _ in found] == [share] * ranks
    assert all(int(threads) == share for _, threads in found)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "3"])
def test_what_the_user_sets_stays(threads, tmp_path):
    [[variable, _]] = printed(tmp_path, ["accelerate", "launch"], HOME=str(tmp_path), OMP_NUM_THREADS=threads)
    assert variable == threads


def test_without_a_launcher_nothing_is_set(tmp_path):
    [[variable, _]] = printed(tmp_path, [Path(sys.executable).name])
    assert variable == "None"
    [[variable, threads]] = printed(tmp_path, [Path(sys.executable).name], OMP_NUM_THREADS="1")
    assert (variable, threads) == ("1", "1")


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", CORES), ("100000 100000", 1), ("50000 100000", 1), ("99900000 100000", CORES), ("?", CORES)],
)
def test_the_quota_of_a_container_counts(quota, cores, monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(cpu_threads, "_QUOTA", tmp_path / "cpu.max")
    assert cpu_threads.available_cores() == cores
