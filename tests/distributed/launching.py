"""Real launches: `accelerate launch` of a script on N CPU ranks, as a user would."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")


def launch(
    ranks: int, script: Path | str, *arguments: str, env: dict[str, str] | None = None, cwd: Path = ROOT, timeout=240
) -> subprocess.CompletedProcess:
    """Runs `accelerate launch --use_deepspeed --num_processes RANKS SCRIPT …` to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--use_deepspeed",
        "--num_processes",
        str(ranks),
        "--num_machines",
        "1",
        "--main_process_port",
        str(port),
        str(script),
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    return run_whole(command, timeout, env=environment, cwd=cwd)


def run_whole(command: Sequence[str], timeout: float, **how: Any) -> subprocess.CompletedProcess:
    """As `subprocess.run` does, whose timeout ends no more than the launcher: this one ends its ranks too.

    how: of `subprocess.Popen`. Raises subprocess.TimeoutExpired.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes, **how) as process, ended_with_its_family(process):
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextlib.contextmanager
def ended_with_its_family(process: subprocess.Popen, timeout: float | None = None) -> Iterator[None]:
    """Kills `process` and its ranks once the block raises, or is not left after `timeout` seconds."""
    clock = None if timeout is None else threading.Timer(timeout, kill_family, (process.pid,))
    try:
        if clock is not None:
            clock.start()
        yield
    except BaseException:
        kill_family(process.pid)
        raise
    finally:
        if clock is not None:
            clock.cancel()


def kill_family(pid: int) -> None:
    """The process and all that it started: torchrun's agent gives each rank a session of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(pid)
        family = launcher.children(recursive=True)
        for process in (launcher, *family):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def run_jobs(ranks: int, jobs: dict[str, dict], directory: Path) -> dict[str, list[dict]]:
    """Runs the worker's jobs in one launch of `ranks`: the name of each job -> what each rank found, in rank order."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "jobs.json").write_text(json.dumps(jobs))
    done = launch(ranks, WORKER, str(directory), timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {
        name: [json.loads((directory / f"{name}.{rank}.json").read_text()) for rank in range(ranks)] for name in jobs
    }
