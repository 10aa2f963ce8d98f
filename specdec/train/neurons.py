"""The choice of the neurons that drafts of M2R2 run in the MLPs of their segments (setting ``neurons``)."""

from __future__ import annotations

import json
import shutil

import torch
from torch import Tensor

from specdec.base import files
from specdec.drafters.m2r2.path import M2R2Path
from specdec.models import drafter_folder
from specdec.runtimes.narrow import strengths
from specdec.runtimes.target import Target
from specdec.train.method import RunContext
from specdec.train.output import STATES, writing
from specdec.train.states import StateSelection, compute_states

FILE = "neurons.json"
TOKENS = 4_000  # answer positions that neurons are chosen on


@torch.no_grad()
def choose_neurons(path: M2R2Path, target: Target, context: RunContext) -> dict[int, Tensor]:
    """Return for each layer of ``path``'s segments the indices of its ``path.neurons`` strongest neurons.

    A neuron is one entry of an MLP's intermediate result. The strongest neurons add most to the residual on about
    ``TOKENS`` positions of the answers. The indices are int32 and ascending. They are stored in ``neurons.json`` in the
    output folder, and read from there if it exists.
    Raises SpecDecError for a full disk.
    target: the base model to train in. context: of the run, with its output folder and answers.
    """
    file = context.output / FILE
    folder = context.output / STATES / "neurons"
    layers = path.narrow_layers
    if not file.exists():
        seen, count = 0, 0
        while seen < TOKENS and count < len(context.answers):
            seen, count = seen + len(context.answers[count].response_ids), count + 1
        some, wanted = context.answers[:count], StateSelection((), tuple(layers))
        records = compute_states(folder, context.teacher, some, wanted, context.progress, "neurons")
        found, kind = dict[str, list[int]](), str(target.model.config.get_text_config().model_type)
        for layer in layers:
            h = torch.cat([record.hidden[layer] for record in records]).to(target.device, target.dtype)  # (n, D)
            strongest = strengths(target.block(layer), kind, h).topk(path.neurons).indices
            found[str(layer)] = strongest.sort().values.tolist()
        with writing(FILE, context.output):
            files.write_atomically(file, json.dumps(found).encode())
        shutil.rmtree(folder)
    stored = drafter_folder.read_json(file)
    return {layer: torch.tensor(stored[str(layer)], dtype=torch.int32) for layer in layers}
