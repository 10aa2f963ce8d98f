"""The drafter that grows a chain, or a tree, with the head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import Mask
from specdec.runtimes.target import Target

from ..speculators import PublicHeadDrafter
from .network import KIND, Eagle3, Eagle3Config, read_network


class Eagle3Drafter(PublicHeadDrafter):
    """Drafts with an EAGLE-3 head: a tree grown level by level if one greedy row decodes, else a chain for each row."""

    name: ClassVar[str] = KIND
    summary: ClassVar[str] = "public EAGLE-3 head (speculators) on the states of three layers"
    shift = 0
    network: Eagle3

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any], target: Target, where: str) -> Eagle3:
        return read_network(folder, Eagle3Config.read(config, target, where), target, where)

    def inputs(self, states: Tensor) -> Tensor:
        return self.network.fuse(states)

    def logits(self, outputs: Tensor) -> Tensor:
        return self.network.logits(outputs)

    def run(
        self, target: Target, tokens: Tensor, states: Tensor, positions: Tensor, mask: Mask, cache: KVCache
    ) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.append(0, k, v)
            return F.scaled_dot_product_attention(q, keys, values, mask.bool_mask(), enable_gqa=True)

        own = self.network.embed_tokens
        embedded = target.embed(tokens, positions) if own is None else own(tokens)
        return self.network.layer(embedded, states, positions, attend)
