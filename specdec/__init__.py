"""Lossless speculative decoding for Hugging Face causal language models.

The public names are imported at their first use.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from specdec.api.decoder import SpecDecoder
    from specdec.api.generation import DecoderOptions, Generation, GenerationOptions, GenerationOutput, RequestOptions
    from specdec.base.errors import SpecDecError
    from specdec.base.options import SamplingParams
    from specdec.engine.engine import Engine
    from specdec.engine.logprobs import TokenLogprob
    from specdec.engine.metrics import RequestMetrics
    from specdec.engine.request import Event, Handle, Request
    from specdec.speculation.constraints import Choice, Grammar, Json, Regex
    from specdec.speculation.draft import Draft
    from specdec.speculation.drafter import Drafter, DrafterWarning, Learner, Traits
    from specdec.speculation.state import State
    from specdec.speculation.verifier import Acceptance, Verifier

# OpenMP reads this when torch is imported: threads that wait spin for up to half a millisecond and then sleep. By
# default they spin for up to 15, on cores that those they wait for may need.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__all__ = [
    "Acceptance",
    "Choice",
    "DecoderOptions",
    "Draft",
    "Drafter",
    "DrafterWarning",
    "Engine",
    "Event",
    "Generation",
    "GenerationOptions",
    "GenerationOutput",
    "Grammar",
    "Handle",
    "Json",
    "Learner",
    "Regex",
    "Request",
    "RequestMetrics",
    "RequestOptions",
    "SamplingParams",
    "SpecDecError",
    "SpecDecoder",
    "State",
    "TokenLogprob",
    "Traits",
    "Verifier",
]

_MODULES = {
    "api.decoder": ("SpecDecoder",),
    "api.generation": ("DecoderOptions", "Generation", "GenerationOptions", "GenerationOutput", "RequestOptions"),
    "speculation.constraints": ("Choice", "Grammar", "Json", "Regex"),
    "speculation.draft": ("Draft",),
    "speculation.drafter": ("Drafter", "DrafterWarning", "Learner", "Traits"),
    "speculation.state": ("State",),
    "speculation.verifier": ("Acceptance", "Verifier"),
    "base.errors": ("SpecDecError",),
    "engine.engine": ("Engine",),
    "engine.logprobs": ("TokenLogprob",),
    "engine.metrics": ("RequestMetrics",),
    "engine.request": ("Event", "Handle", "Request"),
    "base.options": ("SamplingParams",),
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `specdec --help` should not wait for them.
    if name == "__version__":
        from importlib.metadata import version

        return version("specdec-m2r2")
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"specdec.{module}"), name)
    raise AttributeError(f"module 'specdec' has no attribute '{name}'")
