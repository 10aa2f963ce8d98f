"""Runs known tokens through a target model and commits them to its KV cache, such as the tokens of prompts."""

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
    """Run known tokens of B sequences, up to ``PASS_TOKENS`` (512) of each in a pass, and commit them to ``cache``.

    target: the model. cache: its KV cache, whose B sequences the tokens continue.
    rows: for each sequence its token ids, at least one.

    Returns the final states (inputs of the final norm) of each sequence's last token, [B, 1, D].
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
    """Run known tokens of B sequences through all layers in one pass, and commit them to ``cache``.

    target: the model. cache: its KV cache, whose B sequences the tokens continue.
    rows: for each sequence, the ids of its next tokens; some of the sequences may have none.
    taps: layers whose input states are wanted, by number. The value of each key is replaced by the input states of that
        layer: of each sequence's last token [B, 1, D] or, if ``whole``, of all tokens [B, T, D], padded on the right.
        None: no states are wanted.
    whole: whether ``taps`` get the states of all tokens.
    every: a list to which the final states of all tokens are appended, one tensor [tokens, D] for each sequence; None:
        they are not wanted.

    Returns the final states (inputs of the final norm) of each sequence's last token, [B, 1, D]; those of a sequence
    without tokens are meaningless.
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
