"""The quality of a lossy rule's output under the full model: agreement, likelihood, overlap with its own answer."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from specdec.base.errors import SpecDecError
from specdec.engine.replay import replay
from specdec.runtimes.target import Target


@dataclass(frozen=True)
class Quality:
    """The quality of one output.

    tokens: number of tokens.
    agreed: number of tokens that are the full model's argmax.
    nll: sum of -log p(token) in nats, at temperature 1.
    rouge_l: F1 of ROUGE-L (Lin 2004) against the full model's own answer.
    """

    tokens: int
    agreed: int
    nll: float
    rouge_l: float


def require_rouge_score() -> None:
    """Raise SpecDecError if rouge-score is not installed."""
    if importlib.util.find_spec("rouge_score") is None:
        raise SpecDecError("quality figures of a lossy rule need rouge-score; pip install 'specdec-m2r2[bench]'")


def quality(target: Target, tokenizer: Any, prompt: list[int], tokens: list[int], plain: list[int]) -> Quality:
    """The quality of ``tokens`` after ``prompt``. plain: the full model's own answer."""
    from rouge_score.rouge_scorer import RougeScorer

    logits = replay(target, prompt, tokens)  # (n, V)
    chosen = logits.new_tensor(tokens).long()[:, None]
    nll = -logits.log_softmax(-1).gather(1, chosen).sum()
    agreed = logits.gather(1, chosen)[:, 0] >= logits.amax(-1)
    ours, theirs = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (tokens, plain))
    rouge = 1.0 if ours == theirs else RougeScorer(["rougeL"]).score(theirs, ours)["rougeL"].fmeasure
    return Quality(len(tokens), int(agreed.sum()), float(nll), float(rouge))
