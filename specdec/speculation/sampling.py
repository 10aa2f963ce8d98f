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

from specdec.base.options import SamplingParams
from specdec.runtimes.draft_path import Sampled
from specdec.runtimes.target import largest
from specdec.speculation import library
from specdec.speculation.constraints import ConstraintState
from specdec.speculation.warpers import MinP, Penalties, Processor, RepetitionPenalty, Temperature, TopK, TopP

Prefixes = Callable[[], Sequence[Sequence[Sequence[int]]]]  # [B][T]: the tokens before each position


class Transforms:
    """Turns logits into processed logits, by the sampling parameters and extra processors, as ``generate`` does.

    params: the sampling parameters. start: number of prompt tokens, which penalties do not count.
    greedy: whether the temperature is 0.
    processors: the processors that read the tokens before a position.
    warpers: temperature, top-k, top-p and min-p, which read logits alone.
    sharpness: factor by which differences of logits grow: 1 / temperature, at least 1.
    highest: the highest token id with a bias; -1: there is no bias.
    sampling: temperature, top-k (0: all), top-p and min-p.
    group: equal for rows whose transforms do the same.
    filters: whether top-k, top-p or min-p rules out tokens.
    """

    def __init__(self, params: SamplingParams, processors: Sequence[Processor] = (), start: int = 0) -> None:
        self.greedy = params.temperature == 0
        self.sharpness = 1.0 if self.greedy else max(1.0 / params.temperature, 1.0)
        self.processors: list[Processor] = []
        if params.repetition_penalty not in (None, 1):
            self.processors.append(RepetitionPenalty(params.repetition_penalty))
        self.processors += processors
        if params.frequency_penalty or params.presence_penalty or params.logit_bias:
            self.processors.append(Penalties(params, start))
        self.highest = max(params.logit_bias or (), default=-1)
        self.sampling = params.temperature, params.top_k or 0, params.top_p, params.min_p or 0.0
        self.group: Hashable = id(self) if self.processors else self.sampling
        self.warpers: list[Processor] = []
        if not self.greedy:
            if params.temperature != 1:
                self.warpers.append(Temperature(float(params.temperature)))
            if params.top_k:
                self.warpers.append(TopK(params.top_k))
            if params.top_p < 1:
                self.warpers.append(TopP(params.top_p))
            if params.min_p:
                self.warpers.append(MinP(params.min_p))
        self.filters = any(not isinstance(warper, Temperature) for warper in self.warpers)

    def __call__(self, logits: Tensor, prefixes: Prefixes, vocab: Tensor | None = None) -> Tensor:
        """Return processed logits, float32 [B, T, V'], of ``logits`` [B, T, V'].

        prefixes: returns the tokens before each position, [B][T]; called only if a processor reads them.
        vocab: the token ids of the logits, int64 [V'], which only constraints and warpers can do with; None: all.
        """
        scores = logits.float().reshape(-1, logits.shape[-1])  # (B * T, V')
        if self.processors:
            scores = scores.clone()
            for i, prefix in enumerate(prefix for row in prefixes() for prefix in row):
                row, ids = scores[i : i + 1], None
                for processor in self.processors:
                    if isinstance(processor, ConstraintState):
                        row = processor.masked(prefix, row, vocab)
                    else:
                        ids = torch.tensor([list(prefix)], device=scores.device) if ids is None else ids
                        row = processor(ids, row)
                scores[i] = row[0]
        nothing = torch.empty(scores.shape[0], 0, dtype=torch.long, device=scores.device)
        for warper in self.warpers:
            scores = warper(nothing, scores)
        return scores.view(logits.shape)


class Noise:
    """Standard Gumbel noise over the vocabulary for each position of one request.

    The noise is a function of the seed, the stream and the position, by a counter-based generator (Philox).
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
        """Return the token that is drawn at ``position`` from processed logits ``scores`` (float32 [V], on the CPU).

        -1: the logits are not finite. lib: ``library.load()``. It makes noise only for tokens that can win.
        """
        scores = scores.contiguous()
        chosen: int = lib.specdec_choose(scores.data_ptr(), len(scores), *self.key.tolist(), position)
        return chosen

    def forget(self, position: int) -> None:
        """Drop the cached noise of positions before ``position``."""
        for old in [other for other in self.made if other < position]:
            del self.made[old]


class RowSampler:
    """How the tokens of one row are chosen.

    params, processors, start: as in ``Transforms``.
    stream: rows with one seed draw the same at one position unless their streams differ.
    transforms: used instead of ``params``, ``processors`` and ``start``; None: made of these.
    noise: the noise of the row's seed and stream.
    """

    def __init__(
        self,
        params: SamplingParams,
        processors: Sequence[Processor] = (),
        stream: int = 0,
        transforms: Transforms | None = None,
        start: int = 0,
    ) -> None:
        self.transforms = Transforms(params, processors, start) if transforms is None else transforms
        self.noise = Noise(params.seed, stream)

    @property
    def constraint(self) -> ConstraintState | None:
        """The constraint on the row's text; None: there is none."""
        return next((each for each in self.transforms.processors if isinstance(each, ConstraintState)), None)

    @property
    def plain_greedy(self) -> bool:
        """True if every choice is the argmax of the raw logits."""
        return self.transforms.greedy and not self.transforms.processors

    @property
    def masked_greedy(self) -> bool:
        """True if every choice is the argmax of the raw logits of the tokens that a constraint allows."""
        return self.transforms.greedy and self.constraint is not None and len(self.transforms.processors) == 1


class Sampler:
    """Chooses tokens for a batch of rows, at drafted positions and all others alike.

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
        return all(row.transforms.greedy for row in self.rows)

    @property
    def some_greedy(self) -> bool:
        """True if some choices are the argmax of logits."""
        return any(row.transforms.greedy for row in self.rows)

    @property
    def best_allowed(self) -> bool:
        """True if every choice is the argmax of the raw logits of the tokens that the row's constraint allows."""
        return all(row.plain_greedy or row.masked_greedy for row in self.rows)

    def sampled(self, ids: Sequence[Sequence[int]]) -> list[Sampled] | None:
        """Return how the token after each row's ``ids`` is sampled, without processors; None: all rows are greedy."""
        if self.greedy:
            return None
        made = []
        for row, own in zip(self.rows, ids, strict=True):
            seed, stream = row.noise.key.tolist()
            made.append(Sampled(seed, stream, len(own), *row.transforms.sampling, row.noise))
        return made

    @property
    def sharpness(self) -> float:
        """The largest ``Transforms.sharpness``."""
        return max(row.transforms.sharpness for row in self.rows)

    @property
    def filters(self) -> bool:
        """True if top-k, top-p or min-p rules out tokens."""
        return any(row.transforms.filters for row in self.rows)

    @property
    def needs_prefixes(self) -> bool:
        """True if processors other than constraints read the tokens before a position."""
        return any(
            not isinstance(processor, ConstraintState) for row in self.rows for processor in row.transforms.processors
        )

    def scores(self, logits: Tensor, prefixes: Prefixes, vocab: Tensor | None = None) -> Tensor:
        """Return processed logits, float32 [B, T, V'], of ``logits`` [B, T, V'].

        prefixes: ``prefixes()[b][t]`` are the tokens before position t of row b.
        vocab: the token ids of the logits, int64 [V']; None: all, as processors need (``needs_prefixes``).
        """
        groups: dict[Hashable, list[int]] = {}  # rows by what transforms them
        for b, row in enumerate(self.rows):
            groups.setdefault(row.transforms.group, []).append(b)
        if len(groups) == 1:
            return self.rows[0].transforms(logits, prefixes, vocab)
        scores = torch.empty_like(logits, dtype=torch.float32)
        for group in groups.values():

            def own(group: list[int] = group) -> Sequence[Sequence[Sequence[int]]]:
                before = prefixes()
                return [before[b] for b in group]

            scores[group] = self.rows[group[0]].transforms(logits[group], own, vocab)
        return scores

    def perturb(
        self, scores: Tensor, positions: Sequence[Sequence[int]], size: int, vocab: Tensor | None = None
    ) -> Tensor:
        """Return processed logits ``scores`` [B, T, V'] plus the noise of sampled rows: the argmax is an exact draw.

        positions: the positions of the tokens to choose, [B][T].
        size: V, the size of the model's vocabulary.
        vocab: the token ids of ``scores``, int64 [V']; None: all.
        """
        if self.greedy:
            return scores
        perturbed = scores - scores.amax(-1, keepdim=True)  # near zero, where scores compete, float32 is finest
        here = vocab if scores.device.type == "cpu" else None  # of few tokens, noise takes a fraction of the time
        for b, row in enumerate(self.rows):
            if not row.transforms.greedy:
                for t, position in enumerate(positions[b]):
                    noise = row.noise(position, size, here).to(scores.device)
                    perturbed[b, t] += noise if vocab is here else noise[vocab]
        return perturbed

    def choose(self, scores: Tensor, positions: Sequence[Sequence[int]]) -> Tensor:
        """Return the tokens chosen from processed logits [B, T, V], int64 [B, T]; -1: the logits are not finite."""
        if scores.device.type == "cpu" and (lib := library.load()) is not None:
            chosen = torch.empty(scores.shape[:-1], dtype=torch.long)
            for row, own, tokens, at in zip(self.rows, scores, chosen, positions, strict=True):
                if row.transforms.greedy:
                    tokens[:] = largest(own[None])[0]
                else:
                    tokens[:] = torch.tensor([row.noise.choose(lib, *each) for each in zip(own, at, strict=True)])
            return chosen
        tokens = self.perturb(scores, positions, scores.shape[-1]).argmax(-1)
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
