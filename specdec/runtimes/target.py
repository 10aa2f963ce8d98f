"""The target model as embed / layers [lo, hi) / readout over our cache: the interface of all runtimes."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from specdec.base import cores, machine
from specdec.base.devices import download
from specdec.base.errors import SpecDecError
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import Chunk, Mask
from specdec.models import identity
from specdec.models.gguf.blocks import Blocks, matrix, weight_rows
from specdec.runtimes.decoder_layer import Adapters
from specdec.runtimes.draft_path import DraftPath, DraftRoots, Masks, Nodes, TreeLimits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.models.native_model import NativeModel
    from specdec.runtimes.native.experts import MappedExperts

LEAST_ROWS = 64  # of a matrix that grows, for which there is memory
UNLIMITED = ("full_attention", "attention", "linear_attention", "conv", "mamba", "hybrid", "mlp", "moe", "experts")
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_finding = threading.Lock()


def lock_of(model: nn.Module) -> Any:
    """The reentrant lock of a model: whoever changes it, even for one call, or needs it unchanged, holds it."""
    with _finding:
        return _locks.setdefault(model, threading.RLock())


def largest(logits: Tensor) -> Tensor:
    """Logits [B, T, V] -> int64 [B, T]: the first of the largest, or -1 where they are not finite."""
    best = logits.argmax(-1)
    finite = logits.gather(-1, best[..., None])[..., 0].isfinite()
    return best.masked_fill(~finite, -1)


@dataclass
class Pass:
    """The context of a pass over tokens of each row.

    positions: int64 [B, T].
    mask: from ``cache.register(lo, positions, ...)``.
    cache: where keys and values are appended.
    taps: each key l with lo <= l <= hi is filled with the input of layer l (l = hi: the result).
    adapters: applied to all tokens.
    routed: filled with the logits of the routers of layers [lo, hi) by a runtime that does not call the model's own;
        float32 [B T, hi, experts].
    choose: the experts [B T, k] that tokens take, by layer and its router's logits [B T, E], in such a runtime; None:
        those with the largest.
    """

    positions: Tensor
    mask: Mask
    cache: KVCache
    taps: dict[int, Tensor] | None = None
    adapters: Adapters | None = None
    routed: Tensor | None = None
    choose: Callable[[int, Tensor], Tensor] | None = None


# Bytes that memory delivers over products that are made in the same time.
TOKEN_RATIO = {"cpu": 0.1, "gpu": 0.007}


class Target(ABC):
    """A causal language model with N layers, run in pieces.

    Several threads may use it, each with caches of its own. What is made once for all is made under the model's lock.

    model: the unmodified model of transformers or, in the native runtime, that or a ``NativeModel``.
    num_layers, hidden_size, vocab_size: N, D, V.
    context: maximum number of positions.
    windows: attention window of each layer; None: full.
    fingerprint: of the weights as loaded.
    ragged: whether a pass takes rows with different numbers of tokens, one behind the other.
    weight_format, kv_cache, activations: formats of the layers' weights, keys and values, and inputs of products.
    logit_difference: difference from the model's own logits in the self-check, relative to the largest logit.
    tokenizer: the model's, where known, for drafters with a model of their own.
    recurrent_layers: with them, a text can be resumed only at checkpoints.
    experts: loads experts from slow memory, if there are any there.
    """

    runtime: str
    ragged = False
    weight_format = "as loaded"
    kv_cache = "as computed"
    activations = "as computed"
    logit_difference: float
    tokenizer: Any = None
    recurrent_layers: frozenset[int] = frozenset()
    experts: MappedExperts | None = None

    def __init__(
        self,
        model: NativeModel | PreTrainedModel,
        sample: Callable[[Tensor | Blocks], Tensor] = identity.sample,
    ) -> None:
        self.model, self.lock = model, lock_of(model)
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

    @property
    def kernels(self) -> str:
        """What computes: results of another one may differ in rounding."""
        cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if cuda else machine.processor_name()

    @property
    def spare_bytes(self) -> int:
        """Bytes for keys and values that no row has."""
        return 0

    def new_cache(self, batch: int = 1) -> KVCache:
        return KVCache(self.num_layers, batch, self.device, recurrent=sorted(self.recurrent_layers))

    @abstractmethod
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids and positions [B, T] -> the input of layer 0 [B, T, D]."""

    @abstractmethod
    def layers(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> Tensor:
        """Run layers [lo, hi) on ``x`` [B, T, D], appending their keys and values to the cache; return [B, T, D]."""

    @abstractmethod
    def readout(self, x: Tensor, head: nn.Linear | None = None) -> Tensor:
        """Final states [B, T, D] -> logits [B, T, V]: final norm, output head (or ``head``), the model's logit cap."""

    def preparing(self, head: nn.Linear) -> Generator[None]:
        """Make what ``readout`` needs of ``head``, in pieces of work; else its first call does."""
        yield from ()

    @property
    def token_ratio(self) -> float:
        """About the seconds of multiplying a token by the weights over those of reading the weights from memory."""
        return TOKEN_RATIO["cpu" if self.device.type == "cpu" else "gpu"] / self.dtype.itemsize

    def greedy_tokens(self, x: Tensor, *also: Tensor) -> list[list[list[int]]]:
        """Final states [B, T, D] -> the token with the largest logit, the first of equals, as a list [B][T].

        -1 where the logits are not finite. Before it come the lists of ``also`` (int64 [B, n]): one read of the
        device.
        """
        return download(*also, largest(self.readout(x)))

    def draft_rows(
        self, cache: KVCache, roots: DraftRoots, path: DraftPath, limits: TreeLimits, masks: Masks | None = None
    ) -> list[Nodes] | None:
        """Draft along ``path`` for each row of ``cache``, which is left as it was: a tree for a single row, chains with
        siblings for several. What a sampled row may draw is drafted by its noise.

        masks: the tokens that a single row may draft; None: all.
        None: this runtime cannot do so in one call.
        """
        return None

    @abstractmethod
    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        """``{module path: (in, out)}`` of the linear maps of a layer that adapters can sit beside."""

    def block(self, layer: int) -> nn.Module:
        """A decoder layer of the model, by default where Llama-like models have them."""
        found: nn.Module = self.model.model.layers[layer]  # type: ignore[union-attr, index]
        return found

    def reduced_head(self, token_ids: Tensor, lasting: bool = False) -> nn.Linear:
        """The output head restricted to ``token_ids`` [V'], for ``readout(x, head)`` -> [B, T, V'].

        lasting: whether later processes want the same, so that a runtime may keep what it makes of it.
        """
        return GivenLinear(*self._head_rows(token_ids))

    def extended_head(self, head: GrowingLinear | None, token_ids: Tensor) -> GrowingLinear:
        """``head`` (None: one without outputs) with those of further tokens behind its own; reads only their rows."""
        return GrowingLinear(head, *self._head_rows(token_ids))

    def _head_rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        full = self.own_head
        index, bias = token_ids.to(self.device), getattr(full, "bias", None)
        return weight_rows(full, index), None if bias is None else bias.detach()[index]


class GivenLinear(nn.Linear):
    """A linear map of given values, without the cost of random ones."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]


class RowMemory:
    """Memory for the rows of a matrix that grows: values [capacity, in].

    packed: what a runtime derives from the rows, which never change.
    """

    def __init__(self, rows: Tensor, capacity: int) -> None:
        self.values = rows.new_empty(capacity, rows.shape[1])
        self.values[: len(rows)] = rows
        self.used = len(rows)
        self.packed: Any = None


class GrowingLinear(GivenLinear):
    """``before`` with further outputs behind its own, in the same memory where there is room; else in twice as much."""

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


def _windows(config: Any) -> list[int | None]:
    """Attention window of each layer. Raises SpecDecError for layer kinds that are not known."""
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
