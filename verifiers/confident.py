"""Dynamic computing: a drafted token is accepted without scoring if the drafter was sure of it when it left the model.

Lossy: the output is the full model's only as far as the drafter's confidence deserves it. The threshold is the
drafter's to keep (``State.threshold``): it drafts a token only if it gives it at least this probability of being the
full model's. The pass that would have scored the draft fills in the layers the drafted tokens skipped, all at once
and exactly, and yields the token after them, which is always the full model's (early exiting as in CALM, arXiv
2207.07061). CALM's own way, to propagate states, is an option: the layers above a token's exit then get their keys and
values from its state there, approximately, and only the last token is run through them.
"""

from __future__ import annotations

from typing import ClassVar

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.speculation.draft import Verifier

FILLS = ("exact", "propagate")


class ConfidentVerifier(Verifier):
    """Accepts every drafted token of the chain (of a tree: the first child's path); the target chooses the next one.

    exit_threshold: least confidence, in [0, 1], with which a token may leave early; 0 asks for none. fill: "exact", or
    "propagate" for drafters whose tokens leave with a state of the model. Raises SpecDecError for any other value.
    """

    name: ClassVar[str] = "confident"
    lossless: ClassVar[bool] = False

    def __init__(self, exit_threshold: float = 0.8, fill: str = "exact") -> None:
        self.threshold = options.probability("exit_threshold", exit_threshold)
        if fill not in FILLS:
            raise SpecDecError(f"fill of confident acceptance is one of {', '.join(FILLS)}; got {fill!r}")
        self.propagates = fill == "propagate"

    @property
    def label(self) -> str:
        """How results name the rule."""
        return f"{self.name}, threshold {self.threshold:g}{', states propagated' * self.propagates}"

    def accepts(self, token: int, choice: int) -> bool:
        return token >= 0
