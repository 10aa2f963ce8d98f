"""The default: M2R2 where one is shipped for the model, prompt lookup elsewhere."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from specdec.base import options
from specdec.base.errors import SpecDecWarning
from specdec.models import drafter_folder
from specdec.runtimes.target import Target
from specdec.speculation import registry
from specdec.speculation.draft import Drafter


class AutoDrafter(Drafter):
    """Loads another drafter; nothing is drafted by this one."""

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "what 'specdec tune drafter' found, else a shipped m2r2, else prompt-lookup"

    @classmethod
    def load(cls, target: Target, source: str | None = None, **given: Any) -> Drafter:
        """The drafter for ``target``, with its options ``given``. Warns where no trained one is shipped."""
        options.check(cls.name, (), source=source)
        name = "prompt-lookup" if drafter_folder.shipped("m2r2", target) is None else "m2r2"
        if name == "prompt-lookup":
            command = registry.lookup("drafters", "m2r2").training_command(target.model.config._name_or_path)
            message = f"no trained drafter is shipped for this model, so prompt-lookup drafts; to train one: {command}"
            warnings.warn(message, SpecDecWarning, stacklevel=2)
        drafter: Drafter = registry.lookup("drafters", name).load(target, **given)
        return drafter
