"""The public API: load a model and a drafter once, then generate, stream and generate in batches."""

from __future__ import annotations

import copy
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Unpack, cast

import torch
from pydantic import Field, SkipValidation
from torch import Tensor
from transformers import PreTrainedModel

from specdec.api.generation import Generation, GenerationOutput
from specdec.api.options import DecoderOptions, GenerationOptions, Options, RequestOptions
from specdec.api.text import Detokenizer, Prompt, encode
from specdec.api.tuned import DEFAULTS, Tuned, load_tuned, tuned_path
from specdec.base.errors import SpecDecError
from specdec.base.memory import free_memory
from specdec.base.options import Count, Depth, SamplingOptions, SamplingParams
from specdec.base.settings import Whole, checked, short_repr
from specdec.engine.depth import MAX_DEPTH, AutoDepth, DepthPolicy, FixedDepth
from specdec.engine.depth.measure import costs, store
from specdec.engine.engine import Engine
from specdec.engine.request import Request, check_prompt
from specdec.models import catalogue, generation_config, loading
from specdec.runtimes.experts.offload import ExpertOptions, Offload
from specdec.runtimes.prefill import CHUNK
from specdec.runtimes.select import make_target, needs_cpu
from specdec.speculation import registry
from specdec.speculation.constraints import CompiledConstraint, Constraint, compile_constraint
from specdec.speculation.draft import Drafter, Verifier
from specdec.speculation.sampling import RowSampler, streams

SAMPLING = frozenset(SamplingOptions.__annotations__)
MAX_NEW_TOKENS = 128  # where a request does not say
LOSSY_DEPTH = 4  # of drafts under a lossy rule that scores them, where the depth is "auto"
PARTS = {"cpu": 96}  # tokens of new prompts in a step of an engine, by device: a few blocks of the kernels
KEEP_EVERY = 60.0  # fewest seconds between two writes of what requests measured

_claiming = threading.Lock()
_busy: set[int] = set()  # ids of the drafters that a generation is using


class SpecDecoder:
    """A causal language model with a drafter. Runs one generation at a time, in any thread.

    Decoders in several threads may share a model and a target (``with_drafter``), but no Drafter object: it belongs to
    the generation under way, and a second request is refused.

    model, tokenizer: as loaded by transformers (the tokenizer may be None if all prompts are token ids).
    drafter: a name (``specdec drafters``), a drafter folder, a Hugging Face repository of one (ORG/NAME[@revision]),
    several of these joined by "+", or a Drafter object; NAME=SOURCE says what
    it is loaded from, such as draft-model=MODEL. "auto" is ngram, with the m2r2 shipped for the
    model, or, with a warning, alone. ``drafter`` is then that one.
    drafter_options: its options; those of joined drafters are mappings under their names.
    runtime: "auto" (the fastest that serves the model here), "native", "graphs", "fused" or "reference".
    weights: "auto" (as loaded; stored in fewer bits where those hold the very same values), "dense" (as loaded), "int8"
    or "int4" (layers rounded; bfloat16 on a CPU). What is rounded is then the base, in ``model`` too: output is
    lossless with respect to it.
    kv_cache: "auto" (in the model's dtype) or "int8" (keys and values rounded to 8 bits, half the memory; native
    runtime). It is lossy: plain decoding with that cache is then the base.
    activations: what products with quantised weights take in the native runtime: "int8" (rounded, a scale for 32
    numbers), "bf16", or "auto" (the first). Plain decoding in the same way is the base.
    verifier: the acceptance rule, a name (with its ``verifier_options``) or an object: "exact", or a lossy one, such as
    "confident". exact: refuse lossy rules.
    experts: of a mixture-of-experts model, keep them in slow memory and load them as they are needed
    (``ExpertOptions``); until ``close``, they are then gone from ``model``.
    Raises SpecDecError if the model is unsupported or the drafter does not fit it.
    """

    @checked
    def __init__(
        self,
        model: SkipValidation[PreTrainedModel],
        tokenizer: Any = None,
        drafter: str | Path | Drafter = "auto",
        *,
        drafter_options: Options = None,
        runtime: str = "auto",
        weights: str = "auto",
        kv_cache: str = "auto",
        activations: str = "auto",
        verifier: str | Verifier = "exact",
        verifier_options: Options = None,
        exact: bool = False,
        experts: ExpertOptions | None = None,
    ) -> None:
        if not callable(getattr(model, "get_output_embeddings", None)):  # wrapped ones have it, too
            wanted = "a loaded model; SpecDecoder.from_pretrained loads one by name"
            raise SpecDecError(f"model must be {wanted}; got {short_repr(model)}")
        self.tuned: Tuned | None = None  # what ``specdec tune drafter`` found, where it is applied
        self._kept: Tuned | None = None  # the same, where there is anything for this model
        self.verifier = registry.verifier(verifier, verifier_options, exact)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.target, self.runtime_note = make_target(model, runtime, weights, kv_cache, activations)
        self.target.tokenizer = tokenizer
        if experts is not None:
            self.target.experts = Offload(model, self.target.fingerprint, experts)
        try:
            self.drafter = self._drafter(drafter, dict(drafter_options or {}))
        except BaseException:
            self.close()
            raise
        self._auto: AutoDepth | None = None  # one for all requests: what it learns about the drafter stays
        self._kept_at = -KEEP_EVERY

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.target.device

    @classmethod
    @checked
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = catalogue.DEFAULT_MODEL,
        drafter: str | Path | Drafter = "auto",
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        **more: Unpack[DecoderOptions],
    ) -> SpecDecoder:
        """Load an embedded model, a Hugging Face id, a local folder or a GGUF file, and a drafter for it.

        drafter: as in the constructor; "auto" is first of all what ``specdec tune drafter`` found for the model, with
        its depth of drafts (``tuned``).
        device: "auto" is the first CUDA device that can compute, else the CPU; the CPU, too, for what runs there alone
        (the native runtime, weights in int8 or int4, an 8-bit KV cache or 8-bit activations). ``device`` says which it
        is.
        dtype: as ``loading.load``.
        more: goes to the constructor. ``experts`` of a safetensors checkpoint are never in memory all at once; after
        ``close`` they are in the checkpoint only. Raises SpecDecError with the reason if anything is missing or unfit.
        """
        name = os.fspath(name)
        way = {key: str(more.get(key, usual)) for key, usual in DEFAULTS.items()}
        rounded = more.get("kv_cache", "auto"), more.get("activations", "auto")
        if device == "auto" and needs_cpu(way["runtime"], way["weights"], *rounded):
            device = "cpu"
        if isinstance(drafter, str):
            registry.parse(drafter)  # before the model, which may have to be downloaded
        model, tokenizer = loading.load(
            name,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            experts=more.get("experts") is None,
            check=lambda config: registry.refuse_early(drafter, config, name) if isinstance(drafter, str) else None,
        )
        kept = load_tuned(tuned_path(name, str(dtype).removeprefix("torch."), str(model.device), **way))
        drafter, tuned = _recalled(drafter, kept)
        decoder = cls(model, tokenizer, drafter, **more)
        decoder.tuned, decoder._kept = tuned, kept
        return decoder

    def close(self) -> None:
        """Give the model back as it was: experts that were offloaded are where they were. Nothing else needs it."""
        if self.target.experts is not None:
            self.target.experts.close()
            self.target.experts = None

    def __enter__(self) -> SpecDecoder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @checked
    def with_drafter(self, drafter: str | Path | Drafter, **drafter_options: Any) -> SpecDecoder:
        """A second decoder with another drafter, sharing this one's model, tokenizer, target and verifier."""
        other = copy.copy(self)
        drafter, other.tuned = _recalled(drafter, self._kept)
        other.drafter = other._drafter(drafter, drafter_options)
        other._auto, other._kept_at = None, -KEEP_EVERY
        return other

    def _drafter(self, drafter: str | Path | Drafter, given: dict[str, Any]) -> Drafter:
        """Load the drafter if it is named, and bind it."""
        if isinstance(drafter, str | Path):
            text = drafter if isinstance(drafter, str) else str(drafter.absolute())  # a folder may be called "medusa"
            parts = registry.parse(text)
            name, source = parts[0] if len(parts) == 1 else ("hybrid", text)
            drafter = cast(Drafter, registry.lookup("drafters", name).load(self.target, source, **given))
        unscored = self.verifier.threshold is not None
        if unscored and drafter.drafts and not drafter.leaves_early:
            raise SpecDecError(
                f"verifier '{self.verifier.name}' accepts drafts without scoring them, so it takes a drafter that "
                f"leaves the model early and has a confidence ({registry.having('leaves_early')}); "
                f"'{drafter.name}' does not"
            )
        drafter.bind(self.target)
        if self.verifier.propagates and drafter.drafts and not drafter.leaves_state:
            raise SpecDecError(
                f"states are propagated from the layer at which a token leaves ({registry.having('leaves_state')}); "
                f"'{drafter.name}' leaves no state there; use fill=exact"
            )
        return drafter

    @checked
    def request(
        self,
        prompt: SkipValidation[Prompt],
        *,
        stream: Annotated[Whole, Field(ge=0)] = 0,
        draft: bool = True,
        scope: str | None = None,
        sampler: RowSampler | None = None,
        **given: Unpack[RequestOptions],
    ) -> Request:
        """A request for an engine, with the penalties and the end tokens of the model's ``generation_config``.

        stream: which of several answers to one prompt. draft: False decodes plainly. scope: as in ``Request``. sampler:
        of the tokens, in place of the options of sampling, of processors and of the config.
        Raises SpecDecError for values of the wrong type or out of range and for prompts that do not fit.
        """
        context, ignore_eos, logprobs = self.target.context, given.get("ignore_eos", False), given.get("logprobs")
        ids = encode(self.tokenizer, prompt, given.get("chat"), given.get("system"), context=context)
        check_prompt(ids, self.target)
        limit = min(given.get("max_new_tokens", MAX_NEW_TOKENS), context - len(ids))
        if (stops := _stops(given)) and self.tokenizer is None:
            raise SpecDecError("stop strings need a tokenizer; give SpecDecoder one")
        if given.get("prompt_logprobs") and logprobs is None:
            raise SpecDecError("prompt_logprobs goes with logprobs; give the number of likely tokens, such as 1")
        if logprobs is not None and self.verifier.threshold is not None:
            raise SpecDecError(
                f"verifier '{self.verifier.name}' accepts drafts without scoring them, so there are no "
                "log-probabilities; use the verifier 'exact'"
            )
        if sampler is None:
            asked: dict[str, Any] = {name: value for name, value in given.items() if name in SAMPLING}
            params, others = SamplingParams(**asked), given.get("logits_processor", ())
            processors = generation_config.logits_processors(self.model, ids, limit, params.repetition_penalty, others)
            if (rule := given.get("constraint")) is not None:
                processors.append(self.compile_constraint(rule, ignore_eos).state(ids))
            own = replace(params, repetition_penalty=None)  # transformers has made it
            sampler = RowSampler(own, processors, stream, start=len(ids))
        return Request(
            ids,
            limit,
            eos=frozenset() if ignore_eos else self.eos_ids(),
            stop=Detokenizer(self.tokenizer, stops).push if stops else None,
            draft=draft,
            sampler=sampler,
            logprobs=logprobs,
            prompt_logprobs=given.get("prompt_logprobs", False),
            scope=scope,
        )

    @checked
    def open(
        self,
        prompts: SkipValidation[Sequence[Prompt]],
        *,
        num_speculative_tokens: Depth = "auto",
        max_rows: Count | None = None,
        **given: Unpack[RequestOptions],
    ) -> Generation:
        """Start a generation: the form under ``generate`` and ``stream`` that gives text and figures as they grow.

        Options: ``GenerationOptions``. Raises SpecDecError for values of the wrong type or out of range and for prompts
        that do not fit.
        """
        if isinstance(prompts, Tensor) and prompts.dim() == 2:
            prompts = list(prompts)
        if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes):
            raise SpecDecError(f"prompts must be a list of prompts; got {short_repr(prompts)}; generate takes one")
        if not prompts:
            raise SpecDecError("there is no prompt to generate from")
        names = ["prompt"] if len(prompts) == 1 else [f"prompts[{i}]" for i in range(len(prompts))]
        how = given.get("chat"), given.get("system")
        ids = [
            encode(self.tokenizer, prompt, *how, name, self.target.context)
            for name, prompt in zip(names, prompts, strict=True)
        ]
        if (rule := given.get("constraint")) is not None:
            given["constraint"] = self.compile_constraint(rule, given.get("ignore_eos", False))  # once for all rows
        if num_speculative_tokens == "auto" and self.tuned is not None:
            num_speculative_tokens = self.tuned.num_speculative_tokens
        requests = [self.request(row, stream=n, **given) for row, n in zip(ids, streams(ids), strict=True)]
        engine = self.manual_engine(num_speculative_tokens, max_rows=max_rows or len(ids), max_waiting=len(ids))
        try:
            return Generation(engine, requests, self.tokenizer, _stops(given))
        except BaseException:
            engine.close()
            raise

    @checked
    def generate(self, prompt: SkipValidation[Prompt], **given: Unpack[GenerationOptions]) -> GenerationOutput:
        """Generate from one prompt (text, token ids, a tensor, or chat messages)."""
        return self.generate_batch([prompt], **given)[0]

    @checked
    def generate_batch(
        self, prompts: SkipValidation[Sequence[Prompt]], **given: Unpack[GenerationOptions]
    ) -> list[GenerationOutput]:
        """Generate from several prompts at once; rows may differ in length, acceptance and end.

        A SpecDecError that ends decoding carries what was generated until then as ``outputs``.
        """
        with self.open(prompts, **given) as generation:
            try:
                for _ in generation.steps():
                    pass
            except SpecDecError as error:
                error.outputs = generation.outputs()
                raise
            return generation.outputs()

    @checked
    def stream(self, prompt: SkipValidation[Prompt], **given: Unpack[GenerationOptions]) -> Iterator[str]:
        """Yield text as it is accepted. Closing the iterator early ends the generation and frees its memory."""
        with self.open([prompt], **given) as generation:
            for pieces in generation:
                if pieces[0]:
                    yield pieces[0]

    @checked
    def engine(
        self,
        *,
        max_rows: Count = 16,
        max_waiting: Annotated[Whole, Field(ge=0)] = 256,
        kv_memory: Count | None = None,
        prefill_chunk: Count | None = None,
        num_speculative_tokens: Depth = "auto",
    ) -> Engine:
        """Start an engine, which serves requests that come at any time; until it is closed, the drafter is its own.

        max_rows: most requests that are decoded at once. max_waiting: most that wait beside them; one more is refused.
        kv_memory: bytes of keys and values that are held, of texts for later requests, too; None: half of the memory
        that is free. prefill_chunk: most tokens of new prompts that running requests wait for in a step; None: as many
        as suit the device.
        num_speculative_tokens: as in ``open``.
        """
        engine = self.manual_engine(
            num_speculative_tokens,
            max_rows=max_rows,
            max_waiting=max_waiting,
            kv_memory=free_memory(self.device) // 2 if kv_memory is None else kv_memory,
            prefill_chunk=prefill_chunk or PARTS.get(self.device.type, CHUNK),
            reuse=True,
        )
        return engine.start()

    def manual_engine(self, num_speculative_tokens: Depth = "auto", **how: Any) -> Engine:
        """An engine whose steps the caller runs; until it is closed, the drafter is its own. how: as ``Engine``."""
        claim = self._claim()
        try:
            policy = self._policy(num_speculative_tokens)
            engine = Engine(self.target, self.drafter, self.verifier, policy, **how)
        except BaseException:
            _busy.discard(claim)
            raise
        release = weakref.finalize(engine, _busy.discard, claim)
        engine.on_close = functools.partial(self._ended, policy, release)
        return engine

    def _claim(self) -> int:
        """Take the drafter for a generation. Raises SpecDecError if another one is using it."""
        with _claiming:
            if id(self.drafter) in _busy:
                raise SpecDecError(
                    "a generation of this SpecDecoder is still open; finish or close it first, or make a second "
                    "decoder for requests at the same time (with_drafter)"
                )
            _busy.add(id(self.drafter))
            return id(self.drafter)

    def compile_constraint(
        self, constraint: Constraint | CompiledConstraint, ignore_eos: bool = False
    ) -> CompiledConstraint:
        """Prepare a constraint for requests. Raises SpecDecError where it is invalid or cannot be kept."""
        if isinstance(constraint, CompiledConstraint):
            return constraint
        if ignore_eos:
            raise SpecDecError("a constraint ends a text, so ignore_eos cannot be given with it; leave one out")
        if self.verifier.threshold is not None:
            raise SpecDecError(
                f"verifier '{self.verifier.name}' accepts drafts without scoring them, so it cannot keep a constraint; "
                "use the verifier 'exact'"
            )
        return compile_constraint(constraint, self.tokenizer, self.target.vocab_size, self.eos_ids())

    def _policy(self, num_speculative_tokens: Depth) -> DepthPolicy:
        if num_speculative_tokens != "auto":
            return FixedDepth(int(num_speculative_tokens))
        if not self.drafter.drafts:
            return FixedDepth(0)
        if self.verifier.threshold is not None:
            return FixedDepth(MAX_DEPTH)  # the drafter's confidence ends a draft
        if not self.verifier.lossless:
            return FixedDepth(LOSSY_DEPTH)  # the text depends on the depth, so no clock may choose it
        if self._auto is None:
            self._auto = AutoDepth(costs(self.target, self.drafter, self.verifier), self.drafter.has_probabilities)
        return self._auto

    def _ended(self, policy: DepthPolicy, release: Callable[[], object]) -> None:
        """Keep the costs that the request measured, and release the drafter."""
        try:
            if isinstance(policy, AutoDepth) and time.monotonic() - self._kept_at >= KEEP_EVERY:
                store(self.target, self.drafter, policy.costs())
                self._kept_at = time.monotonic()
        finally:
            release()

    def eos_ids(self) -> frozenset[int]:
        """Token ids that end a generation, as ``model.generate`` takes them."""
        return generation_config.eos_token_ids(self.model, self.tokenizer)


def _stops(given: RequestOptions) -> list[str]:
    stop = given.get("stop", ())
    return [stop] if isinstance(stop, str) else list(stop)


def _recalled(drafter: str | Path | Drafter, kept: Tuned | None) -> tuple[str | Path | Drafter, Tuned | None]:
    """The drafter, and the tuned settings if they say which it is."""
    return (kept.drafter, kept) if drafter == "auto" and kept is not None else (drafter, None)
