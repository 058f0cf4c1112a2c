"""The CPU threads of a rank: its share of the node's cores, unless the user has said how many."""

import os
from pathlib import Path

_THREADS = "OMP_NUM_THREADS"  # torch's, MKL's and bitsandbytes' OpenMP read it, each once, as they are loaded
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of all cores, or "max", in so many


def share_cores_among_ranks() -> None:
    """Sets OMP_NUM_THREADS to this rank's share of the cores where the launcher alone has set it.

    To be called before torch is imported. `accelerate launch` and torchrun set it to 1 for those who have not set it:
    a lone rank would compute on one core of a machine that has many. What the user has set stays.
    """
    if _launcher_set_threads():
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this node
        os.environ[_THREADS] = str(max(1, available_cores() // ranks))


def available_cores() -> int:
    """Cores that this process may use: of its affinity, which Slurm sets, and of its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def _launcher_set_threads() -> bool:
    """The launcher is this process's parent, and was itself started without the variable."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ)
    if not launched or _THREADS not in os.environ:
        return False
    try:
        given = Path(f"/proc/{os.getppid()}/environ").read_bytes()  # as it was started: what it set later is not in it
    except OSError:  # no Linux: whose it is cannot be told
        return False
    return not any(entry.startswith(_THREADS.encode() + b"=") for entry in given.split(b"\0"))
