"""Decode ``model.generate(..., custom_generate=SpecGenerate(...))`` of transformers with drafts.

transformers prepares the call: it merges configs, expands rows of the batch, and creates logits processors and stopping
criteria. specdec's engine decodes, in which some rows get ahead of others. Tokens are then added to all rows position
by position, as in ``model.generate``, so that criteria and streamers see the same calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation import logits_process as hf

from specdec.api.decoder import SpecDecoder
from specdec.api.generation import DecoderOptions
from specdec.base import terminal
from specdec.base.errors import SpecDecError
from specdec.base.options import Depth, SamplingParams, Stop
from specdec.base.settings import checked
from specdec.engine.engine import Engine
from specdec.engine.metrics import RequestMetrics
from specdec.engine.request import Request
from specdec.speculation.drafter import Drafter
from specdec.speculation.generation_config import refuse_stateful
from specdec.speculation.sampling import RowSampler, streams

# Processors that do not read the tokens, so that they can process all positions at once.
WARPERS: tuple[type[LogitsProcessor], ...] = (
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TemperatureLogitsWarper,
)
WARPERS += (hf.TopHLogitsWarper, hf.TopKLogitsWarper, hf.TopPLogitsWarper, hf.TypicalLogitsWarper)
PREPARED = ("position_ids", "cache", "use_cache", "logits_to_keep")  # arguments for the model's forward
MODES = ("greedy_search", "sample")


class SpecGenerate:
    """A value for ``model.generate(custom_generate=...)`` that decodes with drafts. It runs one call at a time.

    The first call creates a decoder, which later calls with the same model use; the model's weights must not change.

    drafter: name, folder or object of the drafter; "auto": the best one for the model.
    tokenizer: the model's tokenizer; None: not needed unless ``stop_strings`` are given.
    stop_strings: strings that end a text. ``generate`` does not pass its own ones on.
    streamer: gets new tokens, as in ``generate``, which does not pass its own one on; None: no streamer.
    num_speculative_tokens: draft length, the largest number of tokens drafted in a step; "auto": chosen anew in each
        step.
    more: further keyword arguments of ``SpecDecoder``.
    metrics: the metrics of each row of the last call.
    Raises SpecDecError for values of wrong types; the first call raises it for unknown names.
    """

    @checked
    def __init__(
        self,
        drafter: str | Path | Drafter = "auto",
        *,
        tokenizer: Any = None,
        stop_strings: Stop = (),
        streamer: Any = None,
        num_speculative_tokens: Depth = "auto",
        **more: Unpack[DecoderOptions],
    ) -> None:
        if stop_strings and tokenizer is None:
            raise SpecDecError("stop_strings need a tokenizer; give SpecGenerate(tokenizer=...) one")
        self.drafter = drafter
        self.tokenizer = tokenizer
        self.streamer = streamer
        self.more = more
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        self.num_speculative_tokens = num_speculative_tokens
        self.metrics: list[RequestMetrics] = []
        self._decoder: SpecDecoder | None = None
        self._model: Callable[[], PreTrainedModel | None] = lambda: None

    def decoder(self, model: PreTrainedModel) -> SpecDecoder:
        """Return the ``SpecDecoder`` for ``model``, created at the first call and again for another or changed model.

        Raises SpecDecError for an encoder-decoder model, or options that ``SpecDecoder`` refuses.
        """
        if self._decoder is None or self._model() is not model or self._decoder.model_changed:
            if getattr(model.config, "is_encoder_decoder", False):
                raise SpecDecError("SpecGenerate cannot run encoder-decoder models; call generate without it")
            label, kind = self.drafter if isinstance(self.drafter, str) else self.drafter.name, model.config.model_type
            terminal.say(f"preparing the {kind} model for drafter '{label}'; later calls start at once")
            self._decoder = None  # its copies of the weights are freed first
            self._decoder = SpecDecoder(model, self.tokenizer, self.drafter, **self.more)
            self._model = weakref.ref(model)
        return self._decoder

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Sequence[LogitsProcessor],
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Decode as ``model.generate`` does: return the rows of ``input_ids`` [B, T] with n new tokens, [B, T + n].

        transformers passes the arguments. n is the number of new tokens of the longest row; shorter ones are padded.
        generator: draws the seed for sampling; None: torch's global generator.
        The result is a ``GenerateDecoderOnlyOutput`` if the config has ``return_dict_in_generate``. Raises SpecDecError
        for unsupported arguments, and if the model's context is too short.
        """
        config: Any = generation_config
        with _evaluating(model):
            decoder = self.decoder(model)
            _check(config, logits_processor, model_kwargs)
            prompts = _prompts(input_ids, model_kwargs.pop("attention_mask", None))
            _check_inputs(prompts, input_ids, model_kwargs)
            new = max(config.max_length - input_ids.shape[1], 1)
            if (longest := max(map(len, prompts)) + new) > decoder.target.context:
                raise SpecDecError(
                    f"prompt and new tokens may be {longest} tokens, more than the model's context of "
                    f"{decoder.target.context}; lower max_new_tokens"
                )
            criteria = StoppingCriteriaList(stopping_criteria)
            if self.stop_strings:
                criteria.append(StopStringCriteria(self.tokenizer, self.stop_strings))
            call = _GenerateCall(input_ids, criteria, config)
            rows = _samplers(prompts, input_ids, list(logits_processor), config.do_sample, generator)
            requests = [
                decoder.request(prompt, max_new_tokens=new, sampler=sampler)
                for prompt, sampler in zip(prompts, rows, strict=True)
            ]
            for request in requests:
                request.eos = call.ends
            engine = decoder.stepped_engine(self.num_speculative_tokens, max_rows=len(requests))
            try:
                call.run(engine, requests, self.streamer)
            finally:
                engine.close()
                self.metrics = [request.metrics for request in requests]
            if config.return_dict_in_generate:
                return GenerateDecoderOnlyOutput(sequences=call.sequences)  # type: ignore[arg-type]
            return call.sequences


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Run without dropout; afterwards, the modules of a model in training are so again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# -- checks of the arguments -------------------------------------------------------------------------------------------


def _check(config: Any, processors: Sequence[LogitsProcessor], model_kwargs: dict[str, Any]) -> None:
    """Raise SpecDecError for a part of a ``generate`` call that ``SpecGenerate`` does not support, such as beams.

    config: the ``GenerationConfig``. processors: the logits processors. model_kwargs: arguments for the model's
    forward; all but the attention mask and those in ``PREPARED`` must be None.
    """
    mode = config.get_generation_mode()
    if mode.value not in MODES:
        raise SpecDecError(f"SpecGenerate cannot do {mode.value.replace('_', ' ')}; it decodes greedily or samples")
    for name in ("output_attentions", "output_hidden_states", "output_scores", "output_logits"):
        if getattr(config, name, None) and config.return_dict_in_generate:
            raise SpecDecError(f"SpecGenerate does not support {name}; leave it out")
    if config.cache_implementation == "quantized":
        raise SpecDecError(
            "SpecGenerate has its own KV cache; use SpecGenerate(kv_cache='int8') instead of cache_implementation"
        )
    refuse_stateful(processors, "leave out the option that adds it")
    for name, value in model_kwargs.items():
        if value is not None and name not in (*PREPARED, "attention_mask"):
            raise SpecDecError(f"SpecGenerate cannot pass '{name}' to the model; give only token ids")


def _prompts(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Return the token ids of each row of ``input_ids`` [B, T] without padding.

    mask: the attention mask [B, T], 0 for padding; None: no padding. Raises SpecDecError for padding on the right and
    for rows of padding alone.
    """
    if mask is None:
        mask = torch.ones_like(input_ids)
    prompts = []
    for b, (ids, seen) in enumerate(zip(input_ids.tolist(), mask.tolist(), strict=True)):
        count = sum(map(bool, seen))
        if not count:
            raise SpecDecError(f"row {b} of attention_mask masks every token; leave the row out")
        if not all(seen[-count:]):
            raise SpecDecError(f"row {b} of attention_mask masks tokens after its first unmasked one; pad on the left")
        prompts.append(ids[-count:])
    return prompts


def _check_inputs(prompts: Sequence[Sequence[int]], input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
    """Raise SpecDecError if a filled KV cache is given, or positions that do not count from the first token of a row.

    prompts: token ids of each row without padding. input_ids: [B, T], with padding. model_kwargs: may have the key
    "cache", a KV cache of transformers, and "position_ids", [B or 1, T].
    """
    cache = model_kwargs.get("cache")
    if cache is not None and cache.get_seq_length():
        raise SpecDecError("SpecGenerate has its own KV cache and cannot use another; leave the cache out")
    positions = model_kwargs.get("position_ids")
    if positions is None:
        return
    width = input_ids.shape[1]
    for b, prompt in enumerate(prompts):
        row = positions[b if len(positions) > 1 else 0, -len(prompt) :].tolist()
        if positions.shape[-1] != width or row != list(range(len(prompt))):
            raise SpecDecError("SpecGenerate counts positions from the first token; leave position_ids out")


# -- choosing tokens ---------------------------------------------------------------------------------------------------


class _RowProcessors(LogitsProcessor):
    """The logits processors of a ``generate`` call, applied to one row as if the whole batch were processed.

    processors: the call's logits processors, in order.
    row: index of the row in the batch.
    before: the p padding tokens before the tokens of this row, [1, p].
    batch: number of rows in the batch.
    """

    def __init__(self, processors: list[LogitsProcessor], row: int, before: Tensor, batch: int) -> None:
        self.processors, self.row = processors, row
        self.before, self.batch = before, batch

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the processed logits [1, V] of the logits ``scores`` [1, V].

        input_ids: the n tokens of the row before the position of these logits, [1, n], without padding.
        """
        device = self.before.device
        ids = torch.cat((self.before, input_ids.to(device)), 1).expand(self.batch, -1)
        found = scores.to(device).repeat(self.batch, 1)
        for processor in self.processors:
            if isinstance(processor, hf.PrefixConstrainedLogitsProcessor):  # whose function knows rows by number
                found[self.row] = self._constrained(processor, ids[self.row], found[self.row])
            else:
                found = processor(ids, found)
        return found[self.row : self.row + 1].to(scores.device)

    def _constrained(self, processor: hf.PrefixConstrainedLogitsProcessor, ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits ``scores`` [V] of this row with -inf for tokens that the user's function does not allow.

        ids: the row's tokens, padding included, [p + n]. Raises ValueError if none is allowed.
        """
        allowed = processor._prefix_allowed_tokens_fn(self.row, ids)
        if len(allowed) == 0:
            raise ValueError(f"prefix_allowed_tokens_fn allows no token in row {self.row}")
        mask = torch.full_like(scores, -torch.inf)
        mask[allowed] = 0
        return scores + mask


def _samplers(
    prompts: list[list[int]],
    input_ids: Tensor,
    processors: list[LogitsProcessor],
    sample: bool,
    generator: torch.Generator | None,
) -> list[RowSampler]:
    """Return the sampler that chooses the tokens of each row of a ``generate`` call, in the order of the rows.

    prompts: token ids of each row without padding. input_ids: [B, T], with padding. processors: the call's logits
    processors; in sampling, those of ``WARPERS`` at the end are removed from the list. sample: whether to sample; if
    not, decoding is greedy. generator: draws the seed; None: torch's global one.
    """
    seed = 0
    if sample:
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    params = SamplingParams(temperature=1.0 if sample else 0.0, seed=seed)
    warpers = list[Any]()
    while sample and processors and type(processors[-1]) in WARPERS:
        warpers.insert(0, processors.pop())
    rows, batch = [], len(prompts)
    for b, (prompt, stream) in enumerate(zip(prompts, streams(prompts), strict=True)):
        own = _RowProcessors(processors, b, input_ids[b : b + 1, : input_ids.shape[1] - len(prompt)], batch)
        rows.append(RowSampler(params, [own] if processors else [], stream, warpers=warpers))
    return rows


# -- the call ----------------------------------------------------------------------------------------------------------


class _GenerateCall:
    """The state of one ``generate`` call, which adds one token to every row of the batch at a time.

    input_ids: the prompts [B, T], with padding. config: the call's ``GenerationConfig``.
    sequences: the token ids of all rows so far, [B, T + count].
    criteria: the stopping criteria of the call.
    ends: ids of the tokens that end a row.
    pads: whether a row that has ended gets padding until all rows have; if not, it goes on.
    pad: id of the padding token.
    unfinished: bool [B], the rows that have not ended.
    count: number of positions that were added.
    """

    def __init__(self, input_ids: Tensor, criteria: StoppingCriteriaList, config: Any) -> None:
        self.sequences, self.criteria = input_ids, criteria
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)  # transformers' rule
        ends, pad = config._eos_token_tensor, config._pad_token_tensor
        self.ends = frozenset(ends.flatten().tolist()) if self.pads and ends is not None else frozenset[int]()
        self.pad = 0 if pad is None else int(pad)
        self.unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.count = 0

    def run(self, engine: Engine, requests: Sequence[Request], streamer: Any) -> None:
        """Decode ``requests``, one for each row of the batch, in ``engine`` until every row has ended.

        The tokens are added to ``sequences``. The engine must have no thread, and the caller closes it.

        streamer: gets the prompts and then the tokens of each new position; None: no streamer. Raises the error of a
        request that fails.
        """
        if streamer is not None:
            streamer.put(self.sequences.cpu())
        for request in requests:
            engine.submit(request)
        for _ in engine.steps():
            if error := next((request.error for request in requests if request.error is not None), None):
                raise error
            while bool(self.unfinished.any()) and (tokens := self._next(requests)) is not None:
                self._grow(requests, tokens)
                if streamer is not None:
                    streamer.put(torch.tensor(tokens))
            if not bool(self.unfinished.any()):
                break
        if streamer is not None:
            streamer.end()

    def _next(self, requests: Sequence[Request]) -> list[int] | None:
        """Return the token id of each row at the first position that ``sequences`` does not have yet, a list [B].

        The engine decodes rows at different speeds, but all rows of ``sequences`` grow together. Returns None if a row
        that has not ended lacks the token, so that more steps are needed. A row that has ended gets the padding token.

        requests: the engine's request of each row, with the tokens decoded so far.
        """
        tokens = []
        for request, going in zip(requests, self._running(), strict=True):
            at = len(request.prompt) + self.count
            if going and at >= len(request.ids):
                return None
            tokens.append(request.ids[at] if going else self.pad)
        return tokens

    def _running(self) -> list[bool]:
        """Return for each row of the batch whether it still gets decoded tokens.

        A row that has ended gets padding; in a call without padding, all rows get tokens until all have ended.
        """
        return [going or not self.pads for going in self.unfinished.tolist()]

    def _grow(self, requests: Sequence[Request], tokens: list[int]) -> None:
        """Append one token to each row of ``sequences``, and note in ``unfinished`` the rows that have ended.

        The requests of ended rows are cancelled, if the call pads them; else they go on until all rows have ended.

        requests: the engine's request of each row. tokens: the token of each row at the next position, [B], as
            ``_next`` returns them: padding in rows that ended before, if the call pads.
        """
        new = torch.tensor(tokens, device=self.sequences.device, dtype=self.sequences.dtype)
        self.sequences = torch.cat((self.sequences, new[:, None]), 1)
        self.count += 1
        self.unfinished &= ~self.criteria(self.sequences, None)
        for request, going in zip(requests, self._running(), strict=True):
            request.cancelled = not going
