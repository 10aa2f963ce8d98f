"""The target model as embed / layers [lo, hi) / readout over our cache: the interface of all runtimes."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from specdec.base import cores, machine
from specdec.base.devices import download, upload
from specdec.base.errors import SpecDecError
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import Chunk, Mask
from specdec.models import identity
from specdec.models.gguf.blocks import Blocks, matrix, weight_rows
from specdec.models.native_model import AnyModel
from specdec.runtimes.decoder_layer import Adapters
from specdec.runtimes.draft_path import DeviceTree, DraftPath, DraftRoots, Nodes, TreeLimits
from specdec.runtimes.torch.draft import PathStep, grow, rules_of, taken

if TYPE_CHECKING:
    from specdec.runtimes.native.experts import MappedExperts
    from specdec.runtimes.torch.static_cache import InLanes, Lanes, StaticCache

LEAST_ROWS = 64  # of a matrix that grows, for which there is memory
# Bytes that are read from memory / multiplications in the same time.
TOKEN_RATIO = {"cpu": 0.1, "gpu": 0.007}
UNLIMITED = ("full_attention", "attention", "linear_attention", "conv", "mamba", "hybrid", "mlp", "moe", "experts")


class Target(ABC):
    """A causal language model in one runtime: embed tokens, run a range of layers, read out logits.

    A subclass gives ``runtime``, ``logit_difference``, ``embed``, ``layers``, ``readout`` and ``linears``; all else has
    a default. Several threads may use a target, each with its own caches. Shared state is made under the model's lock.

    runtime: name of the runtime.
    model: the model of transformers, or a ``NativeModel``.
    num_layers, hidden_size, vocab_size: N, D, V.
    context: maximum number of positions.
    windows: attention window of each layer in tokens; None: no limit.
    fingerprint: identifies the weights as loaded (``identity.fingerprint``).
    own_head: the model's output head.
    ragged: whether a pass takes rows with different numbers of tokens, one row after the other.
    weight_format, kv_cache, activations: formats of weights, of keys and values, and of activations, for reports.
    logit_difference: difference from the model's own logits in the self-check, relative to the largest logit.
    tokenizer: the model's tokenizer, for drafters with a model of their own; None: unknown.
    recurrent_layers: numbers of the recurrent layers, with which a text can be resumed only at checkpoints.
    experts: the expert cache; None: all experts are in memory.
    keys: number of key heads and size of each, if layers can run in ``Lanes`` in place of a ``KVCache``; None: they
        cannot.
    """

    runtime: str
    logit_difference: float
    ragged: bool = False
    weight_format: str = "as loaded"
    kv_cache: str = "as computed"
    activations: str = "as computed"
    tokenizer: Any = None
    recurrent_layers: frozenset[int] = frozenset()
    experts: MappedExperts | None = None
    keys: tuple[int, int] | None = None

    # -- what a subclass must give -------------------------------------------------------------------------------------

    @abstractmethod
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return the input of layer 0 [B, T, D] for token ids and positions, both int64 [B, T]."""

    @abstractmethod
    def layers(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> Tensor:
        """Run layers [lo, hi) on ``x`` [B, T, D], appending their keys and values to the cache; return [B, T, D]."""

    @abstractmethod
    def readout(self, x: Tensor, head: nn.Linear | None = None) -> Tensor:
        """Return the logits [B, T, V] of final states ``x`` [B, T, D]: final norm, output head, logit cap.

        head: an output head with V outputs; None: the model's own.
        """

    @abstractmethod
    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        """Return ``{module path: (in_features, out_features)}`` of a layer's linear layers that adapters can change."""

    # -- what it may override ------------------------------------------------------------------------------------------

    def __init__(
        self,
        model: AnyModel,
        sample: Callable[[Tensor | Blocks], Tensor] = identity.sample,
    ) -> None:
        self.model = model
        self.lock = lock_of(model)
        with self.lock:
            self.own_head: Any = model.get_output_embeddings()
            self.fingerprint = identity.fingerprint(model, sample)
        cores.limit_threads()
        config = model.config.get_text_config()
        self.num_layers = int(config.num_hidden_layers)
        self.hidden_size = int(config.hidden_size)
        self.vocab_size = int(matrix(self.own_head).shape[0])
        self.context = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
        self.windows = _windows(config)
        self.device, self.dtype = model.device, model.dtype

    def beside(self, model: AnyModel) -> Target:
        """Return ``model``, whose embedding and output head are this target's, as a target in the same runtime.

        Raises SpecDecError if the runtime does not support it.
        """
        return type(self)(model)

    def new_cache(self, batch: int = 1) -> KVCache:
        recurrent = sorted(self.recurrent_layers)
        return KVCache(self.num_layers, batch, self.device, recurrent=recurrent, limit=self.context)

    def greedy_tokens(self, x: Tensor, *also: Tensor) -> list[list[list[int]]]:
        """Return lists of the tensors ``also``, int64 [B, n], and last the greedy tokens [B][T], in one device read.

        x: final states [B, T, D]. The greedy token is the first with the largest logit; -1 if that is not finite.
        """
        return download(*also, largest(self.readout(x)))

    def draft_rows(
        self, cache: KVCache, roots: DraftRoots, path: DraftPath, limits: TreeLimits
    ) -> list[Nodes] | DeviceTree:
        """Draft along ``path``: a tree if ``cache`` has one row, chains with siblings if it has several.

        Returns the candidates of each row, or the tree that the device selects by the roots' ``choice``. Rows that are
        sampled draft with their noise. The cache is unchanged afterwards.
        roots: last tokens and states of the rows. limits: limits of the tree's growth.
        """
        choice, waits = roots.choice, self.device.type == "cpu"
        rules = rules_of(roots, path.tokens, limits.levels, self.vocab_size, waits)
        final, *carried = (x[:, roots.place : roots.place + 1] for x in (roots.final, *roots.carried))
        before = upload([*roots.positions], self.device)
        step = self.path_step(cache, path, path.heads, before, final, carried, rules.forbidden)
        try:
            tokens = upload([[token] for token in roots.tokens], self.device)
            grown = grow(step, tokens, limits, rules, waits=waits and choice is None)
        finally:
            for lo, hi in path.segments:
                cache.trim(cache.lengths[lo] - cache.committed, lo, hi)
        return taken(grown, choice)

    def path_step(
        self,
        cache: KVCache | Lanes,
        path: DraftPath,
        heads: Sequence[nn.Linear | None],
        before: Tensor,
        final: Tensor,
        carried: Sequence[Tensor],
        forbidden: Tensor | None,
    ) -> PathStep:
        """Return the function that runs the tokens of a level along ``path``, in ``cache``.

        heads: as in ``DraftPath``. before: positions of the roots, int64 [B].
        final, carried, forbidden: as in ``PathStep``.
        """

        def positions(x: Tensor, level: int) -> Tensor:
            return (before[:, None] + level).clamp(max=self.context - 1).expand(x.shape[:2])

        def run(number: int, x: Tensor, level: int, paths: Tensor | None, ids: Tensor) -> Tensor:
            (lo, hi), at = path.segments[number], positions(x, level)
            mask = cache.register(lo, at, paths)
            return self.layers(x, lo, hi, Pass(at, mask, cache, adapters=path.adapters, ids=ids))  # type: ignore[arg-type]

        readouts = [lambda x, head=head: self.readout(x, head) for head in heads]
        embed = lambda tokens, level: self.embed(tokens, positions(tokens[..., None], level))  # noqa: E731
        return PathStep(path, final, carried, embed, run, readouts, forbidden)

    def captured(
        self,
        key: Sequence[Any],
        function: Callable[[Any, Any], Sequence[Tensor]],
        whole: Any,
        rows: Any,
        lanes: InLanes | None = None,
    ) -> list[Tensor]:
        """Return the tensors [B, ...] that ``function(whole, rows)`` returns.

        A runtime may record the function once for each ``key`` and shapes of its arguments, and replay it. It may add
        padding to the rows, and the next call may write over what this one has returned.

        key: all else that the function depends on; it stays alive with the recorded function.
        function: reads no result, and uses no tensor but its arguments, ``lanes``, and what never moves.
        whole, rows: nested tuples of tensors and None. Tensors of ``rows`` are [B, ...].
        lanes: where the rows are in a static cache (``static_cache``). The function then gets ``(lanes.numbers,
            whole)``. None: the function uses none.
        """
        return list(function(whole, rows))

    def static_cache(self, layers: Sequence[int], keys: tuple[int, int]) -> StaticCache | None:
        """Return an empty static cache for captured functions; None: this runtime captures none.

        layers: numbers of the layers. keys: their number of key heads, and the size of each.
        """
        return None

    def preparing(self, head: nn.Linear) -> Generator[None]:
        """Prepare ``head`` for ``readout``, yielding after each short step; else the first ``readout`` does so."""
        yield from ()

    @property
    def kernels(self) -> str:
        """Return the name of the processor or of the kernels: targets with another name may round differently."""
        cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if cuda else machine.processor_name()

    @property
    def token_costs(self) -> TokenCosts:
        """Return the expected times of a token in a pass, relative to reading the weights."""
        return TokenCosts(TOKEN_RATIO["cpu" if self.device.type == "cpu" else "gpu"] / self.dtype.itemsize)

    @property
    def spare_bytes(self) -> int:
        """Bytes that are allocated for keys and values and not used by any row."""
        return 0

    def block(self, layer: int) -> nn.Module:
        """Return the module of a decoder layer; by default ``model.model.layers[layer]``."""
        found: nn.Module = self.model.model.layers[layer]  # type: ignore[union-attr, index]
        return found

    def reduced_head(self, token_ids: Tensor, lasting: bool = False) -> nn.Linear:
        """Return the output head restricted to ``token_ids``, int [V']: ``readout(x, head)`` gives [B, T, V'].

        lasting: whether later processes will need the same head, so that a runtime may store what it derives from it.
        """
        return GivenLinear(*self._head_rows(token_ids))

    def extended_head(self, head: GrowingLinear | None, token_ids: Tensor) -> GrowingLinear:
        """Return ``head`` (None: no outputs) with further outputs for ``token_ids``, int [n]; reads only their rows."""
        return GrowingLinear(head, *self._head_rows(token_ids))

    def _head_rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        full = self.own_head
        index, bias = token_ids.to(self.device), getattr(full, "bias", None)
        return weight_rows(full, index), None if bias is None else bias.detach()[index]


@dataclass
class Pass:
    """The context of a pass of T tokens of each of B rows through layers [lo, hi).

    positions: int64 [B, T].
    mask: the result of ``cache.register(lo, positions, ...)``.
    cache: the KV cache that the pass appends keys and values to.
    taps: states to collect: for each key l with lo <= l <= hi, the pass sets the value to the input of layer l (for
        l = hi, the output).
    adapters: changes of the layers for all tokens; None: none.
    routed: float32 [B T, hi, experts], which the pass fills with router logits, if the runtime has its own routers.
    ids: token ids, int64 [B, T], which layers with embeddings of their own read; None: unknown.
    choose: returns the experts [B T, k] that tokens use, given the layer and its router logits [B T, E], if the runtime
        has its own routers; None: the experts with the largest logits.
    in_place: whether the pass may write its output over its input.
    """

    positions: Tensor
    mask: Mask
    cache: KVCache
    taps: dict[int, Tensor] | None = None
    adapters: Adapters | None = None
    routed: Tensor | None = None
    choose: Callable[[int, Tensor], Tensor] | None = None
    ids: Tensor | None = None
    in_place: bool = False

    def known_ids(self) -> Tensor:
        """Return ``ids``. Raises SpecDecError if they are unknown."""
        if self.ids is None:
            raise SpecDecError("the layers of this model read each token's embedding, which this drafter does not tell")
        return self.ids


class TokenCosts(NamedTuple):
    """Estimated times of one token in a pass, over the time of reading the weights.

    multiply: time of multiplying a token by the weights.
    read: time of reading the keys and values of a cached token; 0: unknown.
    attend: time of multiplying a token by the keys and values of a cached token; 0: unknown.
    """

    multiply: float
    read: float = 0.0
    attend: float = 0.0


class GivenLinear(nn.Linear):
    """A linear layer with given values, without the cost of random ones."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]


class WholeMemory(GivenLinear):
    """A linear layer whose weight other layers still change. Nothing may copy it."""


class RowMemory:
    """Memory for the rows of a growing matrix, shared by ``GrowingLinear`` of different lengths.

    values: [capacity, in]. used: number of rows that are set; these never change, and the others are 0.
    packed: the rows in a runtime's own format; None: not made yet.
    whole: a linear layer with all rows, also those that are set later.
    """

    def __init__(self, rows: Tensor, capacity: int) -> None:
        self.values = rows.new_zeros(capacity, rows.shape[1])
        self.values[: len(rows)] = rows
        self.used = len(rows)
        self.packed: Any = None
        self.whole = WholeMemory(self.values)


class GrowingLinear(GivenLinear):
    """The linear layer ``before`` (None: no outputs) with further outputs ``weight`` [n, in] after its own.

    Uses the memory of ``before`` if that has room, else a copy with twice the rows. memory: the rows.
    """

    memory: RowMemory

    @torch.inference_mode()  # the memory may have been made in this mode
    def __init__(self, before: GrowingLinear | None, weight: Tensor, bias: Tensor | None) -> None:
        start = before.out_features if before is not None else 0
        end = start + len(weight)
        if before is None or before.memory.used != start or end > len(before.memory.values):
            whole = weight if before is None else torch.cat((before.memory.values[:start], weight))
            memory = RowMemory(whole, max(LEAST_ROWS, 2 * end))
        else:
            memory = before.memory
            memory.values[start:end] = weight
            memory.used = end
        if bias is not None and before is not None:
            bias = torch.cat((before.bias, bias))
        super().__init__(memory.values[:end], bias)
        self.memory = memory

    @torch.inference_mode()
    def clear(self) -> None:
        """Remove all outputs. The next layer that is made of this one begins in the same memory."""
        self.memory.values.zero_()
        self.memory.used, self.memory.packed = 0, None
        bias = None if self.bias is None else self.bias[:0]
        GivenLinear.__init__(self, self.memory.values[:0], bias)


def _windows(config: Any) -> list[int | None]:
    """Return the attention window of each layer in tokens; None: no limit. Raises SpecDecError for unknown kinds."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    chunk = getattr(config, "attention_chunk_size", None)
    known = {"sliding_attention": window, "chunked_attention": chunk and Chunk(chunk), **dict.fromkeys(UNLIMITED)}
    for kind in kinds:
        if kind not in known:
            raise SpecDecError(
                f"model type '{config.model_type}' has '{kind}' layers, which are not supported; "
                "use a model with full, sliding-window or chunked attention, or recurrent layers"
            )
    return [known[kind] for kind in kinds]


_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_finding = threading.Lock()


def lock_of(model: nn.Module) -> Any:
    """Return the reentrant lock of ``model``. A caller that changes the model, or needs it unchanged, holds it."""
    with _finding:
        return _locks.setdefault(model, threading.RLock())


def largest(logits: Tensor) -> Tensor:
    """Return the argmax of ``logits`` [B, T, V], int64 [B, T]: the first of equal ones; -1: the best is not finite."""
    best = logits.argmax(-1)
    finite = logits.gather(-1, best[..., None])[..., 0].isfinite()
    return best.masked_fill(~finite, -1)
