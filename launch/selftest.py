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
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone as well as installed

from lorasp.selftest import Outcome, check_libraries, over_ranks, run_check, run_checks

_COLLECTIVE_SECONDS = 60  # after which a rank that waits for another one gives up
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

    outcomes, ranks = [run_check("libraries", check_libraries, "")], None
    if outcomes[0].passed:
        outcomes, ranks = _on_ranks(outcomes)
    passed = all(outcome.passed for outcome in outcomes)
    if os.environ.get("RANK", "0") == "0":
        _tell(outcomes)
        if path is not None:
            _write(path, passed, outcomes)
    elif ranks is None:
        time.sleep(_RANK_0_TELLS_SECONDS)
    if ranks is not None:
        from lorasp.zero.launch import stop_ranks

        stop_ranks(ranks)
    return 0 if passed else 1


def _on_ranks(outcomes: list[Outcome]) -> tuple[list[Outcome], Any]:
    """All outcomes with those of the checks that need ranks; and the ranks, or None if they are not in step."""
    # Known to be there by now.
    import torch
    from torch import distributed as dist

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
    outcomes = [*outcomes, run_check("launch", start, advice)]
    if not started:
        return outcomes, None
    (ranks,) = started
    outcomes += run_checks(ranks, recipe)
    by_rank = [None] * ranks.world_size
    try:
        dist.all_gather_object(by_rank, outcomes)
    except RuntimeError:  # the ranks cannot talk; this one's own outcomes say so
        return outcomes, None
    return over_ranks(by_rank), ranks


def _tell(outcomes: list[Outcome]) -> None:
    """A table on a terminal, a line a check elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("check", "", "found", "s")
        for outcome in outcomes:
            verdict = Text("ok", "green") if outcome.passed else Text("FAILED", "bold red")
            found = outcome.found + (f"\n→ {outcome.advice}" if outcome.advice else "")
            table.add_row(outcome.name, verdict, Text(found), f"{outcome.seconds:.1f}")
        Console().print(table)
    else:
        for outcome in outcomes:
            print(f"{'ok' if outcome.passed else 'FAILED':<7}{outcome.name:<16} {outcome.found}")
            if outcome.advice:
                print(f"{'':24}-> {outcome.advice}")
    failed = sum(not outcome.passed for outcome in outcomes)
    print(f"{failed} of {len(outcomes)} checks failed" if failed else f"all {len(outcomes)} checks passed", flush=True)


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
