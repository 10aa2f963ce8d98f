"""The default drafter: n-grams, with what is known to serve the model best beside them."""

from __future__ import annotations

import warnings

from specdec.base.errors import SpecDecError, SpecDecWarning
from specdec.models import drafter_folder, prediction_layer
from specdec.runtimes.target import Target
from specdec.speculation.drafter_spec import DrafterSpec
from specdec.speculation.ngram import built

from .m2r2 import M2R2Drafter
from .m2r2.learning import why_not
from .mtp import read_head


def auto(target: Target) -> DrafterSpec:
    """Return the drafters that serve ``target`` by default, as a specification to load, such as "ngram+m2r2".

    N-grams are joined with the shipped ``m2r2``, else with the checkpoint's multi-token prediction layer, else with an
    ``m2r2`` that teaches itself. Warns of a layer that does not fit, and if nothing can be joined.
    """
    shipped = drafter_folder.find_shipped("m2r2", target) is not None
    best = "m2r2" if shipped else "mtp" if _has_layer(target) else None
    if best is not None or (why := why_not(target)) is None:
        return DrafterSpec.parse(f"ngram+{best or 'm2r2'}" if built() else best or "m2r2")
    name = "ngram" if built() else "prompt-lookup"
    command = drafter_folder.training_command(M2R2Drafter.training, target.model.config._name_or_path)
    message = f"no trained drafter is shipped for this model, and none can teach itself ({why}), so {name} drafts"
    warnings.warn(f"{message}; to train one: {command}", SpecDecWarning, stacklevel=2)
    return DrafterSpec.parse(name)


def _has_layer(target: Target) -> bool:
    """Return whether the model's files have a multi-token prediction layer that fits; warn if they have another one.

    If so, the layer is in memory, where ``mtp.read_head`` finds it again.
    """
    try:
        if not prediction_layer.announced(target.model) or prediction_layer.find(target.model) is None:
            return False
        read_head(target)
    except SpecDecError as error:
        warnings.warn(f"{error}; it does not draft", SpecDecWarning, stacklevel=3)
        return False
    return True
