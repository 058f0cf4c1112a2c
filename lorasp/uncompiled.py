"""Imports of bitsandbytes and DeepSpeed that do not load torch's compiler.

Both decorate a few functions with torch.compile as they are imported, and so load Dynamo and Inductor: half of the
processor time of a rank's imports, for functions (8-bit kernels, Muon) that nothing here calls.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within it torch.compile gives back what it is given."""
    compile_ = torch.compile
    torch.compile = _as_it_is
    try:
        yield
    finally:
        torch.compile = compile_


def _as_it_is(function: Callable | None = None, **settings: Any) -> Callable:
    return (lambda decorated: decorated) if function is None else function
