"""Drafting through the model's first layers: what every drafter that leaves the model early shares.

A drafted token runs layer by layer and leaves at an exit; its readout there is the draft. What it has computed is
exact: it is kept, and scoring resumes where the deepest token left. Layers that earlier tokens of the draft have not
run are run for all of them at once, just in time, when a later token goes deeper (DEED, Tang et al. 2023, arXiv
2311.08623). Knows nothing of acceptance.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.models import drafter_folder
from specdec.runtimes.cache import KVCache
from specdec.runtimes.layer_pass import Pass
from specdec.runtimes.linear_maps import rms_unit
from specdec.runtimes.target import Target
from specdec.speculation.draft import Draft, State

from . import trained
from .chain import ChainDrafter, Readout, ShapeOptions, best_probability
from .vocabulary import DraftVocabulary


class PartialPass:
    """The tokens of a draft, each run through some of the layers. Earlier tokens are never below later ones."""

    def __init__(self, target: Target, cache: KVCache) -> None:
        self.target, self.cache = target, cache
        self.groups: list[tuple[int, Tensor, Tensor]] = []  # (layer reached, states [B, n, D], positions [B, n])
        self.count = 0  # of the tokens

    def push(self, token: Tensor, positions: Tensor) -> None:
        """Add a token, int64 [B, 1], at layer 0."""
        self.count += 1
        self.groups.append((0, self.target.embed(token, positions), positions))

    def to(self, layer: int) -> Tensor:
        """Run every token that is below ``layer`` up to it; return the last token's states there [B, 1, D]."""
        while (level := self.groups[-1][0]) < layer:
            _, x, positions = self.groups.pop()
            above = self.groups[-1][0] if self.groups else layer
            goal = min(above, layer)
            x = self.target.layers(x, level, goal, Pass(positions, self.cache.mask(level, positions), self.cache))
            if self.groups and above == goal:
                _, earlier, before = self.groups.pop()
                x, positions = torch.cat((earlier, x), 1), torch.cat((before, positions), 1)
            self.groups.append((goal, x, positions))
        return self.groups[-1][1][:, -1:]

    def finish(self) -> tuple[Tensor, int]:
        """All tokens' states [B, n, D] at the deepest layer that any of them has reached, and that layer."""
        deepest = self.groups[0][0]
        self.to(deepest)
        return self.groups[0][1], deepest


class ExitHeads(nn.Module):
    """What is trained at exits: a small module each, from h[E] towards h[N]; they share the output head.

    final = map(u) + up(silu(down(u))) with u = h / rms(h), map the identity at first: untrained it is read out like h.
    exits: layers, rising. width: hidden size of the modules. draft_vocab: int32 [V'], or None for the full vocabulary.
    """

    def __init__(self, exits: Sequence[int], width: int, target: Target, draft_vocab: Tensor | None = None) -> None:
        super().__init__()
        self.exits, self.width, d = check_exits(exits, target.num_layers), width, target.hidden_size
        self.map = nn.ModuleList(nn.Linear(d, d) for _ in self.exits)
        self.down = nn.ModuleList(nn.Linear(d, width) for _ in self.exits)
        self.up = nn.ModuleList(nn.Linear(width, d, bias=False) for _ in self.exits)
        for parameter in (*self.map.parameters(), *self.up.parameters()):
            nn.init.zeros_(parameter)
        for straight in self.map:
            nn.init.eye_(straight.get_parameter("weight"))
        self.register_buffer("draft_vocab", draft_vocab)
        self.draft_vocab: Tensor | None

    def forward(self, index: int, h: Tensor) -> Tensor:
        """States h [B, T, D] at exit ``index`` -> the estimate of h[N] [B, T, D] that the head reads."""
        unit = rms_unit(h)
        out: Tensor = self.map[index](unit) + self.up[index](F.silu(self.down[index](unit)))
        return out

    def config(self) -> dict[str, Any]:
        """The entries of a drafter folder's config.json."""
        return {"exits": list(self.exits), "width": self.width}

    @classmethod
    def load(cls, target: Target, folder: Path, drafter: str) -> ExitHeads:
        """From a folder of ``drafter``. Raises SpecDecError if it is another's, or its files do not fit the target."""
        config = trained.read_config(folder, drafter, target)
        width = drafter_folder.inner("width", config.get("width"), target.hidden_size)
        exits = check_exits(config.get("exits"), target.num_layers)
        return drafter_folder.load(folder, target.vocab_size, lambda vocab: cls(exits, width, target, vocab))


def check_exits(exits: Any, num_layers: int) -> tuple[int, ...]:
    """``exits``, if they rise within the model. Raises SpecDecError otherwise."""
    given = options.wholes("exits", exits, 1)
    if not given or max(given) >= num_layers or list(given) != sorted(set(given)):
        raise SpecDecError(f"exits must be rising layers in 1 .. {num_layers - 1}; got {list(given)}")
    return given


class ExitDrafter(ChainDrafter):
    """Drafts a chain of tokens that each leave at one of the exits; subclasses say which, token by token.

    heads: trained modules at the exits; None: the model's own norm and head. siblings, nodes: see ``Shape``.
    """

    leaves_early = True
    leaves_state = True
    vocabulary: DraftVocabulary

    def __init__(self, heads: ExitHeads | None = None, **shape: Unpack[ShapeOptions]) -> None:
        super().__init__(**shape)
        self.heads = heads

    def bind(self, target: Target) -> None:
        if self.heads is not None:
            self.heads.to(target.device, target.dtype).requires_grad_(False).eval()
        self.vocabulary = DraftVocabulary(target, None if self.heads is None else self.heads.draft_vocab)

    @abstractmethod
    def leave(self, tokens: PartialPass, state: State) -> tuple[Tensor, ...]:
        """Take the last token of ``tokens`` to where it leaves, and read it there (``read``)."""

    def read(self, tokens: PartialPass, layer: int, index: int = 0) -> tuple[Tensor, ...]:
        """Take the last token to ``layer``, which is exit ``index``: the three parts of a ``Readout``."""
        h = tokens.to(layer)
        logits = self.vocabulary.logits(h if self.heads is None else self.heads(index, h))[:, 0]
        certainty = best_probability(logits)
        return logits, certainty, torch.full_like(certainty, layer, dtype=torch.long)

    def propose(self, state: State, limit: int) -> Draft:
        tokens = PartialPass(state.target, state.cache)

        def step(token: Tensor, positions: Tensor) -> Readout:
            tokens.push(token, positions)
            return Readout(*self.leave(tokens, state))

        draft = self.chain(state, limit, step)
        draft.states, draft.exit_layer = tokens.finish()
        return draft
