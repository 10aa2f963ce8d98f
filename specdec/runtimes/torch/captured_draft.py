"""Draft trees that grow on the device without waiting for the CPU, captured as one function where the runtime can."""

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
    """Grow draft trees on the device, in one captured function if ``target`` captures functions (CUDA graphs).

    Returns (drafts, others). ``drafts`` is each row's candidates as lists (scores, tokens, parents, raw), which waits
    for the device; with a ``choice``, the tree of the nodes that the device has selected, still on the device.
    ``others`` are the further tensors that ``step`` returns; the next call may overwrite all tensors.

    target: the model, whose ``captured`` method runs the function.
    key: all that the function depends on besides shapes and the other arguments; hashable values.
    step: called with ``whole`` and ``rows``; returns the function that runs one draft level, all nodes of one depth (a
        ``torch.draft.Step``), and a list of further result tensors [B, ...].
    roots: the token after which each row's draft begins, int64 [B, 1].
    limits: number of levels and width of the tree. Costs in it are ignored.
    rules: what besides logits decides which tokens become candidates, such as sampling noise.
    choice: the rule by which the device selects nodes; None: all candidates are returned.
    keep: number of nodes per level and row that get children.
    whole, rows: inputs of ``step``, nested tuples of tensors and None. Tensors of ``rows`` are [B, ...]. With
        ``lanes``, ``step`` gets the tuple (``lanes.numbers``, ``whole``) as its first argument.
    lanes: the rows' places in a static KV cache; None: ``step`` uses no such cache.
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
