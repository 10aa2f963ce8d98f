"""Exact acceptance: the output is the very text that plain decoding returns, greedy or sampled, on a chain or a tree.

A drafted token is accepted if it is the token that the target chooses after its parent. In greedy decoding that is
the argmax; in sampling it is the argmax of the perturbed logits, drawn by noise that no draft can influence
(``specdec.speculation.sampling``), so drafts change neither the distribution nor the sample.
"""

from __future__ import annotations

from typing import ClassVar

from specdec.speculation.verifier import Verifier


class ExactVerifier(Verifier):
    """Accepts the path of drafted tokens that the target chooses itself: the output is that of plain decoding."""

    name: ClassVar[str] = "exact"
    lossless: ClassVar[bool] = True
