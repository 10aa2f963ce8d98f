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
    """The model's states of a text of T tokens, so that only the draft path needs to run again.

    keys: for each layer of the path's segment [lo, hi), keys and values, [1, H, T, d] each, of H key heads of size d.
    segment: h[lo], the input of layer lo, [T, D].
    final: h[N], the last layer's output, before the final norm, [T, D].
    """

    keys: list[tuple[Tensor, Tensor]]
    segment: Tensor
    final: Tensor

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(x.nbytes for pair in (*self.keys, (self.segment, self.final)) for x in pair)


@dataclass
class Rows:
    """Training data of n tokens: the inputs from which the token after each is drafted, and the goals of the fits.

    A draft runs projection 0, the layers [lo, hi) of the draft path's segment, and projection 1. h[k] is the input of
    layer k in the model's own pass.

    following: the id of the token after each token, int64 [n], on the CPU.
    embedded: the embedding h[0] of each token, [n, D].
    carry: the model's states of the token before each token, [n, D] each.
    end: the draft's hidden state after the segment, [n, D], which projection 1 reads; None: no network ran.
    segment: h[lo], which projection 0 should return, [n, D].
    final: h[N], the last layer's output, which projection 1 should return, [n, D].
    """

    following: Tensor
    embedded: Tensor
    carry: Carry
    end: Tensor | None
    segment: Tensor
    final: Tensor

    def products(self, network: M2R2, index: int) -> tuple[Tensor, Tensor]:
        """Return the inputs [n, F] and the goals [n, D] to which projection ``index`` (0 or 1) is fitted.

        F is 3 D for projection 0 and 2 D for projection 1, which needs ``end``. network: normalizes the inputs.
        """
        x, goal = (self.end, self.final) if index else (self.embedded, self.segment)
        assert x is not None
        return network.features(index, x, self.carry), goal


@dataclass
class Text:
    """The tokens of a finished request, prompt and output.

    ids: the token ids.
    start: index in ``ids`` of the first token that the model chose.
    states: the model's states, once the text has run and while memory allows; else None.
    rows: the training data, while fits need them.
    held: whether the text is in the hold-out set, on which fits are compared.
    """

    ids: list[int]
    start: int
    states: States | None = field(default=None, compare=False, repr=False)
    rows: list[Rows] = field(default_factory=list, compare=False, repr=False)
    held: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, ids: Sequence[int], start: int) -> Text:
        """Return a part of a request's tokens ``ids``: the end of the prompt and the beginning of the output.

        At most ``CONTEXT`` (512) tokens of the prompt's end are kept, and ``LONGEST`` (1024) tokens in all.

        start: number of prompt tokens, which is the index in ``ids`` of the first token that the model chose.
        """
        first = max(start - CONTEXT, 0)
        return cls(list(ids[first : first + LONGEST]), start - first)

    @property
    def count(self) -> int:
        """The number of tokens in ``rows``."""
        return sum(len(rows.following) for rows in self.rows)


class Replay:
    """Runs texts through the model again to make training data, for about ``PIECE`` seconds at a time.

    path: the draft path, which has one segment (range of layers); lo, hi: its layers are [lo, hi).
    pace: measured seconds per token and layer in the last run, by which the next piece of work is sized.
    """

    def __init__(self, target: Target, path: M2R2Path) -> None:
        self.target, [(self.lo, self.hi)], self.pace = target, path.segments, PIECE / PART[0]

    def rows(self, text: Text, network: M2R2 | None = None) -> Iterator[Rows | None]:
        """Run a text through the model, and yield the training data of its tokens, part by part.

        It yields about every ``PIECE`` seconds, so that other work may run: a part's data, or None while a part still
        runs. A token's data are the states from which a drafter would draft the token after it, and the states that it
        should estimate. They come for the last token of the prompt, and each token of the output but the last.

        text: the tokens. Its ``states`` are set, so that a second run is shorter: then only the draft path runs.
        network: the network whose first projection and adapters run the draft path, for ``Rows.end``; None: the path
            does not run, and ``Rows.end`` is None.

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
            tokens = upload([part], target.device)
            embedded = target.embed(tokens, positions)  # (1, n, D)
            taps = dict.fromkeys((lo, last), embedded)
            if kept is None:
                given = Pass(positions, cache.register(0, positions), cache, taps, ids=tokens)
                yield from self._layers(embedded, 0, last, given)
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
                    own_ids = tokens[:, skip:]
                    given = Pass(positions[:, skip:], mask, cache, adapters=network.adapters, ids=own_ids)
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
        """Run layers [lo, hi) on ``x`` [1, n, D], yield after every few layers, and return the output [1, n, D].

        Updates ``pace``. given: positions, mask and cache of the pass.
        """
        while lo < hi:
            began, end = time.perf_counter(), min(lo + max(int(PIECE / (self.pace * x.shape[1])), 1), hi)
            x = self.target.layers(x, lo, end, given)
            if x.shape[1] >= PART[0]:  # fewer tell little
                self.pace = (time.perf_counter() - began) / (x.shape[1] * (end - lo))
            yield
            lo = end
        return x

    def _keep(self, text: Text, cache: KVCache, states: list[tuple[Tensor, Tensor]]) -> None:
        """Store the states of a text that has run in ``text.states``, unless a layer has no keys and values in 16 bits.

        cache: has the text's keys and values. states: for each part of the text, h[lo] and h[N], [n, D] each.
        """
        if cache.int8:  # they cannot be appended again
            return
        keys = list[tuple[Tensor, Tensor]]()
        for layer in range(self.lo, self.hi):
            found = cache.of_layer(layer, 0)  # (S, H, d); none in layers with states of other kinds
            if layer in self.target.recurrent_layers or not found:
                return
            keys.append((found["k"].transpose(0, 1)[None].clone(), found["v"].transpose(0, 1)[None].clone()))
        segment, final = (torch.cat(part) for part in zip(*states, strict=True))
        text.states = States(keys, segment, final)
