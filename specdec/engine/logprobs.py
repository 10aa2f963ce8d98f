"""Log-probabilities of tokens under the model's own distribution: before logits processors, temperature and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from specdec.base.devices import upload
from specdec.runtimes.target import Target

PART = 64  # positions of a prompt whose logits are made at once


class TokenLogprob(NamedTuple):
    """A token with its log-probability. top: the likeliest tokens at its position, the likeliest first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]

    def as_dict(self) -> dict[str, Any]:
        return self._asdict()


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Logits [n, V] and the n ``tokens`` chosen there, with the ``top`` likeliest tokens."""
    if not tokens:
        return []
    logs = logits.float().log_softmax(-1)
    chosen = upload([[token] for token in tokens], logs.device)
    own = logs.gather(-1, chosen)[:, 0].tolist()
    values, ids = logs.topk(min(top, logs.shape[-1]))
    likeliest = [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(*each) for each in zip(tokens, own, likeliest, strict=True)]


def prompt_logprobs(target: Target, states: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Final states [n, D] and the tokens that follow each in the prompt, at most n."""
    found = list[TokenLogprob]()
    for start in range(0, len(tokens), PART):
        part = tokens[start : start + PART]
        found += token_logprobs(target.readout(states[None, start : start + len(part)])[0], part, top)
    return found
