"""Log-probabilities of tokens under the model's own distribution: before processors, temperature and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from specdec.base.devices import upload
from specdec.runtimes.target import Target

LOGIT_ROWS = 64  # prompt positions whose logits are computed at once


class TokenLogprob(NamedTuple):
    """A token id and its natural log-probability.

    top: the likeliest (id, log-probability) at its position, best first; it may include the token.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]

    def as_dict(self) -> dict[str, Any]:
        """Return {"token_id": .., "logprob": .., "top": [(id, log-probability), ..]}, for JSON."""
        return self._asdict()


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Return the log-probabilities of n ``tokens``, each with the ``top`` likeliest tokens at its position.

    logits: raw logits [n, V]; row i is the distribution of token i itself.
    """
    if not tokens:
        return []
    logs = logits.float().log_softmax(-1)
    chosen = upload([[token] for token in tokens], logs.device)
    own = logs.gather(-1, chosen)[:, 0].tolist()
    values, ids = logs.topk(min(top, logs.shape[-1]))
    likeliest = [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(*each) for each in zip(tokens, own, likeliest, strict=True)]


def prompt_logprobs(target: Target, states: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Return the log-probabilities of ``tokens``, each with the ``top`` likeliest tokens at its position.

    states: output of the last layer, before the final norm, [n, D]. Row i is that of the token before token i.
    tokens: at most n token ids.
    """
    found = list[TokenLogprob]()
    for start in range(0, len(tokens), LOGIT_ROWS):
        part = tokens[start : start + LOGIT_ROWS]
        found += token_logprobs(target.readout(states[None, start : start + len(part)])[0], part, top)
    return found
