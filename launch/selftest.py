"""Is everything that a run relies on right on this machine: libraries, devices, collectives, kernels, counters?

python launch/selftest.py
accelerate launch --use_deepspeed --num_processes 2 launch/selftest.py
torchrun --nproc_per_node 2 launch/selftest.py --json selftest.json
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone as well as installed

from lorasp.selftest import Outcome, check_libraries, checks_on_ranks, over_ranks, run_check

_COLLECTIVE_SECONDS = 60  # after which a rank that waits for another one gives up
_OUT_OF_STEP = "ranks in step"
_RANK_0_TELLS_SECONDS = 5  # a launcher ends all ranks as soon as one exits with an error


def main() -> int:
    description, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples.rstrip()}\n\nexit code: 0 if all is right, else 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes the outcome here, for a bug report")
    path = parser.parse_args().json
    if _speaks() and path is not None and not path.parent.is_dir():
        # Now, not when a minute of checks is over.
        parser.error(f"--json: {path.parent} is no directory")

    outcomes, ranks = [_check("libraries", check_libraries, "")], None
    if outcomes[0].passed:
        outcomes, ranks = _on_ranks(outcomes)
    failed = sum(not outcome.passed for outcome in outcomes)
    if _speaks():
        count = len(outcomes)
        print(f"{failed} of {count} checks failed" if failed else f"all {count} checks passed", flush=True)
        if path is not None:
            _write(path, not failed, outcomes)
    elif ranks is None:
        time.sleep(_RANK_0_TELLS_SECONDS)
    if ranks is not None:
        from lorasp.cli import end_rank
        from lorasp.zero.launch import stop_ranks

        stop_ranks(ranks)
        end_rank(1 if failed else 0)
    return 1  # without ranks something has failed


def _on_ranks(outcomes: list[Outcome]) -> tuple[list[Outcome], Any]:
    """All outcomes with those of the checks that need ranks; and the ranks, or None if they are not in step."""
    # Known to be there by now.
    import torch

    from lorasp.recipe import Recipe
    from lorasp.zero.launch import start_ranks

    recipe = Recipe(
        model={"path": "none"},
        data={"train": "none"},
        training={"global_batch_size": int(os.environ.get("WORLD_SIZE", "1")), "micro_batch_size": 1},
        deepspeed={"collective_timeout_seconds": _COLLECTIVE_SECONDS},
    )
    started = []

    def start() -> str:
        started.append(start_ranks(recipe, torch.float32))
        return f"{started[0].world_size} rank(s)"

    advice = "launch it as the examples of --help do, and see that no other program holds the port or the GPUs"
    outcomes = [*outcomes, _check("launch", start, advice)]
    if not started:
        return outcomes, None
    (ranks,) = started
    for check in checks_on_ranks(ranks, recipe):
        outcomes.append(_check(*check, over=ranks))
        if outcomes[-1].name == _OUT_OF_STEP:
            return outcomes, None
    return outcomes, ranks


def _check(name: str, check: Callable[[], str], advice: str, over: Any = None) -> Outcome:
    """Runs a check, `over` all ranks where given, and tells of it before and after: one that hangs is seen."""
    if _speaks():
        # On a terminal the outcome replaces this line.
        print(f"{'...':<7}{name}", end="\r" if sys.stdout.isatty() else "\n", flush=True)
    outcome = run_check(name, check, advice)
    if over is not None:
        from torch import distributed as dist

        by_rank = [None] * over.world_size
        try:
            dist.all_gather_object(by_rank, outcome)
            outcome = over_ranks(by_rank)
        except RuntimeError as error:
            own = f"passed on rank {over.rank}" if outcome.passed else f"rank {over.rank}: {outcome.found}"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            found = f"{name}: {own}; no answer from another rank ({reason})"
            outcome = Outcome(_OUT_OF_STEP, False, found, advice, outcome.seconds)
    if _speaks():
        print(f"{'ok' if outcome.passed else 'FAILED':<7}{outcome.name:<16} {outcome.found}", flush=True)
        if outcome.advice:
            print(f"{'':24}-> {outcome.advice}", flush=True)
    return outcome


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _write(path: Path, passed: bool, outcomes: list[Outcome]) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    content = {"passed": passed, "world_size": world_size, "checks": [asdict(outcome) for outcome in outcomes]}
    try:
        from lorasp.reporting.run_report import collect_versions, command_line

        content |= {"command": command_line(), "versions": collect_versions()}
    except ImportError as error:  # without torch; the checks say so
        content["versions"] = f"unknown: {error}"
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {path}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
