"""The public API: load a model and a drafter once, then generate, stream and generate in batches."""

from __future__ import annotations

import copy
import functools
import math
import os
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Unpack, overload

import torch
from pydantic import Field, SkipValidation
from torch import Tensor

from specdec.api import drafter_learning, drafter_use
from specdec.api.asynchronous import SharedEngine, SharedRequest
from specdec.api.generation import (
    DecoderOptions,
    Generation,
    GenerationOptions,
    GenerationOutput,
    Options,
    RequestOptions,
)
from specdec.api.prompts import Prompt, encode
from specdec.api.text import Detokenizer, token_ids
from specdec.base.errors import SpecDecError
from specdec.base.memory import free_memory
from specdec.base.options import Count, Depth, SamplingOptions, SamplingParams, new_seed
from specdec.base.settings import Whole, checked, short_repr
from specdec.drafters.m2r2.learned import first_use
from specdec.engine.depth import MAX_DEPTH, AutoDepth, DepthPolicy, FixedDepth, cost_cache
from specdec.engine.engine import Engine
from specdec.engine.request import Request, check_prompt
from specdec.kvcache.disk import PrefixDisk
from specdec.kvcache.prefix import PrefixStore
from specdec.models import catalogue, identity, loading
from specdec.runtimes.prefill import PASS_TOKENS
from specdec.runtimes.select import make_target, needs_cpu
from specdec.speculation import registry
from specdec.speculation.constraints import CompiledConstraint, Constraint, compile_constraint
from specdec.speculation.drafter import Drafter
from specdec.speculation.drafter_spec import DrafterSpec
from specdec.speculation.generation_config import eos_token_ids, logits_processors, own_sampling
from specdec.speculation.sampling import RowSampler, streams
from specdec.speculation.verifier import Verifier
from specdec.speculation.warpers import MinNewTokens, NoBadWords, Processor

Named = str | Path | Drafter | DrafterSpec
SAMPLING = frozenset(SamplingOptions.__annotations__)
MAX_NEW_TOKENS = 128  # default of a request
LOSSY_DEPTH = 4  # "auto" depth of drafts under a lossy rule that scores them
PREFILL_CHUNK = {"cpu": 96}  # tokens of new prompts in a step of an engine, by device: a few blocks of the kernels
KEEP_EVERY = 60.0  # least seconds between two writes of measured costs

_shared = weakref.WeakKeyDictionary["SpecDecoder", SharedEngine]()  # engines of calls on event loops
PREFIX_SHARE = 4  # the part of the free memory that texts of earlier calls may take: one in so many bytes
LEARN = True  # whether a drafter that teaches itself learns by default


class SpecDecoder:
    """A causal language model with a drafter. Runs one generation at a time, in any thread.

    Decoders in several threads may share a model and a target (``with_drafter``), but not a Drafter object: it serves
    one generation, and a second one raises an error.

    model, tokenizer: loaded by transformers, or by ``from_pretrained``, which needs no transformers for most models in
    the native runtime: ``model`` is then a ``NativeModel``, and ``model.transformers()`` that of transformers with the
    same weights. The tokenizer may be None if all prompts are token ids.
    drafter: a name (``specdec drafters``), a drafter folder, a Hugging Face repository (ORG/NAME[@revision]), a Drafter
    object, or "ngram+X" with one of these texts as X. NAME=SOURCE loads a drafter from SOURCE, such as
    draft-model=MODEL. "auto" is ngram with the m2r2 shipped for the model, else with the multi-token prediction layer
    (mtp) in its files, else with an m2r2 that teaches itself; the attribute ``drafter`` is the one in use.
    drafter_options: {name: value} of the drafter's options; for "ngram+X", {"ngram": such a mapping, X: another}.
    runtime: "auto" (the fastest one that supports the model here), "native", "torch" or "transformers".
    weights: "auto" (as loaded; in fewer bits if these hold equal values), "dense" (as loaded), "int8" or "int4"
    (layers quantised; bfloat16 on a CPU). The quantised model, also ``model`` itself, is then the base: output is that
    of its plain decoding.
    kv_cache: "auto" (the model's dtype) or "int8" (8-bit keys and values, half the memory; native runtime), which is
    lossy. The base is then plain decoding with that cache.
    verifier: an object, or a name with ``verifier_options``: "exact", or a lossy one, such as "confident".
    expert_cache: the share (0.25) or the bytes (int) of a mixture's experts that stays in memory; the others are read
    from the disk on demand (bfloat16 on a CPU). None: all, or those for which there is room.
    expert_prefetch: read experts ahead, by forecasts that teach themselves.
    learn: whether a drafter that teaches itself learns, while no generation runs, from the texts that were read and
    generated. None is yes.
    prefix_reuse: keep the keys and values of the last texts, in at most a quarter of the free memory, so that a prompt
    that begins like one of them runs only its new tokens. A verifier that accepts drafts without scores keeps none.
    packed: keep the weights in the layout of the native runtime's kernels in the cache folder, for faster later loads.
    Raises SpecDecError if the model is unsupported or the drafter does not fit it.
    """

    @checked
    def __init__(
        self,
        model: SkipValidation[Any],
        tokenizer: Any = None,
        drafter: Named = "auto",
        *,
        drafter_options: Options = None,
        runtime: str = "auto",
        weights: str = "auto",
        kv_cache: str = "auto",
        verifier: str | Verifier = "exact",
        verifier_options: Options = None,
        expert_cache: float | None = None,
        expert_prefetch: bool = False,
        learn: bool | None = None,
        prefix_reuse: bool = True,
        packed: bool = True,
    ) -> None:
        if not callable(getattr(model, "get_output_embeddings", None)):  # also in wrapped models
            wanted = "a loaded model; SpecDecoder.from_pretrained loads one by name"
            raise SpecDecError(f"model must be {wanted}; got {short_repr(model)}")
        self.verifier = registry.verifier(verifier, verifier_options)
        if hasattr(model, "get_base_model"):  # a PeftModel, whose adapters are in the layers of its base model
            if model.active_peft_config.is_prompt_learning:
                raise SpecDecError("SpecDecoder cannot run adapters that learn prompts; give the base model")
            model = model.get_base_model()
        model, self.tokenizer = model.eval(), tokenizer
        self.learning = LEARN if learn is None else learn
        self.target, self.runtime_note = make_target(
            model, runtime, weights, kv_cache, expert_cache, expert_prefetch, packed
        )
        self.model: Any = self.target.model
        self.target.tokenizer = tokenizer
        self.drafter = self._drafter(drafter, dict(drafter_options or {}))
        self.prefix_reuse = prefix_reuse
        self.prefixes = self._new_prefixes()
        self._auto: AutoDepth | None = None  # shared by all requests, which continue its measurements
        if self.learning and self.drafter.learner is not None:
            first_use()
        self._kept_at = -KEEP_EVERY
        self._changes = self._count_changes()

    def __repr__(self) -> str:
        model = str(self.model.config._name_or_path) or type(self.model).__name__
        return f"SpecDecoder(model={model!r}, drafter={self.drafter.traits.label!r}, runtime={self.target.runtime!r})"

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.target.device

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that is merged into the model (a local one's folder or file name); None: none is."""
        merged = identity.merged_adapter(self.model)
        return None if merged is None else Path(merged.name).name if Path(merged.name).exists() else merged.name

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
        adapter: str | os.PathLike[str] | None = None,
        **more: Unpack[DecoderOptions],
    ) -> SpecDecoder:
        """Load the model ``name``, an embedded one, a Hugging Face id, a folder or a GGUF file, and a drafter for it.

        drafter: as in the constructor.
        dtype: float32, bfloat16, float16 or "auto": the checkpoint's, and bfloat16 for a GGUF file.
        revision: branch, tag or commit of a Hugging Face id; None: the latest.
        trust_remote_code: whether to run Python code of the model's repository.
        adapter: a LoRA adapter that is merged into the weights: a folder of PEFT, a GGUF adapter for a GGUF model, or a
        Hugging Face id. The model with it is then the base.
        device: "auto" is the first CUDA device that can compute, else the CPU. For options that need the CPU (the
        native runtime, int8 or int4 weights, an 8-bit KV cache) it is the CPU.
        more: as in the constructor. With ``expert_cache``, experts are never all in memory.
        Raises SpecDecError if anything is missing or does not fit.
        """
        name = os.fspath(name)
        formats = (str(more.get(key, "auto")) for key in ("runtime", "weights", "kv_cache"))
        paging = more.get("expert_cache") is not None
        if device == "auto" and (paging or needs_cpu(*formats)):
            device = "cpu"
        spec = DrafterSpec.parse(drafter).resolved() if isinstance(drafter, str) else None
        if spec is not None:
            spec.refuse_early(name)
        model, tokenizer = loading.load(
            name,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            adapter=adapter,
            check=lambda config: None if spec is None else spec.refuse_early(name, config),
        )
        return cls(model, tokenizer, drafter if spec is None else spec, **more)

    @checked
    def with_drafter(self, drafter: str | Path | Drafter, drafter_options: Options = None) -> SpecDecoder:
        """Return a decoder with another drafter and this one's model, tokenizer, target and verifier.

        drafter: a name, folder, repository or Drafter object, as the constructor takes it.
        drafter_options: options of the drafter by name; None: its defaults.
        """
        other = copy.copy(self)
        other.drafter = other._drafter(drafter, dict(drafter_options or {}))
        other.prefixes = other._new_prefixes()  # the other decoder may run in another thread
        other._auto, other._kept_at = None, -KEEP_EVERY
        return other

    def _new_prefixes(self) -> PrefixStore | None:
        """Return an empty store of the keys and values of this decoder's texts; None: it does not reuse prefixes.

        It does not with ``prefix_reuse=False``, or a verifier that accepts drafts without scores.
        """
        return PrefixStore() if self.prefix_reuse and self.verifier.threshold is None else None

    def _drafter(self, drafter: Named, given: dict[str, Any]) -> Drafter:
        """Load the drafter named ``drafter``, or take the object; return it, bound to this decoder's target.

        given: options of the drafter by name, for loading; an object ignores them.
        Raises SpecDecError if it does not fit the target, or has no confidence where the verifier needs one.
        """
        if isinstance(drafter, str | Path):  # of a path, all: a folder may be called "medusa"
            drafter = DrafterSpec.parse(drafter if isinstance(drafter, str) else str(drafter.absolute()))
        if isinstance(drafter, DrafterSpec):
            drafter = drafter.load(self.target, given)
        drafter.bind(self.target)
        traits, unscored = drafter.traits, self.verifier.threshold is not None
        if unscored and traits.drafts and not traits.leaves_early:
            raise SpecDecError(
                f"verifier '{self.verifier.name}' accepts drafts without scoring them, so it needs a drafter that "
                f"leaves the model early and has a confidence, such as m2r2 or early-exit; '{traits.label}' does not"
            )
        return drafter

    @checked
    def request(
        self,
        prompt: SkipValidation[Prompt],
        *,
        stream: Annotated[Whole, Field(ge=0, le=2**64 - 1)] = 0,
        num_speculative_tokens: Annotated[Whole, Field(ge=0)] | None = None,
        scope: str | None = None,
        sampler: RowSampler | None = None,
        shown: Sequence[str] = (),
        **given: Unpack[RequestOptions],
    ) -> Request:
        """Make a request for ``Engine.submit``, with the penalties and end tokens of the model's ``generation_config``.

        prompt: text, token ids, a tensor of one sequence, or chat messages.
        stream: number of this answer, from 0, among several to one prompt with one seed, which draw different texts.
        num_speculative_tokens: maximum draft depth; 0: no drafts; None: as deep as pays.
        scope: name of the tenant; cached prefixes are shared only within a scope. None: the default tenant.
        sampler: chooses the tokens instead of the sampling options, the processors and the config; None: these do.
        shown: texts, such as marks of a tool call, whose special tokens stay in the output text; others are left out.
        given: the options of ``RequestOptions``, such as ``max_new_tokens`` or ``temperature``.
        Raises SpecDecError for wrong types, values out of range, and prompts that do not fit the context.
        """
        how = given.get("apply_chat_template"), given.get("system")
        ids = encode(self.tokenizer, prompt, *how, context=self.target.context)
        return self._request(ids, given, stream, num_speculative_tokens, scope, sampler, shown)

    def _request(
        self,
        ids: list[int],
        given: RequestOptions,
        stream: int = 0,
        num_speculative_tokens: int | None = None,
        scope: str | None = None,
        sampler: RowSampler | None = None,
        shown: Sequence[str] = (),
    ) -> Request:
        """Make a request for a prompt that is encoded already.

        ids: token ids of the prompt. given: the options; ``system`` is not used, and ``apply_chat_template`` only says
            whether the text continues the prompt. The other arguments are those of ``request``, which explains them.
        """
        check_prompt(ids, self.target)
        ignore_eos, logprobs = given.get("ignore_eos", False), given.get("logprobs")
        max_new_tokens = min(given.get("max_new_tokens", MAX_NEW_TOKENS), self.target.context - len(ids))
        if (stop := given.get("stop", ())) and self.tokenizer is None:
            raise SpecDecError("stop strings need a tokenizer; give SpecDecoder one")
        stops, hidden = [stop] if isinstance(stop, str) else stop, given.get("stop_token_ids", ())
        if (chat := given.get("apply_chat_template")) is None:
            chat = bool(getattr(self.tokenizer, "chat_template", None))
        before = () if chat else ids
        text = Detokenizer(self.tokenizer, stops, shown, hidden, given.get("min_new_tokens", 0), before)
        if given.get("prompt_logprobs") and logprobs is None:
            raise SpecDecError("prompt_logprobs needs logprobs, the number of likeliest tokens, such as 1; set it")
        if logprobs is not None:
            self._check_scores("there are no log-probabilities")
        if sampler is None:
            sampling = own_sampling(self.model) if given.get("use_model_defaults") else {}
            sampling |= {name: value for name, value in given.items() if name in SAMPLING}
            if sampling.get("seed") is None:
                sampling["seed"] = new_seed()
            params, others = SamplingParams(**sampling), given.get("logits_processor", ())
            processors = logits_processors(self.model, ids, max_new_tokens, params.repetition_penalty, others)
            processors += self._token_rules(given, len(ids))
            if (rule := given.get("constraint")) is not None:
                processors.append(self.compile_constraint(rule, ignore_eos).state(ids))
            own = replace(params, repetition_penalty=None)  # among the processors
            sampler = RowSampler(own, processors, stream, start=len(ids))
        return Request(
            ids,
            max_new_tokens,
            sampler,
            eos=frozenset() if ignore_eos else self.eos_ids(),
            stop_token_ids=text.hidden,
            text=text,
            num_speculative_tokens=num_speculative_tokens,
            logprobs=logprobs,
            prompt_logprobs=given.get("prompt_logprobs", False),
            scope=scope,
        )

    def _token_rules(self, given: RequestOptions, start: int) -> list[Processor]:
        """Return the logits processors for ``min_new_tokens`` and ``bad_words``; [] if neither is given.

        given: the options of the request. start: number of prompt tokens.
        Raises SpecDecError if ``min_new_tokens`` is above ``max_new_tokens`` or meets a constraint, or if there is no
        tokenizer for ``bad_words``.
        """
        found = list[Processor]()
        if least := given.get("min_new_tokens", 0):
            if least > (most := given.get("max_new_tokens", MAX_NEW_TOKENS)):
                raise SpecDecError(f"min_new_tokens is {least}, more than max_new_tokens, {most}; lower it")
            if given.get("constraint") is not None:
                what = "min_new_tokens cannot be combined with a constraint, which ends the text"
                raise SpecDecError(f"{what}; leave one out")
            ends = frozenset() if given.get("ignore_eos") else self.eos_ids()
            found.append(MinNewTokens(least, tuple(ends.union(given.get("stop_token_ids", ()))), start))
        if words := given.get("bad_words", ()):
            if self.tokenizer is None:
                raise SpecDecError("bad_words need a tokenizer; give SpecDecoder one")
            spelled = (space + word.lstrip() for word in words for space in ("", " "))
            ways = {tuple(token_ids(self.tokenizer, text, add_special=False)) for text in spelled}
            found.append(NoBadWords(tuple(sorted(ways - {()})), start))
        return found

    @checked
    def open(
        self,
        prompts: SkipValidation[Sequence[Prompt]],
        *,
        num_speculative_tokens: Depth = "auto",
        max_rows: Count | None = None,
        n: Count = 1,
        scope: str | None = None,
        **given: Unpack[RequestOptions],
    ) -> Generation:
        """Start a generation, whose text and metrics can be read after each step. ``generate`` and ``stream`` use it.

        Nothing is decoded until the caller iterates over the generation, which has the drafter until it is closed.

        prompts: each is text, token ids, a tensor of one sequence, or chat messages.
        num_speculative_tokens: draft length; "auto": the engine chooses it in each step.
        max_rows: maximum number of rows that are decoded together; None: all.
        n: number of rows for each prompt, which draw different texts.
        scope: name of the tenant; cached prefixes are shared only within a scope. None: the default tenant.
        given: the options of ``RequestOptions``, such as ``max_new_tokens`` or ``temperature``.
        Raises SpecDecError for wrong types, values out of range, and prompts that do not fit the context.
        """
        if isinstance(prompts, Tensor) and prompts.dim() == 2:
            self._refuse_padding(prompts)
            prompts = list(prompts)
        if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes):
            raise SpecDecError(
                f"prompts must be a list of prompts; got {short_repr(prompts)}; use generate for one prompt"
            )
        if not prompts:
            raise SpecDecError("the list of prompts is empty; give at least one")
        names = ["prompt"] if len(prompts) == 1 else [f"prompts[{i}]" for i in range(len(prompts))]
        how = given.get("apply_chat_template"), given.get("system")
        ids = [
            row
            for name, prompt in zip(names, prompts, strict=True)
            for row in [encode(self.tokenizer, prompt, *how, name, self.target.context)] * n
        ]
        if given.get("seed") is None:
            given["seed"] = new_seed()  # of all rows
        if (rule := given.get("constraint")) is not None:
            given["constraint"] = self.compile_constraint(rule, given.get("ignore_eos", False))  # once, for all rows
        numbered = zip(ids, streams(ids), strict=True)
        requests = [self._request(row, given, stream, scope=scope) for row, stream in numbered]
        rows, prefixes = max_rows or len(ids), self._own_prefixes()
        engine = self.stepped_engine(num_speculative_tokens, max_rows=rows, max_waiting=len(ids), prefixes=prefixes)
        try:
            return Generation(engine, requests)
        except BaseException:
            engine.close()
            raise

    def _refuse_padding(self, prompts: Tensor) -> None:
        """Raise SpecDecError if a row of ``prompts`` [B, T] begins or ends with padding that means nothing else."""
        pad, begins = (getattr(self.tokenizer, name, None) for name in ("pad_token_id", "bos_token_id"))
        edges = {*prompts[:, :1].flatten().tolist(), *prompts[:, -1:].flatten().tolist()}
        if pad in edges - {begins, *self.eos_ids()}:
            raise SpecDecError("prompts has padding, which would be read as text; give a list of unpadded prompts")

    @overload
    def generate(self, prompt: Prompt, *, n: None = None, **given: Unpack[GenerationOptions]) -> GenerationOutput: ...

    @overload
    def generate(self, prompt: Prompt, *, n: int, **given: Unpack[GenerationOptions]) -> list[GenerationOutput]: ...

    @checked
    def generate(
        self, prompt: SkipValidation[Prompt], *, n: Count | None = None, **given: Unpack[GenerationOptions]
    ) -> GenerationOutput | list[GenerationOutput]:
        """Generate from one prompt: text, token ids, a tensor, or chat messages. Returns when all text is there.

        n: number of answers. None: the result is one output; else it is a list of n outputs.
        given: the options of ``GenerationOptions``, such as ``max_new_tokens`` or ``temperature``.
        Raises SpecDecError as ``generate_batch`` does.
        """
        found = self.generate_batch([prompt], n=n, **given)
        return found[0] if n is None else found

    @overload
    def chat(self, messages: Sequence[dict[str, str]], **given: Unpack[GenerationOptions]) -> GenerationOutput: ...

    @overload
    def chat(
        self, messages: Sequence[dict[str, str]], *, n: int, **given: Unpack[GenerationOptions]
    ) -> list[GenerationOutput]: ...

    @checked
    def chat(
        self,
        messages: SkipValidation[Sequence[dict[str, str]]],
        *,
        n: Count | None = None,
        **given: Unpack[GenerationOptions],
    ) -> GenerationOutput | list[GenerationOutput]:
        """Answer chat messages (``[{"role", "content"}, ...]``).

        n: number of answers. None: the result is one output; else it is a list of n outputs.
        given: the options of ``GenerationOptions``, such as ``max_new_tokens`` or ``temperature``.
        Raises SpecDecError as ``generate_batch`` does.
        """
        if isinstance(messages, str) or not all(isinstance(each, Mapping) for each in messages):
            raise SpecDecError(
                f"messages must be a list of mappings with 'role' and 'content'; got {short_repr(messages)}"
            )
        found = self.generate_batch([messages], n=n, **given)
        return found[0] if n is None else found

    @checked
    def generate_batch(
        self, prompts: SkipValidation[Sequence[Prompt]], *, n: Count | None = None, **given: Unpack[GenerationOptions]
    ) -> list[GenerationOutput]:
        """Generate from several prompts at once; return the outputs in the order of the prompts.

        prompts: each is text, token ids, a tensor of one sequence, or chat messages.
        n: number of answers to each prompt, which follow one another in the result. None: one.
        given: the options of ``GenerationOptions``, such as ``max_new_tokens`` or ``temperature``.

        Raises SpecDecError for wrong types, values out of range, and prompts that do not fit the context. One that is
        raised during decoding has the outputs until then as ``outputs``.
        """
        with self.open(prompts, n=n or 1, **given) as generation:
            try:
                for _ in generation.steps():
                    pass
            except SpecDecError as error:
                error.outputs = generation.outputs()
                raise
            return generation.outputs()

    @checked
    def stream(self, prompt: SkipValidation[Prompt], **given: Unpack[GenerationOptions]) -> Iterator[str]:
        """Yield the new text of one prompt, piece by piece, as tokens are accepted.

        Closing the iterator ends the generation and frees its memory.

        prompt: text, token ids, a tensor, or chat messages.
        given: the options of ``GenerationOptions``, such as ``max_new_tokens`` or ``temperature``.
        """
        with self.open([prompt], **given) as generation:
            for pieces in generation:
                if pieces[0]:
                    yield pieces[0]

    async def agenerate(
        self, prompt: Prompt, *, num_speculative_tokens: int | None = None, **given: Unpack[RequestOptions]
    ) -> GenerationOutput:
        """Generate as ``generate`` does, on an event loop. Calls that overlap are decoded together.

        prompt, given: as in ``request``.
        num_speculative_tokens: maximum draft depth; None: as deep as pays. Raises SpecDecError as ``generate`` does.
        """
        async with self._submit(prompt, num_speculative_tokens, given) as running:
            async for _ in running:
                pass
            return running.output()

    async def astream(
        self, prompt: Prompt, *, num_speculative_tokens: int | None = None, **given: Unpack[RequestOptions]
    ) -> AsyncIterator[str]:
        """Yield text as ``stream`` does, on an event loop: ``async for piece in decoder.astream(prompt)``.

        prompt, given: as in ``request``.
        num_speculative_tokens: maximum draft depth; None: as deep as pays. Raises SpecDecError as ``generate`` does.
        """
        async with self._submit(prompt, num_speculative_tokens, given) as running:
            async for piece in running:
                yield piece

    def _submit(self, prompt: Prompt, depth: int | None, given: RequestOptions) -> SharedRequest:
        """Return an async context manager for one request of ``agenerate`` or ``astream``. Nothing runs before it.

        Entering it makes the request and submits it to the engine that all such calls of this decoder share; iterating
        over it yields the text.

        prompt, given: as in ``request``. depth: maximum draft depth; None: as deep as pays.
        """
        make = functools.partial(self.request, prompt, num_speculative_tokens=depth, **given)
        shared = _shared.setdefault(self, SharedEngine())
        return SharedRequest(shared, self._start_shared, make)

    def _start_shared(self) -> Engine:
        """Return the running engine of ``agenerate`` and ``astream``, with the prefixes that ``generate`` has, too."""
        return self.stepped_engine(
            kv_memory=free_memory(self.device) // 2,
            prefill_chunk=self._prefill_chunk,
            prefixes=self._own_prefixes(),
            learn=self.learning,
        ).start()

    @checked
    def engine(
        self,
        *,
        max_rows: Count = 16,
        max_waiting: Annotated[Whole, Field(ge=0)] = 256,
        kv_memory: Count | None = None,
        prefill_chunk: Count | None = None,
        num_speculative_tokens: Depth = "auto",
        prefix_cache: Path | None = None,
        prefix_cache_size: Count = 10 << 30,
    ) -> Engine:
        """Return a running engine: its thread decodes the requests that ``Engine.submit`` queues, at any time.

        It runs, and has the drafter, until ``Engine.close`` or the end of a ``with`` block on it. Raises SpecDecError
        if another engine or generation has the drafter.

        max_rows: maximum number of requests that are decoded together.
        max_waiting: maximum number of requests in the queue; one more raises QueueFullError.
        kv_memory: bytes of the KV cache, cached prefixes included; None: half of the free memory.
        prefill_chunk: maximum number of prompt tokens in a step; None: it depends on the device.
        num_speculative_tokens: depth of each draft; "auto": chosen from measured costs and the acceptance so far.
        prefix_cache: a folder for the keys and values of texts, so that later processes can begin with them, too;
        None: they stay in memory.
        prefix_cache_size: maximum size of this folder in bytes.
        """
        disk, prefixes = None, self._new_prefixes()
        if prefix_cache is not None:
            if prefixes is None:
                why = "with prefix_reuse=False" if not self.prefix_reuse else f"with verifier '{self.verifier.name}'"
                raise SpecDecError(f"no prefixes are kept {why}, so there is nothing to store; leave out prefix_cache")
            own, empty = identity.numbers(self.target, identity.content(self.target.model)), self.target.new_cache(0)
            disk = PrefixDisk(prefix_cache, prefix_cache_size, own, bool(empty.recurrent), empty.window)
        try:
            engine = self.stepped_engine(
                num_speculative_tokens,
                max_rows=max_rows,
                max_waiting=max_waiting,
                kv_memory=free_memory(self.device) // 2 if kv_memory is None else kv_memory,
                prefill_chunk=prefill_chunk or self._prefill_chunk,
                prefixes=prefixes,
                disk=disk,
                learn=self.learning,
            )
        except BaseException:
            if disk is not None:
                disk.close()
            raise
        return engine.start()

    @property
    def _prefill_chunk(self) -> int:
        return PREFILL_CHUNK.get(self.device.type, PASS_TOKENS)

    def _own_prefixes(self) -> PrefixStore | None:
        """Return the store of this decoder's texts, which may take a share of the free memory; None: it has none."""
        if self.prefixes is not None:
            self.prefixes.max_bytes = (free_memory(self.device) + self.prefixes.nbytes) // PREFIX_SHARE
        return self.prefixes

    def stepped_engine(self, num_speculative_tokens: Depth = "auto", **how: Any) -> Engine:
        """Return an engine without a thread, whose steps the caller runs with ``Engine.steps``.

        It has the drafter until ``Engine.close``. Raises SpecDecError if another engine or generation has it.

        num_speculative_tokens: draft length; "auto": the engine chooses it in each step.
        how: further keyword arguments of ``Engine``, such as ``max_rows``.
        """
        if self.model_changed:
            raise SpecDecError("the model's weights have changed since this SpecDecoder was made; make another one")
        claimed = drafter_use.claim(self.drafter)
        try:
            policy = self._policy(num_speculative_tokens)
            engine = Engine(self.target, self.drafter, self.verifier, policy, **how)
        except BaseException:
            drafter_use.release(claimed)
            raise
        release = weakref.finalize(engine, drafter_use.release, claimed)
        engine.on_close = functools.partial(self._engine_closed, policy, release)
        return engine

    @property
    def model_changed(self) -> bool:
        """Whether the model's weights were changed in place, by an optimizer for example: a decoder keeps copies."""
        return self._count_changes() != self._changes

    def _count_changes(self) -> int:
        """Return how often the parameters were changed in place, which PyTorch counts but for inference tensors."""
        with self.target.lock:  # another decoder may be fusing the weights
            return sum(each._version for each in self.model.parameters() if not each.is_inference())

    def compile_constraint(
        self, constraint: Constraint | CompiledConstraint, ignore_eos: bool = False
    ) -> CompiledConstraint:
        """Compile a constraint for requests. Raises SpecDecError if it is invalid or cannot be satisfied.

        constraint: a Json, Regex, Grammar or Choice; a compiled one is returned unchanged.
        ignore_eos: whether the requests continue after end tokens; then a constraint, which ends the text, is refused.
        """
        if isinstance(constraint, CompiledConstraint):
            return constraint
        if ignore_eos:
            raise SpecDecError("ignore_eos cannot be combined with a constraint, which ends the text; leave one out")
        self._check_scores("it cannot enforce a constraint")
        return compile_constraint(constraint, self.tokenizer, self.target.vocab_size, self.eos_ids())

    def _check_scores(self, otherwise: str) -> None:
        """Raise SpecDecError if the verifier accepts drafts without scores.

        otherwise: what is then impossible, a clause for the message, such as "there are no log-probabilities".
        """
        if self.verifier.threshold is not None:
            why = f"verifier '{self.verifier.name}' accepts drafts without scoring them, so {otherwise}"
            raise SpecDecError(f"{why}; use the verifier 'exact'")

    def _policy(self, num_speculative_tokens: Depth) -> DepthPolicy:
        """Return the policy that chooses the depth of each draft. num_speculative_tokens: a fixed depth, or "auto".

        With "auto" and a lossless verifier, all engines of this decoder share one policy and its measurements.
        """
        if num_speculative_tokens != "auto":
            return FixedDepth(int(num_speculative_tokens))
        if not self.drafter.traits.drafts:
            return FixedDepth(0)
        if self.verifier.threshold is not None:
            return FixedDepth(MAX_DEPTH)  # the drafter's confidence ends a draft
        if not self.verifier.lossless:
            return FixedDepth(LOSSY_DEPTH)  # the text depends on the depth, which timings must not choose
        if self._auto is None:
            self._auto = AutoDepth.of(self.drafter, self.target.token_costs, cost_cache.load(self.target, self.drafter))
        return self._auto

    def _engine_closed(self, policy: DepthPolicy, release: Callable[[], object]) -> None:
        """Free the drafter and keep what was measured; the engine calls it when it is closed (``on_close``).

        policy: the engine's; costs that an ``AutoDepth`` has measured go to the cache folder, at most once a minute.
        release: ends the engine's use of the drafter, which may then learn in a thread of its own.
        """
        try:
            if isinstance(policy, AutoDepth) and time.monotonic() - self._kept_at >= KEEP_EVERY:
                cost_cache.store(self.target, self.drafter, policy.costs())
                self._kept_at = time.monotonic()
        finally:
            release()
        if self.learning and self.drafter.learner is not None:
            drafter_learning.learn_when_idle(self.drafter)

    def learn(self, seconds: float = math.inf) -> bool:
        """Let the drafter learn from earlier texts now, for at most about ``seconds``, and save what it has learned.

        The call returns when it is done; a drafter that does not teach itself has nothing to learn from.
        Returns whether it has more to learn from. Raises SpecDecError while a generation or an engine is open.
        """
        return drafter_learning.learn(self.drafter, seconds)

    def eos_ids(self) -> frozenset[int]:
        """Return the ids of the end tokens, each of which ends a generation, as in ``model.generate``."""
        return eos_token_ids(self.model, self.tokenizer)
