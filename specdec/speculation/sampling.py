"""From logits to tokens: logits processors, and Gumbel noise that depends only on seed and position.

A sampled token is the argmax of the processed logits plus Gumbel noise (the Gumbel-max trick), which is an exact draw
from their softmax. The noise of a token depends on the request's seed and the token's position alone. So what is
sampled depends neither on the drafter nor on the depth of drafts nor on other rows (sequences): acceptance is the same
walk along equal tokens as in greedy decoding, and a drafter that adds the same noise to its own logits proposes what
the model is likely to choose (Daliri et al. 2024, arXiv 2408.07978). The transforms of logits are those of
transformers' ``generate``, in its order, and the penalties and the bias of OpenAI's interface.
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
from specdec.base.sequences import common_prefix
from specdec.runtimes.draft_path import Sampled
from specdec.runtimes.target import largest
from specdec.speculation import library
from specdec.speculation.constraints import ConstraintState
from specdec.speculation.warpers import MinP, Penalties, Processor, RepetitionPenalty, Temperature, TopK, TopP

Prefixes = Callable[[], Sequence[Sequence[Sequence[int]]]]  # [B][T]: the tokens before each position


class Noise:
    """Standard Gumbel noise over the vocabulary for each position of one request's text.

    The noise is a function of the seed, the stream and the position, by a counter-based generator (Philox). So the
    model and a drafter that ask for the noise of a position get the same values.

    seed: the request's seed.
    stream: tells rows (sequences) with the same seed and prompt apart: 0, 1, ..
    """

    def __init__(self, seed: int, stream: int = 0) -> None:
        self.key = np.array([seed, stream], np.uint64)
        self.made: dict[int, Tensor] = {}  # by position, of the whole vocabulary

    def __call__(self, position: int, size: int, vocab: Tensor | None = None) -> Tensor:
        """Return the Gumbel noise for the token at ``position`` of the text, float32 on the CPU.

        It is [size] for the whole vocabulary, or [V'] for the token ids ``vocab``. Noise of the whole vocabulary is
        cached, so the caller must not change it.

        size: V, the size of the vocabulary. vocab: token ids, int64 [V']; None: all tokens.
        """
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

    def draw(
        self, lib: Any, logits: Tensor, position: int, temperature: float = 1, top_k: int = 0, top_p: float = 1
    ) -> int:
        """Return the token drawn at ``position`` from logits; -1: the largest is not finite, or one is NaN.

        Equals division by ``temperature``, top-k, top-p, and the argmax with the noise of ``__call__``. Noise is made
        only for tokens that can win, and none is cached.

        lib: the compiled library (``library.load()``).
        logits: bf16 or float32 [V], contiguous, on the CPU.
        position: index in the text of the token that is drawn.
        temperature, top_k, top_p: as in ``SamplingParams``; a top_k of 0 keeps all tokens.
        """
        size, is_float = len(logits), logits.dtype == torch.float32
        given = logits.data_ptr(), is_float, size, temperature, min(top_k, size), top_p
        chosen: int = lib.specdec_draw(*given, *self.key.tolist(), position)
        if chosen < -1:
            raise MemoryError("no memory for a draw")
        return chosen

    def forget(self, position: int) -> None:
        """Delete the cached noise of all positions before ``position``."""
        for old in [other for other in self.made if other < position]:
            del self.made[old]


class RowSampler:
    """Says how the tokens of one row (sequence) are chosen from logits: sampling parameters and logits processors.

    params: the sampling parameters, such as temperature, top-p, penalties and seed.
    processors: logits processors that read the tokens before a position. As an attribute, those that ``params`` asks
        for, such as penalties, are included.
    stream: number of the noise stream; rows with equal seeds and streams draw alike at a position.
    start: number of prompt tokens, which frequency and presence penalties do not count.
    warpers: the logits processors for temperature, top-k, top-p and min-p; None: made from ``params``.
    sampling: the tuple of temperature, top-k (0: all), top-p and min-p.
    alike: rows with equal values of this are warped alike.
    noise: the Gumbel noise of the row's seed and stream.
    failure: the first error that a logits processor has raised, maybe behind a drafted token; None: none has.
    greedy: whether the temperature is 0.
    simple: whether tokens are sampled, by temperature, top-k and top-p alone.
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
        self.alike: Hashable = self.sampling if warpers is None else tuple(map(id, warpers))
        self.noise = Noise(params.seed, stream)
        self.failure: Exception | None = None
        self.held, self.ids = list[int](), torch.empty(0, dtype=torch.long)  # the last text of ``_text``
        self.greedy = params.temperature == 0
        self.simple = not self.greedy and not self.processors and warpers is None and not params.min_p
        self.constraint = next((each for each in self.processors if isinstance(each, ConstraintState)), None)
        self.plain_greedy = self.greedy and not self.processors
        self.masked_greedy = self.greedy and self.constraint is not None and len(self.processors) == 1

    def process(self, scores: Tensor, before: Sequence[int], vocab: Tensor | None) -> Tensor:
        """Apply the row's logits processors to the logits of one position, and return the result, float32 [1, V'].

        Temperature, top-k, top-p and min-p are not applied (``warp``). If a processor raises, the error is in
        ``failure``, and no token is allowed: other rows go on.

        scores: logits, float32 [1, V']. before: ids of all tokens of the text before the position.
        vocab: the token ids of ``scores``, int64 [V'], which only constraints support; None: the index of a logit is
            its token id.
        """
        ids: Tensor | None = None
        for processor in self.processors:
            if isinstance(processor, ConstraintState):
                scores = processor.masked(before, scores, vocab)
            else:
                ids = self._text(before, scores.device) if ids is None else ids
                try:
                    found = processor(ids, scores)
                    if not isinstance(found, Tensor) or found.shape != scores.shape:
                        raise TypeError("a logits processor must return logits of the shape that it gets")
                    scores = found
                except Exception as error:
                    self.failure = self.failure or error
                    return torch.full_like(scores, -torch.inf)
        return scores

    def _text(self, before: Sequence[int], device: torch.device) -> Tensor:
        """Return the token ids ``before`` a position, int64 [1, T], in memory that later calls go on with.

        To compare a text with the last one takes a fortieth of the time of making a tensor of it.
        """
        size, same = len(before), common_prefix(self.held, before)
        new = self.held[same:] = list(before[same:])
        if size > len(self.ids):
            grown = torch.empty(2 * size, dtype=torch.long, device=device)
            grown[:same] = self.ids[:same]
            self.ids = grown
        self.ids[same:size] = torch.tensor(new, dtype=torch.long)
        return self.ids[None, :size]

    def warp(self, scores: Tensor) -> Tensor:
        """Apply temperature, top-k, top-p and min-p to logits ``scores``, float32 [B, T, V'], and return the result.

        It has -inf for tokens that are left out. In greedy decoding, where none of them applies, it equals ``scores``.
        """
        rows = scores.reshape(-1, scores.shape[-1])  # (B * T, V')
        no_ids = torch.empty(len(rows), 0, dtype=torch.long, device=scores.device)
        for warper in self.warpers:
            rows = warper(no_ids, rows)
        return rows.view(scores.shape)


class Sampler:
    """Chooses the tokens of a batch of rows (sequences) from logits, at drafted and other positions alike.

    rows: the ``RowSampler`` of each row, in batch order.
    """

    def __init__(self, rows: Sequence[RowSampler]) -> None:
        self.rows = list(rows)

    @property
    def plain_greedy(self) -> bool:
        """Whether every row's choice is the argmax of the raw logits."""
        return all(row.plain_greedy for row in self.rows)

    @property
    def greedy(self) -> bool:
        """Whether every row decodes greedily: its choice is the argmax of its logits, processed or not."""
        return all(row.greedy for row in self.rows)

    @property
    def best_allowed(self) -> bool:
        """Whether every row's choice is the argmax of the raw logits of the tokens that its constraint allows."""
        return all(row.plain_greedy or row.masked_greedy for row in self.rows)

    @property
    def needs_prefixes(self) -> bool:
        """Whether a logits processor other than a constraint reads the tokens before a position."""
        return any(len(row.processors) > (row.constraint is not None) for row in self.rows)

    def sampled(self, ids: Sequence[Sequence[int]]) -> list[Sampled] | None:
        """Return, for each row, how the token after its text is drawn, so that a drafter can draw alike.

        None if all rows decode greedily. Otherwise each ``Sampled`` has the row's seed, stream, position, temperature
        (0: this row is greedy), top-k, top-p, min-p and noise.

        ids: token ids of each row's text, prompt and output. The position of the next token is their number.
        """
        if self.greedy:
            return None
        made = []
        for row, own in zip(self.rows, ids, strict=True):
            seed, stream = row.noise.key.tolist()
            made.append(Sampled(seed, stream, len(own), *row.sampling, row.noise))
        return made

    def scores(self, logits: Tensor, prefixes: Prefixes, vocab: Tensor | None = None) -> Tensor:
        """Apply each row's logits processors, temperature, top-k, top-p and min-p to the logits of T positions.

        Returns the processed logits, float32 [B, T, V']; forbidden tokens have -inf. They may share the memory of
        ``logits``, which stay unchanged.

        logits: the model's or a drafter's logits, [B, T, V'].
        prefixes: function without arguments that returns lists: entry [b][t] has the ids of all tokens of row b before
            position t. It is called only if a row has logits processors that read them.
        vocab: the token ids of the V' logits, int64 [V']; None: the index of a logit is its token id. Processors other
            than constraints need None.
        """
        groups: dict[Hashable, list[int]] = {}  # rows by what their warpers do
        for b, row in enumerate(self.rows):
            groups.setdefault(row.alike, []).append(b)
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

    def draw(self, logits: Tensor, prefixes: Prefixes, positions: Sequence[Sequence[int]]) -> Tensor:
        """Choose a token for each row and position from raw logits, as ``choose`` does from ``scores``: int64 [B, T].

        logits: the model's logits, [B, T, V]. prefixes: as for ``scores``. positions: as for ``choose``.
        """
        lib = library.load() if logits.device.type == "cpu" else None
        if (
            lib is None
            or not all(row.simple for row in self.rows)
            or logits.dtype not in (torch.bfloat16, torch.float32)
        ):
            return self.choose(self.scores(logits, prefixes), positions)
        found = []
        for row, own, at in zip(self.rows, logits.contiguous(), positions, strict=True):
            temperature, top_k, top_p, _ = row.sampling
            found.append([row.noise.draw(lib, *each, temperature, top_k, top_p) for each in zip(own, at, strict=True)])
        return torch.tensor(found, dtype=torch.long)

    def perturb(
        self,
        scores: Tensor,
        positions: Sequence[Sequence[int]],
        size: int,
        vocab: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Add Gumbel noise to the processed logits of rows that are sampled; the argmax is then an exact draw.

        Returns [B, T, V']: logits up to a constant per position, plus noise in sampled rows. If all rows are greedy,
        ``scores`` is returned.

        scores: processed logits, [B, T, V'].
        positions: positions[b] has the positions in the text of the tokens to choose in row b.
        size: V, the size of the model's vocabulary.
        vocab: the token ids of ``scores``, int64 [V']; None: the index of a logit is its token id.
        places: for each of the T tokens, the index of its position in ``positions[b]``, int64 [B, T]; None: 0, 1, ..
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
        """Choose a token for each row and position from processed logits: int64 [B, T]; -1: the logits are not finite.

        scores: processed logits, [B, T, V], as ``scores()`` returns them.
        positions: positions[b] has the positions in the text of the tokens to choose in row b.
        places: for each of the T tokens, the index of its position in ``positions[b]``, int64 [B, T]; None: 0, 1, ..
        """
        if scores.device.type == "cpu" and places is None and (lib := library.load()) is not None:
            chosen = torch.empty(scores.shape[:-1], dtype=torch.long)
            for row, own, tokens, at in zip(self.rows, scores, chosen, positions, strict=True):
                if row.greedy:
                    tokens[:] = largest(own[None])[0]
                else:
                    tokens[:] = torch.tensor(
                        [row.noise.draw(lib, *each) for each in zip(own.contiguous(), at, strict=True)]
                    )
            return chosen
        tokens = self.perturb(scores, positions, scores.shape[-1], places=places).argmax(-1)
        return tokens.masked_fill(~scores.amax(-1).isfinite(), -1)


def streams(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return the noise stream of each row (sequence) of a batch: the number of earlier rows with the same prompt.

    So a row's text depends neither on its index nor on other rows, and equal prompts draw different texts.

    prompts: token ids of each row's prompt.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for prompt in map(tuple, prompts):
        found.append(seen[prompt])
        seen[prompt] += 1
    return found
