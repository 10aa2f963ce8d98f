"""Which tokens' keys and values sliding-window layers keep in the KV cache, and how the memory of others is freed.

A windowed layer sees only the last ``window`` tokens before a token. A slot (one token's keys and values) below is
dropped: its memory goes back to the system, and its address stays valid. Kept are the first slots, and a window before
the end of a row (sequence) and before its checkpoints, where later texts may go on.
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
    """Return the ranges [begin, end) of tokens whose keys and values sliding-window layers need no longer, in order.

    Needed are the first 64 tokens, and a window with a margin of 128 tokens before the end and each checkpoint.

    count: number of tokens of the row (sequence). window: number of tokens before a token that these layers see.
    checkpoints: numbers of tokens up to which other texts may reuse the row, so that a window before them is needed.
    dropped: the ranges that are dropped already; the result includes them.
    """
    found, begin = list(dropped), FIRST
    for end in sorted({*checkpoints, count}):
        if (first := (end - window - MARGIN) // STEP * STEP) > begin:
            found.append((begin, first))
        begin = max(begin, end)
    return union(found)


def union(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return the union of half-open ranges [begin, end) as disjoint ranges in ascending order."""
    made = list[Range]()
    for begin, end in sorted(ranges):
        if made and begin <= made[-1][1]:
            made[-1] = made[-1][0], max(made[-1][1], end)
        elif begin < end:
            made.append((begin, end))
    return tuple(made)


def intersection(left: Sequence[Range], right: Sequence[Range]) -> tuple[Range, ...]:
    """Return the intersection of two lists of half-open ranges, as disjoint ranges in ascending order."""
    return union((max(a, c), min(b, d)) for a, b in left for c, d in right if max(a, c) < min(b, d))


def held(dropped: Sequence[Range], count: int) -> tuple[Range, ...]:
    """Return the ranges of 0 to ``count`` - 1 that are not in ``dropped``: tokens whose keys are still held.

    dropped: half-open ranges [begin, end) in ascending order.
    """
    ends = [0, *(end for _, end in dropped)]
    begins = [*(begin for begin, _ in dropped), count]
    return union((begin, min(end, count)) for begin, end in zip(ends, begins, strict=True))


def resumable(count: int, window: int, dropped: Sequence[Range]) -> int:
    """Return the largest number of first tokens of a row, at most ``count``, that another text can reuse.

    After that number, no dropped token is in the attention window of the next one.

    window: number of tokens before a token that sliding-window layers see.
    dropped: half-open ranges of tokens whose keys and values are dropped, in ascending order.
    """
    for begin, end in reversed(dropped):
        if begin < count < end + window:
            count = begin
    return count


def thinned(checkpoints: Iterable[int]) -> frozenset[int]:
    """Return at most three of the checkpoints: the last one, and others at growing distances before it.

    checkpoints: numbers of first tokens of a row (sequence) that other texts can reuse.
    """
    kept = sorted({*checkpoints})
    while len(kept) > MAX_CHECKPOINTS:
        last = kept[-1] + MARGIN
        gaps = [(last - before) / (last - after) for before, after in zip([0, *kept], kept[1:], strict=False)]
        del kept[gaps.index(min(gaps))]
    return frozenset(kept)


def release(buffer: Tensor, layers: Sequence[int], ranges: Sequence[Range]) -> None:
    """Return the memory of some slots of a buffer to the system, whole memory pages only. They then read as zeros.

    buffer: keys and values [2, N', H, slots, d] on a CPU. layers: indices of layers, along N'.
    ranges: half-open ranges [begin, end) of slots.
    """
    for part in buffer.unbind(0):
        for layer in layers:
            for head in part[layer].unbind(0):
                for begin, end in ranges:
                    memory.discard(head[begin:end])
