"""Predicted speedup on this machine: how many drafts are accepted, against what drafting and scoring cost.

The costs are those of the drafter as users run it (from its folder, in the runtime that serves it), measured once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specdec.api.decoder import SpecDecoder
from specdec.engine.depth.costs import Costs
from specdec.engine.depth.measure import costs


def measure(decoder: SpecDecoder, folder: Path) -> Costs:
    """The costs of the drafter in ``folder`` on the model of ``decoder``."""
    drafting = decoder.with_drafter(folder)
    return costs(drafting.target, drafting.drafter, drafting.verifier)


def predict(chain: Sequence[float], costs: Costs, nodes: Sequence[int] | None = None) -> tuple[float, int]:
    """(speedup over plain decoding, draft depth k that reaches it), for the best k:

        (1 + chain_1 + ... + chain_k) s(1) / (k d + s(1 + nodes_k))

    chain: P(the first i drafts are all accepted). nodes: tokens scored for a draft of depth i (None: i, a chain).
    s, d: ``costs``. That scoring may resume from a draft's states is left out: a pass over fewer layers is saved for
    the drafted tokens, but the last of them still needs one.
    """
    best, depth, tokens = 1.0, 0, 1.0
    for k, accepted in enumerate(chain, start=1):
        tokens += accepted
        seconds = costs.drafting(k) + costs.scoring(1 + (nodes[k - 1] if nodes else k))
        speedup = tokens * costs.scoring(1) / seconds
        if speedup > best:
            best, depth = speedup, k
    return best, depth


def speedup_text(figures: dict[str, Any]) -> str:
    """The predicted speedup for people, or nothing."""
    if "speedup" not in figures:
        return ""
    if not figures["depth"]:
        return "; predicted slower than plain decoding here"
    return f"; predicted {figures['speedup']:.2f}x here at {figures['depth']} drafts a step"
