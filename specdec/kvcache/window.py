"""Which slots the sliding-window layers of a row hold, and the memory of those that they do not.

A windowed layer sees only the last ``window`` slots before a token. Slots below are dropped: their memory goes back to
the system, and addresses stay. What a later text may begin with stays: the slots before the row's end and before its
checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from specdec.base import memory

FIRST = 64  # slots at the beginning that stay: drafts see them from anywhere in a text
MARGIN = 128  # slots more than the window that stay, so that a text can be resumed a little before its end
STEP = 64  # slots are dropped in multiples of this number
MAX_CHECKPOINTS = 3  # of a row: each holds the slots of a window
Range = tuple[int, int]  # slots from a first one to an end, which is not included


def outside(count: int, window: int, checkpoints: Iterable[int], dropped: Sequence[Range] = ()) -> tuple[Range, ...]:
    """Return the ranges of slots that the windowed layers of a row of ``count`` tokens need no longer, in order.

    checkpoints: numbers of tokens at which another text may go on. dropped: the ranges that are gone already.
    """
    found, begin = list(dropped), FIRST
    for end in sorted({*checkpoints, count}):
        if (first := (end - window - MARGIN) // STEP * STEP) > begin:
            found.append((begin, first))
        begin = max(begin, end)
    return union(found)


def union(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return the union of ``ranges`` as disjoint ranges in order."""
    made = list[Range]()
    for begin, end in sorted(ranges):
        if made and begin <= made[-1][1]:
            made[-1] = made[-1][0], max(made[-1][1], end)
        elif begin < end:
            made.append((begin, end))
    return tuple(made)


def intersection(left: Sequence[Range], right: Sequence[Range]) -> tuple[Range, ...]:
    """Return the slots that are in both of two lists of ranges."""
    return union((max(a, c), min(b, d)) for a, b in left for c, d in right if max(a, c) < min(b, d))


def held(dropped: Sequence[Range], count: int) -> tuple[Range, ...]:
    """Return the ranges of the first ``count`` slots that are not in ``dropped``, which is in order."""
    ends = [0, *(end for _, end in dropped)]
    begins = [*(begin for begin, _ in dropped), count]
    return union((begin, min(end, count)) for begin, end in zip(ends, begins, strict=True))


def resumable(count: int, window: int, dropped: Sequence[Range]) -> int:
    """Return the largest number of tokens, at most ``count``, after which no token's window has a dropped slot."""
    for begin, end in reversed(dropped):
        if begin < count < end + window:
            count = begin
    return count


def thinned(checkpoints: Iterable[int]) -> frozenset[int]:
    """Return at most ``MAX_CHECKPOINTS`` of ``checkpoints``: the last one, and others ever farther before it."""
    kept = sorted({*checkpoints})
    while len(kept) > MAX_CHECKPOINTS:
        last = kept[-1] + MARGIN
        gaps = [(last - before) / (last - after) for before, after in zip([0, *kept], kept[1:], strict=False)]
        del kept[gaps.index(min(gaps))]
    return frozenset(kept)


def release(buffer: Tensor, layers: Sequence[int], ranges: Sequence[Range]) -> None:
    """Give the memory of slots back to the system; whole pages only. They read as zeros then.

    buffer: [2, N', H, slots, d], on a CPU. layers: indices of the layers. ranges: ranges of the slots.
    """
    for part in buffer.unbind(0):
        for layer in layers:
            for head in part[layer].unbind(0):
                for begin, end in ranges:
                    memory.discard(head[begin:end])
