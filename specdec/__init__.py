"""specdec: lossless speculative decoding for Hugging Face causal language models."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.decoder import Generation, GenerationOutput, SpecDecoder
    from specdec.draft import Acceptance, Draft, Drafter, DrafterWarning, State, Verifier
    from specdec.errors import SpecDecError
    from specdec.metrics import RequestMetrics
    from specdec.sampling import SamplingParams

__version__ = version("specdec-m2r2")
__all__ = [
    "Acceptance",
    "Draft",
    "Drafter",
    "DrafterWarning",
    "Generation",
    "GenerationOutput",
    "RequestMetrics",
    "SamplingParams",
    "SpecDecError",
    "SpecDecoder",
    "State",
    "Verifier",
]

_MODULES = {
    "decoder": ("Generation", "GenerationOutput", "SpecDecoder"),
    "draft": ("Acceptance", "Draft", "Drafter", "DrafterWarning", "State", "Verifier"),
    "errors": ("SpecDecError",),
    "metrics": ("RequestMetrics",),
    "sampling": ("SamplingParams",),
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `specdec --help` should not wait for them.
    name = "Acceptance" if name == "Verdict" else name  # its former name
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"specdec.{module}"), name)
    raise AttributeError(f"module 'specdec' has no attribute '{name}'")
