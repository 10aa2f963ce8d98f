"""A draft whose tree the device selects: the CPU reads it together with the verification scores, once per step."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.base.devices import is_asynchronous
from specdec.runtimes.draft_path import DeviceChoice, DeviceTree, LevelNodes
from specdec.speculation.candidates import Candidates, CandidateSet
from specdec.speculation.draft import Draft
from specdec.speculation.state import State
from specdec.speculation.tree_builder import in_one_shape
from specdec.speculation.trees import MOST_NODES


def choice_of(state: State, levels: int, nodes: int | None, width: int) -> DeviceChoice | None:
    """Return the rule by which a GPU selects the nodes of draft trees, so that the CPU need not wait for it.

    None: the CPU has to select the nodes, because the device is not asynchronous, or because sampling, a constraint or
        ``state.threshold`` needs the drafted tokens on the CPU.

    state: the rows (sequences) of the batch.
    levels: number of draft levels (depths of the tree), each one pass of the drafter.
    nodes: maximum number of nodes per row; None: as many as add more expected accepted tokens than their scoring costs
        by ``state.prices`` or, without prices, one for each level.
    width: maximum number of children of a node; 1: drafts are chains.
    """
    if not is_asynchronous(state.cache.device) or state.sampler.needs_prefixes or state.threshold is not None:
        return None
    # Verification alone obeys a constraint: masks along a draft would be of tokens that the host has not read.
    if state.constrained and not (state.sampler.best_allowed and len(state.ids) == 1):
        return None
    prices, rows = None if nodes else state.prices, len(state.ids)
    most = levels if width == 1 else MOST_NODES
    if nodes is not None:
        most = min(nodes, most)
    elif width == 1 or prices is None:
        most = min(levels, most)
    else:  # the n-th likeliest node has at most 1 / n of what is expected
        price = prices.nodes
        worth = (n for n in range(1, len(price)) if n * (price[n] - price[n - 1]) > levels * rows)
        most = min(-(-max(next(worth, len(price)) - 1, 1) // rows), most)
    if prices is None:
        return DeviceChoice(most, list(state.depths))
    return DeviceChoice(most, list(state.depths), prices.nodes, prices.allowance, prices.beyond)


class DeviceDraft(Draft):
    """A draft whose tokens and tree are on the device; the CPU knows them only after ``receive``.

    Until then ``found`` is None, and ``parents`` are unknown unless it is a chain. ``lists`` waits for the device.

    held: the selected nodes on the device; as an attribute, None once the CPU has read them.
    state: the rows (sequences) for which it was drafted, with their maximum depths.
    levels: number of draft levels (depths of the tree), each one pass of the drafter.
    chain: whether the tree is known to be a chain.
    without_levels: for each row the nodes that would have been drafted without any such pass; None: there is no such
        draft.
    """

    def __init__(
        self,
        held: DeviceTree,
        state: State,
        levels: int,
        chain: bool = False,
        without_levels: Sequence[Candidates] | None = None,
    ) -> None:
        super().__init__(held.tokens, tuple(range(held.tokens.shape[1])) if chain else ())
        self.held, self._levels, self._most, self._without = held, levels, list(state.depths), without_levels

    def receive(self, rows: Sequence[Sequence[int]]) -> list[list[int]] | None:
        assert self.held is not None
        count, trees, found = self.held.tokens.shape[1], list[Candidates](), list[Candidates]()
        width = (len(rows[0]) - count) // (3 + self.held.sources) if rows else 0
        for row, most in zip(rows, self._most, strict=True):
            every = Candidates(*LevelNodes.unpacked(row[count:], width))
            trees.append(every.only([node for node in row[:count] if node >= 0]))
            found.append(every.within(most))
        shape, order = in_one_shape([(tree.tokens, tree.parents) for tree in trees], self.device)
        self.listed, self.parents, self._tokens, self._depths, self.held = shape.listed, shape.parents, None, None, None
        self.found = CandidateSet(found, self._levels, self._without)
        return [[*own, *[-1] * (1 + count - len(own))] for own in order]

    def lists(self) -> list[list[int]]:
        if self.held is not None:
            self.receive(self.held.packed.tolist())
        return super().lists()

    def within(self, depths: list[int]) -> list[int]:
        return super().within(depths) if self.held is None else []  # the device took none that are deeper
