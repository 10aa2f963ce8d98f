"""Running finished texts again, for a short time at once: what drafting after each of their tokens would see."""

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

CONTEXT, LONGEST = 512, 1024  # maximum tokens of a prompt, and of a whole text, that are run again
PIECE = 0.025  # seconds that a piece of work should take
PART = 8, 128  # least and most tokens of a text that are run at once


@dataclass
class States:
    """The exact states of a text of T tokens, so that only the draft path needs to run again.

    keys: keys and values of each layer of the path, [1, H, T, d].
    segment: h[lo], [T, D]. final: h[N], [T, D].
    """

    keys: list[tuple[Tensor, Tensor]]
    segment: Tensor
    final: Tensor

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for pair in (*self.keys, (self.segment, self.final)) for x in pair)


@dataclass
class Rows:
    """Training data of n tokens: what drafting after each token starts from, and what it should find.

    following: the token after each, int64 [n].
    embedded: the embedding of each, h[0], [n, D].
    carry: h of the token before each, [n, D].
    end: p at the end of the segment, [n, D]; None: no network ran.
    segment: h[lo], the goal of the first projection, [n, D].
    final: h[N], the goal of the second projection, [n, D].
    """

    following: Tensor
    embedded: Tensor
    carry: Carry
    end: Tensor | None
    segment: Tensor
    final: Tensor

    def products(self, network: M2R2, index: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and the goals of projection ``index`` (0 or 1): [n, F] and [n, D]."""
        x, goal = (self.end, self.final) if index else (self.embedded, self.segment)
        assert x is not None
        return network.features(index, x, self.carry), goal


@dataclass
class Text:
    """The tokens of a finished request.

    ids: the tokens. start: index of the first token that the model chose.
    states: the exact states, once the text has run and while there is room; else None.
    rows: the training data, while fits need it.
    held: whether the text is in the hold-out set, on which fits are compared.
    """

    ids: list[int]
    start: int
    states: States | None = field(default=None, compare=False, repr=False)
    rows: list[Rows] = field(default_factory=list, compare=False, repr=False)
    held: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, ids: Sequence[int], start: int) -> Text:
        """Return the end of the prompt and the beginning of what follows, of a request of ``start`` prompt tokens."""
        first = max(start - CONTEXT, 0)
        return cls(list(ids[first : first + LONGEST]), start - first)

    @property
    def count(self) -> int:
        """The number of tokens in ``rows``."""
        return sum(len(rows.following) for rows in self.rows)


class Replay:
    """Runs texts again, for about ``PIECE`` seconds at a time.

    path: the draft path, of one segment.
    pace: seconds that a token took in a layer, the last time.
    """

    def __init__(self, target: Target, path: M2R2Path) -> None:
        self.target, [(self.lo, self.hi)], self.pace = target, path.segments, PIECE / PART[0]

    def rows(self, text: Text, network: M2R2 | None = None) -> Iterator[Rows | None]:
        """Run a text; yield after each ``PIECE`` seconds: the rows of a part of it if they are complete, else None.

        The states are kept in ``text.states``. If they are there already, the text runs only through the draft path.
        network: runs the draft path, for ``Rows.end``; None: it does not run.
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
        """Run layers [lo, hi) on ``x`` [1, n, D], and yield after some of them; return the result [1, n, D]."""
        while lo < hi:
            began, end = time.perf_counter(), min(lo + max(int(PIECE / (self.pace * x.shape[1])), 1), hi)
            x = self.target.layers(x, lo, end, given)
            if x.shape[1] >= PART[0]:  # fewer tell little
                self.pace = (time.perf_counter() - began) / (x.shape[1] * (end - lo))
            yield
            lo = end
        return x

    def _keep(self, text: Text, cache: KVCache, states: list[tuple[Tensor, Tensor]]) -> None:
        """Keep the states of a text that has run, unless a layer has no keys and values."""
        keys = list[tuple[Tensor, Tensor]]()
        for layer in range(self.lo, self.hi):
            found = cache.of_layer(layer, 0)  # (S, H, d); none in layers with states of other kinds
            if layer in self.target.recurrent_layers or not found:
                return
            keys.append((found["k"].transpose(0, 1)[None].clone(), found["v"].transpose(0, 1)[None].clone()))
        segment, final = (torch.cat(part) for part in zip(*states, strict=True))
        text.states = States(keys, segment, final)
