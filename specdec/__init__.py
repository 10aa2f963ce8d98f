"""specdec: lossless speculative decoding for Hugging Face causal language models."""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from specdec.api.decoder import SpecDecoder
    from specdec.api.generation import DecoderOptions, Generation, GenerationOptions, GenerationOutput, RequestOptions
    from specdec.base.errors import SpecDecError
    from specdec.base.options import SamplingParams
    from specdec.engine.engine import Engine
    from specdec.engine.metrics import RequestMetrics
    from specdec.engine.request import Event, Handle, Request, TokenLogprob
    from specdec.speculation.constraints import Choice, Grammar, Json, Regex
    from specdec.speculation.draft import Acceptance, Draft, Drafter, DrafterWarning, State, Verifier

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
    "Regex",
    "Request",
    "RequestMetrics",
    "RequestOptions",
    "SamplingParams",
    "SpecDecError",
    "SpecDecoder",
    "State",
    "TokenLogprob",
    "Verifier",
]

_MODULES = {
    "api.decoder": ("SpecDecoder",),
    "api.generation": ("DecoderOptions", "Generation", "GenerationOptions", "GenerationOutput", "RequestOptions"),
    "speculation.constraints": ("Choice", "Grammar", "Json", "Regex"),
    "speculation.draft": ("Acceptance", "Draft", "Drafter", "DrafterWarning", "State", "Verifier"),
    "base.errors": ("SpecDecError",),
    "engine.engine": ("Engine",),
    "engine.metrics": ("RequestMetrics",),
    "engine.request": ("Event", "Handle", "Request", "TokenLogprob"),
    "base.options": ("SamplingParams",),
}


def _other_parts() -> str | None:
    """What is wrong if drafters, verifiers or configurations are those of another copy of specdec; None if nothing is.

    A checkout that is the current folder, or on PYTHONPATH, comes before an installed copy, but lacks these packages
    under this name: they would be that copy's.
    """
    own = os.path.dirname(os.path.realpath(__file__))
    beside = own, os.path.dirname(own)  # an installed copy has them in its folder, a checkout beside it
    for name in ("drafters", "verifiers", "configs"):
        spec = find_spec(f"specdec.{name}")
        if spec is None or spec.origin is None:
            found = "are missing"
        else:
            folder = os.path.dirname(os.path.realpath(spec.origin))
            if folder in [os.path.join(each, name) for each in beside]:
                continue
            found = f"are those of another copy, in '{folder}'"
        built = os.path.exists(os.path.join(own, "runtimes", "native", "_native.so"))
        kernels = "" if built else ", and has no kernels"
        return (
            f"specdec is '{own}'{kernels}, but its {name} {found}: run 'pip install -e .' in the checkout that you "
            "mean, or leave its folder and take it off PYTHONPATH"
        )
    return None


if _problem := _other_parts():
    from specdec.base.errors import SpecDecWarning

    warnings.warn_explicit(_problem, SpecDecWarning, "specdec", 0)  # one line, without one of the source


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `specdec --help` should not wait for them.
    if name == "__version__":
        from importlib.metadata import version

        return version("specdec-m2r2")
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"specdec.{module}"), name)
    raise AttributeError(f"module 'specdec' has no attribute '{name}'")
