"""Drafters, processors, constraints and a clock whose behavior a test gives."""

import torch
from tiny_tokenizers import letters
from transformers import LogitsProcessor
from zoo import EOS

from specdec.speculation.constraints import CompiledConstraint, Constraint, compile_constraint
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter
from specdec.speculation.state import State


class Scripted(Drafter):
    """A drafter that proposes what ``script(ids, limit)`` returns for each row: [(token, parent block index), ...]."""

    name = "scripted"

    def __init__(self, script):
        self.script = script

    def propose(self, state: State, limit: int) -> Draft:
        rows = [self.script(ids, limit) for ids in state.ids]
        longest = max(rows, key=len)
        parents = tuple(parent for _, parent in longest)
        tokens = [[token for token, _ in row] + [-1] * (len(longest) - len(row)) for row in rows]
        return Draft(torch.tensor(tokens, dtype=torch.long).view(len(rows), len(longest)), parents)


def knowing(*texts: list[int]) -> Scripted:
    """Return a drafter that drafts how the texts go on, which are whole: prompts with what follows."""

    def go_on(ids: list[int], limit: int) -> list[tuple[int, int]]:
        text = next((text for text in texts if text[: len(ids)] == ids), ids)
        return [(token, place) for place, token in enumerate(text[len(ids) :][:limit])]

    return Scripted(go_on)


class Clock:
    """A clock that replaces the module ``time`` and advances when a test says so.

    tick: seconds that each call of ``perf_counter`` takes.
    """

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 1000.0, tick

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def perf_counter(self) -> float:
        self.now += self.tick
        return self.now


class OnlyOddAfterEven(LogitsProcessor):
    """A processor that allows odd tokens after even ones and even after odd, so that a wrong prefix would show."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        parity = 1 - int(input_ids[0, -1]) % 2
        scores = scores.clone()
        scores[:, [t for t in range(scores.shape[1]) if t % 2 != parity]] = float("-inf")
        return scores


def made(constraint: Constraint, vocab: int = 97) -> CompiledConstraint:
    return compile_constraint(constraint, letters(vocab - 3), vocab, frozenset([EOS]))
