"""The default drafter: n-grams, together with the M2R2 shipped for the model, or with one that teaches itself."""

from __future__ import annotations

import warnings

from specdec.base.errors import SpecDecWarning
from specdec.models import drafter_folder
from specdec.runtimes.target import Target
from specdec.speculation.drafter_spec import DrafterSpec
from specdec.speculation.ngram import built

from .m2r2 import M2R2Drafter
from .m2r2.learning import why_not


def auto(target: Target) -> DrafterSpec:
    """Return the default drafter of ``target``. Warns if no M2R2 is shipped for the model or can teach itself there."""
    if drafter_folder.find_shipped("m2r2", target) is not None or (why := why_not(target)) is None:
        return DrafterSpec.parse("ngram+m2r2" if built() else "m2r2")
    name = "ngram" if built() else "prompt-lookup"
    command = drafter_folder.training_command(M2R2Drafter.training, target.model.config._name_or_path)
    message = f"no trained drafter is shipped for this model, and none can teach itself ({why}), so {name} drafts"
    warnings.warn(f"{message}; to train one: {command}", SpecDecWarning, stacklevel=2)
    return DrafterSpec.parse(name)
