"""Options of loading and generation: name, bounds and documentation of each, for Python, command line, server and YAML.

Also checks of the options of drafters and of the command line. Imports nothing heavy.
"""

import math
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import ByteSize, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from specdec.base import inputs
from specdec.base.errors import SpecDecError, did_you_mean
from specdec.base.settings import Number, Whole, checked_class, validate

Runtime = Literal["auto", "native", "torch", "transformers"]
Weights = Literal["auto", "dense", "int8", "int4"]
KVCacheFormat = Literal["auto", "int8"]

MAX_SEED = 2**63 - 1
GREEDY_BELOW = 1e-5  # temperatures below it: logits / T would overflow float32, and the softmax is one-hot anyway

Count = Annotated[Whole, Field(ge=1)]
Bias = Annotated[Number, Field(ge=-100, le=100)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]

# How the next token is chosen. The description is the option's documentation, also on the command line.
Temperature = Annotated[Number, Field(ge=0, description="0 is greedy: always the likeliest token.")]
TopK = Annotated[Whole, Field(ge=0, description="Keep this many likeliest tokens; 0 is off.")]
TopP = Annotated[
    Number, Field(gt=0, le=1, description="Keep the likeliest tokens up to this total probability; 1 is off.")
]
MinP = Annotated[
    Number,
    Field(
        ge=0,
        le=1,
        description="Keep tokens that have at least this share of the likeliest token's probability; 0 is off.",
    ),
]
RepetitionPenalty = Annotated[
    Annotated[Number, Field(gt=0)] | None,
    Field(description="Above 1 discourages repetition, 1 is off; if not given, the model's own."),
]
GivenSeed = Annotated[Whole, Field(ge=0, le=MAX_SEED)]
Seed = Annotated[
    GivenSeed | None,
    Field(
        description="The same seed gives the same text; without one, each request draws its own.",
    ),
]
FrequencyPenalty = Annotated[
    Penalty, Field(description="Subtracted from a token's logit for each time that it has occurred.")
]
PresencePenalty = Annotated[Penalty, Field(description="Subtracted from the logit of each token that has occurred.")]
LogitBias = Annotated[
    Mapping[Annotated[Whole, Field(ge=0)], Bias] | None,
    Field(
        description="Number that is added to a token's logit; repeatable.",
    ),
]

# What the text is, and where it ends
MaxNewTokens = Annotated[Count, Field(description="Largest number of new tokens; the model's context limits it, too.")]
Stop = Annotated[str | Sequence[str], Field(description="End the answer before this text; repeatable.")]
MinNewTokens = Annotated[
    Whole,
    Field(ge=0, description="Smallest number of new tokens: no end token and no stop string ends the text before."),
]
StopTokenIds = Annotated[
    Sequence[Annotated[Whole, Field(ge=0)]],
    Field(description="Tokens that end the text, and are not in it; repeatable."),
]
BadWords = Annotated[
    Sequence[Annotated[str, Field(min_length=1)]],
    Field(description="Text that the new tokens must not contain; repeatable."),
]
System = Annotated[str | None, Field(description="System message before the prompt.")]
Depth = Annotated[
    Literal["auto"] | Annotated[Whole, Field(ge=0)],
    Field(description="Number of tokens that are drafted in a step; auto chooses it; 0 drafts nothing."),
]


def new_seed() -> int:
    """Return a random seed in 0 .. ``MAX_SEED``."""
    return secrets.randbelow(MAX_SEED + 1)


@checked_class
@dataclass(frozen=True)
class SamplingParams:
    """The sampling parameters of one request. Raises SpecDecError for a value out of range.

    temperature: 0, or a value below ``GREEDY_BELOW``, is greedy decoding.
    top_k: keep this number of the likeliest tokens; 0 is off.
    top_p: keep the likeliest tokens up to this total probability; 1 is off.
    min_p: keep tokens with at least this share of the likeliest token's probability; 0 is off.
    repetition_penalty: as in transformers, for tokens of prompt and answer; above 1 discourages them, 1 is off; None:
        the value of the model's generation config.
    seed: seed of the random numbers.
    frequency_penalty: subtracted from a token's logit for each time that the token is among the new tokens.
    presence_penalty: subtracted once from the logit of each token that is among the new tokens.
    logit_bias: {token id: number added to its logit}; None: nothing is added.
    """

    temperature: Temperature = 0.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = None
    seed: GivenSeed = 0
    frequency_penalty: FrequencyPenalty = 0.0
    presence_penalty: PresencePenalty = 0.0
    logit_bias: LogitBias = None

    def __post_init__(self) -> None:
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)


class SamplingOptions(TypedDict, total=False):
    """The fields of ``SamplingParams`` as optional keyword arguments of a function, with the same meaning and defaults.

    Only the seed differs: if it is missing or None, a random one is drawn.
    """

    temperature: Temperature
    top_k: TopK
    top_p: TopP
    min_p: MinP
    repetition_penalty: RepetitionPenalty
    seed: Seed
    frequency_penalty: FrequencyPenalty
    presence_penalty: PresencePenalty
    logit_bias: LogitBias


def description(option: Any) -> str:
    """Return the documentation of an option, for help texts: the ``description`` of pydantic's ``Field`` in its type.

    option: a type of this module, such as ``Temperature``.
    """
    return next(each.description for each in reversed(get_args(option)) if getattr(each, "description", None))


def check_names(drafter: str, given: Iterable[str], known: Sequence[str] = (), source: str | None = None) -> None:
    """Check the options, and the SOURCE, that a user gave to a drafter (as NAME or NAME=SOURCE).

    drafter: its name in messages. given: names of the options that the user gave. known: names of those that it has.
    source: the user's SOURCE, such as a folder, for a drafter that takes none; None: there is nothing to refuse.
    Raises SpecDecError if a name in ``given`` is not in ``known``, and if there is a ``source``.
    """
    for name in given:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise SpecDecError(f"drafter '{drafter}' has no option '{name}'{did_you_mean(name, known)}; {has}")
    if source is not None:
        raise SpecDecError(f"drafter '{drafter}' takes no source; leave '={source}' out")


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return ``value`` if it is a whole number in low .. high (None: no upper bound), else raise SpecDecError.

    name: the option's name in the message.
    """
    return validate(name, value, Annotated[Whole, Field(ge=low, le=high)])


def check_ints(name: str, values: Any, low: int) -> tuple[int, ...]:
    """Return ``values`` as a tuple if they are a sequence of whole numbers >= low, else raise SpecDecError.

    name: the option's name in the message.
    """
    return tuple(validate(name, values, Sequence[Annotated[Whole, Field(ge=low)]]))


def check_probability(name: str, value: Any) -> float:
    """Return ``value`` if it is a number in [0, 1], else raise SpecDecError, which names the option ``name``."""
    return validate(name, value, Annotated[Number, Field(ge=0, le=1)])


def parse_assignments(flag: str, pairs: Iterable[str]) -> dict[str, Any]:
    """Parse the texts ``KEY=VALUE`` in ``pairs`` into {key: value}, where values are YAML.

    flag: the repeatable command-line option that has them, for messages. Raises SpecDecError for other texts.
    """
    out: dict[str, Any] = {}
    for pair in pairs:
        key, given, text = pair.partition("=")
        try:
            value = inputs.parse_yaml(text)
            earlier = out.get(key)  # m2r2={width: 2} and m2r2={nodes: 4}: options of one drafter
            out[key] = {**earlier, **value} if isinstance(earlier, dict) and isinstance(value, dict) else value
        except ValueError:
            given = ""
        if not (key and given):
            raise SpecDecError(f"{flag} takes KEY=VALUE, such as exit_layer=8 or skip=[4,5]; got '{pair}'")
    return out


def parse_size(flag: str, text: str) -> float | int:
    """Parse ``text``, the value of the command-line option ``flag``: a share or a size.

    A share ("0.25", "25%") becomes a float in (0, 1]; a size ("300MB", "2GiB", "1e9") becomes an int of bytes. Raises
    SpecDecError for other texts.
    """
    with suppress(ValueError):
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if 0 < number <= 1:
            return number
        if 1 < number < math.inf and not text.endswith("%"):
            return int(number)
    with suppress(ValidationError):
        # pydantic ignores what follows the unit, and takes bits
        named = re.fullmatch(r"(?i)[\d.]+ *(?!\w*bit)\w+", text.strip())
        if named and (size := TypeAdapter(ByteSize).validate_python(text)) >= 1:
            return int(size)
    raise SpecDecError(f"{flag} takes a share in (0, 1], such as 0.25, or a size, such as 300MB; got '{text}'")
