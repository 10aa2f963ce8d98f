"""The default drafter: n-grams, together with M2R2 if one is shipped for the model."""

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


class AutoDrafter(Drafter):
    """Loads another drafter; it drafts nothing itself."""

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "what 'specdec tune drafter' found, else ngram, with m2r2 where one is shipped"

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> Drafter:
        """The drafter for ``target``, with its options. Warns if no trained one is shipped."""
        options.check_names(cls.name, (), source=source)
        name, source = "ngram" if built() else "prompt-lookup", None
        if drafter_folder.find_shipped("m2r2", target) is not None:
            name, source = ("hybrid", "ngram+m2r2") if built() else ("m2r2", None)
        else:
            command = registry.lookup("drafters", "m2r2").training_command(target.model.config._name_or_path)
            message = f"no trained drafter is shipped for this model, so {name} drafts; to train one: {command}"
            warnings.warn(message, SpecDecWarning, stacklevel=2)
        drafter: Drafter = registry.lookup("drafters", name).load(target, source, **kwargs)
        return drafter
