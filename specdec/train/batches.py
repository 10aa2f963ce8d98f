"""Training batches: windows of answers with their teacher states, padded, in an order fixed by the seed.

A window is a run of consecutive answer positions. Short windows keep attention over drafted entries small and mix many
answers in one batch.

Drafts that begin at each position of a window need the states of recurrent layers there (``StatesAtPositions``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.base.errors import SpecDecError
from specdec.base.memory import free_memory
from specdec.kvcache.cache import KVCache
from specdec.kvcache.recurrent import Advance, Recurrent, States
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
    mixed: dict[int, Tensor]  # recurrent layer -> the input of its mixer at positions 0 .. S - 1 [B, S, D]
    exact: dict[int, States] = field(default_factory=dict)  # recurrent states, computed on first use

    @property
    def slots(self) -> int:
        """S, the number of exact entries per row."""
        inputs = [x.shape[1] for x in self.mixed.values()]
        return max([k.shape[2] for k, _ in self.kv.values()] + inputs, default=0)

    def cache(self, num_layers: int) -> KVCache:
        """A cache with the exact entries."""
        cache = KVCache(num_layers, len(self.ids), self.ids.device)
        for layer, (k, v) in self.kv.items():
            cache.keys[layer], cache.values[layer] = k, v
        for layer, x in self.mixed.items():
            cache.recurrent[layer] = StatesAtPositions(layer, x, self.positions, self.exact)
        cache.lengths = [self.slots] * num_layers
        return cache


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
        mixed={layer: cast(pad([r.mixed[layer][:end] for r, _, end in picked], slots)) for layer in first.mixed},
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


HELD = 4  # states per position in memory: exact, before and after a step, and for gradients


class StatesAtPositions(Recurrent):
    """The state of a layer in a cache. Each call of ``run`` is the next draft step at all positions.

    mixed: input of the layer's mixer for every token [B, S, D].
    positions: int64 [B, T], consecutive.
    exact: cache of the states before each position [B, T, ...], by layer.
    """

    def __init__(self, layer: int, mixed: Tensor, positions: Tensor, exact: dict[int, States]) -> None:
        super().__init__(len(mixed))
        self.layer, self.mixed, self.positions, self.exact = layer, mixed, positions, exact

    def run(self, x: Tensor, held: int, tree: Tensor | None, advance: Advance) -> Tensor:
        batch, t, width = x.shape
        if self.layer not in self.exact:
            with torch.no_grad():
                self.exact[self.layer] = self._before(advance)
        before = self.states or self.exact[self.layer]  # [B, T, ...]
        rows = {key: state.flatten(0, 1) for key, state in before.items()}
        out, after = advance(x.reshape(batch * t, 1, width), rows, True)
        ends = {key: state.unflatten(0, (batch, t)) for key, state in after.items()}
        self.states = {key: torch.cat((torch.zeros_like(s[:, :1]), s[:, :-1]), 1) for key, s in ends.items()}
        return out.view(batch, t, -1)

    def _before(self, advance: Advance) -> States:
        """The exact states before each position [B, T, ...]. Raises SpecDecError if they do not fit into memory."""
        rows, (batch, t) = list[States](), self.positions.shape
        for x, start in zip(self.mixed, self.positions[:, 0].tolist(), strict=True):
            rows.append(advance(x[None, :start], {}, False)[1])
        states = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
        need = HELD * t * sum(state.nbytes for state in states.values())
        if (free := free_memory(self.mixed.device)) < need:
            raise SpecDecError(
                f"training through recurrent layer {self.layer} stores its state at {batch} x {t} positions, about "
                f"{need / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free; use a smaller 'rows' or 'window'"
            )
        index = self.positions.clamp_max(self.mixed.shape[1] - 1)  # a window may be shorter than T
        tokens = self.mixed.gather(1, index[..., None].expand(-1, -1, self.mixed.shape[2]))  # (B, T, D)
        found = [states]
        for token in tokens[:, :-1].split(1, 1):
            found.append(advance(token, found[-1], False)[1])
        return {key: torch.stack([each[key] for each in found], 1) for key in states}
