"""Real launches: `accelerate launch` of a script on N CPU ranks, as a user would."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

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
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=timeout)


def run_jobs(ranks: int, jobs: dict[str, dict], directory: Path) -> dict[str, list[dict]]:
    """Runs the worker's jobs in one launch of `ranks`: the name of each job -> what each rank found, in rank order."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "jobs.json").write_text(json.dumps(jobs))
    done = launch(ranks, WORKER, str(directory), timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {
        name: [json.loads((directory / f"{name}.{rank}.json").read_text()) for rank in range(ranks)] for name in jobs
    }
