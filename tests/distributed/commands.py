"""What a user types, run to its end, in an environment that knows nothing of this machine's user."""

import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.launching import ROOT, ended_with_its_family

TRAIN = str(ROOT / "launch" / "train.py")
EVALUATE = str(ROOT / "launch" / "evaluate.py")


@dataclass(frozen=True)
class Done:
    """lingered: seconds from the first line of stderr that begins with "error" to the end; None without one."""

    returncode: int
    stdout: str
    stderr: str
    lingered: float | None

    @property
    def errors(self) -> list[str]:
        """The sentences on stderr that are the script's own, not its launcher's."""
        return [line for line in self.stderr.splitlines() if line.startswith("error")]


def python(*arguments: str, script: str = TRAIN) -> list[str]:
    return [sys.executable, script, *arguments]


def accelerate(*arguments: str, flags: tuple[str, ...] = ()) -> list[str]:
    return [_tool("accelerate"), "launch", *flags, TRAIN, *arguments]


def accelerate_on_two(*arguments: str) -> list[str]:
    return accelerate(
        *arguments, flags=("--use_deepspeed", "--num_processes", "2", "--main_process_port", str(free_port()))
    )


def torchrun_on_two(*arguments: str, script: str = TRAIN) -> list[str]:
    return [_tool("torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port()), script, *arguments]


def environment_of(home: Path, threads: int | None = 1) -> dict[str, str]:
    """Nothing of this machine's user, whose home is `home`. threads: of a rank; None: as the user who sets nothing."""
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
    environment |= {"HOME": str(home), "HF_HUB_OFFLINE": "1"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    environment["CUDA_VISIBLE_DEVICES"] = ""  # two ranks cannot share a GPU; on CPUs the numbers are the same anywhere
    return environment


def run(command: list[str], home: Path, timeout: float = 180, threads: int | None = 1) -> Done:
    """Runs `command` from the repository root, each rank on so many `threads`; None: on as many as it takes.

    home: the user's, where `accelerate config` leaves its answers. timeout: seconds until launcher and ranks are
    killed.
    """
    out: list[str] = []
    with (
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment_of(home, threads),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process,
        ended_with_its_family(process, timeout),
    ):
        reader = threading.Thread(target=lambda: out.append(process.stdout.read()))
        reader.start()
        err, told = [], None
        for line in process.stderr:
            err.append(line)
            if told is None and line.startswith("error"):
                told = time.monotonic()
        returncode = process.wait()
        ended = time.monotonic()
        reader.join()
    return Done(returncode, "".join(out), "".join(err), None if told is None else ended - told)


def start(command: list[str], home: Path) -> subprocess.Popen:
    """Starts `command` as `run` does, in a session of its own; all that it says comes line by line from stdout."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment_of(home),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))
