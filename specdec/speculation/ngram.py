"""Candidates by n-grams: texts to search for the last tokens, a static prior, and the tree that is grown from both.

The compiled part is ``ngram.c``. It knows token ids, not drafters or models.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from specdec.base.errors import SpecDecError
from specdec.runtimes.draft_path import KNOTS
from specdec.speculation import library
from specdec.speculation.candidates import Candidates
from specdec.speculation.sampling import Noise
from specdec.speculation.trees import MOST_NODES

MATCH_TOKENS, NODES = 16, 64  # as in ngram.c: tokens of a match, nodes of a tree
SOURCES = 4  # most texts that are matched
FOLLOWERS = 8  # of a token that the prior keeps
POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
Allowed = ctypes.CFUNCTYPE(POINTER, INT)
ANY = Allowed()  # every token
Ints = npt.NDArray[np.int32]


class _Prior(ctypes.Structure):
    """A ``Prior`` (the likeliest successors of each token) as the C struct of that name in ngram.c.

    It points into the arrays of the ``Prior``, which must live as long.
    """

    _fields_ = (("tokens", INT), *((name, POINTER) for name in ("begin", "after", "p")))


class _Growth(ctypes.Structure):
    """The C struct ``Growth`` in ngram.c: arguments and results of growing one tree. Pointers are addresses.

    ``Grower`` fills it, passes it to the C function ``specdec_ngram_grow``, and reads it.

    text, length: the last token ids of the text, and their number. limit, nodes: maximum depth and number of nodes.
    sources: number of texts that are searched. source, weight: each text, and how much an occurrence in it counts.
    least: minimum probability of a path. priced, price: cost of scoring 0, 1, .. nodes, and how many costs there are.
    prior: the ``_Prior``; null: none.
    learned, learned_tokens, learned_parents, learned_p: another drafter's tree: number of nodes, and the lists.
    table, beside, learned_table: calibration tables of n-grams, of n-grams where the other drafter has other candidates
        after the parent, and of that drafter; null: raw probabilities.
    sampled: whether tokens are drawn by Gumbel noise. seed, stream: of the noise. position: that of the next token.
    allowed: callback that returns the tokens that may follow a node; null: all may.
    tokens, parents, values: results for each node: token id, parent, and probability of its path.
    own_raw, learned_raw: results for each node after its parent: raw probability by n-grams (negative in the case of
        ``beside``; 0 if the other drafter has the node), and by the other drafter (0 if it lacks the node).
    """

    _fields_ = (
        ("text", POINTER),
        *((name, INT) for name in ("length", "limit", "nodes", "sources")),
        ("least", FLOAT),
        ("priced", INT),
        ("price", POINTER),
        *((name, POINTER) for name in ("prior", "source", "weight", "table", "beside")),
        ("learned", INT),
        *((name, POINTER) for name in ("learned_tokens", "learned_parents", "learned_p", "learned_table")),
        ("sampled", INT),
        ("seed", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("position", ctypes.c_int64),
        ("allowed", Allowed),
        *((name, POINTER) for name in ("tokens", "parents", "values", "own_raw", "learned_raw")),
    )


def built() -> bool:
    """Return whether the compiled n-gram library is installed."""
    return library.load() is not None


def load() -> Any:
    """Return the compiled n-gram library, a ``ctypes.CDLL``. Raises SpecDecError if it is not installed."""
    if (found := library.load()) is None:
        raise SpecDecError(
            "the n-gram drafter is not built; install specdec where there is a C compiler, or draft with prompt-lookup"
        )
    return found


class Texts:
    """Stores token ids of texts, in which ``Grower`` searches the last tokens (n-grams) of another text.

    most: number of the latest tokens that are kept, rounded up to a power of two.
    size: number of tokens for which memory is allocated at first, a power of two.
    pointer: the C object of ngram.c, which is freed with this object.
    """

    def __init__(self, most: int, size: int = 1024) -> None:
        lib = load()
        whole = 1 << max(most - 1, MATCH_TOKENS).bit_length()
        self.pointer = lib.specdec_texts_open(size, whole)
        if not self.pointer:
            raise MemoryError("can't allocate memory for the texts of the n-gram drafter")
        # Not when the process ends: a thread may still add texts, or read them.
        weakref.finalize(self, lib.specdec_texts_close, self.pointer).atexit = False
        self._add = lib.specdec_texts_add

    def add(self, ids: Sequence[int] | Ints) -> None:
        """Append token ids to the stored texts, whose oldest tokens are dropped if there are too many.

        ids: token ids, as int32 [n], contiguous, if they are an array. -1 ends a text, and the next token begins
            another one; without it, the next call goes on with the text.
        """
        if isinstance(ids, np.ndarray):
            self._add(self.pointer, ids.ctypes.data, len(ids))
        else:
            self._add(self.pointer, (INT * len(ids))(*ids), len(ids))


class SortedTexts:
    """Token ids of texts that never change, 8 bytes per token, in which ``Grower`` searches a text's last tokens.

    A search finds only the longest matches, of two tokens or more.

    ids: token ids, int32 [n], contiguous, with -1 between two texts; may be memory-mapped.
    order: the sorted indices of ``ids``, uint32 [n], as ``sort`` returns them; may be memory-mapped.
    """

    def __init__(self, ids: Ints, order: npt.NDArray[np.uint32]) -> None:
        lib, self.ids, self.order = load(), ids, order
        self.pointer = lib.specdec_texts_view(ids.ctypes.data, order.ctypes.data, len(ids))
        if not self.pointer:
            raise MemoryError("can't allocate memory for the texts of the n-gram drafter")
        weakref.finalize(self, lib.specdec_texts_close, self.pointer).atexit = False

    @staticmethod
    def sort(ids: Ints) -> npt.NDArray[np.uint32]:
        """Return all indices of ``ids``, uint32 [n], sorted by the 16 tokens before each, read backwards.

        ids: token ids of texts, int32 [n], contiguous, with -1 between two texts.
        """
        order = np.empty(len(ids), np.uint32)
        load().specdec_texts_sort(ids.ctypes.data, order.ctypes.data, len(ids))
        return order


class Prior:
    """The likeliest successors of each token of the vocabulary: the tokens that most often come next after it.

    ``count`` makes it from texts. ``Grower`` uses it where no text matches.

    begin: int32 [V + 1]; the successors of token t are the entries begin[t]:begin[t + 1] of ``after`` and ``p``.
    after: token ids of the successors, int32 [n], for each token the likeliest first.
    p: probabilities of the successors, float32 [n].
    """

    def __init__(self, begin: Ints, after: Ints, p: npt.NDArray[np.float32]) -> None:
        self.begin = begin
        self.after = after
        self.p = p
        self.struct = _Prior(len(begin) - 1, *(part.ctypes.data for part in (begin, after, p)))

    @classmethod
    def count(cls, ids: Ints, vocab_size: int) -> Prior:
        """Count which tokens follow each token in texts, and return the ``FOLLOWERS`` (8) most frequent as a prior.

        A successor that comes after c of the n occurrences of a token gets the probability c / (n + 2).

        ids: token ids, int32 [n], with a -1 between two texts, across which nothing is counted.
        vocab_size: V, which all ids are below.
        """
        pairs = ids[:-1].astype(np.int64) * vocab_size + ids[1:]
        keys, counts = np.unique(pairs[(ids[:-1] >= 0) & (ids[1:] >= 0)], return_counts=True)
        before = keys // vocab_size
        order = np.lexsort((-counts, before))
        keys, counts, before = keys[order], counts[order], before[order]
        begin = np.searchsorted(before, np.arange(vocab_size + 1))  # (V + 1,)
        totals = np.add.reduceat(np.append(counts, 0), np.minimum(begin[:-1], len(counts)))
        kept = np.arange(len(keys)) - begin[before] < FOLLOWERS
        p = counts / (totals[before] + 2)
        first = np.concatenate(([0], np.cumsum(kept)))[begin]
        return cls(first.astype(np.int32), (keys % vocab_size)[kept].astype(np.int32), p[kept].astype(np.float32))


class Grower:
    """Grows trees of the likeliest continuations of a text by n-grams, one call at a time.

    It reuses the memory of its arguments and results, so threads must not share it.

    prior: successors of each token, used where no text matches; None: there is no prior.
    least: paths with a smaller probability are left out.
    """

    def __init__(self, prior: Prior | None = None, least: float = 0.01) -> None:
        self.lib, self.prior = load(), prior
        self.text = (INT * MATCH_TOKENS)()
        self.out = (INT * NODES)(), (INT * NODES)(), (FLOAT * NODES)(), (FLOAT * NODES)(), (FLOAT * NODES)()
        self.tables = (FLOAT * len(KNOTS))(), (FLOAT * len(KNOTS))(), (FLOAT * len(KNOTS))()
        self.source, self.weight = (POINTER * SOURCES)(), (FLOAT * SOURCES)()
        self.price = (FLOAT * (NODES + 1))()
        self.struct = _Growth(text=ctypes.addressof(self.text), least=least)
        self.struct.source, self.struct.weight = ctypes.addressof(self.source), ctypes.addressof(self.weight)
        self.struct.price = ctypes.addressof(self.price)
        self.struct.prior = None if prior is None else ctypes.addressof(prior.struct)
        self.struct.tokens, self.struct.parents = map(ctypes.addressof, self.out[:2])
        self.struct.values, self.struct.own_raw, self.struct.learned_raw = map(ctypes.addressof, self.out[2:])

    def __call__(
        self,
        ids: Sequence[int],
        sources: Sequence[tuple[Texts | SortedTexts, float]],
        limit: int,
        learned: Candidates | None = None,
        masks: Callable[[Sequence[int]], Tensor | None] | None = None,
        noise: tuple[Noise, int] | None = None,
        nodes: int = MOST_NODES,
        tables: Sequence[Sequence[float]] = (),
        prices: Sequence[float] = (),
    ) -> Candidates:
        """Return the tree of the ``nodes`` likeliest paths after the text ``ids``, at most ``limit`` tokens deep.

        ids: token ids of the text, of which the last 16 are searched for; the last one is the root of the tree.
        sources: at most 4 texts to search for the last tokens of ``ids``, each with the weight of an occurrence in it;
            later ones overrule earlier ones. At most one is sorted.
        learned: the candidates of another drafter, which are merged in; None: there is no other drafter.
        masks: function from the tokens between the root and a node to the tokens that may follow (bool [V] on the CPU;
            None: none); None: all tokens are allowed.
        noise: the Gumbel noise of the row, and the position of the token after the root; None: greedy decoding.
        tables: tables of calibrated probabilities, each 11 at the log-odds ``KNOTS`` (-4 .. 6) of raw ones: of n-grams
            and, with ``learned``, of n-grams where the other drafter has candidates, and of the other drafter.
            ``Candidates.raw`` has the same sources in this order. Empty: raw probabilities count.
        nodes: maximum number of nodes, at most 64.
        prices: what scoring 0, 1, .. nodes costs, in accepted tokens. Nodes that are not worth it are left out; empty:
            scoring is free.
        """
        struct, tail = self.struct, ids[-MATCH_TOKENS:]
        self.text[: len(tail)] = [*tail]
        struct.length, struct.nodes = len(tail), min(nodes, NODES)
        struct.limit = limit
        struct.sources = len(sources)
        for number, (texts, weight) in enumerate(sources):
            self.source[number], self.weight[number] = texts.pointer, weight
        struct.priced = min(len(prices), len(self.price))
        self.price[: struct.priced] = [*prices[: struct.priced]]
        struct.table = struct.beside = struct.learned_table = None
        for name, into, table in zip(("table", "beside", "learned_table"), self.tables, tables, strict=False):
            into[:] = [*table]
            setattr(struct, name, ctypes.addressof(into))
        alive: list[Any] = []  # what the structure points to
        struct.learned = 0 if learned is None else len(learned.tokens)
        if learned is not None and learned.tokens:
            parts = [(INT * struct.learned)(*learned.tokens), (INT * struct.learned)(*learned.parents)]
            parts.append((FLOAT * struct.learned)(*learned.raw[0]))
            struct.learned_tokens, struct.learned_parents, struct.learned_p = map(ctypes.addressof, parts)
            alive += parts
        struct.sampled = noise is not None
        if noise is not None:
            (struct.seed, struct.stream), struct.position = noise[0].key.tolist(), noise[1]
        error: list[BaseException] = []
        struct.allowed = ANY if masks is None else self._allowed(masks, error)
        count = self.lib.specdec_ngram_grow(ctypes.byref(struct))
        if error:
            raise error[0]
        tokens, parents, values, own, other = self.out
        raw = [own[:count]]
        if learned is not None:
            raw = [[max(p, 0.0) for p in own[:count]], [max(-p, 0.0) for p in own[:count]], other[:count]]
        return Candidates([math.log(value) for value in values[:count]], tokens[:count], parents[:count], raw)

    def _allowed(self, masks: Callable[[Sequence[int]], Tensor | None], error: list[BaseException]) -> Any:
        """Return ``masks`` as a C callback: it takes the index of a node of the tree (0: the root, i + 1: node i).

        It returns the address of V bytes, 1 for each token that may follow the node; NULL: none may. The callback keeps
        this memory alive, and so must live until the C function returns.

        masks: function from the tokens between the root and a node to the tokens that may follow (bool [V] on the CPU;
            None: none).
        error: receives the first exception of ``masks``, after which no token is allowed; the caller raises it.
        """
        alive = list[Tensor]()

        def allowed(node: int) -> int | None:
            try:
                text = list[int]()
                while node:
                    text.insert(0, self.out[0][node - 1])
                    node = self.out[1][node - 1]
                mask = None if error else masks(text)
            except BaseException as problem:  # also an interrupt: the caller raises it
                error.append(problem)
                return None
            if mask is None:
                return None
            alive.append(mask)
            return mask.data_ptr()

        return Allowed(allowed)
