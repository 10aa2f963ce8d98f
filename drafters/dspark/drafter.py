"""The drafters that draft a block, and grow a chain or a tree of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import Mask
from specdec.models.gguf.blocks import weight_rows
from specdec.runtimes.target import Target
from specdec.runtimes.torch.draft import Step, states_of
from specdec.runtimes.torch.static_cache import Lanes

from ..pairs import Pairs
from ..speculators import PublicHeadDrafter, read_head
from .network import DFLASH, DSPARK, BlockConfig, BlockHead, with_confidence

THEIRS = ("embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight")  # copies of the model's weights


class DSparkDrafter(PublicHeadDrafter):
    """Drafts with a DSpark head, a small network that drafts a block of tokens in one pass.

    A block is the text's last token and a mask token for each token to come. The pass gives logits for all of them;
    the Markov head, a small part of the network, then corrects the logits of each depth by the token drafted before it.
    Greedy rows draft trees, in which each node's children are likely after the node's token; other rows draft chains.
    """

    name: ClassVar[str] = DSPARK
    summary: ClassVar[str] = "public DSpark head (speculators): a block of tokens in one pass, corrected token by token"
    shift = 1
    several = True
    network: BlockHead

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any], target: Target, where: str) -> BlockHead:
        sizes = BlockConfig.read(config, target, where, cls.name)
        own = ("lm_head.weight", "d2t") if sizes.vocab == target.vocab_size else ()  # the model's, and no difference
        make = lambda _, d2t: BlockHead(sizes, target, d2t)  # noqa: E731
        return read_head(folder, where, target, sizes.vocab, make, (*THEIRS, *own))

    def inputs(self, states: Tensor) -> Tensor:
        made: Tensor = self.network.hidden_norm(self.network.map("fc", states))
        return made

    def run(self, tokens: Tensor, states: Tensor, positions: Tensor, mask: Mask, cache: KVCache | Lanes) -> Tensor:
        turns = self.network.rotary[0](states, positions)
        for n in range(self.network.config.depth):
            cache.append(n, *self.network.keys_and_values(n, states, turns))
        return states  # blocks read keys and values alone

    def logits(self, outputs: Tensor) -> Tensor:
        return self.network.map("head", outputs)

    def slots(self, levels: int, keep: int) -> int:
        return self.network.config.block

    def levels(self, pairs: Pairs, cache: KVCache | Lanes) -> Step:
        network, config, sure = self.network, self.network.config, pairs.sure
        states = self.block(pairs, cache)  # (B, S, D')
        logits, slot = self.logits(states), 0
        memory = states.new_zeros(len(states), 1, config.rank)
        if config.first:  # the text's last token is known, and the Markov head has seen it
            *_, memory = network.follow(pairs.tokens, states[:, :1], memory)
            slot = 1

        def step(tokens: Tensor, parents: Tensor, paths: Tensor | None) -> Tensor:
            nonlocal slot, memory
            here = slice(slot, slot + 1)
            added, odds, memory = network.follow(tokens, states[:, here], states_of(memory, parents))
            slot += 1
            made = logits[:, here] if added is None else logits[:, here] + added
            return made if odds is None or not sure else with_confidence(made, odds)

        return step

    def block(self, pairs: Pairs, cache: KVCache | Lanes) -> Tensor:
        """Run the head on a block of S tokens for each row; return their states [B, S, D'], after the head's norm.

        A block is the row's root, the last token of its text, and S - 1 mask tokens for the tokens to come.

        pairs: the roots. cache: the KV cache of all rows, as ``catch_up`` returns it. It keeps the block's keys and
            values, uncommitted.
        """
        config, roots, target = self.network.config, pairs.positions, self.target
        slots = torch.arange(config.block, device=roots.device)
        tokens, positions = torch.where(slots == 0, pairs.tokens, config.mask_token), roots + slots  # (B, S)
        # Heads are trained on the model's embeddings without its factors, positions or projections
        embedded = weight_rows(target.model.get_input_embeddings(), tokens.flatten()).unflatten(0, tokens.shape)
        if embedded.shape[-1] != target.hidden_size:
            embedded = target.embed(tokens, positions.clamp_max(target.context - 1))
        # A window counts from the block's first token for all of them: they share its position in the masks
        places, size = roots.expand(-1, config.block), (config.block, config.block)
        every = torch.ones(size, dtype=torch.bool, device=roots.device)
        full = cache.register(0, places, every).bool_mask()
        near = cache.register(0, places, every.tril() if config.causal else every)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.append(layer, k, v)
            window = config.windows[layer]
            mask = full if window is None else near.bool_mask(window + 1)
            return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)

        return self.network(embedded, positions, attend)


class DFlashDrafter(DSparkDrafter):
    """Drafts with a DFlash head, a small network that drafts a block of tokens in one pass.

    It has no Markov head (``DSparkDrafter``), so a node's children do not depend on the node's token.
    """

    name: ClassVar[str] = DFLASH
    summary: ClassVar[str] = "public DFlash head (speculators): a block of tokens in one pass"
