"""Examples put together into packs of about equal length, so that each forward of each rank costs the same."""

from collections.abc import Sequence

import numpy as np

# Examples that are packed among themselves: all of them would make packing quadratic, and fill Alpaca's packs of 256
# tokens to 98.0 % instead of 97.9 %. Taken as they come, without sorting, examples fill them to 94.4 %.
_WINDOW = 2048


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First fit, longest first: each example goes into the first pack of its window with room, else into a new one.

    lengths: tokens of each example, at most `capacity`. Gives the indices of each pack's examples. Packs of long
    examples stand before those of short ones: shuffle them.
    """
    if max(lengths, default=0) > capacity:
        raise ValueError(f"an example of {max(lengths)} tokens for packs of {capacity}")
    packs: list[list[int]] = []
    for start in range(0, len(lengths), _WINDOW):
        window = sorted(range(start, min(start + _WINDOW, len(lengths))), key=lambda index: -lengths[index])
        before = len(packs)
        room = np.zeros(len(window), dtype=np.int64)  # of each of the window's packs, in tokens
        for index in window:
            fits = room[: len(packs) - before] >= lengths[index]
            chosen = int(fits.argmax()) if fits.any() else len(fits)
            if chosen == len(fits):
                packs.append([])
                room[chosen] = capacity
            packs[before + chosen].append(index)
            room[chosen] -= lengths[index]
    return packs
