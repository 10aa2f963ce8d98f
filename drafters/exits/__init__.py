"""Drafting through the model's first layers: one base class, whose subclasses say where a token leaves.

A drafted token runs layer by layer and leaves at an exit; its readout there is the draft. Its states are exact, so
scoring resumes where the deepest token left. When a later token goes deeper, the layers that earlier tokens of the
draft have not run are run for all of them at once.

    early-exit         every token leaves at one exit (LayerSkip, Elhoushi et al. 2024, arXiv 2404.16710)
    deed               each at the first exit with enough confidence (Tang et al. 2023, arXiv 2311.08623)
    skip-decode        the later in the answer, the earlier (Del Corro et al. 2023, arXiv 2307.02628)
    mixture-of-depths  a router at each layer lets a token run or skip it (Raposo et al. 2024, arXiv 2404.02258)
"""

from __future__ import annotations

from .drafter import DeedDrafter, EarlyExitDrafter, MixtureOfDepthsDrafter, SkipDecodeDrafter
from .networks import ExitHeads, Routers, check_exits

__all__ = ["DeedDrafter", "EarlyExitDrafter", "MixtureOfDepthsDrafter", "SkipDecodeDrafter"]
__all__ += ["ExitHeads", "Routers", "check_exits"]
