"""Texts that have ended run again, in short pieces of work: what drafting after each of their tokens would see."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.base.devices import upload
from specdec.base.errors import SpecDecError
from specdec.kvcache.cache import KVCache
from specdec.runtimes.target import Pass, Target

from .network import M2R2, Carry
from .path import M2R2Path

CONTEXT, LONGEST = 512, 1024  # maximum tokens of a prompt, and of a text, that are run again
PIECE = 0.025  # seconds that a piece of work should take
PART = 8, 128  # least and most tokens of a text that are run at once


@dataclass
class States:
    """What is exact of a text of T tokens.

    keys: keys and values in the path's layers, [1, H, T, d]. segment, final: h[lo] and h[N] [T, D].
    """

    keys: list[tuple[Tensor, Tensor]]
    segment: Tensor
    final: Tensor

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for pair in (*self.keys, (self.segment, self.final)) for x in pair)


@dataclass
class Rows:
    """What drafting after each of n tokens starts from, and what it should find; states are [n, D].

    following: the tokens after them, int64 [n].
    embedded: their embeddings.
    carry: exact states of the tokens before them.
    end: the residual at the segment's end, where a network ran.
    segment, final: exact states h[lo] and h[N].
    """

    following: Tensor
    embedded: Tensor
    carry: Carry
    end: Tensor | None
    segment: Tensor
    final: Tensor

    def products(self, network: M2R2, index: int) -> tuple[Tensor, Tensor]:
        """Features and goals of projection ``index``."""
        x, goal = (self.end, self.final) if index else (self.embedded, self.segment)
        assert x is not None
        return network.features(index, x, self.carry), goal


@dataclass
class Text:
    """Tokens of a request.

    start: number of the first one that the model chose. states: once it has run, while there is room.
    rows: while fits need them. held: whether fits are compared on it.
    """

    ids: list[int]
    start: int
    states: States | None = field(default=None, compare=False, repr=False)
    rows: list[Rows] = field(default_factory=list, compare=False, repr=False)
    held: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, ids: Sequence[int], start: int) -> Text:
        """The end of the prompt, and the beginning of what follows it."""
        first = max(start - CONTEXT, 0)
        return cls(list(ids[first : first + LONGEST]), start - first)

    @property
    def count(self) -> int:
        """Number of its rows."""
        return sum(len(rows.following) for rows in self.rows)


class Replay:
    """Runs texts in pieces of about ``PIECE`` seconds.

    pace: seconds that a token took in a layer, the last time.
    """

    def __init__(self, target: Target, path: M2R2Path) -> None:
        self.target, [(self.lo, self.hi)], self.pace = target, path.segments, PIECE / PART[0]

    def rows(self, text: Text, network: M2R2 | None = None) -> Iterator[Rows | None]:
        """Run a text; yield the rows of each part of it when they are complete, else None, after pieces of work.

        Its states are kept (``Text.states``); where they are already, it runs only through the draft path.

        network: runs the draft path.

        Raises SpecDecError if a state is not finite.
        """
        target, lo, hi, last = self.target, self.lo, self.hi, self.target.num_layers
        ids, cache = text.ids[:-1], target.new_cache()
        first, at = max(text.start - 1, 1), 0  # the first token has no token before it
        before = dict[int, Tensor]()
        kept, states = text.states, list[tuple[Tensor, Tensor]]()
        while at < len(ids):
            part = ids[at : at + max(PART[0], min(int(PIECE / self.pace), PART[1]))]
            n, skip = len(part), max(first - at, 0)
            positions = upload([list(range(at, at + n))], target.device)  # (1, n)
            embedded = target.embed(upload([part], target.device), positions)  # (1, n, D)
            taps = dict.fromkeys((lo, last), embedded)
            if kept is None:
                yield from self._layers(embedded, 0, last, Pass(positions, cache.register(0, positions), cache, taps))
                states.append((taps[lo][0], taps[last][0]))
            else:
                cache.register(lo, positions)  # registers them
                for layer, (k, v) in enumerate(kept.keys, start=lo):
                    cache.append(layer, k[:, :, at : at + n], v[:, :, at : at + n])
                taps = {lo: kept.segment[None, at : at + n], last: kept.final[None, at : at + n]}
            if skip < n:
                final, segment = (
                    torch.cat((before.get(k, taps[k][:, :1]), taps[k][:, :-1]), 1)[:, skip:] for k in (last, lo)
                )
                end, goals = None, (taps[lo][0, skip:], taps[last][0, skip:])
                if network is not None:
                    # A token sees the exact keys of those before it, and its own.
                    own = torch.eye(n, dtype=torch.bool, device=target.device)[skip:, skip:]
                    seen = torch.ones(n, n, dtype=torch.bool, device=target.device).tril(-1)[skip:]
                    mask = cache.register(lo, positions[:, skip:], torch.cat((seen, own), 1))  # (n - skip, 2 n - skip)
                    x = network.project(0, embedded[:, skip:], Carry(final, [segment]))
                    given = Pass(positions[:, skip:], mask, cache, adapters=network.adapters)
                    end = (yield from self._layers(x, lo, hi, given))[0]
                    cache.trim(n - skip, lo, hi)
                if not all(bool(x.isfinite().all()) for x in (final, segment, *goals, *([] if end is None else [end]))):
                    raise SpecDecError("a state is not finite")
                following = torch.tensor(text.ids[at + skip + 1 : at + n + 1])
                yield Rows(following, embedded[0, skip:], Carry(final[0], [segment[0]]), end, *goals)
            cache.commit([range(n)])
            before, at = {k: taps[k][:, -1:] for k in (lo, last)}, at + n
        if kept is None:
            self._keep(text, cache, states)

    def _layers(self, x: Tensor, lo: int, hi: int, given: Pass) -> Generator[None, None, Tensor]:
        """Run layers [lo, hi) on a part of a text [1, n, D], some of them at a time."""
        while lo < hi:
            began, end = time.perf_counter(), min(lo + max(int(PIECE / (self.pace * x.shape[1])), 1), hi)
            x = self.target.layers(x, lo, end, given)
            if x.shape[1] >= PART[0]:  # fewer tell little
                self.pace = (time.perf_counter() - began) / (x.shape[1] * (end - lo))
            yield
            lo = end
        return x

    def _keep(self, text: Text, cache: KVCache, states: list[tuple[Tensor, Tensor]]) -> None:
        """Keep the states of a text that has run."""
        keys = list[tuple[Tensor, Tensor]]()
        for layer in range(self.lo, self.hi):
            found = cache.of_layer(layer, 0)  # (S, H, d); none in layers with states of other kinds
            if layer in self.target.recurrent_layers or not found:
                return
            keys.append((found["k"].transpose(0, 1)[None].clone(), found["v"].transpose(0, 1)[None].clone()))
        segment, final = (torch.cat(part) for part in zip(*states, strict=True))
        text.states = States(keys, segment, final)
