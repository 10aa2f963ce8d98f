"""Drafts that grow without the host, in one captured function where the runtime captures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from specdec.runtimes.draft_path import DeviceChoice, DeviceTree, LevelNodes, Nodes, TreeLimits
from specdec.runtimes.torch.draft import Rules, Step, choose, grow, limits_of

if TYPE_CHECKING:
    from specdec.runtimes.target import Target
    from specdec.runtimes.torch.static_cache import InLanes


def grow_captured(
    target: Target,
    key: Sequence[Any],
    step: Callable[[Any, Any], tuple[Step, Sequence[Tensor]]],
    roots: Tensor,
    limits: TreeLimits,
    rules: Rules,
    choice: DeviceChoice | None,
    keep: int,
    whole: Any,
    rows: Any,
    lanes: InLanes | None = None,
) -> tuple[list[Nodes] | DeviceTree, list[Tensor]]:
    """Grow candidates without the host, in one captured function where ``target`` captures.

    Returns the candidates of each row, or with a ``choice`` the tree that the device selects, and other results.

    key: what else the captured function depends on. step: makes the argument ``step`` of ``grow``, and other results
    [B, ...], of ``whole`` and ``rows`` (as in ``Target.captured``). roots, limits, rules, keep: as in ``grow``; limits
    have no costs here. lanes: the rows of a static cache; None: none is used.
    """
    batch, device = len(roots), roots.device
    count = 1 << max(batch - 1, 0).bit_length() if lanes is None else lanes.total
    bounds, prices = (None, None) if choice is None else limits_of(choice, count, device)
    free, nodes = replace(limits, level=0.0, node=0.0), 0 if choice is None else choice.nodes

    def function(given: Any, own: Any) -> Sequence[Tensor]:
        numbers, (vocab, prices, whole) = (None, given) if lanes is None else given
        tokens, rules, bounds, rows = own
        make, others = step(whole if lanes is None else (numbers, whole), rows)
        grown = grow(make, tokens, free, rules._replace(vocab=vocab), keep, choice is None and rules.given is not None)
        if choice is None:
            return [grown.packed(), *others]
        return [*choose(grown, nodes, bounds, prices)[:4], *others]

    name = *key, limits.levels, limits.width, keep, choice is None, nodes
    every = roots, rules._replace(vocab=None), bounds, rows
    found = target.captured(name, function, (rules.vocab, prices, whole), every, lanes)
    if choice is None:
        return [LevelNodes.unpacked(row, len(row) // 4) for row in found[0].tolist()], found[1:]
    return DeviceTree(found[0], found[1], found[2], found[3], 1 if rules.given is None else 3), found[4:]
