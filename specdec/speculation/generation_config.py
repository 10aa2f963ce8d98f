"""Reads a model's ``generation_config``: its end tokens, its sampling options, and what else it does to logits.

It is applied as in ``model.generate(do_sample=False)``: end tokens, and all that changes logits (penalties, suppressed,
forced and bad words, minimum lengths, biases). The caller sets sampling and length.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from specdec.base.errors import SpecDecError, one_line
from specdec.models.native_model import as_transformers
from specdec.speculation.warpers import Processor, RepetitionPenalty

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.models.native_model import NativeModel

# Fields of a generation_config that change no logits, or that a request has of its own.
PLAIN = {
    *("_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "max_length", "max_new_tokens", "repetition_penalty"),
    *("output_attentions", "output_hidden_states", "return_dict_in_generate", "cache_implementation"),
}
# Processors of transformers with a state.
STATEFUL = "UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor"


def eos_token_ids(model: NativeModel | PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Return the ids of a model's end tokens, from its ``generation_config`` or else from the tokenizer.

    Empty if neither names one. tokenizer: a tokenizer of transformers; None: there is none.
    """
    eos: Any = model.generation_config.eos_token_id if model.generation_config else None
    if eos is None:
        eos = getattr(tokenizer, "eos_token_id", None)
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def own_sampling(model: NativeModel | PreTrainedModel) -> dict[str, Any]:
    """Return the sampling options of a model's ``generation_config``, as ``model.generate`` uses them.

    They are temperature, top_k, top_p and min_p, by name; {}: the config asks for greedy decoding.
    """
    config: Any = model.generation_config
    given = {} if config is None else config.to_diff_dict()
    if not given.get("do_sample"):
        return {}
    defaults = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}  # as transformers has them
    return {name: value if given.get(name) is None else given[name] for name, value in defaults.items()}


def logits_processors(
    model: NativeModel | PreTrainedModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    repetition_penalty: float | None = None,
    others: Sequence[Callable[..., Any]] = (),
) -> list[Processor]:
    """Return the logits processors of a request: those of the model's ``generation_config``, and the caller's.

    Temperature, top-k, top-p and min-p are not among them.

    prompt: the request's token ids. max_new_tokens: maximum number of tokens after them.
    repetition_penalty: replaces the config's penalty; None: the config's is used.
    others: the caller's processors; each replaces a processor of the same class that the config asks for.
    Raises SpecDecError for a config that cannot be used.
    """
    config: Any = model.generation_config
    given = {} if config is None else config.to_diff_dict()
    penalty = given.get("repetition_penalty", 1.0) if repetition_penalty is None else repetition_penalty
    if not others and given.keys() <= PLAIN and isinstance(penalty, int | float) and penalty > 0:
        return [] if penalty == 1 else [RepetitionPenalty(float(penalty))]
    from transformers import GenerationConfig  # heavy

    whole = as_transformers(model)
    config = copy.copy(whole.generation_config) or GenerationConfig()
    config.do_sample, config.max_length = False, len(prompt) + max_new_tokens
    if config.min_new_tokens is not None:
        config.min_length = len(prompt) + config.min_new_tokens
    if repetition_penalty is not None:
        config.repetition_penalty = repetition_penalty
    eos = config.eos_token_id
    try:
        config._eos_token_tensor = None if eos is None else torch.tensor(eos, device=whole.device).reshape(-1)
        make: Any = whole._get_logits_processor
        found = make(
            config,
            input_ids_seq_length=len(prompt),
            encoder_input_ids=torch.tensor([list(prompt)], device=whole.device),
            logits_processor=list(others),
            device=whole.device,
        )
    except Exception as error:  # the type depends on the setting
        raise SpecDecError(f"the model's generation_config cannot be used: {one_line(error)}") from None
    refuse_stateful(found, "remove it from the model's generation_config or from logits_processor")
    return list(found)


def refuse_stateful(processors: Sequence[Processor], remedy: str) -> None:
    """Raise SpecDecError if a logits processor has a state that calls change, since rejected drafts would spoil it.

    processors: logits processors; those of transformers with a state are known by their names.
    remedy: end of the error message: what the user can do.
    """
    for processor in processors:
        if (name := type(processor).__name__) in STATEFUL:
            raise SpecDecError(f"{name} has a state that cannot be rolled back after a rejected draft; {remedy}")
