"""Running ragged rows of known tokens into a cache, in chunks: prompts, and what a second model has to catch up on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specdec.runtimes.cache import KVCache
from specdec.runtimes.layer_pass import Pass
from specdec.runtimes.target import Target

CHUNK = 512  # tokens of a row per pass: bounds the memory of masks and activations


def prefill(
    target: Target,
    cache: KVCache,
    rows: Sequence[Sequence[int]],
    taps: Callable[[], dict[int, Tensor]] = dict,
    observe: Callable[[list[list[int]], dict[int, Tensor]], None] = lambda paths, taps: None,
) -> Tensor:
    """Run each row's tokens (at least one) after those that ``cache`` holds of it; commit them.

    taps: called for the layers to tap in each chunk. observe: called after each chunk with which of its tokens are each
    row's, and the tapped states. Returns the final states [B, 1, D] of each row's last token.
    """
    lengths = [len(row) for row in rows]
    last: list[Tensor] = [torch.empty(0)] * len(rows)
    for start in range(0, max(lengths), CHUNK):
        counts = [min(max(n - start, 0), CHUNK) for n in lengths]
        width = max(counts)
        chunk = [[*row[start : start + n], *[0] * (width - n)] for row, n in zip(rows, counts, strict=True)]
        tokens = torch.tensor(chunk, device=cache.device)  # (B, T), padded on the right
        positions = torch.tensor([[n] for n in cache.rows], device=cache.device)
        positions = positions + torch.arange(width, device=cache.device)
        positions.clamp_(max=target.context - 1)  # padding may point past the end
        x, tapped = target.embed(tokens, positions), taps()
        x = target.layers(x, 0, target.num_layers, Pass(positions, cache.mask(0, positions), cache, tapped))
        for b, n in enumerate(counts):
            if n and start + n == lengths[b]:
                last[b] = x[b, n - 1]
        paths = [list(range(n)) for n in counts]
        cache.commit(paths)
        observe(paths, tapped)
    return torch.stack(last)[:, None]
