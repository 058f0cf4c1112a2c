"""A real Slurm of two nodes on this machine. It takes root and four packages; without them the tests skip."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.conftest import home, place  # noqa: F401  (fixtures)
from tests.distributed.launching import ROOT

_NEEDED = {"slurmd": "slurmd", "slurmctld": "slurmctld", "sbatch": "slurm-client", "munged": "munge"}
_UNDER_WAY = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "REQUEUED")
_CLUSTER = Path(__file__).with_name("cluster.sh")


@dataclass(frozen=True)
class Slurm:
    environment: dict[str, str]

    def do(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *arguments: str) -> str:
        """The job's number."""
        return self.do("sbatch", "--parsable", *arguments)

    def state(self, job: str) -> str:
        """Of a job that has ended too, for some minutes."""
        return self.do("scontrol", "show", "job", job).partition("JobState=")[2].partition(" ")[0]

    def wait_until(self, what, seconds: float = 240):
        """What `what` gives, once that is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := what():
                return found
            time.sleep(0.1)
        pytest.fail(f"not within {seconds} s; squeue: {self.do('squeue')}")

    def end(self, job: str) -> str:
        """The state in which the job ends."""
        return self.wait_until(lambda: (state := self.state(job)) not in _UNDER_WAY and state)


@pytest.fixture(scope="session")
def slurm(home, tmp_path_factory):  # noqa: F811
    missing = [package for program, package in _NEEDED.items() if shutil.which(program) is None]
    if os.geteuid() != 0:
        pytest.skip("only root can start Slurm's daemons")
    if missing:
        pytest.skip(f"Slurm is not installed: apt-get install --no-install-recommends {' '.join(missing)}")
    directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: sockets have paths of 108 letters
    started = subprocess.run(["bash", str(_CLUSTER), "start", str(directory)], capture_output=True, text=True)
    try:
        if started.returncode:
            pytest.skip(f"Slurm's daemons do not start here: {started.stderr.strip()}")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as an active environment has it
        environment = {"PATH": path, "HOME": str(home), "SLURM_CONF": str(directory / "slurm.conf")}
        yield Slurm(environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    finally:
        subprocess.run(["bash", str(_CLUSTER), "stop", str(directory)], capture_output=True)
        shutil.rmtree(directory, ignore_errors=True)
