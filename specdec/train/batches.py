"""Training batches: windows of answers with their teacher states, padded, in an order fixed by the seed.

A window is a run of consecutive answer positions. Short windows keep attention over drafted entries small and mix many
answers in one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kvcache.cache import KVCache
from specdec.train.states import AnswerStates

BLOCK = 64
Window = tuple[int, int, int]  # record, first position, end


@dataclass
class TrainingBatch:
    """B windows of T positions. Position t reads token ids[t] and predicts the base's choice for t + 1."""

    ids: Tensor  # int64 [B, T]
    next_ids: Tensor  # int64 [B, T], the text's own next token
    positions: Tensor  # int64 [B, T]
    valid: Tensor  # bool [B, T], False for padding
    kv: dict[int, tuple[Tensor, Tensor]]  # layer -> exact keys and values of positions 0 .. S - 1 [B, H', S, d]
    hidden: dict[int, Tensor]  # layer -> its input at each position [B, T, D]
    before: dict[int, Tensor]  # the same, one position earlier
    best: Tensor  # int64 [B, T], the base's most likely next token
    log_z: Tensor  # float32 [B, T], log of the base's partition sum
    texts: list[Tensor]  # int32, each row's tokens up to the end of its window

    @property
    def slots(self) -> int:
        """S, the number of exact entries per row."""
        return max((k.shape[2] for k, _ in self.kv.values()), default=0)

    def cache(self, num_layers: int) -> KVCache:
        """A cache with the exact entries."""
        return TrainingCache(num_layers, self)


class TrainingCache(KVCache):
    """The exact entries of a batch, and those of draft steps behind them, which gradients pass."""

    def __init__(self, num_layers: int, batch: TrainingBatch) -> None:
        super().__init__(num_layers, len(batch.ids), batch.ids.device)
        self.lengths, self.kv = [batch.slots] * num_layers, dict(batch.kv)

    def append(self, layer: int, k: Tensor, v: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
        self.lengths[layer] += k.shape[2]
        if layer in self.kv:
            keys, values = self.kv[layer]
            k, v = torch.cat((keys, k), 2), torch.cat((values, v), 2)
        self.kv[layer] = k, v
        padding = 0, 0, 0, -k.shape[2] % multiple
        return F.pad(k, padding), F.pad(v, padding)


def windows(records: Sequence[AnswerStates], length: int) -> list[Window]:
    """All windows of at most ``length`` answer positions, without overlap."""
    found = []
    for index, record in enumerate(records):
        start, end = max(record.prompt - 1, record.first + 1), len(record.ids) - 1
        found += [(index, t, min(t + length, end)) for t in range(start, end, length)]
    return found


def epoch(found: Sequence[Window], rows: int, seed: int, number: int) -> list[list[Window]]:
    """The whole batches of one epoch: shuffled, windows of similar key length together."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    order = torch.randperm(len(found), generator=generator).tolist()
    groups, group = [], rows * 16  # sorting within groups keeps padding small and the order random
    for start in range(0, len(order), group):
        part = sorted(order[start : start + group], key=lambda i: found[i][2])
        groups += [part[i : i + rows] for i in range(0, len(part), rows)]
    whole = [g for g in groups if len(g) == rows] or groups
    mixed = torch.randperm(len(whole), generator=generator).tolist()
    return [[found[i] for i in whole[j]] for j in mixed]


def assemble(
    records: Sequence[AnswerStates],
    rows: Sequence[Window],
    length: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> TrainingBatch:
    """A batch of windows of the records, with T = ``length`` and S a multiple of ``BLOCK``.

    dtype: of the states; None: as they are stored.
    """
    picked = [(records[index], start, end) for index, start, end in rows]
    slots = -(-max(end for _, _, end in rows) // BLOCK) * BLOCK
    first = picked[0][0]
    layers, hidden = first.kv, first.hidden

    def pad(parts: list[Tensor], size: int = length) -> Tensor:
        """Stack parts of different length, padded with zeros."""
        out = torch.zeros(len(parts), size, *parts[0].shape[1:], dtype=parts[0].dtype)
        for row, part in zip(out, parts, strict=True):
            row[: len(part)] = part
        return out.to(device)

    def cast(padded: Tensor) -> Tensor:
        return padded if dtype is None else padded.to(dtype)

    def states(layer: int, shift: int) -> Tensor:
        return cast(pad([r.hidden[layer][start - r.first + shift : end - r.first + shift] for r, start, end in picked]))

    def exact(layer: int, part: int) -> Tensor:
        return cast(pad([r.kv[layer][part][:end] for r, _, end in picked], slots)).transpose(1, 2)

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
    """Every window once, windows of similar key length together."""
    found = sorted(windows(records, length), key=lambda window: window[2])
    for start in range(0, len(found), rows):
        yield assemble(records, found[start : start + rows], length, device, dtype)


def endless(found: Sequence[Window], rows: int, seed: int, skip: int) -> Iterator[tuple[int, list[Window]]]:
    """Yield (epoch, batch) without end, from batch number ``skip`` on."""
    number, passed = 0, 0
    while True:
        batches = epoch(found, rows, seed, number)
        for batch in batches[max(0, skip - passed) :]:
            yield number, batch
        passed, number = passed + len(batches), number + 1
