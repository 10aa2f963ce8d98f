"""Names of plug-ins. Adding a drafter or verifier is one file and one line here; nothing else names them."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from specdec.errors import SpecDecError, did_you_mean

DRAFTERS: dict[str, str] = {
    "none": "specdec.drafters.none:NoDrafter",
    "draft-model": "specdec.drafters.draft_model:DraftModelDrafter",
    "early-exit": "specdec.drafters.early_exit:EarlyExitDrafter",
    "layer-skip": "specdec.drafters.layer_skip:LayerSkipDrafter",
    "m2r2": "specdec.drafters.m2r2:M2R2Drafter",
    "prompt-lookup": "specdec.drafters.prompt_lookup:PromptLookupDrafter",
}

VERIFIERS: dict[str, str] = {
    "exact": "specdec.verifiers.exact:ExactVerifier",
}


def names(kind: str) -> dict[str, str]:
    """Return ``{name: "module:Class"}`` for ``kind`` ("drafters" or "verifiers"), outside packages included.

    An outside package registers itself through the entry-point group ``specdec.drafters`` or ``specdec.verifiers``.
    """
    built_in = {"drafters": DRAFTERS, "verifiers": VERIFIERS}[kind]
    return {e.name: e.value for e in entry_points(group=f"specdec.{kind}")} | built_in


def lookup(kind: str, name: str) -> Any:
    """Import and return the class registered as ``name``. Raises SpecDecError for an unknown name."""
    known = names(kind)
    if name not in known:
        raise SpecDecError(
            f"unknown {kind[:-1]} '{name}'{did_you_mean(name, known)}; known: {', '.join(sorted(known))}"
        )
    module, _, attribute = known[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
