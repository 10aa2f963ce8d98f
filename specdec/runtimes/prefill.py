"""Runs known tokens through a model: prompts, and text that a second model has not seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specdec.base.devices import upload
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import Mask
from specdec.runtimes.target import Pass, Target

PASS_TOKENS = 512  # maximum tokens of a row per pass: bounds the memory of masks and activations


def prefill(target: Target, cache: KVCache, rows: Sequence[Sequence[int]]) -> Tensor:
    """Run the tokens of each row (at least one) in passes of ``PASS_TOKENS``, and commit them to ``cache``.

    Returns the final states [B, 1, D] of each row's last token.
    """
    last: Tensor | None = None
    for start in range(0, max(map(len, rows)), PASS_TOKENS):
        parts = [row[start : start + PASS_TOKENS] for row in rows]
        x = run_tokens(target, cache, parts)
        alive = upload([[[bool(part)]] for part in parts], cache.device, torch.bool)  # (B, 1, 1)
        last = x if last is None else torch.where(alive, x, last)
    assert last is not None
    return last


def run_tokens(
    target: Target,
    cache: KVCache,
    rows: Sequence[Sequence[int]],
    taps: dict[int, Tensor] | None = None,
    whole: bool = False,
    every: list[Tensor] | None = None,
) -> Tensor:
    """Run the tokens of each row (some rows may have none) in one pass, and commit them to ``cache``.

    Returns the final states [B, 1, D] of each row's last token.
    taps: for each layer that is a key, the value is set to the layer's input states [B, 1, D] of the last tokens or, if
        ``whole``, of all tokens [B, T, D], padded on the right; None: no states.
    every: a list that gets, for each row, the final states [n, D] of its n tokens; None: no states.
    """
    counts, device = list(map(len, rows)), cache.device
    mask: Mask
    if target.ragged:
        tokens = upload([[token for row in rows for token in row]], device)  # (1, T)
        places = [range(n, n + count) for n, count in zip(cache.rows, counts, strict=True)]
        positions = upload([[place for row in places for place in row]], device)
        mask, ends, end = cache.register(0, positions, counts=counts), list[int](), 0
        for count in counts:
            end += count
            ends.append(max(end - 1, 0))
        last = [0] * len(rows), ends
    else:
        width = max(counts)
        tokens = upload([[*row, *[0] * (width - len(row))] for row in rows], device)  # (B, T), padded on the right
        positions = upload([[n] for n in cache.rows], device) + torch.arange(width, device=device)
        positions.clamp_(max=target.context - 1)  # padding may point past the end
        mask = cache.register(0, positions)
        last = list(range(len(rows))), [max(count - 1, 0) for count in counts]
    index, x = tuple(upload(last, device)), target.embed(tokens, positions)
    x = target.layers(x, 0, target.num_layers, Pass(positions, mask, cache, taps, ids=tokens))
    cache.commit([range(count) for count in counts])
    packed = len(rows) > 1 and len(x) == 1  # rows lie one behind the other
    if every is not None:
        every += x[0].split(counts) if packed else [row[:count] for row, count in zip(x, counts, strict=True)]
    for layer, states in (taps or {}).items():
        if taps is None or states.dim() < 2:
            continue
        if not whole:
            taps[layer] = states[index][:, None]
        elif packed:
            taps[layer] = pad_sequence(states[0].split(counts), batch_first=True)
    return x[index][:, None]
