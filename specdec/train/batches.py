"""Training batches: padded windows of answers with the base model's states, in an order fixed by the seed.

A window is a range of consecutive positions of one answer. Short windows keep attention over drafted positions small
and mix many answers in one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kvcache.cache import KVCache
from specdec.train.states import AnswerStates

KEY_BLOCK = 64  # the number of keys of a batch is a multiple of this
GRAIN = 4  # windows whose lengths differ by fewer positions are sorted by where they end
Window = tuple[int, int, int]  # index of the answer, first position, end position (exclusive)


@dataclass
class TrainingBatch:
    """B windows of T positions with the base model's states. Column t predicts the token after ``ids[:, t]``.

    A text is a prompt and its answer; a window is a range of consecutive positions of it, padded at its end to T.

    ids, next_ids: the tokens and the token after each in the text, int64 [B, T].
    positions: the tokens' positions in the text, int64 [B, T].
    valid: bool [B, T], False for padding.
    kv: layer -> (keys, values) of the base model ("exact") for positions 0 .. S - 1, [B, H', S, d] each, with H' key
        heads of size d.
    hidden, before: layer -> the layer's input at each position, and at the position before it, [B, T, D]. Layer N (the
        number of layers) stands for the last layer's output, before the final norm.
    best: the base model's most likely token after each position, int64 [B, T].
    log_z: log of its partition sum there, the sum of exp(logit) over all tokens, float32 [B, T].
    texts: one int32 tensor per row, the text's tokens up to the end of the window.
    """

    ids: Tensor
    next_ids: Tensor
    positions: Tensor
    valid: Tensor
    kv: dict[int, tuple[Tensor, Tensor]]
    hidden: dict[int, Tensor]
    before: dict[int, Tensor]
    best: Tensor
    log_z: Tensor
    texts: list[Tensor]

    @property
    def num_keys(self) -> int:
        """S, the number of exact keys per row, padding included; 0 if the batch has no keys."""
        return max((k.shape[2] for k, _ in self.kv.values()), default=0)


class TrainingCache(KVCache):
    """A KV cache for training: a batch's exact keys and values, then those of draft steps, which keep gradients.

    Exact ones are those that the base model itself computes, not estimates of a drafter: the first S tokens of each row
    are those of ``batch.kv``. Layers that ``kv`` lacks have the same length, but no keys and values.

    num_layers: layers of the base model. batch: gives the exact keys and values, which are the same for all draft
    steps.
    """

    def __init__(self, num_layers: int, batch: TrainingBatch) -> None:
        super().__init__(num_layers, len(batch.ids), batch.ids.device)
        self.lengths, self.kv = [batch.num_keys] * num_layers, dict(batch.kv)

    def append(self, layer: int, k: Tensor, v: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
        self.lengths[layer] += k.shape[2]
        if layer in self.kv:
            keys, values = self.kv[layer]
            k, v = torch.cat((keys, k), 2), torch.cat((values, v), 2)
        self.kv[layer] = k, v
        padding = 0, 0, 0, -k.shape[2] % multiple
        return F.pad(k, padding), F.pad(v, padding)


def windows(records: Sequence[AnswerStates], length: int) -> list[Window]:
    """Cut the answers ``records`` into adjacent windows of at most ``length`` positions.

    Returns for each window (index of its answer in ``records``, first position, position after the last one). A
    position t is trained to predict the answer token at t + 1. No window has the text's first position.
    """
    cut = []
    for index, record in enumerate(records):
        start, end = max(record.prompt - 1, record.first + 1), len(record.ids) - 1
        cut += [(index, t, min(t + length, end)) for t in range(start, end, length)]
    return cut


def epoch(cut: Sequence[Window], rows: int, length: int, seed: int, number: int) -> list[list[Window]]:
    """Return the batches of epoch ``number`` (from 0), lists of windows that have the room of ``rows`` whole ones.

    cut: all windows, as ``windows`` returns them, of at most ``length`` positions; an epoch has each once. The order
    depends on ``seed`` and ``number`` alone. A last batch with fewer than ``rows`` windows is dropped, unless it is the
    only one; these are the shortest windows in one epoch, and long ones in the next.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
    order = [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]
    # Sorting within parts keeps padding small and the order random.
    size, found, rest = rows * min(64, max(16, len(cut) // (8 * rows))), list[list[Window]](), list[Window]()
    for start in range(0, len(order), size):
        *full, rest = _filled([*rest, *order[start : start + size]], rows, length, number % 2 == 0)
        found += full
    if len(rest) >= rows or not found:
        found.append(rest)
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


def _filled(some: Sequence[Window], rows: int, length: int, falling: bool = True) -> list[list[Window]]:
    """Divide windows into batches of similar lengths and end positions, the longest first if ``falling``.

    A batch has at most ``rows`` times ``length`` positions, padding included, and four times ``rows`` windows: each has
    keys of its own. All but the last batch are full.
    """
    found, longest = list[list[Window]](), 0
    for window in sorted(some, key=lambda each: (-(-(each[2] - each[1]) // GRAIN), each[2]), reverse=falling):
        longest = max(longest, window[2] - window[1])
        if not found or (len(found[-1]) + 1) * max(longest, length / 4) > rows * length:
            found.append([])
            longest = window[2] - window[1]
        found[-1].append(window)
    return found


def assemble(
    records: Sequence[AnswerStates],
    rows: Sequence[Window],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> TrainingBatch:
    """Return the batch of B windows, on ``device``, padded to the longest.

    records: the base model's states of all answers. rows: the windows, as ``windows`` returns them for ``records``.
    S, the number of keys, is a multiple of ``KEY_BLOCK``.
    dtype: the dtype of states, keys and values; None: the dtype in which they are stored.
    """
    picked = [(records[index], start, end) for index, start, end in rows]
    length = max(end - start for _, start, end in rows)
    num_keys = -(-max(end for _, _, end in rows) // KEY_BLOCK) * KEY_BLOCK
    first = picked[0][0]
    layers, hidden = first.kv, first.hidden

    def pad(parts: list[Tensor], size: int = length) -> Tensor:
        """Stack tensors [n, ...] of different n to [B, size, ...], padded with zeros."""
        out = torch.zeros(len(parts), size, *parts[0].shape[1:], dtype=parts[0].dtype)
        for row, part in zip(out, parts, strict=True):
            row[: len(part)] = part
        return out.to(device)

    def cast(padded: Tensor) -> Tensor:
        return padded if dtype is None else padded.to(dtype)

    def states(layer: int, shift: int) -> Tensor:
        return cast(pad([r.hidden[layer][start - r.first + shift : end - r.first + shift] for r, start, end in picked]))

    def exact(layer: int, part: int) -> Tensor:
        return cast(pad([r.kv[layer][part][:end] for r, _, end in picked], num_keys)).transpose(1, 2)

    starts, last = torch.tensor([(start, end - 1) for _, start, end in rows]).unbind(1)
    return TrainingBatch(
        ids=pad([r.ids[start:end].long() for r, start, end in picked]),
        next_ids=pad([r.ids[start + 1 : end + 1].long() for r, start, end in picked]),
        # Padding repeats the last position: the next one may exceed the model's context.
        positions=torch.minimum(starts[:, None] + torch.arange(length), last[:, None]).to(device),
        valid=pad([torch.ones(end - start, dtype=torch.bool) for _, start, end in rows]),
        kv={layer: (exact(layer, 0), exact(layer, 1)) for layer in layers},
        hidden={layer: states(layer, 0) for layer in hidden},
        before={layer: states(layer, -1) for layer in hidden},
        best=pad([r.best[start - r.first : end - r.first].long() for r, start, end in picked]),
        log_z=pad([r.log_z[start - r.first : end - r.first] for r, start, end in picked]),
        texts=[r.ids[:end] for r, _, end in picked],
    )


def by_length(
    records: Sequence[AnswerStates], rows: int, length: int, device: torch.device, dtype: torch.dtype | None = None
) -> Iterator[TrainingBatch]:
    """Yield batches that contain every window of ``records`` once, those of similar length and end position together.

    rows: number of whole windows that a batch has room for. length: positions per window. device, dtype: those of the
    returned tensors; dtype None: as stored.
    """
    for some in _filled(windows(records, length), rows, length):
        yield assemble(records, some, device, dtype)


def endless(cut: Sequence[Window], rows: int, length: int, seed: int, skip: int) -> Iterator[tuple[int, list[Window]]]:
    """Yield (epoch number from 0, windows of a batch), epoch after epoch, without end.

    cut, rows, length, seed: as for ``epoch``.
    skip: number of batches at the beginning to leave out, which an earlier run has used.
    """
    number, passed = 0, 0
    while True:
        batches = epoch(cut, rows, length, seed, number)
        for batch in batches[max(0, skip - passed) :]:
            yield number, batch
        passed, number = passed + len(batches), number + 1
