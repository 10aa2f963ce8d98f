"""The default drafter: n-grams, together with the M2R2 shipped for the model, or with one that teaches itself."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from specdec.base import options
from specdec.base.errors import SpecDecWarning
from specdec.models import drafter_folder
from specdec.runtimes.target import Target
from specdec.speculation import registry
from specdec.speculation.draft import Drafter
from specdec.speculation.ngram import built

from .m2r2.learning import why_not


class AutoDrafter(Drafter):
    """Loads another drafter; it drafts nothing itself."""

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "ngram with m2r2, which is shipped or teaches itself"

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> Drafter:
        """The drafter for ``target``, with its options. Warns if no trained one is shipped."""
        options.check_names(cls.name, (), source=source)
        name = "ngram" if built() else "prompt-lookup"
        if drafter_folder.find_shipped("m2r2", target) is not None or (why := why_not(target)) is None:
            names = ("ngram", "m2r2") if built() else ("m2r2",)
        else:
            names = (name,)
            command = registry.lookup("drafters", "m2r2").training_command(target.model.config._name_or_path)
            message = (
                f"no trained drafter is shipped for this model, and none can teach itself ({why}), so {name} drafts"
            )
            warnings.warn(f"{message}; to train one: {command}", SpecDecWarning, stacklevel=2)
        return registry.Choice("+".join(names), [(each, None) for each in names]).load(target, kwargs)
