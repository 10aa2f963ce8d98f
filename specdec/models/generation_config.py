"""A model's ``generation_config``, applied as in ``model.generate(do_sample=False)``.

Its end tokens apply, and all that changes logits: repetition and n-gram penalties, suppressed, forced and bad words,
minimum lengths, biases. The caller sets sampling and length (temperature, top-k, top-p, max_new_tokens, beams). Knows
no drafter and no runtime.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from specdec.base.errors import SpecDecError, one_line

STATEFUL = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)


def eos_token_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Token ids that end a generation."""
    eos = model.generation_config.eos_token_id if model.generation_config else None
    if eos is None:
        eos = getattr(tokenizer, "eos_token_id", None)
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def logits_processors(
    model: PreTrainedModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    repetition_penalty: float | None = None,
    others: Sequence[Callable[..., Any]] = (),
) -> list[LogitsProcessor]:
    """The logits processors of a request, made by transformers; empty without any.

    repetition_penalty: replaces the config's.
    others: the caller's; one of the same class as one of the config replaces it.
    Raises SpecDecError for a config that cannot be used.
    """
    config: Any = copy.copy(model.generation_config) or GenerationConfig()
    config.do_sample, config.max_length = False, len(prompt) + max_new_tokens
    if config.min_new_tokens is not None:
        config.min_length = len(prompt) + config.min_new_tokens
    if repetition_penalty is not None:
        config.repetition_penalty = repetition_penalty
    eos = config.eos_token_id
    try:
        config._eos_token_tensor = None if eos is None else torch.tensor(eos, device=model.device).reshape(-1)
        make: Any = model._get_logits_processor
        found = make(
            config,
            input_ids_seq_length=len(prompt),
            encoder_input_ids=torch.tensor([list(prompt)], device=model.device),
            logits_processor=list(others),
            device=model.device,
        )
    except Exception as error:  # the type depends on the setting
        raise SpecDecError(f"the model's generation_config cannot be used: {one_line(error)}") from None
    for processor in found:
        if isinstance(processor, STATEFUL):
            raise SpecDecError(
                f"{type(processor).__name__} has a state that cannot be rolled back after a rejected draft; remove it "
                "from the model's generation_config or from logits_processor"
            )
    return list(found)


def apply_processors(
    processors: Sequence[LogitsProcessor], prompt: Sequence[int], tokens: Sequence[int], logits: Tensor
) -> Tensor:
    """Apply ``processors`` to the logits [n, V] that predict the n ``tokens`` after ``prompt``."""
    if not processors:
        return logits
    rows = []
    for count, row in enumerate(logits.float()):
        ids, scores = torch.tensor([[*prompt, *tokens[:count]]], device=logits.device), row[None]
        for processor in processors:
            scores = processor(ids, scores)
        rows.append(scores)
    return torch.cat(rows)
