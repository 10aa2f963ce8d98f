"""The names of drafters and verifiers. A new one is one file and one line here."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.base.errors import SpecDecError, did_you_mean
from specdec.base.options import check_names
from specdec.base.settings import keywords
from specdec.models.catalogue import EMBEDDED, shipped_drafters

if TYPE_CHECKING:
    from specdec.speculation.draft import Drafter, Verifier

DRAFTERS: dict[str, str] = {
    "none": "specdec.drafters.none:NoDrafter",
    "auto": "specdec.drafters.auto:AutoDrafter",
    "deed": "specdec.drafters.exits:DeedDrafter",
    "draft-model": "specdec.drafters.draft_model:DraftModelDrafter",
    "eagle3": "specdec.drafters.eagle3:Eagle3Drafter",
    "early-exit": "specdec.drafters.exits:EarlyExitDrafter",
    "hybrid": "specdec.drafters.hybrid:HybridDrafter",
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
    """Return ``{name: "module:Class"}`` for ``kind`` ("drafters" or "verifiers"), outside packages included.

    An outside package registers itself through the entry-point group ``specdec.drafters`` or ``specdec.verifiers``.
    """
    return outside(kind) | {"drafters": DRAFTERS, "verifiers": VERIFIERS}[kind]


@functools.cache  # it reads the metadata of all installed packages
def outside(kind: str) -> dict[str, str]:
    """The names of outside packages."""
    return {each.name: each.value for each in entry_points(group=f"specdec.{kind}")}


def having(trait: str) -> str:
    """The names of drafters whose class has ``trait``, such as ``leaves_early``, for messages."""
    return ", ".join(name for name in DRAFTERS if getattr(lookup("drafters", name), trait))


def check_name(kind: str, name: str) -> str:
    """ "module:Class" of ``name``. Imports nothing. Raises SpecDecError for an unknown name."""
    if (own := {"drafters": DRAFTERS, "verifiers": VERIFIERS}[kind].get(name)) is not None:
        return own
    known = names(kind)
    if name not in known:
        raise SpecDecError(
            f"unknown {kind[:-1]} '{name}'{did_you_mean(name, known)}; known: {', '.join(sorted(known))}"
        )
    return known[name]


def check_drafter(text: str) -> None:
    """Raise SpecDecError for names that ``parse`` refuses, as far as that is known without imports and downloads."""
    for part in _names(text):
        if part in names("drafters") or not ("/" in part or Path(part).is_dir()):
            check_name("drafters", part)
        elif not Path(part).is_dir():
            if part.startswith((".", "/", "~")):
                raise SpecDecError(f"drafter folder '{part}' does not exist")
        elif not (Path(part) / "config.json").is_file():
            raise SpecDecError(f"'{part}' is no drafter folder: config.json is missing")


def lookup(kind: str, name: str) -> Any:
    """Import and return the class registered as ``name``. Raises SpecDecError for an unknown name."""
    place = check_name(kind, name)
    from specdec.speculation.draft import Drafter, Verifier  # heavy

    module, _, attribute = place.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    base = Drafter if kind == "drafters" else Verifier
    if not (isinstance(found, type) and issubclass(found, base)):
        raise SpecDecError(
            f"{kind[:-1]} '{name}' ({place}) is not a subclass of specdec.speculation.draft.{base.__name__}"
        )
    return found


def verifier(rule: str | Verifier, options: Mapping[str, Any] | None = None) -> Verifier:
    """The verifier named ``rule``, with its options. A rule that is an object is returned as it is.

    Raises SpecDecError for an unknown name, and for an option that the rule does not have.
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


@dataclass(frozen=True)
class Choice:
    """Drafters as ``parse`` has read them from a text: the name and the source of each."""

    text: str
    parts: Sequence[tuple[str, str | None]]

    @classmethod
    def of(cls, text: str) -> Choice:
        """Raises SpecDecError as ``parse`` does."""
        return cls(text, parse(text))

    def load(self, target: Any, options: Mapping[str, Any]) -> Drafter:
        """The drafter for ``target``, or one that joins several. options: of it, or of each by its name."""
        if len(self.parts) > 1:
            joined: Drafter = lookup("drafters", "hybrid").join(target, self.parts, options)
            return joined
        name, source = self.parts[0]
        return load_drafter(name, target, source, options)


def load_drafter(name: str, target: Any, source: str | None, options: Mapping[str, Any]) -> Drafter:
    """The drafter named ``name`` for ``target``. Raises SpecDecError for an option that it does not have."""
    found = lookup("drafters", name)
    try:
        made: Drafter = found.load(target, source, **options)
    except TypeError as error:  # of an outside package, whose ``load`` takes no others or passes them on unchecked
        known = [each for part in (found.load, found) for each in keywords(part) if each not in ("target", "source")]
        unknown = [each for each in options if each not in known and f" keyword argument '{each}'" in str(error)]
        check_names(name, unknown, list(dict.fromkeys(known)))
        raise
    return made


def parse(text: str) -> list[tuple[str, str | None]]:
    """The (name, source) of each drafter that ``text`` joins with "+".

    Each is a registered name, a drafter folder or a Hugging Face repository (ORG/NAME[@revision]), which is downloaded.
    The source is then the folder, whose config.json has the name. The last may name its source: "NAME=SOURCE". Raises
    SpecDecError for an unknown name, and for a folder that holds no drafter.
    """
    parts, source = [_part(part) for part in _names(text)], text.partition("=")[2]
    if source and not Path(text).is_dir():
        parts[-1] = parts[-1][0], source
    return parts


def _names(text: str) -> list[str]:
    """The names or folders that ``text`` joins. Raises SpecDecError if one is empty."""
    joined = text.partition("=")[0]
    if not all(part.strip() for part in joined.split("+")):
        raise SpecDecError(f"no drafter is named in '{text}'; 'specdec drafters' lists them, and + joins several")
    return [text] if text in DRAFTERS or Path(text).is_dir() or text in names("drafters") else joined.split("+")


def refuse_early(choice: Choice, name: str, config: Any = None) -> None:
    """Raise SpecDecError for a trained drafter without a source, if none is shipped for the model ``name``.

    config: of the model, before its weights are loaded; None: before it is downloaded, if it is an embedded one.
    """
    from specdec.models import drafter_folder  # heavy

    if config is None and name not in EMBEDDED:
        return
    for part, source in choice.parts:
        found = lookup("drafters", part)
        if source is not None or not found.needs_training:
            continue
        embedded = name in shipped_drafters().get(part, ())
        if not (embedded if config is None else drafter_folder.may_be_shipped(part, config)):
            raise found.not_shipped(name)


def _part(text: str) -> tuple[str, str | None]:
    if text in names("drafters") or not ("/" in text or Path(text).is_dir()):
        lookup("drafters", text)
        return text, None
    from specdec.models import drafter_folder, hub  # heavy

    folder = Path(text) if Path(text).is_dir() or hub.parse_repo_id(text) is None else hub.fetch_drafter(text)
    return str(drafter_folder.read_config(folder)["drafter"]), str(folder)
