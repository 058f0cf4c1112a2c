"""What a rank says as it ends beside others: one sentence where the input is at fault, else every rank's stack.

A collective fails on a rank as soon as a peer has exited. If the peer has refused what the user gave, it has told why,
and a stack of each other rank would bury that; if it has died, where the others stood is all that there is to read.
"""

import os
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any

_KEY = "lorasp/refused"


def tell_peers_of_refusal() -> None:
    """To be called before this rank exits, and so before a peer can fail of it."""
    if (store := _store()) is not None:
        with suppress(Exception):  # its host may have exited: then nobody asks any more
            store.set(_KEY, "")


def peer_has_refused() -> bool:
    """Whether another rank ends, or has ended, with a sentence of its own."""
    if (store := _store()) is None:
        return False
    with suppress(Exception):
        return store.check([_KEY])
    return False


def print_stack(error: BaseException) -> None:
    """The traceback of `error` on stderr."""
    rank = os.environ.get("RANK", "0")
    told = f"rank {rank} ended here (the launcher names the rank that ended first):\n"
    _in_one_piece(told + "".join(traceback.format_exception(error)))


def print_stacks(told: str) -> None:
    """`told` and where each thread of this rank stands, the main one last, on stderr."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] == threading.main_thread().ident)
    stacks = [
        f"{names.get(ident, 'a thread')} (most recent call last):\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
    ]
    _in_one_piece(f"{told}. Its stacks:\n{''.join(stacks)}")


def _in_one_piece(text: str) -> None:
    """One write to stderr: ranks speak at the same time, and what each wrote in parts could not be told apart."""
    with suppress(OSError, ValueError):  # nobody listens any more: the rank is still to end
        sys.stderr.flush()
        os.write(sys.stderr.fileno(), text.encode(errors="replace"))


def _store() -> Any:
    """What the ranks have met through; None before, and where nothing has imported torch."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()
