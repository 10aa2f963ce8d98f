"""Transforms of logits that need no transformers: temperature, top-k, top-p, min-p, penalties, and rules about tokens.

Each is called with the ids of the tokens before a position, int64 [n, T], and the logits of the position, [n, V], and
returns logits [n, V]. It equals transformers' processor of that name, with two differences: top-p keeps tokens
as likely as the last one that is kept, and bad words are searched in new tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.base.options import SamplingParams
from specdec.speculation import library

Processor = Callable[[Tensor, Tensor], Tensor]
NEVER = float("-inf")


@dataclass(frozen=True)
class Temperature:
    """Logits processor that divides logits by ``temperature`` > 0."""

    temperature: float

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores / self.temperature


@dataclass(frozen=True)
class TopK:
    """Logits processor that keeps the ``top_k`` likeliest tokens, and those as likely as the last of these.

    The logits of all other tokens become -inf.
    """

    top_k: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        least = scores.topk(min(self.top_k, scores.shape[-1])).values[..., -1, None]
        return scores.masked_fill(scores < least, NEVER)


@dataclass(frozen=True)
class TopP:
    """Logits processor that keeps the smallest set of likeliest tokens with the total probability ``top_p`` or more.

    The logits of all other tokens become -inf. On CPUs the compiled library selects them without sorting.
    """

    top_p: float

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        lib = library.load() if scores.device.type == "cpu" else None
        if lib is not None:
            scores = scores.contiguous()
            kept = torch.empty_like(scores)
            for own, to in zip(scores, kept, strict=True):
                if lib.specdec_top_p(own.data_ptr(), len(own), self.top_p, to.data_ptr()):
                    raise MemoryError("no memory for top-p")
            return kept
        ordered = scores.sort(descending=False).values
        out = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
        out[..., -1:] = False
        least = ordered.masked_fill(out, -NEVER).amin(-1, keepdim=True)
        return scores.masked_fill(scores < least, NEVER)


@dataclass(frozen=True)
class MinP:
    """Logits processor that sets the logits of tokens less likely than ``min_p`` times the likeliest token to -inf."""

    min_p: float

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(-1)
        out = probabilities < self.min_p * probabilities.amax(-1, keepdim=True)
        out.scatter_(-1, probabilities.topk(1, dim=-1).indices, False)
        return scores.masked_fill(out, NEVER)


@dataclass(frozen=True)
class RepetitionPenalty:
    """Logits processor that lowers the logits of tokens that are in the text, prompt included.

    It divides their positive logits by ``penalty``, and multiplies their negative ones by it. penalty: above 1 lowers
    them, from 0 to 1 raises them.
    """

    penalty: float

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        size = scores.shape[-1]
        ids, wider = input_ids.clamp(max=size), F.pad(scores, (0, 1))  # the output head may lack tokens
        found = wider.gather(1, ids)
        found = torch.where(found < 0, found * self.penalty, found / self.penalty)
        return wider.scatter(1, ids, found)[..., :size]


@dataclass(frozen=True)
class MinNewTokens:
    """Logits processor that sets the logits of the end tokens to -inf while a text is too short.

    least: minimum number of tokens from index ``start`` of the text on. ends: ids of the end tokens.
    start: index of the first token that counts, such as the length of the prompt.
    """

    least: int
    ends: tuple[int, ...]
    start: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[-1] - self.start >= self.least:
            return scores
        return _without(scores, self.ends)


@dataclass(frozen=True)
class NoBadWords:
    """Logits processor that forbids the last token of a bad word where the text ends with the word's other tokens.

    It sets the logit of that token to -inf, in place.

    words: the token ids of each bad word.
    start: index of the first token of the text that is compared, such as the length of the prompt.
    """

    words: tuple[tuple[int, ...], ...]
    start: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, new in enumerate(input_ids[:, self.start :].tolist()):
            begun = [
                last for *head, last in self.words if len(head) <= len(new) and new[len(new) - len(head) :] == head
            ]
            scores[row : row + 1] = _without(scores[row : row + 1], begun)
        return scores


def _without(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return logits ``scores`` [n, V] with -inf for the token ids ``tokens``; ids of V or more are ignored."""
    there = torch.tensor([token for token in tokens if token < scores.shape[-1]], dtype=torch.long)
    return scores.index_fill(-1, there.to(scores.device), NEVER)


class Penalties:
    """Logits processor for logit bias and for frequency and presence penalties, as in OpenAI's interface.

    params: sampling parameters with the bias and the penalties.
    start: index of the first token of the text that the penalties count, such as the length of the prompt.
    """

    def __init__(self, params: SamplingParams, start: int) -> None:
        self.frequency = params.frequency_penalty
        self.presence = params.presence_penalty
        self.start = start
        bias = params.logit_bias or {}
        self.biased, self.bias = torch.tensor(list(bias), dtype=torch.long), torch.tensor(list(bias.values()))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.index_add(-1, self.biased.to(scores.device), self.bias.to(scores).expand(len(scores), -1))
        for row, new in zip(scores, input_ids[:, self.start :], strict=True):
            tokens, counts = new.unique(return_counts=True)
            row[tokens] -= self.frequency * counts + self.presence
        return scores
