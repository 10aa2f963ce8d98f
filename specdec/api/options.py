"""The keywords of the Python API, by method. What each may be, and what it means, says its type."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from specdec.base.options import Count, Depth, MaxNewTokens, SamplingOptions, Stop, System
from specdec.base.settings import Whole
from specdec.runtimes.experts.offload import ExpertOptions
from specdec.speculation.constraints import CompiledConstraint, Constraint
from specdec.speculation.draft import Verifier

Options = Mapping[str, Any] | None


class DecoderOptions(TypedDict, total=False):
    """What ``SpecDecoder`` takes beside the model and the drafter."""

    drafter_options: Options
    runtime: str
    weights: str
    kv_cache: str
    activations: str
    verifier: str | Verifier
    verifier_options: Options
    exact: bool
    experts: ExpertOptions | None


class RequestOptions(SamplingOptions, total=False):
    """What one prompt is asked with.

    max_new_tokens: most new tokens (128), also bounded by the model's context. temperature to logit_bias: those of
    ``SamplingParams``. stop: strings that end the text; special tokens in them are matched, too. chat: wrap text in the
    chat template (None: if the tokenizer has one), after a ``system`` message. logits_processor: HF processors, applied
    to every position. ignore_eos: go on to the limit. constraint: what the new text must be (Json, Regex, Grammar or
    Choice); the limit and stop strings may still cut it. Tokens that it leaves no choice about are drafted before the
    drafter is asked. logprobs: give the log-probability of each new token, with this many of the likeliest tokens at
    its position. They are the model's own: before processors, temperature and constraints. prompt_logprobs: also of the
    prompt.
    """

    max_new_tokens: MaxNewTokens
    stop: Stop
    chat: bool | None
    system: System
    logits_processor: Annotated[Sequence[Callable[..., Any]], Field(title="a list of logits processors")]
    ignore_eos: bool
    constraint: Annotated[
        Constraint | CompiledConstraint | None, Field(title="a Json, Regex, Grammar or Choice or None")
    ]
    logprobs: Annotated[Whole, Field(ge=0)] | None
    prompt_logprobs: bool


class GenerationOptions(RequestOptions, total=False):
    """What ``generate``, ``generate_batch`` and ``stream`` take: the options of a request, and of its decoding.

    num_speculative_tokens: depth of each draft; "auto" (the default) chooses it from measured costs and running
    acceptance, down to plain decoding (of ``tuned`` settings, it is theirs). max_rows: most rows that are decoded at
    once; another begins when one has ended. None: all.
    """

    num_speculative_tokens: Depth
    max_rows: Count | None
