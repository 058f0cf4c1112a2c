"""What every launch script shares: its arguments, and errors told once, in one sentence, with exit code 2."""

import argparse
import atexit
import errno
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from lorasp.cpu_threads import share_cores_among_ranks
from lorasp.health import asked_to_leave, stop_listening
from lorasp.host_memory import map_large_blocks_apart
from lorasp.last_words import peer_has_refused, print_stack, tell_peers_of_refusal
from lorasp.recipe import Recipe, RecipeError
from lorasp.recipe_loading import load_recipe

FAILED = 1
BAD_INPUT = 2
STOPPED = 3
HUNG = 76  # a rank that stood still
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from where it was
INTERRUPTED = 130  # Ctrl-C, as shells have it
_OTHERS_WAIT_SECONDS = 10


def recipe_from_command_line(documentation: str, arguments: list[str] | None = None) -> Recipe:
    """Parses `RECIPE [key=value …]` and loads the recipe; imports nothing heavy. `documentation`: the script's."""
    parser = argument_parser(documentation)
    parser.add_argument("recipe", help="a YAML file of recipes/, or your own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    options = parser.parse_args(arguments)
    return load_recipe(options.recipe, options.overrides)


def argument_parser(documentation: str) -> argparse.ArgumentParser:
    """A parser that raises RecipeError for arguments that it cannot take.

    documentation: the script's docstring; its first paragraph describes, what follows are the examples of --help.
    """
    description, _, examples = documentation.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples.rstrip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda fault: _refuse_arguments(fault, parser.format_usage())  # argparse's own speaks on every rank
    return parser


def refuse_several_processes() -> None:
    """For scripts that no launcher helps: its processes would all do the same, into the same directory."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(f"{os.path.basename(sys.argv[0])} is one process: start it with python, without a launcher")


def run_reporting_errors(main: Callable[[], int]) -> int:
    """Runs `main`; a RecipeError, or a full disk, becomes a sentence on stderr and exit code 2. For `sys.exit(…)`.

    Any other error ends it with the traceback, of several ranks with each one's. Ctrl-C ends it without a word.
    """
    map_large_blocks_apart()
    share_cores_among_ranks()
    try:
        return main()
    except KeyboardInterrupt:
        _exit(INTERRUPTED)
    except Exception as error:
        fault = _fault_of_the_user(error)
        if fault is None:
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                raise
            # A launcher that ends this rank beside one that died sends SIGTERM: heard, it leaves time for the stack.
            if not peer_has_refused():
                print_stack(error)
            _exit(FAILED)
    tell_peers_of_refusal()
    stop_listening()  # the launcher is to end this rank when another one has ended
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0:
        # All ranks see the same input. A launcher ends the others as soon as one exits, so rank 0 speaks first;
        # if it does not, the fault is this rank's alone. One that was asked to leave before it came here is late.
        if asked_to_leave():
            _exit(BAD_INPUT)
        time.sleep(_OTHERS_WAIT_SECONDS)
    print(f"error{f' on rank {rank}' if rank else ''}: {fault}", file=sys.stderr, flush=True)
    _exit(BAD_INPUT)


def end_rank(code: int) -> NoReturn:
    """Ends a rank that has left the others: Python's clean-up runs, the destructors of C++ libraries do not.

    One that finds its thread still running aborts ("terminate called without an active exception"), and the launcher
    takes a run whose report is written for one that failed.
    """
    atexit._run_exitfuncs()
    sys.stderr.flush()
    _exit(code)


def _exit(code: int) -> NoReturn:
    """Not sys.exit: a rank that waits in a collective would keep the interpreter's own clean-up waiting."""
    sys.stdout.flush()
    os._exit(code)


def _fault_of_the_user(error: Exception) -> str | None:
    """The sentence to tell instead of a traceback, or None where the program is at fault."""
    if isinstance(error, RecipeError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}; free space, or name another output_dir"
    return None


def _refuse_arguments(fault: str, usage: str) -> NoReturn:
    raise RecipeError(f"{fault}; {usage.strip()}")
