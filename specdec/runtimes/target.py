"""The interface of all runtimes: embed tokens, run layers [lo, hi) with a KV cache, and compute logits."""

from __future__ import annotations

import sys
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
from specdec.models.families import FAMILIES, WINDOWS
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
    """A causal language model in one runtime: embed tokens, run a range of layers, compute logits.

    A subclass gives ``runtime``, ``logit_difference``, ``embed``, ``layers``, ``readout`` and ``linears``; all else has
    a default. Several threads may use a target, each with its own caches. Shared state is made under the model's lock.

    runtime: name of the runtime: "native", "torch" or "transformers".
    model: the model of transformers, or a ``NativeModel``.
    device, dtype: of the model's weights.
    lock: the model's lock (``lock_of``).
    num_layers, hidden_size, vocab_size: N, D and V in the shapes below.
    context: maximum number of positions of a text.
    windows: for each layer, its attention window in tokens; None: no limit.
    fingerprint: hash that identifies the weights as loaded (``identity.fingerprint``).
    own_head: module of the model's output head.
    ragged: whether a pass takes sequences with different numbers of tokens, one behind the other in a single row [1,
        total] without padding.
    weight_format, kv_cache, activations: formats of weights, of keys and values, and of activations, as text for
        reports.
    logit_difference: difference between the logits of this runtime and of the model's own forward, measured when the
        target was made, relative to the largest logit.
    tokenizer: the model's tokenizer, for drafters with a model of their own; None: unknown.
    recurrent_layers: numbers of the recurrent layers. With these, a text can be resumed only at checkpoints.
    experts: the cache of a mixture's experts that are on disk; None: all experts are in memory.
    keys: (number of key heads, size of each) if layers can run in a static cache (``static_cache``) in place of a
        ``KVCache``; None: they cannot.
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
        """Return the input of layer 0, [B, T, D], for token ids ``ids`` and ``positions``, both int64 [B, T]."""

    @abstractmethod
    def layers(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> Tensor:
        """Run layers [lo, hi) on hidden states, append keys and values to the KV cache; return the output [B, T, D].

        x: input of layer ``lo``, [B, T, D].
        ctx: positions, mask, KV cache and options of the pass. The new keys and values are uncommitted: the caller
            commits or trims them.
        """

    @abstractmethod
    def readout(self, x: Tensor, head: nn.Linear | None = None) -> Tensor:
        """Return the logits [B, T, V] of final states ``x``: final norm, output head, logit factor and cap if any.

        x: output of the last layer, [B, T, D].
        head: an output head to use, a layer from D to V outputs; None: the model's own.
        """

    @abstractmethod
    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        """Return the linear layers of a layer that adapters can change, ``{module path: (in_features, out_features)}``.

        layer: number of the decoder layer, to which the module paths are relative.
        """

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
        self.windows = _windows(model)
        self.device, self.dtype = model.device, model.dtype

    def beside(self, model: AnyModel) -> Target:
        """Return a second model as a target in the same runtime, without a second copy of what both share.

        model: a model, such as a layer that predicts further tokens (MTP), whose embedding and output head are those of
            this target's model: the same modules, or modules over the same weights.
        Raises SpecDecError if the runtime does not support it.
        """
        return type(self)(model)

    def new_cache(self, batch: int = 1) -> KVCache:
        recurrent = sorted(self.recurrent_layers)
        return KVCache(self.num_layers, batch, self.device, recurrent=recurrent, limit=self.context)

    def greedy_tokens(self, x: Tensor, *also: Tensor) -> list[list[list[int]]]:
        """Return the greedy token at each position, and read tensors of the device at the same time, in one transfer.

        x: final states (outputs of the last layer, before the final norm), [B, T, D].
        also: further integer tensors to read, [B, n] each.

        Returns a list: first each tensor of ``also`` as nested lists, and last the greedy tokens [B][T]. A greedy token
            is the first one with the largest logit; it is -1 if that logit is not finite.
        """
        return download(*also, largest(self.readout(x)))

    def round_adapted(self, adapters: Adapters) -> None:
        """Let layers with ``adapters`` compute with the error that drafts on a CPU have, for training.

        The native kernels round the weights of these layers after the adapters are merged. The error is that of the
        adapters' present values; call it again after they have changed. No effect in runtimes without gradients.
        """
        return

    def draft_rows(
        self, cache: KVCache, roots: DraftRoots, path: DraftPath, limits: TreeLimits
    ) -> list[Nodes] | DeviceTree:
        """Draft along ``path`` for each sequence of ``cache``: a tree for one, chains with siblings for several.

        In a chain with siblings, one node of each level gets children, and the other nodes of the level are leaves.

        A sequence that is sampled drafts with its noise. The cache is unchanged afterwards: drafted tokens are trimmed.

        roots: last token of each sequence, states before it, and what restricts the draft.
        path: the projections, layers and output heads that draft.
        limits: limits of the tree's growth.

        Returns the candidates of each sequence as lists (scores, tokens, parents, raw), as in ``LevelNodes.lists``. If
        ``roots.choice`` is given and PyTorch runs the draft, it returns the tree that the device selected instead.
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
        """Return the callable that runs the tokens of a level along ``path``; the draft calls it level by level.

        A level is all draft nodes of one depth; the first call runs the roots. The keys and values of the tokens stay
        in ``cache``, uncommitted; the caller trims them.

        cache: the KV cache, or the lanes of a static cache in a captured function.
        heads: output heads whose logits are concatenated; None instead of a head: the model's own.
        before: position of each root in its sequence, int64 [B].
        final: final states (before the final norm) of the token before each root, [B, 1, D].
        carried: for each segment of the path, the input of its first layer for that token, [B, 1, D].
        forbidden: outputs of the second head that a sequence may not draft, bool [B, outputs]; None: there are none.
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
        """Return the tensors [B, ...] that ``function(whole, rows)`` returns; a runtime may record and replay it.

        A recording, such as a CUDA graph, is made for each ``key`` and shapes of the arguments. The runtime may pad the
        rows to a larger B for the call. The next call may overwrite the returned tensors.

        key: everything else that the function's result depends on. The runtime keeps it alive with the recording.
        function: takes ``(whole, rows)``. It must not read values on the host, and uses no tensors but its arguments,
            ``lanes``, and tensors whose memory never moves.
        whole: nested tuples of None and tensors without a batch dimension.
        rows: nested tuples of tensors [B, ...] and None, with an entry for each sequence.
        lanes: which lanes of a static cache (``static_cache``) the B sequences are in. The function then gets
            ``(lanes.numbers, whole)`` instead of ``whole``. None: the function uses no static cache.
        """
        return list(function(whole, rows))

    def static_cache(self, layers: Sequence[int], keys: tuple[int, int]) -> StaticCache | None:
        """Return an empty KV cache at fixed addresses, for ``captured`` functions; None: the runtime captures none.

        It has no memory yet. Its numbers of rows, and of tokens of a row, grow by doubling as rows are placed in it.

        layers: numbers of the layers that have keys and values.
        keys: (number of key heads, size of each) of these layers; values have the same shape.
        """
        return None

    def preparing(self, head: nn.Linear) -> Generator[None]:
        """Prepare an output head for ``readout``: a generator that yields after each short step (some 20 ms) of work.

        The caller runs it to its end; if it is left before, or not called, the first ``readout`` with the head does all
        the work. The default has nothing to prepare.
        """
        yield from ()

    def settle(self) -> bool:
        """Do up to 50 ms of work that makes later passes faster, such as moving weights to large memory pages.

        Returns True if some work is left, so that another call is useful.

        The engine calls it again and again while no request runs or waits. The default has no such work.
        """
        return False

    @property
    def kernels(self) -> str:
        """Return the name of the GPU, CPU or kernels in use; targets with different names may round differently."""
        cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if cuda else machine.processor_name()

    @property
    def token_costs(self) -> TokenCosts:
        """Return estimates of the times that one more token adds to a pass, each as a multiple of one time unit.

        The unit is the time that this device takes to read all weights from memory once, about that of a pass over one
        token. The estimates come from the sizes of the model; nothing is measured. The default knows ``multiply`` only.
        """
        return TokenCosts(TOKEN_RATIO["cpu" if self.device.type == "cpu" else "gpu"] / self.dtype.itemsize)

    @property
    def spare_bytes(self) -> int:
        """Return the bytes of memory that are allocated for keys and values but not used by any sequence."""
        return 0

    def block(self, layer: int) -> nn.Module:
        """Return the module of the decoder layer with number ``layer``; by default ``model.model.layers[layer]``."""
        found: nn.Module = self.model.model.layers[layer]  # type: ignore[union-attr, index]
        return found

    def reduced_head(self, token_ids: Tensor, lasting: bool = False) -> nn.Linear:
        """Return an output head for only some tokens: ``readout(x, head)`` then gives logits [B, T, V'].

        token_ids: the tokens, int [V']; logit i is that of ``token_ids[i]``.
        lasting: whether later processes need the same head, so that a runtime may store what it derives from it.
        """
        return GivenLinear(*self._head_rows(token_ids))

    def extended_head(self, head: GrowingLinear | None, token_ids: Tensor) -> GrowingLinear:
        """Return an output head with the outputs of ``head`` and, after them, those of further tokens.

        Only the further tokens' rows of the model's weight are read.

        head: the head so far; None: it has no outputs.
        token_ids: the further tokens, int [n].
        """
        return GrowingLinear(head, *self._head_rows(token_ids))

    def _head_rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        full = self.own_head
        index, bias = token_ids.to(self.device), getattr(full, "bias", None)
        return weight_rows(full, index), None if bias is None else bias.detach()[index]


@dataclass
class Pass:
    """What a pass of T tokens of each of B sequences through layers [lo, hi) needs, besides the hidden states.

    positions: position of each token, int64 [B, T].
    mask: which cached keys each token attends to: the result of ``cache.register(lo, positions, ...)``.
    cache: the KV cache that the layers append keys and values to.
    taps: hidden states to collect, by layer number. For each key l with lo <= l <= hi, the pass sets the value to the
        input [B, T, D] of layer l, which for l = hi is the output of the pass. None: no states.
    adapters: changes of the layers, which apply to all tokens; None: none.
    routed: float32 [B T, hi, experts], where a runtime that computes the routers of mixtures of experts itself
        ("native", "torch") writes the router logits of layers [lo, hi); None: they are not wanted.
    ids: token ids, int64 [B, T], for layers that have embeddings of their own; None: unknown.
    choose: function from a layer's number and its router logits [B T, E] to the k of E experts that each token uses,
        int64 [B T, k]; only the torch runtime calls it. None: the experts with the largest logits.
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
        """Return ``ids``, the token ids [B, T]. Raises SpecDecError if they are None."""
        if self.ids is None:
            raise SpecDecError("the layers of this model read each token's embedding, which this drafter does not tell")
        return self.ids


class TokenCosts(NamedTuple):
    """Estimated times of one token in a pass, each divided by the time of reading all weights from memory once.

    multiply: time of multiplying the token by all weights.
    read: time of reading the keys and values of one cached token; 0: unknown.
    attend: time of multiplying the token by the keys and values of one cached token; 0: unknown.
    """

    multiply: float
    read: float = 0.0
    attend: float = 0.0


class GivenLinear(nn.Linear):
    """A linear layer with a given weight [out, in] and bias [out] (None: no bias), without random initial values."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]


class WholeMemory(GivenLinear):
    """A linear layer over all memory for the rows of a growing output head, also the rows that are not set yet (zeros).

    Other layers set rows of its weight in place, so a runtime must not keep a packed or converted copy of the weight.
    """


class RowMemory:
    """Memory for the weight rows of an output head that grows; ``GrowingLinear`` layers of different lengths share it.

    A layer of n outputs has the first n rows as its weight.

    values: the rows, [capacity, in_features].
    used: number of rows that are set. Set rows never change, and all others are 0.
    packed: the rows in a runtime's own format (``native.linear.GrowingTiles``), which the runtime sets; None: not made.
    whole: a linear layer with all ``capacity`` rows as outputs, also those that are set later.
    """

    def __init__(self, rows: Tensor, capacity: int) -> None:
        self.values = rows.new_zeros(capacity, rows.shape[1])
        self.values[: len(rows)] = rows
        self.used = len(rows)
        self.packed: Any = None
        self.whole = WholeMemory(self.values)


class GrowingLinear(GivenLinear):
    """A linear layer that has the outputs of the layer ``before`` and, after them, n more. ``before`` is unchanged.

    The rows are added in the memory of ``before`` if it has room, else a copy is made with room for twice as many rows.

    before: the layer to extend; None: there are no outputs yet.
    weight: weight of the further outputs, [n, in_features].
    bias: bias of the further outputs, [n]; None: the layers have no bias.
    memory: the memory that holds the weight.
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
        """Remove all outputs of this layer, and set its memory to zeros, also for other layers that share the memory.

        ``GrowingLinear(this layer, ..)`` then begins in the same memory, whose address stays.
        """
        self.memory.values.zero_()
        self.memory.used, self.memory.packed = 0, None
        bias = None if self.bias is None else self.bias[:0]
        GivenLinear.__init__(self, self.memory.values[:0], bias)


def _windows(model: AnyModel) -> list[int | None]:
    """Return the attention window of each layer: how many of the last tokens a token attends to, itself included.

    None: the layer has no window, so that a token attends to all earlier ones, or it has no attention. A ``Chunk``, a
    subclass of int, is the size of a chunk instead: tokens attend only within their chunk.

    Raises SpecDecError for a layer type that is unknown.
    """
    config = model.config.get_text_config()
    if (kinds := getattr(config, "attention_layers", None)) is not None:  # GPT-Neo
        return [config.window_size if kind == "local" else None for kind in kinds]
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if kinds is None:
        return [window if _windowed(model) else None] * config.num_hidden_layers
    chunk = getattr(config, "attention_chunk_size", None)
    known = {"sliding_attention": window, "chunked_attention": chunk and Chunk(chunk), **dict.fromkeys(UNLIMITED)}
    for kind in kinds:
        if kind not in known:
            raise SpecDecError(
                f"model type '{config.model_type}' has '{kind}' layers, which are not supported; "
                "use a model with full, sliding-window or chunked attention, or recurrent layers"
            )
    return [known[kind] for kind in kinds]


def _windowed(model: AnyModel) -> bool:
    """Return whether the layers of a model whose config names no layer types obey its ``sliding_window``.

    Some checkpoints, such as those converted from another family, have a field that the family's code ignores.
    """
    kind, module = model.config.get_text_config().model_type, sys.modules[type(model).__module__]
    if kind in FAMILIES:
        return kind in WINDOWS
    return not module.__name__.startswith("transformers.") or hasattr(module, "create_sliding_window_causal_mask")


_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_finding = threading.Lock()


def lock_of(model: nn.Module) -> Any:
    """Return the reentrant lock of ``model``, one for each model.

    A caller that changes the model, or needs it unchanged for a while, holds the lock (a ``threading.RLock``).
    """
    with _finding:
        return _locks.setdefault(model, threading.RLock())


def largest(logits: Tensor) -> Tensor:
    """Return the index of the largest logit at each position, int64 [B, T], for ``logits`` [B, T, V].

    Of equal logits, the first one counts. The index is -1 where the largest logit is not finite.
    """
    best = logits.argmax(-1)
    finite = logits.gather(-1, best[..., None])[..., 0].isfinite()
    return best.masked_fill(~finite, -1)
