"""Public Medusa checkpoints, in the format of their authors and in vLLM's."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.models import drafter_folder, hub
from specdec.runtimes.target import Target

from .network import Medusa

HEADS, BLOCKS = 64, 16  # maximum numbers of heads, and of blocks of each
KIND = "medusa"
PUBLIC, PICKLE = "medusa_lm_head.safetensors", "medusa_lm_head.pt"
VLLM_COUNTS = {"num_heads": "num_heads", "num_layers": "num_hidden_layers"}  # with or without "medusa_" before them


def check_sizes(heads: Any, layers: Any) -> tuple[int, int]:
    """Return (heads, layers) as they are: the number of heads, and the number of blocks of each, from a config.json.

    Raises SpecDecError unless they are integers in 1 .. ``HEADS`` and 1 .. ``BLOCKS``.
    """
    what = "of the Medusa drafter"
    return options.check_int(f"heads {what}", heads, 1, HEADS), options.check_int(f"layers {what}", layers, 1, BLOCKS)


def find_folder(source: str) -> Path:
    """Return the path of the folder ``source``; or download the Hugging Face repository ORG/NAME[@revision] into one.

    Pickle files are not downloaded. Raises SpecDecError if the download fails; a folder need not exist.
    """
    named = hub.parse_repo_id(source)
    if named is None or Path(source).is_dir():
        return Path(source)
    files = [drafter_folder.CONFIG, drafter_folder.WEIGHTS, PUBLIC]
    return hub.fetch("drafter", *named, files, "; name a folder or a Hugging Face id")


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the config.json of a public Medusa checkpoint; None: the folder is not one.

    Raises SpecDecError if the file is broken.
    """
    if not (folder / drafter_folder.CONFIG).is_file():
        return None
    config = drafter_folder.read_json(folder / drafter_folder.CONFIG)
    if not isinstance(config, dict):
        return None
    return config if "medusa_num_heads" in config or config.get("model_type") == KIND else None


def read_checkpoint(folder: Path, config: dict[str, Any], target: Target) -> tuple[Medusa, list[Tensor]]:
    """Return the blocks and the output heads, [V, D] or [V', D] each, of a public checkpoint.

    Raises SpecDecError if a tensor is missing or does not fit. config: what ``read_config`` returns for ``folder``.
    V' is the number of tokens that the heads draft, ``Medusa.draft_vocab``.

    The Medusa authors' tensors are ``HEAD.BLOCK.linear.weight`` [D, D] and ``.bias`` [D], and ``HEAD.LAYERS.weight``
    [V, D]. vLLM's tensors are ``blocks.HEAD.layers.BLOCK.weight``, with ``medusa_fc_bias`` also ``.bias``, and
    ``lm_heads.HEAD.weight``, of which only the first exists with ``original_lm_head``. ``token_map`` [V'] has the ids
    of the tokens of a reduced vocabulary (``truncated_vocab_size``).
    """
    d, v, vllm = target.hidden_size, target.vocab_size, config.get("model_type") == KIND
    path = folder / (drafter_folder.WEIGHTS if vllm else PUBLIC)
    if vllm:
        heads, layers = check_sizes(
            *(config.get(f"medusa_{name}", config.get(own)) for name, own in VLLM_COUNTS.items())
        )
        block, head = "blocks.{k}.layers.{n}", "lm_heads.{k}.weight"
    elif path.is_file():
        heads, layers = check_sizes(config["medusa_num_heads"], config.get("medusa_num_layers", 1))
        block, head = "{k}.{n}.linear", f"{{k}}.{layers}.weight"
    else:
        pickled = f"{PICKLE} is a pickle, which may run code and is not read" if (folder / PICKLE).exists() else ""
        raise SpecDecError(
            f"'{folder}' has no {PUBLIC}; {pickled or 'get the whole checkpoint'}; "
            "save its tensors with safetensors.torch.save_file"
        )
    shared, biased = vllm and bool(config.get("original_lm_head")), not vllm or bool(config.get("medusa_fc_bias"))
    blocks = {(k, n): block.format(k=k, n=n) for k, n in product(range(heads), range(layers))}
    with drafter_folder.open_tensors(path) as stored:
        names = {name.removeprefix("medusa_heads.") if vllm else name: name for name in stored.header}
        vocab = None
        if vllm and "token_map" in names and config.get("truncated_vocab_size") != v:
            vocab = drafter_folder.draft_vocabulary(folder, stored, v, names["token_map"])
        first = stored.header.get(names.get(head.format(k=0), ""))
        full = vocab is None or (first is not None and first.shape[:1] == (v,))  # of which the tokens' rows are taken
        rows = v if vocab is None or full else len(vocab)
        wanted: dict[str, tuple[int, ...]] = {head.format(k=k): (rows, d) for k in range(1 if shared else heads)}
        own_heads = list(wanted)
        for name in blocks.values():
            wanted |= {f"{name}.weight": (d, d)} | ({f"{name}.bias": (d,)} if biased else {})
        needed = {name: torch.empty(shape, device="meta") for name, shape in wanted.items()}
        drafter_folder.check_fit(folder, needed, {name: stored.header[names[name]] for name in wanted if name in names})
        network = Medusa(d, heads, layers, draft_vocab=None if vocab is None else vocab.int())
        for (k, n), name in blocks.items():
            network.weights[n].data[k] = stored.read(names[f"{name}.weight"])
            if biased:
                network.biases[n].data[k] = stored.read(names[f"{name}.bias"])
        own = [stored.read(names[name]) for name in own_heads]
        own = [weight[vocab] if vocab is not None and full else weight for weight in own]
        return network, own * (heads if shared else 1)
