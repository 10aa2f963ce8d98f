"""Dynamic computing: a drafted token stands unjudged, because the drafter was sure of it when it left the model early.

Lossy: the output is the full model's only as far as the drafter's confidence deserves it. The threshold is the
drafter's to keep (``State.threshold``): it drafts a token only if it gives it at least this probability of being the
full model's. The pass that would have judged the draft fills in the layers the drafted tokens skipped, all at once
and exactly, and yields the token after them, which is always the full model's (early exiting as in CALM, arXiv
2207.07061, whose skipped states are propagated instead).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from specdec.draft import Draft, Verdict
from specdec.errors import SpecDecError
from specdec.sampling import draw


class ConfidentVerifier:
    """Keeps every drafted token of the chain (of a tree: the first child's path), and draws the next one from p.

    exit_threshold: least confidence, in [0, 1], with which a token may leave early; 0 asks for none. Raises
    SpecDecError for any other value.
    """

    name: ClassVar[str] = "confident"
    lossless: ClassVar[bool] = False

    def __init__(self, exit_threshold: float = 0.8) -> None:
        if not isinstance(exit_threshold, int | float) or not 0 <= exit_threshold <= 1:
            raise SpecDecError(f"the exit threshold must be a probability in [0, 1]; got {exit_threshold}")
        self.threshold = float(exit_threshold)

    @property
    def label(self) -> str:
        """How results name the rule."""
        return f"{self.name}, threshold {self.threshold:g}"

    def judge(self, draft: Draft, p: Tensor, generators: list[torch.Generator]) -> Verdict:
        paths = []
        for tokens in draft.tokens.tolist():
            path = [0]
            for node, parent in enumerate(draft.parents, start=1):
                if parent == path[-1] and tokens[node - 1] >= 0:
                    path.append(node)
            paths.append(path)
        return Verdict(paths, draw(p[range(len(paths)), [path[-1] for path in paths]], generators))
