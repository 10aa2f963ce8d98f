"""Dynamic computing: a drafted token is accepted without scoring if the drafter was sure of it when it left the model.

Lossy: the output is as good as the drafter's confidence. The drafter proposes a token only if its probability of being
the full model's reaches the threshold (``State.threshold``). The scoring pass runs the layers that drafted tokens have
skipped, all at once and exactly, and yields the next token, which is always the full model's (early exiting as in CALM,
arXiv 2207.07061).
"""

from __future__ import annotations

from typing import ClassVar

from specdec.base import options
from specdec.speculation.verifier import Verifier


class ConfidentVerifier(Verifier):
    """Accepts every drafted token of a chain, or the path of first children in a tree; the target chooses the next one.

    Raises SpecDecError for values out of range.

    exit_threshold: minimum probability, in [0, 1], of drafted tokens; drafters end a draft before a less likely one.
    """

    name: ClassVar[str] = "confident"
    lossless: ClassVar[bool] = False

    def __init__(self, exit_threshold: float = 0.8) -> None:
        self.threshold = options.check_probability("exit_threshold", exit_threshold)

    @property
    def label(self) -> str:
        """The verifier's name and threshold, as results show them."""
        return f"{self.name}, threshold {self.threshold:g}"

    def accepts(self, token: int, choice: int) -> bool:
        return token >= 0
