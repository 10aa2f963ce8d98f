"""Parses the text that names a drafter, such as ``--drafter ngram+m2r2``, and loads the drafter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from specdec.base.errors import SpecDecError
from specdec.base.options import check_names
from specdec.base.settings import keywords
from specdec.models.catalogue import EMBEDDED, shipped_drafters
from specdec.speculation import registry

if TYPE_CHECKING:
    from specdec.speculation.drafter import Drafter

AUTO, JOINED = "specdec.drafters.auto:auto", "specdec.drafters.joined:JoinedDrafter"
FIRST, NEVER_SECOND = "ngram", ("none", "ngram")  # of joined drafters


class Part(NamedTuple):
    """One drafter of a text such as "ngram+m2r2", by its name and where its parameters are.

    name: name in the registry; "": the name is in the config.json of ``source``.
    source: a folder or a hub repository to load from; None: nothing to load, or what the package ships for the model.
    """

    name: str
    source: str | None = None

    @classmethod
    def parse(cls, text: str) -> Part:
        """Parse the text that names one drafter: its name, a drafter folder, or a hub repository ORG/NAME[@revision].

        The name of a folder's or repository's drafter stays "" until ``resolved``. Downloads nothing. Raises
        SpecDecError for an unknown name, and for a folder that is missing or has no config.json.
        """
        if text in registry.names("drafters") or not ("/" in text or Path(text).is_dir()):
            registry.check_name("drafters", text)
            return cls(text)
        if Path(text).is_dir():
            if not (Path(text) / "config.json").is_file():
                raise SpecDecError(f"'{text}' is no drafter folder: config.json is missing")
        elif text.startswith((".", "/", "~")):
            raise SpecDecError(f"drafter folder '{text}' does not exist")
        return cls("", text)

    def resolved(self) -> Part:
        """Return a part with the name from the config.json of ``source``, and ``source`` as a local folder.

        Downloads a hub repository. A part that has a name is returned as it is. Raises SpecDecError if the folder or
        repository has no drafter.
        """
        if self.name:
            return self
        from specdec.models import drafter_folder, hub  # heavy

        source = str(self.source)
        remote = not Path(source).is_dir() and hub.parse_repo_id(source) is not None
        folder = hub.fetch_drafter(source) if remote else Path(source)
        return Part(str(drafter_folder.read_config(folder)["drafter"]), str(folder))


@dataclass(frozen=True)
class DrafterSpec:
    """The drafters that a text such as "ngram+m2r2" names.

    parts: one drafter, or n-grams and a drafter that is joined with them; (): "auto", which chooses for the model.
    """

    parts: tuple[Part, ...] = ()

    @classmethod
    def parse(cls, text: str) -> DrafterSpec:
        """Parse ``text``: "auto", NAME, NAME=SOURCE, a drafter folder, ORG/NAME[@revision], or ngram+X.

        SOURCE is a folder or a hub repository with the drafter's parameters; X is any of these but "auto". Imports and
        downloads nothing. Raises SpecDecError for other texts.
        """
        if text == "auto":
            return cls()
        if text in registry.names("drafters") or (text and Path(text).is_dir()):
            return cls((Part.parse(text),))
        named, _, source = text.partition("=")
        if not all(each.strip() for each in named.split("+")):
            raise SpecDecError(f"no drafter is named in '{text}'; 'specdec drafters' lists them, and ngram+X joins two")
        parts = [Part.parse(each) for each in named.split("+")]
        if source:
            parts[-1] = Part(parts[-1].name, source)
        if len(parts) > 1 and (len(parts) > 2 or parts[0].name != FIRST or parts[1].name in NEVER_SECOND):
            raise SpecDecError(f"drafters are joined as ngram+X, such as ngram+m2r2; '{text}' is not such a pair")
        return cls(tuple(parts))

    def resolved(self) -> DrafterSpec:
        """Return the spec with the name of each drafter, read from config.json where it was given by its source.

        May download hub repositories. Raises SpecDecError if a source has no drafter.
        """
        return DrafterSpec(tuple(part.resolved() for part in self.parts))

    def load(self, target: Any, options: Mapping[str, Any]) -> Drafter:
        """Load the drafter for the model ``target``, and return it; the caller binds it. May download it from the hub.

        Raises SpecDecError for an option that the drafter does not have, and for a drafter that does not fit the model.

        options: the drafter's options by name; for joined drafters and "auto", a mapping of such options by drafter
            name.
        """
        if not self.parts:
            chosen: DrafterSpec = registry.load_object(AUTO)(target)
            own = options.get(chosen.parts[0].name)
            alone = len(chosen.parts) == 1 == len(options) and isinstance(own, Mapping)
            return chosen.load(target, own if alone and own is not None else options)
        parts = self.resolved().parts
        if len(parts) == 1:
            return _load(parts[0], target, options)
        label = "+".join(part.name for part in parts)
        check_names(label, options, [part.name for part in parts])
        for name, own in options.items():
            if not isinstance(own, Mapping):
                raise SpecDecError(f"drafter '{label}' takes the options of '{name}' as a mapping; got {own!r}")
        joined: Drafter = registry.load_object(JOINED)(
            *(_load(part, target, options.get(part.name, {})) for part in parts)
        )
        return joined

    def refuse_early(self, model: str, config: Any = None) -> None:
        """Raise SpecDecError if a drafter needs trained parameters, and none are given or shipped for ``model``.

        So the user need not wait for the model's weights first. Passing is no guarantee that loading works.

        model: name of the model.
        config: the model's config; None: not downloaded yet, so only models of the package's own catalogue are checked.
        """
        from specdec.models import drafter_folder  # heavy

        if config is None and model not in EMBEDDED:
            return
        for name, source in self.parts:
            if source is not None or not registry.lookup("drafters", name).needs_training:
                continue
            embedded = model in shipped_drafters().get(name, ())
            if not (embedded if config is None else drafter_folder.may_be_shipped(name, config)):
                raise drafter_folder.not_shipped(name, registry.lookup("drafters", name).training, model)


def _load(part: Part, target: Any, options: Mapping[str, Any]) -> Drafter:
    """Load one drafter, and return it, not bound yet. Raises SpecDecError for an option that it does not have.

    part: the drafter's name, which must not be "", and its source (None: what is shipped, or nothing).
    target: the model for which it drafts. options: the drafter's options by name.
    """
    found = registry.lookup("drafters", part.name)
    try:
        made: Drafter = found.load(target, part.source, **options)
    except TypeError as error:  # of an outside package, whose ``load`` takes no others or passes them on unchecked
        known = [each for own in (found.load, found) for each in keywords(own) if each not in ("target", "source")]
        unknown = [each for each in options if each not in known and f" keyword argument '{each}'" in str(error)]
        check_names(part.name, unknown, list(dict.fromkeys(known)))
        raise
    return made
