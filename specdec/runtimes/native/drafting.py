"""Drafting in one call of the native kernels: a tree for one sequence, or a chain with siblings for each of several.

The kernels' argument structures are built once for a draft path. A draft changes few fields and builds nothing, because
between two passes all Python code has left the CPU's caches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from specdec.base import cores
from specdec.kvcache.cache import KVCache
from specdec.runtimes.decoder_layer import Adapters
from specdec.runtimes.draft_path import NEAR, DraftPath, DraftRoots, Masks, Nodes, TreeLimits
from specdec.runtimes.native import library
from specdec.runtimes.native.library import FLOAT, INT, POINTER, Call, Model, Sampled, TreeDraft, done, pointer
from specdec.runtimes.native.linear import Packed, RowTable
from specdec.runtimes.torch.linear import UNIT_EPS

KNOTS = 11  # numbers of a table of calibrated probabilities (calibrate.h)
MOST_GIVEN = 64  # nodes of a tree of another source


class Kernels(Protocol):
    """The parts of the native runtime (compiled CPU kernels) that drafting needs; ``NativeTarget`` has them.

    lib: the loaded library of kernels (``library.load``).
    embedding: the table of token embeddings, [V, D].
    final_norm: factors of the final norm, float32 [D].
    eps: epsilon of the final norm.
    vocab_size: number of tokens, V.
    windows: attention window of each layer in tokens; None: no limit.
    """

    lib: Any
    embedding: RowTable
    final_norm: Tensor
    eps: float
    vocab_size: int
    windows: list[int | None]

    def head(self, head: nn.Linear | None) -> Packed:
        """Return an output head in the kernels' format, packed at its first use.

        head: the module of the head; None: the model's own.
        """

    def draft_call(self, lo: int, hi: int, adapters: Adapters) -> tuple[Model, Call]:
        """Return the kernels' arguments to run layers [lo, hi) with ``adapters`` on one token of each sequence.

        Returns two ctypes structures: of the model, whose layers have the adapters merged, and of the call, without
        the fields that ``place`` sets and the addresses of inputs and positions.
        """

    def place(self, call: Call, cache: KVCache, lo: int, hi: int, counts: Sequence[int]) -> tuple[Any, ...]:
        """Reserve slots of a KV cache for the tokens of a pass, and set the fields of ``call`` that describe them.

        A slot holds the keys and values of one token. The cache counts the slots as filled, and the kernels fill them.

        call: ctypes structure with the arguments of the pass; its fields ``count``, ``tokens``, ``cache``,
            ``sequences`` and ``rotary`` are set.
        cache: the KV cache; its memory grows if it has too few slots.
        lo, hi: the layers [lo, hi) of the pass.
        counts: for each sequence of the cache, number of slots that the pass needs.

        Returns objects that ``call`` points to; the caller keeps them alive until the kernels have run.
        """


class TreeDrafter:
    """Drafts along a path by the native kernels: a tree for one sequence, chains with siblings for several.

    In a chain with siblings, one node of each level gets children, and the other nodes of the level are leaves.

    Made for one path and size, and then called for each draft, by one thread at a time. ``drafter(target, cache, roots,
    limits)`` returns, for each sequence, the lists (scores, token ids, parents, [raw probabilities]) of ``_by_row``. Of
    ``limits`` (``TreeLimits``), it reads the costs and rates; ``levels`` and ``width`` must be those given here. The
    cache has no further tokens afterwards. A level is all draft nodes of one depth. A candidate is a node that may be
    scored. The arrays are C arrays that ``struct`` points to.

    target: the native runtime. path: the projections, layers and output heads that draft.
    levels: maximum number of levels. width: number of children of a node. rows: number of sequences, R.
    segments: the path's ranges of layers.
    drafted: maximum number of tokens of a sequence that run through the path, which is the cache slots that a draft
        uses.
    positions, roots: position and token id of each sequence's root, [R].
    sampled: how each sequence is sampled, [R]; unused if all are greedy.
    given: the tree of another source, such as n-grams, for each sequence, [R]; unused if there is none.
    tables: three calibration tables of each sequence, [R][3][KNOTS] (``DraftRoots.tables``): calibrated probabilities
        at fixed log-odds of raw ones.
    found: four arrays with an entry for each candidate that the kernels return: score, token id, parent, and raw
        probability by the output heads.
    rates: acceptance rate of each level, [levels].
    allowed: for each token of a level, address of the mask of the tokens that may follow (null: none may), [width].
    masks: function from the ids of the tokens after the root to that mask, bool [V]; None: all tokens may follow.
    held: the mask tensors of the present level, which keeps them alive.
    error: exception that ``masks`` raised during the call; None: it raised none.
    stages: for each projection of the path, the kernels' structure for it and the layers after it.
    calls: the kernels' arguments for the layers of each segment.
    alive: objects that ``struct`` points to, which this list keeps in memory.
    struct: the ctypes structure with the arguments of the kernel that drafts.
    heads, tokens: output heads of the path, and the token id of each logit (None: the logit's index).
    """

    def __init__(self, target: Kernels, path: DraftPath, levels: int, width: int, rows: int = 1) -> None:
        self.segments = path.segments
        self.drafted = 1 + (levels - 1) * (width if rows == 1 else 1)
        self.rows = rows
        self.positions = (ctypes.c_int64 * rows)()
        self.roots = (INT * rows)()
        self.sampled = (Sampled * rows)()
        self.given = (library.Given * rows)()
        self.tables = (FLOAT * KNOTS * 3 * rows)()
        count = levels * width * max(width, rows) + MOST_GIVEN * rows
        self.found = (FLOAT * count)(), (INT * count)(), (INT * count)(), (FLOAT * count)()
        self.rates = (FLOAT * levels)()
        self.allowed = (POINTER * width)()
        self.masks: Masks | None = None
        self.held: list[Tensor | None] = []
        self.error: BaseException | None = None
        maps = [each.packed for each in path.projections]
        self.stages = (library.Stage * len(maps))()
        self.calls: list[Call] = []
        self.alive: list[Any] = [maps]
        for stage, projection in zip(self.stages, maps, strict=True):
            assert projection is not None
            stage.projection = ctypes.addressof(projection.struct)
        for stage, (lo, hi) in zip(self.stages, path.segments, strict=False):
            model, call = target.draft_call(lo, hi, path.adapters)
            call.positions, call.near = ctypes.addressof(self.positions), NEAR
            stage.model, stage.call = ctypes.addressof(model), ctypes.addressof(call)
            self.calls.append(call)
            self.alive.append(model)
        scores, ids, parents, raw = (ctypes.addressof(each) for each in self.found)
        self.struct = TreeDraft(
            stages=len(maps),
            levels=levels,
            width=width,
            sequences=rows,
            roots=ctypes.addressof(self.roots),
            stage=ctypes.addressof(self.stages),
            embedding=ctypes.addressof(target.embedding.struct),
            norm=target.final_norm.data_ptr(),
            eps=target.eps,
            unit_eps=UNIT_EPS,
            rates=ctypes.addressof(self.rates),
            scores=scores,
            raw=raw,
            ids=ids,
            parents=parents,
            allowed=ctypes.addressof(self.allowed),
        )
        self.follow(target, path)

    def follow(self, target: Kernels, path: DraftPath) -> None:
        """Use the output heads that ``path`` has now. Called when they have changed since the last draft.

        target: the native runtime, which packs new heads.
        """
        self.heads = [target.head(head) for head in path.heads]
        self.tokens = path.tokens
        self.struct.head[:] = [*(ctypes.addressof(head.struct) for head in self.heads), None][:2]
        self.struct.outputs[:] = [*(head.width for head in self.heads), 0][:2]
        self.struct.tokens = pointer(path.tokens)

    @staticmethod
    def supports(target: Kernels, path: DraftPath, levels: int, width: int, rows: int = 1) -> bool:
        """Return whether the kernels support drafts along ``path`` of this size; if not, PyTorch runs them.

        target: the native runtime.
        levels: maximum number of levels. width: number of children of a node. rows: number of sequences.
        """
        outputs = sum(target.vocab_size if head is None else head.out_features for head in path.heads)
        near = any(window is not None and window <= levels for window in target.windows)
        few = width <= min(16, outputs) and rows <= 16 and len(path.projections) <= 8 and len(path.heads) <= 2
        packed = bool(path.segments) and all(each.packed for each in path.projections)
        return few and packed and not near

    def __call__(self, target: Kernels, cache: KVCache, roots: DraftRoots, limits: TreeLimits) -> list[Nodes]:
        struct, segments, masks = self.struct, self.segments, roots.masks
        final, *carried = (x.contiguous() for x in (roots.final, *roots.carried))
        before = roots.place * final.shape[2] * final.element_size()  # bytes
        forbidden = None if roots.forbidden is None else roots.forbidden.contiguous()
        struct.forbidden = None if forbidden is None else forbidden.data_ptr()
        self.positions[:] = list(roots.positions)
        self.roots[:] = list(roots.tokens)
        if roots.sampled is not None:
            for own, given in zip(self.sampled, roots.sampled, strict=True):
                own.seed, own.stream, own.place, temperature, own.top_k, own.top_p, own.min_p, _ = given
                own.sharpness = 1 / temperature if temperature else 0.0
        struct.sampled = None if roots.sampled is None else ctypes.addressof(self.sampled)
        alive: list[Any] = []
        for stage, call, state, (lo, hi) in zip(self.stages, self.calls, carried, segments, strict=False):
            alive.append(target.place(call, cache, lo, hi, [self.drafted] * self.rows))
            call.threads = cores.threads()
            stage.carried = call.x = state.data_ptr() + before
        struct.final = final.data_ptr() + before
        struct.level = limits.level
        struct.node = limits.node
        self.rates[:] = [*map(limits.rate, range(len(self.rates)))]
        if roots.tables is not None:
            for into, tables in zip(self.tables, roots.tables, strict=True):
                for kind, table in enumerate(tables):
                    into[kind][:] = table
        struct.tables = None if roots.tables is None else ctypes.addressof(self.tables)
        if roots.given is not None:
            for each, (_, tokens, parents, raw) in zip(self.given, roots.given, strict=True):
                each.count = len(tokens)
                alive += [(INT * each.count)(*tokens), (INT * each.count)(*parents), (FLOAT * each.count)(*raw[0])]
                each.tokens, each.parents, each.p = map(ctypes.addressof, alive[-3:])
        struct.given = None if roots.given is None else ctypes.addressof(self.given)
        self.masks = masks
        call_mask = None if masks is None else library.MaskCall(self._mask)
        struct.mask = None if call_mask is None else ctypes.cast(call_mask, POINTER)
        count = target.lib.specdec_draft_tree(ctypes.byref(struct))
        for lo, hi in segments:
            cache.trim(self.drafted, lo, hi)
        self.masks = None
        self.held = []
        if self.error is not None:
            raise self.error
        done(count)
        return self._by_row(count)

    def _by_row(self, count: int) -> list[Nodes]:
        """Return the candidates of each sequence as lists (scores, tokens, parents, [raw probabilities]).

        A score is the logarithm of the probability that the path to the candidate is accepted. A parent is 0 for the
        root, and i + 1 for candidate i of the same sequence. A raw probability is that of the output heads.

        count: number of candidates of all sequences together that the kernels have written to ``found``.
        """
        found = self.found
        scores, tokens, parents, raw = found[0][:count], found[1][:count], found[2][:count], found[3][:count]
        if self.rows == 1:
            return [(scores, tokens, parents, [raw])]
        rows: list[Nodes] = [([], [], [], [[]]) for _ in range(self.rows)]
        places = [(row, 0) for row in range(self.rows)]  # of each candidate behind the roots: its row and number there
        for score, token, parent, said in zip(scores, tokens, parents, raw, strict=True):
            row, own = places[-parent if parent <= 0 else self.rows - 1 + parent]
            into = rows[row]
            into[0].append(score)
            into[1].append(token)
            into[2].append(own)
            into[3][0].append(said)
            places.append((row, len(into[1])))
        return rows

    def _mask(self, rows: int, nodes: Any) -> int:
        """Make the masks of the tokens that may follow the next tokens to run, and point ``allowed`` to them.

        The kernels call it before they run each level.

        rows: number of tokens that run.
        nodes: C array [rows] that says which candidate each token is: 0 for the root, i + 1 for candidate i.
        Returns 0, or 1 if an exception was raised, which is then stored in ``error``.
        """
        _, tokens, parents, _ = self.found
        assert self.masks is not None
        try:
            self.held = []
            for row in range(rows):
                node, text = nodes[row], list[int]()
                while node:
                    text.insert(0, tokens[node - 1])
                    node = parents[node - 1]
                self.held.append(self.masks(text))
                self.allowed[row] = pointer(self.held[-1])
        except BaseException as error:  # also an interrupt: the caller raises it
            self.error = error
        return int(self.error is not None)
