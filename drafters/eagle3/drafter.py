"""The drafter that grows a chain, or a tree, with the head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from specdec.base.errors import SpecDecError
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import Mask
from specdec.runtimes.target import Target
from specdec.runtimes.torch.static_cache import Lanes

from ..speculators import PublicHeadDrafter, read_head
from .network import KIND, Eagle3, Eagle3Config


class Eagle3Drafter(PublicHeadDrafter):
    """Drafts with an EAGLE-3 head, a small network of one decoder layer that reads states of the model.

    It drafts a tree, grown level by level, if one greedy row decodes, else a chain for each row.
    """

    name: ClassVar[str] = KIND
    summary: ClassVar[str] = "public EAGLE-3 head (speculators) on the states of three layers"
    shift = 0
    network: Eagle3

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any], target: Target, where: str) -> Eagle3:
        sizes = Eagle3Config.read(config, target, where)

        def make(header: Mapping[str, Tensor], d2t: Tensor | None) -> Eagle3:
            embedded, biases = "embed_tokens.weight" in header, [name for name in header if name.endswith(".bias")]
            if sizes.width != target.hidden_size and not embedded:
                raise SpecDecError(f"'{where}' has states of its own size ({sizes.width}) and no embedding for them")
            biased = [name.removesuffix(".bias").removeprefix("layers.0.") for name in biases]
            return Eagle3(sizes, target, d2t, embedded, biased)

        return read_head(folder, where, target, sizes.vocab, make)

    def inputs(self, states: Tensor) -> Tensor:
        return self.network.map("fc", states)

    def logits(self, outputs: Tensor) -> Tensor:
        return self.network.logits(outputs)

    def run(self, tokens: Tensor, states: Tensor, positions: Tensor, mask: Mask, cache: KVCache | Lanes) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.append(0, k, v)
            return F.scaled_dot_product_attention(q, keys, values, mask.bool_mask(), enable_gqa=True)

        own = self.network.embed_tokens
        embedded = self.target.embed(tokens, positions) if own is None else own(tokens)
        return self.network.layer(embedded, states, positions, attend)
