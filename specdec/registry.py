"""Names of plug-ins. Adding a drafter or verifier is one file and one line here; nothing else names them."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from specdec.errors import SpecDecError, did_you_mean

DRAFTERS: dict[str, str] = {
    "none": "specdec.drafters.none:NoDrafter",
    "draft-model": "specdec.drafters.draft_model:DraftModelDrafter",
    "early-exit": "specdec.drafters.early_exit:EarlyExitDrafter",
    "hybrid": "specdec.drafters.hybrid:HybridDrafter",
    "layer-skip": "specdec.drafters.layer_skip:LayerSkipDrafter",
    "lookahead": "specdec.drafters.lookahead:LookaheadDrafter",
    "m2r2": "specdec.drafters.m2r2:M2R2Drafter",
    "m2r2-paper": "specdec.drafters.m2r2:PaperM2R2Drafter",
    "medusa": "specdec.drafters.medusa:MedusaDrafter",
    "prompt-lookup": "specdec.drafters.prompt_lookup:PromptLookupDrafter",
}

VERIFIERS: dict[str, str] = {
    "exact": "specdec.verifiers.exact:ExactVerifier",
    "typical": "specdec.verifiers.typical:TypicalVerifier",
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


def parse(text: str) -> list[tuple[str, str | None]]:
    """The (name, source) of each drafter that ``text`` joins with "+".

    Each is a registered name or a drafter folder, which is then its source (its config.json has the name). The last may
    say what it is loaded from: "NAME=SOURCE". Raises SpecDecError for an unknown name and a folder that is none.
    """
    if text in names("drafters") or Path(text).is_dir():
        return [_part(text)]
    joined, _, source = text.partition("=")
    parts = [_part(part) for part in joined.split("+")]
    if source:
        parts[-1] = parts[-1][0], source
    return parts


def _part(text: str) -> tuple[str, str | None]:
    if text in names("drafters") or not ("/" in text or Path(text).is_dir()):
        lookup("drafters", text)
        return text, None
    from specdec import artifacts  # heavy

    return str(artifacts.read_config(Path(text))["drafter"]), text
