"""M2R2 that teaches itself: its projections are fitted, in closed form, to the texts that the model writes.

A text that has ended is run again, in short pieces of work while the machine is idle: the model's exact states, and the
path's residual as drafting would see it. Sums of products of both (``Sums``) are kept, no text. The projections are
fitted to them from time to time, with the latest texts counted once or several times. A fit serves only if it agrees
with the model more often than the one before on texts that are held out.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from specdec.base.devices import upload
from specdec.base.errors import SpecDecError, SpecDecWarning, one_line
from specdec.base.memory import free_memory
from specdec.kvcache.cache import KVCache
from specdec.models.gguf.blocks import named_weights
from specdec.runtimes.linear_maps import UnitMap
from specdec.runtimes.llama_like import Adapters
from specdec.runtimes.narrow import activity, column_sizes, gated_mlp
from specdec.runtimes.target import Pass, Target
from specdec.speculation.ngram import built

from .corpus import corpus
from .learned import Progress, Store
from .m2r2_network import M2R2, NEURONS, Carry, are_neurons, narrow_mlp
from .m2r2_path import M2R2Path
from .ridge import RIDGE, WORK, Sums, Weighted, result

FIRST = 1000  # tokens before the first fit
EVERY = 300  # tokens between two fits: some ten requests, so that a new kind of them is soon learned
GROWTH = 1.5  # times as many tokens at the next fit of the first projection
AGAIN = 16_000  # maximum tokens of texts that are run again after a fit of the first projection
STATES = 80_000_000  # maximum bytes of states of these texts, which then run through the draft path alone
HELD_OUT, HELD = 8, 8  # one text of so many is held out; number of these that fits are compared on
RECENT, WEIGHTS = 2000, (1.0, 5.0)  # number of latest tokens, and how many times fits count them
CONTEXT, LONGEST = 512, 1024  # maximum tokens of a prompt, and of a text, that are run again
WAITING = 64  # maximum number of texts that wait
KEPT = 600.0  # least seconds between two times that all is kept
VOCABULARY = 8192  # tokens that are drafted
BLOCK = 256  # rows that are added to a system at once
PIECE = 0.025  # seconds that a piece of work should take
PART = 8, 128  # least and most tokens of a text that are run at once
SHARE_OF_MEMORY = 4  # the sums may take one part of so many of the free memory


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
class Text:
    """Tokens of a request.

    start: number of the first one that the model chose. states: once it has run, while there is room.
    """

    ids: list[int]
    start: int
    states: States | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, ids: Sequence[int], start: int) -> Text:
        """The end of the prompt, and the beginning of what follows it."""
        first = max(start - CONTEXT, 0)
        return cls(list(ids[first : first + LONGEST]), start - first)


@dataclass
class Rows:
    """What drafting after each of n tokens starts from, and what it should find; states are [n, D].

    following: the tokens after them.
    embedded: their embeddings.
    carry: exact states of the tokens before them.
    ends: the residual at the segment's end, of each network.
    segment, final: exact states h[lo] and h[N].
    """

    following: list[int]
    embedded: Tensor
    carry: Carry
    ends: list[Tensor]
    segment: Tensor
    final: Tensor

    def products(self, network: M2R2, index: int) -> tuple[Tensor, Tensor]:
        """Features and goals of projection ``index``; those of the last one follow the last of ``ends``."""
        x, goal = (self.ends[-1], self.final) if index else (self.embedded, self.segment)
        return network.features(index, x, self.carry), goal


@dataclass
class Held:
    """A text that nothing is learned from, and what drafting after each of n tokens starts from; states are [n, D].

    following: the tokens after them.
    carry: exact final states of the tokens before them.
    ends: the residual at the segment's end, of the basis.
    hits: number of tokens that the network that serves drafts first.
    """

    text: Text
    following: Tensor
    carry: Tensor
    ends: Tensor
    hits: int = 0


def learned_path(target: Target) -> M2R2Path:
    """The path of a drafter that teaches itself: a third of the layers, which end a twelfth before the model's end.

    Their MLPs run two thirds of D neurons; where they cannot, fewer layers run whole. Where the output head has more
    weights than all layers, half of these run whole: beside the head they cost little.
    """
    n, blocks = target.num_layers, range(target.num_layers)
    own = sum(math.prod(each.shape) for layer in blocks for _, each in named_weights(target.block(layer)))
    neurons = -(-2 * target.hidden_size // 3 // NEURONS) * NEURONS
    hi, whole = n - max(n // 12, 1), [gated_mlp(target.block(layer)) for layer in range(n)]
    if target.vocab_size * target.hidden_size > own:
        return M2R2Path(0, ((hi - max(n // 2, 1), hi),), True)
    lo = hi - max(n // 3, 1)
    if all(mlp is not None and mlp.size > neurons for mlp in whole[lo:hi]):
        return M2R2Path(0, ((lo, hi),), True, neurons=neurons)
    return M2R2Path(0, ((hi - max(2 * n // 9, 1), hi),), True)


def why_not(target: Target) -> str | None:
    """Why a drafter cannot teach itself on this target; None if it can."""
    if target.num_layers < 3:
        return "the model has too few layers"
    if target.experts is not None:
        return "its layers cannot be run twice on a token"
    need = 120 * target.hidden_size**2 + STATES  # bytes; the sums, and the system that is solved
    if need > free_memory(torch.device("cpu")) // SHARE_OF_MEMORY:
        return f"it would need {need / 1e9:.1f} GB of memory"
    return None


class Learner:
    """Learns from texts in pieces of work (``work``), and has the network that serves.

    What it learns is kept for later processes (``Store``), by the one process that may write. A fault ends the learning
    with a warning, never a request.

    network: the latest fit that serves; before the first, one of zeros.
    head: of its vocabulary; None: the model's own. newest: of the latest vocabulary.
    basis: its first projection makes the rows of the second one. It is fitted anew when there are ``GROWTH`` times as
        many tokens, and the texts of this process are run again.
    progress: number of tokens, fits and more; without fits, ``network`` drafts nothing useful.
    on: whether it learns from texts; the fit serves all the same.
    neurons: those that drafts run, int32 [L, I'], of each narrow layer.
    pace: seconds that a token took in a layer, the last time.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.path = target, learned_path(target)
        self.progress = Progress(str(target.model.config._name_or_path), str(self.path))
        self.kind = str(target.model.config.get_text_config().model_type)
        self.inputs = defaultdict[int, list[Tensor]](list)  # of each narrow layer, until its neurons are chosen
        self.neurons = torch.arange(self.path.neurons, dtype=torch.int32).repeat(len(self.path.narrow_layers), 1)
        self.store, self.on, self.saved = Store(target.fingerprint, str(self.path)), True, 0  # texts
        self.kept_at = -KEPT
        self.queue, self.held = deque[Text](maxlen=WAITING), deque[Held](maxlen=HELD)
        self.sums: list[Sums] = []  # made by the first piece of work
        self.recent = deque[Rows]()
        self.texts = deque[Text]()  # learned from, the latest ``AGAIN`` tokens
        self.counted = 0  # tokens when the vocabulary was chosen
        self.adapters: Adapters | None = None  # of all networks, while the neurons are the same
        self.pace = PIECE / PART[0]
        self._work: Iterator[None] | None = None
        self._restore()

    def _restore(self) -> None:
        """Take the fit of an earlier process, or begin with zeros."""
        self.counts = torch.zeros(self.target.vocab_size, dtype=torch.long)
        if self.target.tokenizer is not None and built():
            ids = corpus(self.target.tokenizer, self.target.vocab_size)
            self.counts += torch.from_numpy(np.bincount(ids[ids >= 0], minlength=self.target.vocab_size))
        self.vocabulary = self._vocabulary()
        found, basis = [torch.zeros(outer, inner) for outer, inner in self._shapes()], None
        try:
            if (progress := self.store.progress()) is not None:
                shapes: dict[str, tuple[int, ...]] = {"counts": (len(self.counts),), "neurons": (*self.neurons.shape,)}
                shapes |= {f"fit.{n}": shape for n, shape in enumerate(self._shapes())}
                shapes |= {} if self.vocabulary is None else {"vocabulary": (len(self.vocabulary),)}
                shapes["basis"] = shapes["fit.0"]
                kept = dict(self.store.tensors(("fit.", "basis", "counts", "neurons", "vocabulary"), shapes))
                layers = zip(self.path.narrow_layers, kept.get("neurons", ()), strict=False)
                good = all(are_neurons(row, narrow_mlp(self.target, layer, len(row))) for layer, row in layers)
                if kept.keys() != shapes.keys() or not (good and self._are_tokens(kept.get("vocabulary"))):
                    raise SpecDecError(f"'{self.store.path}' is not complete")
                basis = kept["basis"].float()
                found, self.counts = [kept["fit.0"].float(), kept["fit.1"].float()], kept["counts"].long()
                self.vocabulary, self.neurons = kept.get("vocabulary"), kept["neurons"]
                self.progress = progress
                self.counted, self.saved = progress.tokens, progress.texts
        except SpecDecError as error:
            warnings.warn(f"{error}; learning starts anew", SpecDecWarning, stacklevel=2)
        self.network = self.basis = result(self._making(*found))
        if basis is not None and not torch.equal(basis, found[0]):
            self.basis = result(self._making(basis))
        self.head = self.newest = None if self.vocabulary is None else self.target.reduced_head(self.vocabulary)

    def _shapes(self) -> list[tuple[int, int]]:
        """[F + 1, D] of each projection."""
        return [(parts * self.target.hidden_size + 1, self.target.hidden_size) for parts in (3, 2)]

    def _are_tokens(self, vocabulary: Tensor | None) -> bool:
        size = self.target.vocab_size
        return vocabulary is None or not bool(((vocabulary < 0) | (vocabulary >= size)).any())

    @property
    def version(self) -> int:
        """Number of fits that have served."""
        return self.progress.fits

    def busy(self) -> None:
        """A request is decoded."""

    # -- what is called between steps ---------------------------------------------------------------------------------

    def add(self, ids: Sequence[int], start: int) -> None:
        """Learn from a text, later. start: number of prompt tokens."""
        if self.on and len(ids) > start + 1 >= 2:
            self.queue.append(Text.of(ids, start))

    @torch.inference_mode()
    def work(self) -> bool:
        """Do a piece of work; False if there is none."""
        try:
            self._work = self._work or self._next()
            if self._work is None:
                return False
            if next(self._work, self) is self:
                self._work = None
        except Exception as error:  # memory, states that are not finite: requests go on
            self._work, self.on = None, False
            self.queue.clear()
            warnings.warn(f"the drafter learns no more: {one_line(error)}", SpecDecWarning, stacklevel=2)
        return True

    def _next(self) -> Iterator[None] | None:
        """The work to do next."""
        progress = self.progress
        if not self.sums:
            return self._open() if self.queue else None
        due = progress.tokens >= FIRST and progress.tokens - progress.fitted >= EVERY
        chosen = progress.based or progress.fits or not self.path.narrow_layers  # neurons; else a text tells which
        if progress.tokens >= max(FIRST, GROWTH * progress.based) and (chosen or self.inputs):
            return self._rebase()
        if due and self.sums[1].rows >= FIRST / 2 and (self.held or self.queue):  # texts to compare fits on
            return self._fit()
        if self.queue:
            return self._read(self.queue.popleft())
        late = progress.texts > self.saved and time.monotonic() - self.kept_at >= KEPT
        return self._save() if self.store.writes and late else None

    def save(self) -> None:
        """Keep what was learned since the last time, if this process may."""
        if self.store.writes and self.progress.texts > self.saved:
            self._write()

    # -- pieces of work -----------------------------------------------------------------------------------------------

    def _open(self) -> Iterator[None]:
        """Make the sums, or read those of earlier processes."""
        sums = [Sums(outer - 1, inner) for outer, inner in self._shapes()]
        writes = self.store.claim()
        if self.progress.tokens:
            shapes = dict[str, tuple[int, ...]]()
            for n, each in enumerate(sums):
                shapes |= {f"sums.{n}.{number}": tuple(panel.shape) for number, panel in enumerate(each.panels)}
            try:
                for name, tensor in self.store.tensors(("sums.",), shapes):
                    n, number = map(int, name.split(".")[1:])
                    sums[n].panels[number] = tensor
                    shapes.pop(name)
                    yield
                if shapes:
                    raise SpecDecError(f"'{self.store.path}' is not complete")
            except SpecDecError as error:
                warnings.warn(f"{error}; learning starts anew", SpecDecWarning, stacklevel=2)
                sums = [Sums(outer - 1, inner) for outer, inner in self._shapes()]
                self.progress = Progress(self.progress.model, self.progress.path, fits=self.progress.fits)
                self.counted = self.saved = 0
        if not writes:
            why = "another process learns for this model, or the cache folder cannot be written"
            warnings.warn(f"{why}: what this one learns is not kept", SpecDecWarning, stacklevel=2)
        if self.progress.based:
            yield from self._merging()
        self.sums = sums
        yield

    def _save(self) -> Iterator[None]:
        """Write the file in a thread; nothing else is learned meanwhile."""
        thread = threading.Thread(target=self._write, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(PIECE)
            yield

    def _write(self) -> None:
        tensors = {"counts": self.counts.int(), "neurons": self.neurons} | (
            {} if self.vocabulary is None else {"vocabulary": self.vocabulary}
        )
        for n, sums in enumerate(self.sums):
            tensors |= {f"sums.{n}.{number}": panel for number, panel in enumerate(sums.panels)}
            tensors[f"fit.{n}"] = self._weights(self.network, n).bfloat16()
        tensors["basis"] = self._weights(self.basis, 0).bfloat16()
        try:
            self.store.save(self.progress, tensors)
        except OSError as error:
            self.store.release()
            warnings.warn(f"what was learned cannot be kept: {one_line(error)}", SpecDecWarning, stacklevel=2)
        self.saved, self.kept_at = self.progress.texts, time.monotonic()

    def _read(self, text: Text) -> Iterator[None]:
        """Add a text to the sums, or hold it out."""
        self.progress.texts += 1
        if self.progress.texts % HELD_OUT == 1:
            self.held.append((yield from self._hold(text)))
            return
        self.texts.append(text)
        while sum(len(each.ids) for each in self.texts) > AGAIN:
            self.texts.popleft()
        begun, chosen = self.progress.based > 0, self.progress.fits > 0
        for rows in self._replay(text, [self.basis] if begun else [], watched=not (begun or chosen)):
            yield
            if rows is not None:
                yield from self._add(rows, 0)
                self.progress.tokens += len(rows.following)
                self.counts += torch.bincount(torch.tensor(rows.following), minlength=len(self.counts))

    def _add(self, rows: Rows, first: int) -> Generator[None]:
        """Add rows to the sums from number ``first`` on."""
        for index, sums in enumerate(self.sums[first : 1 + len(rows.ends)], start=first):
            yield from sums.adding(*rows.products(self.basis, index))
        if rows.ends:
            self.recent.append(rows)
            while sum(len(each.following) for each in self.recent) > RECENT:
                self.recent.popleft()

    def _rebase(self) -> Iterator[None]:
        """Fit the first projection, at the first time choose neurons, and run texts again for the second one."""
        if self.inputs:
            self.neurons, self.adapters = (yield from self._strongest()), None
        self.basis = yield from self._making((yield from self.sums[0].solve(RIDGE)))
        yield from self._merging()
        # Rows of the earlier projection are worse; without the texts they are all there is.
        again = list(self.texts)
        enough = 2 * sum(len(x.ids) - x.start for x in again) > self.progress.tokens
        yield from self.sums[1].scaling(0.0 if enough else 0.5)
        self.recent.clear()
        self.progress.based = self.progress.tokens
        for number, each in enumerate([*self.held]):
            self.held[number] = yield from self._hold(each.text, each.hits)
        for text in again:
            for rows in self._replay(text, [self.basis]):
                yield
                if rows is not None:
                    yield from self._add(rows, 1)

    def _strongest(self) -> Generator[None, None, Tensor]:
        """The neurons of each narrow layer that add most to the residual, int32 [L, I']."""
        found = list[Tensor]()
        for layer in self.path.narrow_layers:
            sums, block = torch.zeros(()), self.target.block(layer)
            step = max(int(WORK / (self.target.hidden_size * narrow_mlp(self.target, layer, NEURONS).size)), 8)
            for rows in torch.cat(self.inputs.pop(layer)).split(step):
                with self.target.lock:
                    sums = sums + activity(block, self.kind, rows)
                yield
            found.append((sums * column_sizes(block)).topk(self.path.neurons).indices.cpu())
            yield
        return torch.stack(found).sort().values.int()

    def _merging(self) -> Generator[None]:
        """Let the runtime make what it needs of the path's layers, one at a time, by running a token through each."""
        target, [(lo, hi)] = self.target, self.path.segments
        zero = torch.zeros(1, 1, dtype=torch.long, device=target.device)
        cache, x = target.new_cache(), target.embed(zero, zero)
        for layer in range(lo, hi):
            given = Pass(zero, cache.mask(layer, zero), cache, adapters=self.basis.adapters)
            target.layers(x, layer, layer + 1, given)
            yield

    def _fit(self) -> Iterator[None]:
        """Fit the second projection, and let the best one of the fits and the last one serve."""
        tokens = self.progress.fitted = self.progress.tokens
        if tokens >= 2 * self.counted:
            self.vocabulary, self.counted = self._vocabulary(), tokens
            if self.vocabulary is not None:
                self.newest = self.target.reduced_head(self.vocabulary)
        if self.newest is not None:
            yield from self.target.preparing(self.newest)
        held = [*self.held] or [(yield from self._hold(self.queue[0]))]
        best, most = self.network, [each.hits for each in held]
        for weight in WEIGHTS if tokens > 2 * RECENT else WEIGHTS[:1]:
            more = self._recent(weight - 1) if weight > 1 else ()
            found = yield from self.sums[1].solve(RIDGE, more)
            network, hits = (yield from self._making(self.basis, found)), list[int]()
            for each in held:
                hits.append((yield from self._hits(network, self.newest, each.following, each.carry, each.ends)))
            if sum(hits) > sum(most) or not (self.progress.fits or best is not self.network):
                best, most = network, hits
        if best is not self.network:
            self.network, self.head = best, self.newest
            for each, count in zip(held, most, strict=True):
                each.hits = count
            self.progress.fits += 1
            share = sum(most) / sum(len(each.following) for each in held)
            self.progress.agreement.append((tokens, share))

    def _recent(self, weight: float) -> Iterator[Weighted]:
        """The latest rows of the second projection, about ``BLOCK`` at once."""
        held = list[tuple[Tensor, Tensor]]()
        for number, rows in enumerate(self.recent, start=1):
            held.append(rows.products(self.basis, 1))
            if sum(len(x) for x, _ in held) >= BLOCK or number == len(self.recent):
                x, y = (torch.cat(part) for part in zip(*held, strict=True))
                yield x, y, weight
                held = []

    def _hold(self, text: Text, hits: int | None = None) -> Generator[None, None, Held]:
        """Run a held-out text. hits: number of its tokens that the network in use drafts first; None: count them."""
        if not self.progress.based:  # it runs when there is a basis
            return Held(text, torch.zeros(0), torch.zeros(0), torch.zeros(0))
        networks, rows, counts = [self.basis], list[Rows](), self.progress.fits > 0 and hits is None
        if counts and self.network.inference_maps[0] is not self.basis.inference_maps[0]:
            networks.append(self.network)
        for each in self._replay(text, networks):
            yield
            rows += [] if each is None else [each]
        following = upload([token for each in rows for token in each.following], self.target.device)
        carry = torch.cat([each.carry.final for each in rows])
        ends = [torch.cat([each.ends[n] for each in rows]) for n in range(len(networks))]
        if counts:
            hits = yield from self._hits(self.network, self.head, following, carry, ends[-1])
        return Held(text, following, carry, ends[0], hits or 0)

    def _hits(
        self, network: M2R2, head: nn.Linear | None, following: Tensor, carry: Tensor, ends: Tensor
    ) -> Generator[None, None, int]:
        """How many of the tokens ``following`` [n] a network drafts first, from states as in ``Held``."""
        found, vocabulary = 0, network.draft_vocab
        for tokens, before, end in zip(*(x.split(PART[1]) for x in (following, carry, ends)), strict=True):
            best = self.target.readout(network.project(1, end[None], Carry(before[None], [])), head)[0].argmax(-1)
            found += int(((best if vocabulary is None else vocabulary.long()[best]) == tokens).sum())
            yield
        return found

    def _replay(self, text: Text, networks: Sequence[M2R2], watched: bool = False) -> Iterator[Rows | None]:
        """Run a text in pieces; yield the rows of each part of it when they are complete, else None.

        watched: whether to keep the inputs of narrow layers.

        Raises SpecDecError if a state is not finite.
        """
        target, [(lo, hi)], last = self.target, self.path.segments, self.target.num_layers
        ids, cache = text.ids[:-1], target.new_cache()
        first, at = max(text.start - 1, 1), 0  # the first token has no token before it
        before = dict[int, Tensor]()
        kept, states = None if watched else text.states, list[tuple[Tensor, Tensor]]()
        while at < len(ids):
            part = ids[at : at + max(PART[0], min(int(PIECE / self.pace), PART[1]))]
            n, skip = len(part), max(first - at, 0)
            positions = upload([list(range(at, at + n))], target.device)  # (1, n)
            embedded = target.embed(upload([part], target.device), positions)  # (1, n, D)
            taps = dict.fromkeys((lo, last, *(self.path.narrow_layers if watched else ())), embedded)
            if kept is None:
                yield from self._layers(embedded, 0, last, Pass(positions, cache.mask(0, positions), cache, taps))
                states.append((taps[lo][0], taps[last][0]))
            else:
                cache.mask(lo, positions)  # registers them
                for layer, (k, v) in enumerate(kept.keys, start=lo):
                    cache.append(layer, k[:, :, at : at + n], v[:, :, at : at + n])
                taps = {lo: kept.segment[None, at : at + n], last: kept.final[None, at : at + n]}
            if skip < n:
                shifted = {
                    k: torch.cat((before.get(k, taps[k][:, :1]), taps[k][:, :-1]), 1)[:, skip:] for k in (lo, last)
                }
                # A token sees the exact keys of those before it, and its own.
                own = torch.eye(n, dtype=torch.bool, device=target.device)[skip:, skip:]
                seen = torch.ones(n, n, dtype=torch.bool, device=target.device).tril(-1)[skip:]
                tree, ends = torch.cat((seen, own), 1), list[Tensor]()  # (n - skip, 2 n - skip)
                for network in networks:
                    x = network.project(0, embedded[:, skip:], Carry(shifted[last], [shifted[lo]]))
                    mask = cache.mask(lo, positions[:, skip:], tree)
                    given = Pass(positions[:, skip:], mask, cache, adapters=network.adapters)
                    ends.append((yield from self._layers(x, lo, hi, given))[0])
                    cache.trim(n - skip, lo, hi)
                carry = Carry(shifted[last][0], [shifted[lo][0]])
                goals = taps[lo][0, skip:], taps[last][0, skip:]
                if not all(bool(x.isfinite().all()) for x in (*goals, *ends)):
                    raise SpecDecError("a state is not finite")
                for layer in self.path.narrow_layers if watched else ():
                    self.inputs[layer].append(taps[layer][0, skip:])
                yield Rows(text.ids[at + skip + 1 : at + n + 1], embedded[0, skip:], carry, ends, *goals)
            cache.commit([range(n)])
            before, at = {k: tap[:, -1:] for k, tap in taps.items()}, at + n
        if kept is None:
            self._keep(text, cache, states)

    def _keep(self, text: Text, cache: KVCache, states: list[tuple[Tensor, Tensor]]) -> None:
        """Keep the states of a text that has run; the oldest ones make room."""
        (lo, hi), keys = self.path.segments[0], list[tuple[Tensor, Tensor]]()
        for layer in range(lo, hi):
            found = cache.entries(layer, 0)  # (S, H, d); none in layers with states of other kinds
            if layer in self.target.recurrent_layers or not found:
                return
            keys.append((found["k"].transpose(0, 1)[None].clone(), found["v"].transpose(0, 1)[None].clone()))
        segment, final = (torch.cat(part) for part in zip(*states, strict=True))
        text.states = States(keys, segment, final)
        each = [*self.texts, *(held.text for held in self.held)]
        each += [] if any(one is text for one in each) else [text]
        total = sum(one.states.nbytes for one in each if one.states)
        for one in each:
            if total > STATES and one.states:
                total -= one.states.nbytes
                one.states = None

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

    # -- networks -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _weights(network: M2R2, index: int) -> Tensor:
        """A projection as a solution [F + 1, D]."""
        layer = network.projections[index]
        return torch.cat((layer.weight.T, layer.bias[None])).cpu()

    def _vocabulary(self) -> Tensor | None:
        """The likeliest tokens, int32 [V'], rising; None: all."""
        if len(self.counts) <= VOCABULARY:
            return None
        return self.counts.topk(VOCABULARY).indices.sort().values.int()

    def _making(self, first: Tensor | M2R2, second: Tensor | None = None) -> Generator[None, None, M2R2]:
        """Return the network with these projections, each [F + 1, D] (``first``: or that of a network).

        Without ``second``, it can only make rows for it.
        """
        target, tensors, maps = self.target, dict[str, Tensor](), list[UnitMap]()
        with torch.device("meta"):
            network = M2R2(self.path, target, self.vocabulary)
        if self.vocabulary is not None:
            tensors["draft_vocab"] = self.vocabulary
        weight: Tensor
        bias: Tensor
        for index, each in enumerate((first, second)):
            if isinstance(each, M2R2):
                weight, bias = each.projections[index].weight, each.projections[index].bias
                maps.append(each.inference_maps[index])
            else:
                found = torch.zeros(self._shapes()[index]) if each is None else each
                weight, bias = (x.to(target.device, target.dtype) for x in (found[:-1].T.contiguous(), found[-1]))
                if each is not None:
                    maps.append((yield from UnitMap.making(weight, bias)))
            tensors |= {f"projections.{index}.weight": weight, f"projections.{index}.bias": bias}
        for layer, kept in zip(self.path.narrow_layers, self.neurons, strict=True):
            tensors[f"adapters.{layer}/neurons"] = kept
        network.load_state_dict(tensors, assign=True)
        if self.adapters is not None:  # what a runtime made for it is made once
            network.adapters = self.adapters
        network.freeze(target, maps)
        self.adapters = network.adapters
        return network
