"""The names of drafters and verifiers, and the classes behind them. A new one is one file and one line here."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from specdec.base.errors import SpecDecError, did_you_mean
from specdec.base.settings import keywords

if TYPE_CHECKING:
    from specdec.speculation.verifier import Verifier

DRAFTERS: dict[str, str] = {
    "none": "specdec.drafters.none:NoDrafter",
    "deed": "specdec.drafters.exits:DeedDrafter",
    "dflash": "specdec.drafters.dspark:DFlashDrafter",
    "draft-model": "specdec.drafters.draft_model:DraftModelDrafter",
    "dspark": "specdec.drafters.dspark:DSparkDrafter",
    "eagle3": "specdec.drafters.eagle3:Eagle3Drafter",
    "early-exit": "specdec.drafters.exits:EarlyExitDrafter",
    "layer-skip": "specdec.drafters.layer_skip:LayerSkipDrafter",
    "lookahead": "specdec.drafters.lookahead:LookaheadDrafter",
    "m2r2": "specdec.drafters.m2r2:M2R2Drafter",
    "m2r2-paper": "specdec.drafters.m2r2:PaperM2R2Drafter",
    "mixture-of-depths": "specdec.drafters.exits:MixtureOfDepthsDrafter",
    "medusa": "specdec.drafters.medusa:MedusaDrafter",
    "mtp": "specdec.drafters.mtp:MTPDrafter",
    "ngram": "specdec.drafters.ngram:NgramDrafter",
    "prompt-lookup": "specdec.drafters.prompt_lookup:PromptLookupDrafter",
    "skip-decode": "specdec.drafters.exits:SkipDecodeDrafter",
}

VERIFIERS: dict[str, str] = {
    "confident": "specdec.verifiers.confident:ConfidentVerifier",
    "exact": "specdec.verifiers.exact:ExactVerifier",
    "typical": "specdec.verifiers.typical:TypicalVerifier",
}


def names(kind: str) -> dict[str, str]:
    """Return ``{name: "module:Class"}`` of all plug-ins of a kind, those of other installed packages included.

    A package registers a plug-in by the entry-point group ``specdec.drafters`` or ``specdec.verifiers``.

    kind: "drafters" or "verifiers".
    """
    return outside(kind) | {"drafters": DRAFTERS, "verifiers": VERIFIERS}[kind]


@functools.cache  # it reads the metadata of all installed packages
def outside(kind: str) -> dict[str, str]:
    """Return ``{name: "module:Class"}`` of the plug-ins that other installed packages register. The result is cached.

    kind: "drafters" or "verifiers".
    """
    return {each.name: each.value for each in entry_points(group=f"specdec.{kind}")}


def check_name(kind: str, name: str) -> str:
    """Return "module:Class" of the plug-in ``name``, without importing it. Raises SpecDecError for an unknown name.

    kind: "drafters" or "verifiers".
    """
    if (own := {"drafters": DRAFTERS, "verifiers": VERIFIERS}[kind].get(name)) is not None:
        return own
    known = names(kind)
    if name not in known:
        raise SpecDecError(
            f"unknown {kind[:-1]} '{name}'{did_you_mean(name, known)}; known: {', '.join(sorted(known))}"
        )
    return known[name]


def load_object(place: str) -> Any:
    """Import a module and return one of its attributes. place: both, as "package.module:attribute"."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def lookup(kind: str, name: str) -> Any:
    """Import and return the drafter or verifier class that is registered as ``name``.

    Raises SpecDecError for an unknown name, and for an object that is not a subclass of ``Drafter`` or ``Verifier``.

    kind: "drafters" or "verifiers".
    """
    place = check_name(kind, name)
    from specdec.speculation.drafter import Drafter  # heavy
    from specdec.speculation.verifier import Verifier

    found, base = load_object(place), Drafter if kind == "drafters" else Verifier
    if not (isinstance(found, type) and issubclass(found, base)):
        raise SpecDecError(f"{kind[:-1]} '{name}' ({place}) is not a subclass of specdec.{base.__name__}")
    return found


def verifier(rule: str | Verifier, options: Mapping[str, Any] | None = None) -> Verifier:
    """Return the verifier named ``rule``, such as "exact", made with ``options``. A verifier object is returned itself.

    Raises SpecDecError for an unknown name, and for an option that the verifier does not have.

    options: the verifier's options by name; None: none. They are ignored with a verifier object.
    """
    if not isinstance(rule, str):
        return rule
    options, takes = options or {}, {each: keywords(lookup("verifiers", each)) for each in {rule, *VERIFIERS}}
    for option in options:
        if option not in takes[rule]:
            owner = next((each for each in VERIFIERS if option in takes[each]), None)
            hint = f"it belongs to '{owner}'" if owner else f"it has {', '.join(takes[rule]) or 'none'}"
            raise SpecDecError(f"verifier '{rule}' has no option '{option}'; {hint}")
    made: Verifier = lookup("verifiers", rule)(**options)
    return made
