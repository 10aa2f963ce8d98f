"""Teacher states on disk: what the base model computed for each training answer, once, for every epoch of a student.

A store is a folder of safetensors shards (memory-mapped when read) and an ``index.json`` with their SHA-256, the base
model's fingerprint and a digest of the answers. It is written shard by shard, so that a killed run goes on where it
stopped. Knows nothing about students and losses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.base import inputs
from specdec.base.errors import SpecDecError
from specdec.models.drafter_folder import replace
from specdec.runtimes.cache import KVCache, Mask
from specdec.runtimes.layer_pass import Pass
from specdec.runtimes.target import Target
from specdec.train.data import Answer
from specdec.train.files import writing

INDEX, VERSION = "index.json", 1
SHARD_ANSWERS = 256
PASS_TOKENS = 4096  # tokens (padding included) of one teacher pass


@dataclass(frozen=True)
class Wanted:
    """Which states are kept: keys and values of layers ``kv`` (every token) and the inputs of layers ``hidden``.

    Hidden states (layer N: the final one) are kept from two positions before the first answer token on.
    """

    kv: tuple[int, ...]
    hidden: tuple[int, ...]


@dataclass(frozen=True)
class Record:
    """One answer's states, as views of a memory-mapped shard. L tokens, hidden states of positions first .. L - 2."""

    ids: Tensor  # int32 [L]
    prompt: int  # tokens of the prompt
    first: int
    kv: dict[int, tuple[Tensor, Tensor]]  # layer -> keys and values [L, H', d]
    hidden: dict[int, Tensor]  # layer -> [L - 1 - first, D]
    best: Tensor  # int32 [L - 1 - first], the base's most likely next token
    log_z: Tensor  # float32 [L - 1 - first], log of the base's partition sum over the full vocabulary


def first_kept(prompt: int) -> int:
    return max(prompt - 2, 0)


def digest(answers: Sequence[Answer]) -> str:
    """A digest of the token ids of the answers, in order."""
    sha = hashlib.sha256()
    for answer in answers:
        sha.update(json.dumps([answer.prompt_ids, answer.response_ids]).encode())
    return sha.hexdigest()


class StateStore:
    """Reads the records of a complete store. Raises SpecDecError for foreign, damaged or missing shards."""

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        self.folder = folder
        self.records: list[Record] = []
        for shard in _read_index(folder)["shards"]:
            self.records += _records(_load(folder, shard), wanted)

    def __len__(self) -> int:
        return len(self.records)


def compute(
    folder: Path,
    target: Target,
    answers: Sequence[Answer],
    wanted: Wanted,
    fingerprint: str,
    progress: Callable[[int], None] = lambda tokens: None,
) -> StateStore:
    """Complete the store in ``folder`` for these answers and open it. ``progress`` receives the tokens done.

    Raises SpecDecError if the folder holds states of another model or other answers, and if the disk is full.
    """
    head = {
        "version": VERSION,
        "fingerprint": fingerprint,
        "answers": digest(answers),
        "dtype": str(target.dtype).removeprefix("torch."),
        "kv": list(wanted.kv),
        "hidden": list(wanted.hidden),
    }
    shards: list[dict[str, object]] = []
    if (folder / INDEX).exists():
        index = _read_index(folder)
        differs = [key for key in list(head)[:4] if index.get(key) != head[key]]
        differs += [key for key in ("kv", "hidden") if not set(head[key]) <= set(index.get(key, ()))]  # type: ignore[call-overload]
        if differs:
            raise SpecDecError(
                f"'{folder}' holds teacher states of other {', '.join(differs)}; use another --output or delete it"
            )
        shards, head = index["shards"], {key: index[key] for key in head}
        full = Wanted(tuple(index["kv"]), tuple(index["hidden"]))
    else:
        full = wanted
    with writing("teacher states", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(len(shards), -(-len(answers) // SHARD_ANSWERS)):
            chunk = answers[number * SHARD_ANSWERS : (number + 1) * SHARD_ANSWERS]
            tensors = _teach(target, chunk, full, progress)
            name = f"states-{number:05d}.safetensors"
            save_file(tensors, folder / f"{name}.part")
            (folder / f"{name}.part").replace(folder / name)
            shards.append({"file": name, "sha256": inputs.sha256(folder / name), "answers": len(chunk)})
            replace(folder / INDEX, json.dumps(head | {"shards": shards}, indent=1).encode())
    return StateStore(folder, wanted)


@torch.inference_mode()
def _teach(
    target: Target, answers: Sequence[Answer], wanted: Wanted, progress: Callable[[int], None]
) -> dict[str, Tensor]:
    """Run the base over the answers (batched by length) and return a shard's tensors, answers in the given order."""
    parts: list[dict[str, Tensor]] = [{} for _ in answers]
    order = sorted(range(len(answers)), key=lambda i: len(answers[i]))
    while order:
        width = len(answers[order[-1]])
        rows = [order.pop() for _ in range(min(len(order), max(1, PASS_TOKENS // width)))]
        ids = torch.zeros(len(rows), width, dtype=torch.long, device=target.device)
        for b, i in enumerate(rows):
            ids[b, : len(answers[i])] = torch.tensor(answers[i].prompt_ids + answers[i].response_ids)
        positions = torch.arange(width, device=target.device).expand(len(rows), -1)
        visible = torch.ones(width, width, dtype=torch.bool, device=target.device).tril().expand(len(rows), -1, -1)
        cache = KVCache(target.num_layers, len(rows), target.device)
        taps = {layer: torch.empty(0) for layer in wanted.hidden}
        mask = Mask(positions, positions, visible)
        final = target.layers(target.embed(ids, positions), 0, target.num_layers, Pass(positions, mask, cache, taps))
        for b, i in enumerate(rows):
            length, first = len(answers[i]), first_kept(len(answers[i].prompt_ids))
            logits = target.readout(final[b : b + 1, first : length - 1])[0].float()  # (M, V)
            part = {"ids": ids[b, :length].int(), "best": logits.max(-1).indices.int(), "log_z": logits.logsumexp(-1)}
            for layer in wanted.hidden:
                part[f"hidden.{layer}"] = taps[layer][b, first : length - 1]
            for layer in wanted.kv:
                for name, buffer in (("k", cache.keys[layer]), ("v", cache.values[layer])):
                    assert buffer is not None
                    part[f"{name}.{layer}"] = buffer[b, :, :length].transpose(0, 1)
            parts[i] = {key: value.cpu().clone() for key, value in part.items()}
            progress(length)
    tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    tensors["lengths"] = torch.tensor([len(a) for a in answers])
    tensors["prompts"] = torch.tensor([len(a.prompt_ids) for a in answers])
    return tensors


def _records(tensors: dict[str, Tensor], wanted: Wanted) -> list[Record]:
    lengths, prompts = tensors["lengths"].tolist(), tensors["prompts"].tolist()
    firsts = [first_kept(n) for n in prompts]
    kept = [n - 1 - f for n, f in zip(lengths, firsts, strict=True)]
    split = {
        key: tensor.split(kept if key in ("best", "log_z") or key.startswith("hidden") else lengths)
        for key, tensor in tensors.items()
        if key not in ("lengths", "prompts")
    }
    return [
        Record(
            split["ids"][i],
            prompts[i],
            firsts[i],
            {layer: (split[f"k.{layer}"][i], split[f"v.{layer}"][i]) for layer in wanted.kv},
            {layer: split[f"hidden.{layer}"][i] for layer in wanted.hidden},
            split["best"][i],
            split["log_z"][i],
        )
        for i in range(len(lengths))
    ]


def _read_index(folder: Path) -> dict:  # type: ignore[type-arg]
    try:
        index = json.loads((folder / INDEX).read_text("utf-8"))
        if index["version"] != VERSION or not isinstance(index["shards"], list):
            raise ValueError("another format")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SpecDecError(
            f"'{folder / INDEX}' is not an index of teacher states ({error}); delete the folder"
        ) from None
    return index


def _load(folder: Path, shard: dict[str, str]) -> dict[str, Tensor]:
    path = folder / str(shard["file"])
    try:
        if inputs.sha256(path) == shard["sha256"]:
            return load_file(path)
    except (OSError, SafetensorError):
        pass
    raise SpecDecError(f"shard '{path}' is missing, truncated or not the one that was written; delete '{folder}'")
