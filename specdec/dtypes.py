"""Which dtype to compute in: of those that hold a model's weights exactly, the one that is fastest on this machine.

Another dtype rounds otherwise, so its text may be another one: it is chosen where somebody asks for it, and then it is
the base. Knows nothing about drafting.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from specdec import measured, native
from specdec.errors import SpecDecError
from specdec.runtimes import make_target
from specdec.target import Target, find_layers

FASTEST = "fastest"


def convert(model: PreTrainedModel, runtime: str = "auto", weights: str = "auto", compile: bool = False) -> str:
    """Bring ``model`` into the dtype that is fastest in the runtime asked for; return which, and why, in a line.

    Its own and float32, which holds the values of both 16-bit dtypes, are timed on as many of its layers as no cache
    holds, in passes over one and five tokens; what was found is kept. Its own stays on GPUs, where layers are rounded
    anyway, where one runtime alone serves, and while the machine is busy. Arguments as ``make_target``.
    """
    own = model.dtype
    if own == torch.float32 or model.device.type != "cpu" or weights in ("int8", "int4"):
        return f"{_name(own)}: nothing else to choose"
    targets: dict[torch.dtype, Target] = {}
    try:
        sample = _few_layers(model)
        for kind in (own, torch.float32):
            few: Any = copy.deepcopy(sample)
            targets[kind] = make_target(few.to(kind), runtime, weights, compile)[0]
    except SpecDecError as error:  # of the one or the other
        return f"{_name(own)}: nothing else to choose ({error})"
    what = f"dtype {targets[own].fingerprint} {[f'{t.runtime} {t.storage}' for t in targets.values()]}"
    ways = {f"{_name(kind)} {rows}": _pass(targets[kind], rows) for kind in targets for rows in native.TIMED}
    found = measured.seconds(what, ways)
    if found is None:
        return f"{_name(own)}: the machine is too busy to tell"
    total = {_name(kind): sum(found[f"{_name(kind)} {rows}"] for rows in native.TIMED) for kind in targets}
    best = measured.choose(total, _name(own))
    if best != _name(own):
        model.float()
    ratio = total[_name(torch.float32)] / total[_name(own)]
    return f"{best}: float32 takes {ratio:.2f} times as long as {_name(own)}"


def _few_layers(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` with its first layers alone."""
    owner, attr = find_layers(model, int(model.config.get_text_config().num_hidden_layers))
    layers: Any = getattr(owner, attr)
    size = sum(parameter.nbytes for parameter in layers[0].parameters())
    count = min(-(-native.TIMED_BYTES // max(size, 1)), len(layers))
    setattr(owner, attr, nn.ModuleList(layers[:count]))
    try:
        few = copy.deepcopy(model)
    finally:
        setattr(owner, attr, layers)
    config = few.config.get_text_config()
    config.num_hidden_layers = count
    for kinds in ("layer_types", "layers_block_type"):
        if getattr(config, kinds, None):
            setattr(config, kinds, getattr(config, kinds)[:count])
    return few


def _pass(target: Target, rows: int) -> Callable[[], object]:
    cache, positions = target.new_cache(), torch.arange(rows)[None]

    def run() -> None:
        x = target.embed(torch.zeros(1, rows, dtype=torch.long), positions)
        target.choose(target.layers(x, 0, target.num_layers, positions, cache.mask(0, positions), cache))
        cache.trim(rows)

    return run


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
