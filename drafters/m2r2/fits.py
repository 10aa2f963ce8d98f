"""What a self-taught M2R2 has learned: sums of products of states, and the projections that are fitted to them.

The process that may write keeps all of it for later processes (``Store``). Generators yield after some milliseconds.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Generator, Iterable

import numpy as np
import torch
from torch import Tensor

from specdec.base.devices import without_memory
from specdec.base.errors import SpecDecError, SpecDecWarning, one_line
from specdec.base.ridge import RIDGE, Sums, Weighted, result
from specdec.models import identity
from specdec.models.gguf.blocks import named_weights
from specdec.runtimes.target import Target
from specdec.runtimes.torch.linear import UnitMap
from specdec.speculation.ngram import built

from ..corpus import corpus
from .learned import Progress, Stamp, Store, UnusableError, as_start, read_progress, read_tensors, whole_name
from .network import M2R2
from .path import M2R2Path

VOCABULARY = 8192  # tokens that are drafted
AGREEMENTS = 100  # latest fits whose agreement with the model is kept


def learned_path(target: Target) -> M2R2Path:
    """Return the draft path of a drafter that teaches itself: one range of layers between two projections.

    The range is a quarter of the model's layers, or half of them if the output head has more weights than all layers,
    which then cost little compared with the head. It ends before the last twelfth of the layers.
    """
    n, blocks = target.num_layers, range(target.num_layers)
    own = sum(math.prod(each.shape) for layer in blocks for _, each in named_weights(target.block(layer)))
    hi, part = n - max(n // 12, 1), 2 if target.vocab_size * target.hidden_size > own else 4
    return M2R2Path(0, ((hi - max(n // part, 1), hi),), True)


class Fits:
    """Sums over the training data of texts (``replay.Rows``), and networks with two projections fitted to these sums.

    The draft path runs one range of layers, its segment. The first projection, a linear layer, estimates the segment's
    input, the second one the final state from its output. ``Sums`` holds what ridge regression needs: sums of products
    of a projection's inputs and the states that it should return. To *fit* is to solve the regression.

    path: the draft path (``learned_path``). name: the model's name, or its absolute path if it is local.
    adapter: name of the adapter that is merged into the model; "": there is none.
    network: the network that drafts; before the first fit a network of zeros, which drafts nothing useful.
    head: the output head for the draft tokens of ``network``; None: the model's own head.
    newest: the output head for the tokens in ``vocabulary``; None: the model's own head.
    basis: the network whose first projection makes the training data of the second projection.
    counts: number of times that each token was seen in the package's corpus and in the outputs that were learned from,
        int64 [V].
    vocabulary: the most frequent tokens, int32 [V']; None: all tokens.
    progress: numbers of tokens, texts and fits so far, as stored in the file.
    sums: the sums of the two projections; empty before ``opening``.
    store: the file in which all of this is kept.
    stamp: ``store.stamp()`` when the file was last read or written.
    kept: ``progress.texts`` when the file was last written.
    kept_at: time of the last writing, in seconds of ``time.monotonic``.
    start: the file of the base model, from which a model with a merged adapter begins; None: no adapter is merged.
    source: the file that was read last, ``store`` or ``start``.
    read_at: ``source.stamp()`` when it was read.
    factor: factor by which the sums in ``source`` are multiplied when they are read.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.path = target, learned_path(target)
        self.name, merged = whole_name(str(target.model.config._name_or_path)), identity.merged_adapter(target.model)
        self.adapter = "" if merged is None else whole_name(merged.name)
        self.progress = self._new_progress()
        self.sums: list[Sums] = []
        self.store = Store(target.fingerprint, str(self.path))
        self.kept = 0
        self.kept_at = -math.inf
        self.keeping = threading.Lock()
        self.start = None if merged is None else Store(merged.base, str(self.path))
        self._restore()

    @property
    def version(self) -> int:
        """The number of fitted networks that have been used to draft."""
        return self.progress.fits

    # -- what is kept -------------------------------------------------------------------------------------------------

    def _new_progress(self, fits: int = 0) -> Progress:
        """Return the progress of a drafter that has learned nothing. fits: number of networks that have drafted."""
        return Progress(self.name, str(self.path), fits=fits, adapter=self.adapter)

    def _read_progress(self) -> Progress | None:
        """Return the progress in the model's file, or else in the file of its base model; None: neither file exists.

        Sets ``source``, ``read_at`` and ``factor``.
        """
        self.source = self.store
        self.read_at = self.stamp
        self.factor = 1.0
        found = read_progress(self.store.path)
        if found is None and self.start is not None:
            self.source, self.read_at = self.start, self.start.stamp()
            if (of_base := read_progress(self.start.path)) is not None:
                found, self.factor = as_start(of_base, self.name, self.adapter)
        return found

    def _new_sums(self) -> list[Sums]:
        """Return empty sums for the two projections, which have 3 D and 2 D inputs and D outputs."""
        return [Sums(parts * self.target.hidden_size, self.target.hidden_size) for parts in (3, 2)]

    def _restore(self) -> None:
        """Set counts, vocabulary, networks, heads and progress from the file that an earlier process has written.

        Without a file, projections are zeros, and the counts are those of the package's corpus. A file that cannot be
        used is reported by a warning, and ignored. The sums are not read here (``opening``).
        """
        target, store, size, d = self.target, self.store, self.target.vocab_size, self.target.hidden_size
        self.counts = torch.zeros(size, dtype=torch.long)
        self.stamp: Stamp = store.stamp()
        if target.tokenizer is not None and built():
            ids = corpus(target.tokenizer, size)
            self.counts += torch.from_numpy(np.bincount(ids[ids >= 0], minlength=size))
        self.vocabulary = self._likeliest()
        first, second = (torch.zeros(parts * d + 1, d) for parts in (3, 2))
        basis = first
        try:
            if (progress := self._read_progress()) is not None:
                found = dict(read_tensors(self.source.path, self._kept(first, second, basis)))
                tokens = found.get("vocabulary", torch.zeros(1))
                if int(tokens.min()) < 0 or int(tokens.max()) >= size:
                    raise UnusableError(f"'{self.source.path}' names tokens that the model does not have")
                first, second, basis = (found[name].float() for name in ("fit.0", "fit.1", "basis"))
                self.counts, self.vocabulary = found["counts"].long(), found.get("vocabulary")
                progress.model = self.name
                self.progress, self.kept = progress, progress.texts
        except SpecDecError as error:
            self._cannot_use(error)
        self.network = self.basis = result(self._making(first.T, second.T))
        if not torch.equal(basis, first):
            self.basis = result(self._making(basis.T))
        self.head = self.newest = None if self.vocabulary is None else target.reduced_head(self.vocabulary)

    def _kept(self, first: Tensor, second: Tensor, basis: Tensor) -> dict[str, Tensor]:
        """Return the tensors to write to the file by name: "fit.0", "fit.1", "basis", "counts" and "vocabulary".

        The last one is missing if all tokens are drafted.

        first, second, basis: weight and bias of projections with F inputs, in one matrix [F + 1, D]: those of the
            network that drafts, and the first one of ``basis``.
        """
        more = {} if self.vocabulary is None else {"vocabulary": self.vocabulary}
        return {"fit.0": first, "fit.1": second, "basis": basis, "counts": self.counts.int()} | more

    def _panels(self, sums: list[Sums]) -> dict[str, Tensor]:
        """Return the tensors of the sums of both projections by name, "sums.PROJECTION.NUMBER" (``Sums.panels``).

        sums: those of projections 0 and 1. The tensors are not copied.
        """
        return {f"sums.{n}.{number}": panel for n, each in enumerate(sums) for number, panel in enumerate(each.panels)}

    def _cannot_use(self, error: SpecDecError) -> None:
        """Warn that the file ``source`` cannot be used. Sets ``source`` to ``store``, ``stamp`` and ``read_at`` anew.

        error: why; for an UnusableError (a damaged file), the file will be overwritten, for others it stays as it is.
        """
        then = "learning starts anew"
        if not isinstance(error, UnusableError):
            self.source.leave(str(error))
            then += ", and what this process learns is not kept" if self.source is self.store else ""
        warnings.warn(f"{error}; {then}", SpecDecWarning, stacklevel=3)
        self.source = self.store
        self.stamp = self.read_at = self.store.stamp()

    @property
    def forgotten(self) -> bool:
        """Whether another process has deleted the file (``learned.forget``), so that learning must begin anew."""
        return self.store.writes and bool(self.sums) and self.store.stamp() != self.stamp

    def begin_anew(self) -> None:
        """Forget all that was learned, and draft with a network of zeros again."""
        self.sums = []
        self.kept = 0
        self.progress = self._new_progress()
        self._restore()

    def opening(self) -> Generator[None]:
        """Set ``sums``: those that earlier processes have written, or empty ones if there are none that can be used.

        Becomes the process that writes the file, if it can; else a warning says that nothing is kept. It is a generator
        that yields after each tensor, so that other work may run; ``sums`` is set when it has ended.
        """
        warned = self.store.why_not  # by ``_cannot_use``
        if not self.store.claim() and not warned:
            why = self.store.why_not or "another process learns for this model"
            warnings.warn(f"{why}: what this one learns is not kept", SpecDecWarning, stacklevel=2)
        if (self.store.stamp(), self.source.stamp()) != (self.stamp, self.read_at):  # it has learned since
            self._restore()
        sums = self._new_sums()
        try:
            for name, tensor in read_tensors(self.source.path, self._panels(sums)) if self.progress.tokens else ():
                n, number = map(int, name.split(".")[1:])
                sums[n].panels[number] = tensor.mul_(self.factor)
                yield
        except SpecDecError as error:
            self._cannot_use(error)
            return self.discard()
        self.sums = sums

    def discard(self) -> None:
        """Forget the sums, and how much was learned; the network that drafts stays."""
        self.sums = self._new_sums()
        self.progress, self.kept = self._new_progress(self.version), 0

    def keep(self) -> None:
        """Write the file if there is something new and this process may write it. Warns if that fails.

        Of two threads that call it at once, the second waits, and finds nothing new.
        """
        with self.keeping:
            if not self.store.writes or self.progress.texts <= self.kept:
                return
            try:
                used = (self.network.projections[0], self.network.projections[1], self.basis.projections[0])
                maps = (torch.cat((each.weight.T, each.bias[None])).cpu().bfloat16() for each in used)
                tensors = self._kept(*maps) | self._panels(self.sums)
                if self.store.save(self.progress, tensors, self.stamp):
                    self.stamp = self.store.stamp()
            except Exception as error:  # memory, the disk: what is learned serves all the same
                self.store.release()
                warnings.warn(f"what was learned cannot be kept: {one_line(error)}", SpecDecWarning, stacklevel=2)
            self.kept, self.kept_at = self.progress.texts, time.monotonic()

    # -- from sums to networks ----------------------------------------------------------------------------------------

    def basing(self, more: Iterable[Weighted]) -> Generator[None, None, M2R2]:
        """Choose the draft vocabulary, and make a network with a fitted first projection, and a second one of zeros.

        It is a generator that yields where other work may run; its return value is the network. Sets ``vocabulary`` and
        ``newest``; the caller sets ``basis``.

        more: further training data that count in this fit alone, (inputs [n, 3 D], the segment's inputs [n, D], weight)
            each.
        """
        self.vocabulary = self._likeliest()
        if self.vocabulary is not None:
            self.newest = self.target.reduced_head(self.vocabulary)
            yield
        return (yield from self._making((yield from self.sums[0].solve(RIDGE, more))))

    def fitting(self, more: Iterable[Weighted]) -> Generator[None, None, M2R2]:
        """Make a network with the first projection of ``basis``, and a second one fitted by ridge regression.

        It is a generator that yields where other work may run; its return value is the network.

        more: further training data that count in this fit alone, (inputs [n, 2 D], final states [n, D], weight) each.
        """
        return (yield from self._making(self.basis, (yield from self.sums[1].solve(RIDGE, more))))

    def serve(self, network: M2R2, share: float) -> None:
        """Set ``network`` and ``head``, with which the drafter drafts from its next step on, and update ``progress``.

        network: a network with the latest vocabulary, as ``fitting`` makes it.
        share: share of the hold-out tokens that it drafts correctly, in [0, 1].
        """
        self.network, self.head = network, self.newest
        self.progress.fits += 1
        self.progress.agreement.append((self.progress.fitted, share))
        del self.progress.agreement[:-AGREEMENTS]  # all of them are written each time

    def _likeliest(self) -> Tensor | None:
        """Return the ids of the V' = ``VOCABULARY`` most frequent tokens, int32 [V'], in ascending order.

        Frequencies are ``counts``: of the package's corpus and of the tokens that the model chose in the texts learned
        from. None, which means all tokens, if the model has no more than ``VOCABULARY``.
        """
        if len(self.counts) <= VOCABULARY:
            return None
        return self.counts.topk(VOCABULARY).indices.sort().values.int()

    def _making(self, first: Tensor | M2R2, second: Tensor | None = None) -> Generator[None, None, M2R2]:
        """Make a network with two projections. It is a generator that yields between them, and returns the network.

        first: weight and bias of the first projection, with F inputs, in one matrix [D, F + 1], or a network whose
            first projection is reused.
        second: the same for the second projection; None: zeros.
        """
        target, tensors, maps = self.target, dict[str, Tensor](), list[UnitMap]()
        with without_memory():
            network = M2R2(self.path, target, self.vocabulary)
        if self.vocabulary is not None:
            tensors["draft_vocab"] = self.vocabulary
        for index, each in enumerate((first, second)):
            if isinstance(each, M2R2):
                weight: Tensor = each.projections[index].weight
                bias: Tensor = each.projections[index].bias
                maps.append(each.inference_maps[index])
            else:
                found = torch.zeros(target.hidden_size, 2 * target.hidden_size + 1) if each is None else each
                weight, bias = (x.to(target.device, target.dtype).contiguous() for x in (found[:, :-1], found[:, -1]))
                yield
                if each is not None:
                    maps.append((yield from UnitMap.making(weight, bias)))
            tensors |= {f"projections.{index}.weight": weight, f"projections.{index}.bias": bias}
        network.load_state_dict(tensors, assign=True)
        network.freeze(target, maps)
        return network
