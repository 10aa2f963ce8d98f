"""From logits to tokens: logits processors, and Gumbel noise that is keyed by position.

A sampled token is the argmax of the processed logits plus Gumbel noise (the Gumbel-max trick), which is an exact draw
from their softmax. The noise of a token depends on the request's seed and only on the token's position, so what is
sampled depends neither on the drafter nor on the depth of drafts nor on other rows: acceptance is the walk of greedy
decoding, and a drafter that adds the same noise to its own logits proposes what the model is likely to choose (Daliri
et al. 2024, arXiv 2408.07978). The transforms are those of ``generate``, in its order, and the penalties and the bias
of OpenAI's interface. Knows nothing about drafts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.base.devices import upload
from specdec.base.options import SamplingParams
from specdec.runtimes.draft_path import Sampled
from specdec.runtimes.target import largest
from specdec.speculation import library
from specdec.speculation.constraints import ConstraintState
from specdec.speculation.warpers import MinP, Penalties, Processor, RepetitionPenalty, Temperature, TopK, TopP

Prefixes = Callable[[], Sequence[Sequence[Sequence[int]]]]  # [B][T]: the tokens before each position


class Noise:
    """Standard Gumbel noise over the vocabulary for each position of one request.

    The noise is a function of the seed, the stream and the position, by a counter-based generator (Philox). So the
    model and a drafter that ask for the noise of a position get the same values.

    seed: the request's seed. stream: tells rows with one seed apart (``streams``).
    """

    def __init__(self, seed: int, stream: int = 0) -> None:
        self.key = np.array([seed, stream], np.uint64)
        self.made: dict[int, Tensor] = {}  # by position, of the whole vocabulary

    def __call__(self, position: int, size: int, vocab: Tensor | None = None) -> Tensor:
        """Return the noise for the token at ``position``, float32 on the CPU: [V] (``size``), or of ``vocab`` [V']."""
        if (made := self.made.get(position)) is not None:
            return made if vocab is None else made[vocab]
        philox = np.random.Philox(key=self.key, counter=np.array([0, 0, position, 0], np.uint64))
        bits = torch.from_numpy((philox.random_raw((size + 1) // 2).view(np.uint32)[:size] >> 1).view(np.int32))
        # 1 - u, not u: near zero, where exponentials win, float32 has all 31 bits.
        uniform = (bits if vocab is None else bits[vocab]).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
        noise = uniform.neg_().log1p_().neg_().log_().neg_()
        if vocab is None:
            self.made[position] = noise
        return noise

    def choose(self, lib: Any, scores: Tensor, position: int) -> int:
        """Draw the token at ``position`` from processed logits ``scores``, float32 [V] on the CPU; -1: not finite.

        The compiled library ``lib`` (``library.load()``) makes noise only for tokens that can win.
        """
        scores = scores.contiguous()
        chosen: int = lib.specdec_choose(scores.data_ptr(), len(scores), *self.key.tolist(), position)
        return chosen

    def forget(self, position: int) -> None:
        """Drop the cached noise of positions before ``position``."""
        for old in [other for other in self.made if other < position]:
            del self.made[old]


class RowSampler:
    """How the tokens of one row are chosen from logits, by sampling parameters and processors, as in transformers.

    params: the sampling parameters.
    start: number of prompt tokens, which penalties do not count.
    stream: number of the noise stream; rows with equal seeds and streams draw alike at a position.
    processors: the logits processors that read the tokens before a position.
    warpers: the logits processors for temperature, top-k, top-p and min-p; None: made from ``params``.
    sampling: the tuple of temperature, top-k (0: all), top-p and min-p; rows with equal tuples have equal warpers.
    noise: the noise of the row's seed and stream.
    greedy: whether the temperature is 0.
    constraint: the constraint on the row's text; None: there is none.
    plain_greedy: whether every choice is the argmax of the raw logits.
    masked_greedy: whether every choice is the argmax of the raw logits of the tokens that a constraint allows.
    """

    def __init__(
        self,
        params: SamplingParams,
        processors: Sequence[Processor] = (),
        stream: int = 0,
        start: int = 0,
        warpers: Sequence[Processor] | None = None,
    ) -> None:
        self.params = params
        self.processors: list[Processor] = []
        if params.repetition_penalty not in (None, 1):
            self.processors.append(RepetitionPenalty(params.repetition_penalty))
        self.processors += processors
        if params.frequency_penalty or params.presence_penalty or params.logit_bias:
            self.processors.append(Penalties(params, start))
        self.warpers: list[Processor] = [*(warpers or ())]
        if warpers is None and params.temperature:
            if params.temperature != 1:
                self.warpers.append(Temperature(float(params.temperature)))
            if params.top_k:
                self.warpers.append(TopK(params.top_k))
            if params.top_p < 1:
                self.warpers.append(TopP(params.top_p))
            if params.min_p:
                self.warpers.append(MinP(params.min_p))
        self.sampling = params.temperature, params.top_k or 0, params.top_p, params.min_p or 0.0
        self.noise = Noise(params.seed, stream)
        self.greedy = params.temperature == 0
        self.constraint = next((each for each in self.processors if isinstance(each, ConstraintState)), None)
        self.plain_greedy = self.greedy and not self.processors
        self.masked_greedy = self.greedy and self.constraint is not None and len(self.processors) == 1

    def process(self, scores: Tensor, before: Sequence[int], vocab: Tensor | None) -> Tensor:
        """Apply the processors to logits ``scores``, float32 [1, V'], of the token after the tokens ``before``.

        vocab: the token ids of ``scores``, int64 [V'], which only constraints support; None: all.
        """
        ids: Tensor | None = None
        for processor in self.processors:
            if isinstance(processor, ConstraintState):
                scores = processor.masked(before, scores, vocab)
            else:
                ids = torch.tensor([list(before)], device=scores.device) if ids is None else ids
                scores = processor(ids, scores)
        return scores

    def warp(self, scores: Tensor) -> Tensor:
        """Apply temperature, top-k, top-p and min-p to ``scores``, float32 [B, T, V'], and return the result."""
        rows = scores.reshape(-1, scores.shape[-1])  # (B * T, V')
        no_ids = torch.empty(len(rows), 0, dtype=torch.long, device=scores.device)
        for warper in self.warpers:
            rows = warper(no_ids, rows)
        return rows.view(scores.shape)


class Sampler:
    """Chooses tokens for a batch of rows, in the same way at drafted and other positions.

    rows: the sampler of each row.
    """

    def __init__(self, rows: Sequence[RowSampler]) -> None:
        self.rows = list(rows)

    @property
    def plain_greedy(self) -> bool:
        """True if every choice is the argmax of the raw logits."""
        return all(row.plain_greedy for row in self.rows)

    @property
    def greedy(self) -> bool:
        """True if every choice is the argmax of logits, processed or not."""
        return all(row.greedy for row in self.rows)

    @property
    def best_allowed(self) -> bool:
        """True if every choice is the argmax of the raw logits of the tokens that the row's constraint allows."""
        return all(row.plain_greedy or row.masked_greedy for row in self.rows)

    @property
    def needs_prefixes(self) -> bool:
        """True if processors other than constraints read the tokens before a position."""
        return any(len(row.processors) > (row.constraint is not None) for row in self.rows)

    def sampled(self, ids: Sequence[Sequence[int]]) -> list[Sampled] | None:
        """Return how the token after each row's text is drawn, so that drafts are drawn alike; None: all are greedy.

        ids: the text of each row, prompt and output. The position in the result is the length of the text.
        """
        if self.greedy:
            return None
        made = []
        for row, own in zip(self.rows, ids, strict=True):
            seed, stream = row.noise.key.tolist()
            made.append(Sampled(seed, stream, len(own), *row.sampling, row.noise))
        return made

    def scores(self, logits: Tensor, prefixes: Prefixes, vocab: Tensor | None = None) -> Tensor:
        """Return processed logits, float32 [B, T, V'], of ``logits`` [B, T, V'].

        prefixes: ``prefixes()[b][t]`` are the tokens before position t of row b; called only if a processor reads them.
        vocab: the token ids of the logits, int64 [V']; None: all, as processors need (``needs_prefixes``).
        """
        groups: dict[Hashable, list[int]] = {}  # rows by what their warpers do
        for b, row in enumerate(self.rows):
            groups.setdefault(row.sampling, []).append(b)
        processed = [b for b, row in enumerate(self.rows) if row.processors]
        scores = logits.to(torch.float32, copy=bool(processed) or len(groups) > 1)
        texts = prefixes() if processed else ()
        for b in processed:
            for t, before in enumerate(texts[b]):
                scores[b, t] = self.rows[b].process(scores[b, t, None], before, vocab)[0]
        if len(groups) == 1:
            return self.rows[0].warp(scores)
        for group in groups.values():
            scores[group] = self.rows[group[0]].warp(scores[group])
        return scores

    def perturb(
        self,
        scores: Tensor,
        positions: Sequence[Sequence[int]],
        size: int,
        vocab: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Return processed logits ``scores`` [B, T, V'] plus the noise of sampled rows: the argmax is an exact draw.

        positions: the positions of the tokens to choose, [B][T]. size: V, the size of the model's vocabulary.
        vocab: the token ids of ``scores``, int64 [V']; None: all.
        places: which of a row's ``positions`` each of T tokens has, int64 [B, T]; None: they are in order.
        """
        if self.greedy:
            return scores
        perturbed = scores - scores.amax(-1, keepdim=True)  # near zero, where scores compete, float32 is finest
        here = vocab if scores.device.type == "cpu" else None  # of few tokens, noise takes a fraction of the time
        for b, row in enumerate(self.rows):
            if not row.greedy:
                every = torch.stack([row.noise(position, size, here) for position in positions[b]])
                noise = upload(every, scores.device, torch.float32)
                noise = noise if places is None else noise[places[b]]
                perturbed[b] += noise if vocab is here else noise[:, vocab]
        return perturbed

    def choose(self, scores: Tensor, positions: Sequence[Sequence[int]], places: Tensor | None = None) -> Tensor:
        """Choose tokens, int64 [B, T] (-1: logits not finite), from processed logits ``scores`` [B, T, V].

        positions: positions of the tokens in their texts, [B][T]. places: as in ``perturb``.
        """
        if scores.device.type == "cpu" and places is None and (lib := library.load()) is not None:
            chosen = torch.empty(scores.shape[:-1], dtype=torch.long)
            for row, own, tokens, at in zip(self.rows, scores, chosen, positions, strict=True):
                if row.greedy:
                    tokens[:] = largest(own[None])[0]
                else:
                    tokens[:] = torch.tensor([row.noise.choose(lib, *each) for each in zip(own, at, strict=True)])
            return chosen
        tokens = self.perturb(scores, positions, scores.shape[-1], places=places).argmax(-1)
        return tokens.masked_fill(~scores.amax(-1).isfinite(), -1)


def streams(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return the noise stream of each row of a batch: the number of earlier rows with the same prompt.

    A row's text then depends neither on its index nor on other rows, and equal prompts draw different texts.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for prompt in map(tuple, prompts):
        found.append(seen[prompt])
        seen[prompt] += 1
    return found
