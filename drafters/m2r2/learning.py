"""M2R2 that teaches itself: its projections are fitted, in closed form, to the texts that the model writes.

While the machine is idle, a finished text is run again (``Replay``), for the model's exact states and for p as drafting
would see it. Sums of products of both are kept, no text (``Fits``). From time to time the projections are fitted to the
sums, with the latest texts counted once or several times. Each new fit is compared with the one that serves on a
hold-out set of latest texts, which neither has seen. The better one is fitted again, with the hold-out set, and serves.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence

import torch
from torch import nn

from specdec.base.background import Work
from specdec.base.errors import SpecDecWarning, one_line
from specdec.base.memory import free_memory
from specdec.base.ridge import Sums, Weighted
from specdec.runtimes.target import Target
from specdec.speculation.drafter import Learner

from .fits import Fits
from .network import M2R2, Carry
from .replay import PIECE, Replay, Text

FIRST = 1000  # tokens before the first fit
EVERY = 300  # tokens between two fits: some ten requests, so that a new kind of them is soon learned
GROWTH = 1.5  # times as many tokens at the next fit of the first projection
AGAIN = 16_000  # maximum tokens of texts that are run again after a fit of the first projection
STATES = 80_000_000  # maximum bytes of states of these texts, which then run only through the draft path
HOLDOUT_EVERY = 3  # one text of so many is in the hold-out set ...
HOLDOUT_TOKENS = 500  # ... until later texts of the set have so many tokens
RECENT_TOKENS = 2000  # number of latest tokens that fits may count several times
RECENT_WEIGHTS = 1.0, 5.0  # how many times fits count them
WAITING = 64  # maximum number of texts that wait
SAVE_EVERY = 600.0  # least seconds between two times that all is written
SHARE_OF_MEMORY = 4  # the sums may take one part of so many of the free memory


def why_not(target: Target) -> str | None:
    """Return why a drafter cannot teach itself on this target; None: it can."""
    if target.num_layers < 3:
        return "the model has too few layers"
    if target.experts is not None:
        return "some of its experts are on the disk"
    need = 120 * target.hidden_size**2 + STATES  # bytes; the sums, and the system that is solved
    if need > free_memory(torch.device("cpu")) // SHARE_OF_MEMORY:
        return f"it would need {need / 1e9:.1f} GB of memory"
    return None


class Latest(deque[Text]):
    """A queue of the latest texts that were learned from, with states and training data while these are needed.

    The oldest text comes first.
    """

    def bound(self) -> None:
        """Remove the oldest data beyond what is used.

        Kept are the latest texts of at most ``AGAIN`` tokens, the model's states of the latest ones in at most
        ``STATES`` bytes, and the training data of about ``HOLDOUT_TOKENS`` tokens of the hold-out set and
        ``RECENT_TOKENS`` others.
        """
        tokens = size = 0
        rows = {True: 0, False: 0}
        for number, text in enumerate(reversed(self)):
            tokens += len(text.ids)
            if number and tokens > AGAIN:
                for _ in range(len(self) - number):
                    self.popleft()
                return
            if rows[text.held] >= (HOLDOUT_TOKENS if text.held else RECENT_TOKENS):
                text.rows, text.held = [], False
            rows[text.held] += text.count
            size += text.states.nbytes if text.states else 0
            if size > STATES:
                text.states = None

    @property
    def held(self) -> list[Text]:
        """The texts of the hold-out set."""
        return [text for text in self if text.held]


class M2R2Learner(Learner):
    """Trains an M2R2 network on the texts of finished requests, for some milliseconds at a time.

    The drafter calls ``add`` for each finished text, the engine calls ``work`` when it is idle. An error ends the
    learning with a warning, and no request fails.

    The network runs one range of layers, its segment, and has two projections: 0 estimates the segment's input
    (``Fits.basis`` has the latest), 1 the final state. Both are fitted by ridge regression.

    fits: the sums that were learned, and the networks fitted to them.
    replay: runs texts through the model again.
    baseline: the network in use as it was before the hold-out set was added to its training data.
    queue: texts still to learn from.
    latest: texts that were learned from.
    read: number of texts learned from.
    on: whether learning goes on; False after an error, when the last network stays in use.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.fits = target, Fits(target)
        self.replay = Replay(target, self.fits.path)
        self.baseline, self.on = self.fits.network, True
        self.queue = deque[Text](maxlen=WAITING)
        self.latest = Latest()
        self.read = 0
        self._work: Iterator[None] | None = None

    # -- called between steps -----------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The number of fitted networks that have been used to draft."""
        return self.fits.version

    def claim(self) -> None:
        self.fits.store.take(self.fits.name)

    def add(self, ids: Sequence[int], start: int) -> None:
        """Queue a text to learn from, and return at once. No effect after an error, or if the output is one token.

        ids: its token ids, prompt and output. start: number of prompt tokens.
        """
        if self.on and len(ids) > start + 1 >= 2:
            self.queue.append(Text.of(ids, start))

    @torch.inference_mode()
    def work(self) -> bool:
        try:
            self._work = self._work or (self._next() if self.on else None)
            if self._work is None:
                return False
            if next(self._work, self) is self:
                self._work = None
        except torch.linalg.LinAlgError:  # such sums were in the file
            self._work = None
            self.latest.clear()
            self.fits.discard()
            warnings.warn("what was learned has no solution; learning starts anew", SpecDecWarning, stacklevel=2)
        except Exception as error:  # memory, states that are not finite: requests go on
            self._work, self.on = None, False
            self.queue.clear()
            warnings.warn(f"the drafter stops learning: {one_line(error)}", SpecDecWarning, stacklevel=2)
        return True

    def _next(self) -> Iterator[None] | None:
        """Return the next task, a generator that yields after every few milliseconds; None: there is nothing to do."""
        fits, progress = self.fits, self.fits.progress
        if fits.forgotten:
            return self._forget()
        if not fits.sums:
            return self._open() if self.queue else None
        held = sum(text.count for text in self.latest.held)
        enough = held >= HOLDOUT_TOKENS / 2 or (held and not self.queue)  # to compare fits on
        if enough and progress.tokens - held >= FIRST / 2:
            if progress.tokens >= max(FIRST, GROWTH * progress.based):
                return self._rebase()
            fits_now = progress.tokens >= FIRST and progress.tokens - progress.fitted >= EVERY
            if fits_now and fits.sums[1].rows - held >= FIRST / 2:
                return self._fit()
        if self.queue:
            return self._read(self.queue.popleft())
        late = progress.texts > fits.kept and time.monotonic() - fits.kept_at >= SAVE_EVERY
        return self._keep() if fits.store.writes and late else None

    @torch.inference_mode()
    def save(self) -> None:
        for sums in self.fits.sums:
            sums.settle()  # in part, they could never be solved again
        self.fits.keep()

    # -- kinds of work -----------------------------------------------------------------------------------------------

    def _open(self) -> Iterator[None]:
        yield from self.fits.opening()
        self.baseline = self.fits.network

    def _forget(self) -> Iterator[None]:
        """Forget everything, because a person has deleted the file of what was learned."""
        warnings.warn("another process deleted what was learned; the drafter starts anew", SpecDecWarning, stacklevel=2)
        self.queue.clear()
        self.latest.clear()
        self.fits.begin_anew()
        self.baseline, self.read = self.fits.network, 0
        yield

    def _keep(self) -> Iterator[None]:
        """Write the file (``Fits.keep``) in a thread; yield until it has ended. Nothing else is learned meanwhile."""
        work = Work(lambda stop: self.fits.keep(), "specdec keeping")
        while work.running:
            work.join(PIECE)
            yield

    def _read(self, text: Text) -> Iterator[None]:
        """Run a text, add its training data to the sums, and keep it in ``latest``; yield where other work may run.

        One text of ``HOLDOUT_EVERY`` is marked as held out: its data are left out of the fits that are compared on it.
        """
        fits, progress = self.fits, self.fits.progress
        text.held = self.read % HOLDOUT_EVERY == 0
        self.read += 1
        progress.texts += 1
        self.latest.append(text)
        begun = progress.based > 0
        yield from self._run(text, fits.basis if begun else None, dict(enumerate(fits.sums[: 1 + begun])))
        for rows in text.rows:
            fits.counts += torch.bincount(rows.following, minlength=len(fits.counts))
        progress.tokens += text.count
        self.latest.bound()

    def _run(self, text: Text, basis: M2R2 | None, sums: dict[int, Sums]) -> Iterator[None]:
        """Run a text again, set its ``rows``, and add these training data to ``sums``; yield where other work may run.

        basis: the network that runs the draft path, for the second projection's data; None: the path does not run.
        sums: the sums to add to, by index of the projection.
        """
        text.rows = []
        for rows in self.replay.rows(text, basis):
            yield
            if rows is not None:
                for index, each in sums.items():
                    yield from each.adding(*rows.products(self.fits.basis, index))
                text.rows.append(rows)

    def _weighted(self, index: int, recent: float, held: float) -> Iterator[Weighted]:
        """Yield, for each of the latest texts, its training data for a projection and the weight to add to the sums.

        That are inputs [n, F], goals [n, D] and a number (``Weighted``). The sums contain each text with weight 1
        already, so the number is the wanted weight minus 1; texts for which it is 0 are left out.

        index: index of the projection, 0 or 1. recent: wanted weight of a text that is not in the hold-out set.
        held: wanted weight of a text of the hold-out set; 0: its data are taken out of the sums.
        """
        for text in self.latest:
            weight = (held if text.held else recent) - 1  # the sums have them once
            if text.rows and weight:
                x, y = zip(*(rows.products(self.fits.basis, index) for rows in text.rows), strict=True)
                yield torch.cat(x), torch.cat(y), weight

    def _rebase(self) -> Iterator[None]:
        """Fit the first projection to all data, and run texts again for the sums of the second one, which depend on it.

        Sets ``fits.basis`` and ``fits.sums[1]``; yields where other work may run.
        """
        fits, progress = self.fits, self.fits.progress
        basis = yield from fits.basing(self._weighted(0, 1, 0))
        # Rows of the earlier projection are worse; without the texts they are all there is.
        enough = 2 * sum(len(text.ids) - text.start for text in self.latest) > progress.tokens
        sums = yield from fits.sums[1].scaled(0.0 if enough else 0.5)
        for text in self.latest.held if progress.based and not enough else ():
            for rows in text.rows:
                yield from sums.adding(*rows.products(basis, 1), -0.5)
        for text in [*self.latest]:
            yield from self._run(text, basis, {1: sums})
            self.latest.bound()
        fits.basis, fits.sums[1], progress.based = basis, sums, progress.tokens

    def _fit(self) -> Iterator[None]:
        """Fit the second projection with several weights of recent texts; use the best fit if it beats ``baseline``.

        They are compared by the hold-out tokens that they draft correctly. The best one is fitted again with the
        hold-out set, and drafts from then on (``Fits.serve``). Yields where other work may run.
        """
        fits, progress = self.fits, self.fits.progress
        progress.fitted = progress.tokens
        if fits.newest is not None:
            yield from self.target.preparing(fits.newest)
        best, found = 0.0, self.baseline
        most = (yield from self._hits(found, fits.head)) if progress.fits else -1
        for weight in RECENT_WEIGHTS if progress.tokens > 2 * RECENT_TOKENS else RECENT_WEIGHTS[:1]:
            network = yield from fits.fitting(self._weighted(1, weight, 0))
            hits = yield from self._hits(network, fits.newest)
            if hits > most:
                best, found, most = weight, network, hits
        if best:
            network = yield from fits.fitting(self._weighted(1, best, best))
            self.baseline = found
            fits.serve(network, most / sum(text.count for text in self.latest.held))

    def _hits(self, network: M2R2, head: nn.Linear | None) -> Generator[None, None, int]:
        """Count the hold-out tokens that ``network`` drafts correctly: a generator, whose return value is the number.

        It yields where other work may run. head: the output head for ``network.draft_vocab``; None: the model's.
        """
        found, vocabulary = 0, network.draft_vocab
        other = network.inference_maps[0] is not self.fits.basis.inference_maps[0]  # rows are those of the basis
        for text in self.latest.held:
            for rows in self.replay.rows(text, network) if other else text.rows:
                yield
                if rows is not None and rows.end is not None:
                    final = network.project(1, rows.end[None], Carry(rows.carry.final[None], []))
                    best = self.target.readout(final, head)[0].argmax(-1)
                    best = best if vocabulary is None else vocabulary[best]
                    found += int((best.cpu() == rows.following).sum())
        return found
