"""The keyword arguments of the Python API. Their types define bounds and documentation."""

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
    """The options of ``SpecDecoder`` beside the model and the drafter."""

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
    """The options of a request.

    max_new_tokens: most new tokens, 128 by default; the model's context bounds them, too.
    temperature to logit_bias: as in ``SamplingParams``.
    stop: strings that end the text; they may contain special tokens.
    chat: wrap text in the chat template; None does so if the tokenizer has one.
    system: a system message before the prompt.
    logits_processor: processors of transformers, applied at every position.
    ignore_eos: continue after end tokens.
    constraint: what the new text must be (Json, Regex, Grammar or Choice); limit and stop strings may still cut it.
    Tokens without an alternative are drafted without the drafter.
    logprobs: return the log-probability of each new token, and this many of the likeliest tokens at its position. These
    are the model's own, before processors, temperature and constraints.
    prompt_logprobs: return those of the prompt, too.
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
    """The options of ``generate``, ``generate_batch`` and ``stream``.

    num_speculative_tokens: depth of each draft. "auto", the default, chooses it from measured costs and the acceptance
    so far, down to plain decoding; with ``tuned`` settings it is theirs.
    max_rows: most rows that are decoded together; the next starts when one has ended. None is all.
    """

    num_speculative_tokens: Depth
    max_rows: Count | None
