"""Timing of forward passes, for benchmarks. An engine learns its costs from real steps instead.

The shortest of several timings counts: other work on the machine makes a pass longer, never shorter.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence

import torch

from specdec.kvcache.cache import KVCache
from specdec.runtimes.target import Pass, Target

SIZES = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 32)  # numbers of scored tokens that are timed
CONTEXT = 128  # cached tokens while timing


@torch.inference_mode()
def time_scoring(target: Target, repeats: int = 5, sizes: Sequence[int] | None = None) -> dict[int, float]:
    """Return {number of tokens: seconds of one pass over as many tokens}, the shortest of several, after a warm-up.

    target: the model in its runtime. sizes: the numbers of tokens to time, interleaved; None: ``SIZES``. repeats:
    roughly the number of passes per size.
    For a model with experts in slow memory the seconds are a median: each pass has other tokens, and a lucky pass finds
    its experts in fast memory already.
    """
    sizes = SIZES if sizes is None else sizes
    cache, context = target.new_cache(), min(CONTEXT, target.context - max(sizes))
    _pass(target, cache, 0, context)
    cache.commit([list(range(context))])
    seconds = defaultdict[int, list[float]](list)
    order = [*sizes, *reversed(sizes)]  # a pass takes longer after a much larger one
    for turn, n in enumerate(order * (repeats // 2 + 1)):
        start = time.perf_counter()
        _pass(target, cache, context, n, turn * max(sizes))
        seconds[n].append(time.perf_counter() - start)
        cache.trim(n)
    typical = min if target.experts is None else statistics.median
    return {n: typical(s[1:]) for n, s in seconds.items()}


def _pass(target: Target, cache: KVCache, start: int, count: int, first: int = 0) -> None:
    """Run one sequence's pass over ``count`` tokens through all layers, and choose the greedy token after each of them.

    The token at position p has the id (p + ``first``) modulo the vocabulary's size. Nothing is returned; the keys and
    values of the tokens are uncommitted in ``cache`` afterwards.

    target: the model in its runtime. cache: a cache of one row, with ``start`` committed tokens and no others.
    start: position of the first token. count: number of tokens.
    first: offset of the token ids, so that passes at the same positions can have different tokens.
    """
    positions = torch.arange(start, start + count, device=target.device)[None]
    ids = (positions + first) % target.vocab_size
    given = Pass(positions, cache.register(0, positions), cache, ids=ids)
    target.greedy_tokens(target.layers(target.embed(ids, positions), 0, target.num_layers, given))
