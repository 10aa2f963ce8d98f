"""What the arguments of the Python API may be, as tables that are checked when a method is called."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from specdec.base import options
from specdec.runtimes.experts.offload import ExpertOptions
from specdec.speculation.constraints import Constraint
from specdec.speculation.draft import Drafter

_PATH = options.instance("text or a path", str, Path)
_MAPPING = options.NONE | options.Kind(
    "a mapping by name", lambda value: isinstance(value, Mapping) and all(map(options.TEXT.holds, value))
)
_EXPERTS = options.instance("ExpertOptions", ExpertOptions) | options.NONE

CONSTRUCTOR = {
    "model": options.Kind(
        "a loaded model; SpecDecoder.from_pretrained loads one by name",
        lambda value: callable(value.get_output_embeddings),  # wrapped ones, too
    ),
    "drafter": _PATH | options.instance("a Drafter", Drafter),
    "drafter_options": _MAPPING,
    "runtime": options.TEXT,
    "weights": options.TEXT,
    "kv_cache": options.TEXT,
    "activations": options.TEXT,
    "verifier": options.TEXT | options.Kind("a Verifier", lambda value: callable(value.verify)),
    "verifier_options": _MAPPING,
    "exact": options.BOOL,
    "experts": _EXPERTS,
}
LOADING = {
    "name": options.instance("text or a path", str, os.PathLike),
    "drafter": CONSTRUCTOR["drafter"],
    "dtype": options.instance("text or a torch.dtype", str, torch.dtype),
    "device": options.instance("text or a torch.device", str, torch.device),
    "revision": options.TEXT | options.NONE,
    "trust_remote_code": options.BOOL,
    "experts": _EXPERTS,
}
REQUEST = {
    "max_new_tokens": options.wholes_from(1),
    "num_speculative_tokens": options.one_of("auto") | options.wholes_from(1),
    "stop": options.TEXT | options.lists("texts", options.TEXT.holds),
    "logits_processor": options.lists("logits processors", callable),
    "ignore_eos": options.BOOL,
    "logprobs": options.wholes_from(0) | options.NONE,
    "max_rows": options.wholes_from(1) | options.NONE,
    "prompt_logprobs": options.BOOL,
    "constraint": options.instance("a Json, Regex, Grammar or Choice", Constraint) | options.NONE,
}
ENGINE = {
    "max_rows": options.wholes_from(1),
    "max_waiting": options.wholes_from(0),
    "kv_memory": options.wholes_from(1) | options.NONE,
    "prefill_chunk": options.wholes_from(1) | options.NONE,
    "num_speculative_tokens": REQUEST["num_speculative_tokens"],
}
