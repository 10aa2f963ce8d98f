"""Teacher states on disk: what the base model computed for each training answer, once, for every epoch of a student.

A store is a folder of safetensors shards (memory-mapped when read) and an ``index.json`` with their SHA-256, the base
model's fingerprint and a digest of the answers. It is written shard by shard, so that a killed run resumes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specdec.base import inputs
from specdec.base.errors import SpecDecError
from specdec.models.drafter_folder import replace
from specdec.runtimes.cache import KVCache, Mask
from specdec.runtimes.layer_pass import Pass
from specdec.runtimes.target import Target
from specdec.train.data import Answer
from specdec.train.output import writing

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


def compute(
    folder: Path,
    target: Target,
    answers: Sequence[Answer],
    wanted: Wanted,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[Record]:
    """Complete the store in ``folder`` for these answers and read it. ``progress`` receives the tokens done.

    Raises SpecDecError if the folder holds states of another model or other answers, for damaged or missing shards, and
    if the disk is full.
    """
    index: dict[str, Any] = {
        "version": VERSION,
        "fingerprint": target.fingerprint,
        "answers": digest(answers),
        "dtype": str(target.dtype).removeprefix("torch."),
        "kv": wanted.kv,
        "hidden": wanted.hidden,
        "shards": [],
    }
    if (folder / INDEX).exists():
        found = _read_index(folder)
        differs = [key for key in ("fingerprint", "answers", "dtype") if found.get(key) != index[key]]
        differs += [key for key in ("kv", "hidden") if not set(index[key]) <= set(found.get(key, ()))]
        if differs:
            raise SpecDecError(
                f"'{folder}' holds teacher states of other {', '.join(differs)}; use another --output or delete it"
            )
        index = found
    kept, shards = Wanted(tuple(index["kv"]), tuple(index["hidden"])), index["shards"]
    with writing("teacher states", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for start in range(len(shards) * SHARD_ANSWERS, len(answers), SHARD_ANSWERS):
            chunk, name = answers[start : start + SHARD_ANSWERS], f"states-{len(shards):05d}.safetensors"
            save_file(_teach(target, chunk, kept, progress), folder / f"{name}.part")
            (folder / f"{name}.part").replace(folder / name)
            shards.append({"file": name, "sha256": inputs.sha256(folder / name), "answers": len(chunk)})
            replace(folder / INDEX, json.dumps(index, indent=1).encode())
    return [record for shard in shards for record in _records(_load(folder, shard), wanted)]


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
        texts = [torch.tensor(answers[i].prompt_ids + answers[i].response_ids) for i in rows]
        ids = pad_sequence(texts, batch_first=True).to(target.device)
        cache = KVCache(target.num_layers, len(rows), target.device)
        taps = {layer: torch.empty(0) for layer in wanted.hidden}
        final = whole_pass(target, ids, cache, taps)
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


def whole_pass(target: Target, ids: Tensor, cache: KVCache, taps: dict[int, Tensor]) -> Tensor:
    """All layers over rows of text ``ids`` [B, L] from the beginning: final states [B, L, D]."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    mask = Mask(positions, positions, positions[:, None] <= positions[:, :, None])
    return target.layers(target.embed(ids, positions), 0, target.num_layers, Pass(positions, mask, cache, taps))


def _records(tensors: dict[str, Tensor], wanted: Wanted) -> list[Record]:
    lengths, prompts = tensors.pop("lengths").tolist(), tensors.pop("prompts").tolist()
    kept = [length - 1 - first_kept(prompt) for length, prompt in zip(lengths, prompts, strict=True)]
    split = {
        key: tensor.split(
            lengths if key.startswith(("ids", "k.", "v.")) else kept
        )  # of every token, or from ``first`` on
        for key, tensor in tensors.items()
    }
    return [
        Record(
            split["ids"][i],
            prompt,
            first_kept(prompt),
            {layer: (split[f"k.{layer}"][i], split[f"v.{layer}"][i]) for layer in wanted.kv},
            {layer: split[f"hidden.{layer}"][i] for layer in wanted.hidden},
            split["best"][i],
            split["log_z"][i],
        )
        for i, prompt in enumerate(prompts)
    ]


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = inputs.parse_json((folder / INDEX).read_bytes())
        if index["version"] != VERSION or not isinstance(index["shards"], list):
            raise ValueError("another format")
    except (OSError, ValueError, KeyError, TypeError) as error:
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
