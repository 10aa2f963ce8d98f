"""Teacher states on disk: states of the base model for each training answer, computed once for all epochs.

The states are a folder of safetensors shards (memory-mapped when read) and an ``index.json`` with the shards' names,
the base model's fingerprint and a digest of the answers. A shard has the states of answers of about ``SHARD_TOKENS``
tokens. Shards are written one by one, so a killed run can resume.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specdec.base import inputs
from specdec.base.errors import SpecDecError, errors_as
from specdec.base.files import write_atomically
from specdec.base.terminal import Progress
from specdec.kvcache.cache import KVCache
from specdec.models.families import key_sources
from specdec.runtimes.target import Pass, Target
from specdec.train.data import TrainingAnswer
from specdec.train.output import writing

INDEX, VERSION = "index.json", 1
SHARD_TOKENS = 16_000  # of the texts in a shard, the last of which may go beyond: what an interrupted run loses
EVERY_TOKEN = "ids", "k.", "v."  # prefixes of tensors with an entry for every token; all others begin at ``first``
NO_PATH = (
    "and training runs through layers with attention only; m2r2 learns from texts of this model by itself (specdec "
    "learn MODEL), and medusa runs no layer"
)
PASS_TOKENS = 1024  # tokens per forward pass, padding included: intermediate results fit into the CPU cache
READOUT_ROWS = 256  # positions per call of the output head
SUM_ROWS = 8  # positions per log-sum-exp in float32


@dataclass(frozen=True)
class StateSelection:
    """The layers whose states are stored.

    kv: layers whose keys and values are stored, for every token.
    hidden: layers whose inputs are stored, from two positions before the first answer token on. Layer N (the number of
        layers) stands for the final states: the last layer's output, before the final norm.
    """

    kv: tuple[int, ...]
    hidden: tuple[int, ...]


@dataclass(frozen=True)
class AnswerStates:
    """The base model's states on a prompt and its answer, L tokens together, as views of a memory-mapped shard.

    ids: int32 [L]. prompt: number of prompt tokens.
    kv: layer -> (keys, values), [L, H', d] each, of H' key heads of size d.
    first: position of the first entry of the following fields, which have n = L - 1 - first entries: entry i is of the
        position first + i.
    hidden: layer -> the layer's input [n, D]; layer N: the last layer's output, before the final norm.
    best: the most likely token after each position, int32 [n].
    log_z: log of the partition sum, which is the sum of exp(logit) over the full vocabulary, float32 [n].
    """

    ids: Tensor
    prompt: int
    first: int
    kv: dict[int, tuple[Tensor, Tensor]]
    hidden: dict[int, Tensor]
    best: Tensor
    log_z: Tensor


def check_layers(target: Target, wanted: StateSelection) -> None:
    """Raise SpecDecError if a layer in ``wanted.kv`` is recurrent, or attends to the keys of another layer.

    Such a layer of ``target`` has no keys and values of its own that could be stored.
    """
    if recurrent := sorted(target.recurrent_layers.intersection(wanted.kv)):
        raise SpecDecError(f"layer {recurrent[0]} is recurrent, {NO_PATH}")
    sources = key_sources(target.model.config.get_text_config()) if wanted.kv else []
    if shared := [layer for layer in wanted.kv if sources[layer] != layer]:
        raise SpecDecError(f"layer {shared[0]} reads the keys of another layer, {NO_PATH}")


def first_stored(prompt: int) -> int:
    """Return the first position in a text whose hidden states are stored: that before the last of ``prompt`` tokens."""
    return max(prompt - 2, 0)


def digest(answers: Sequence[TrainingAnswer]) -> str:
    """Return the SHA-256 (hex digits) of the token ids of the answers, in order."""
    sha = hashlib.sha256()
    for answer in answers:
        sha.update(json.dumps([answer.prompt_ids, answer.response_ids]).encode())
    return sha.hexdigest()


def compute_states(
    folder: Path,
    target: Target,
    answers: Sequence[TrainingAnswer],
    wanted: StateSelection,
    progress: Progress,
    name: str,
) -> list[AnswerStates]:
    """Return the states ``wanted`` of ``target`` on each of ``answers``, in order, computing what ``folder`` lacks.

    folder: where the states are written, shard by shard, and from which they are mapped; made if it is missing.
    progress: shows the number of finished tokens. name: names these states in its bar.
    Raises SpecDecError if the folder holds states of another model or of other answers, for damaged or missing shards,
    and for a full disk.
    """
    index: dict[str, Any] = {
        "version": VERSION,
        "fingerprint": target.fingerprint,
        "answers": digest(answers),
        "dtype": str(target.dtype).removeprefix("torch."),
        "kv": [*wanted.kv],
        "hidden": [*wanted.hidden],
        "shards": [],
    }
    if (folder / INDEX).exists():
        found = _read_index(folder)
        if differs := [key for key in index if key != "shards" and found.get(key) != index[key]]:
            raise SpecDecError(
                f"'{folder}' holds teacher states of other {', '.join(differs)}; use another --output or delete it"
            )
        index = found
    shards = index["shards"]
    left = answers[sum(shard["answers"] for shard in shards) :]
    total, missing = (sum(map(len, some)) for some in (answers, left))
    label = f"teacher states ({name})"
    task = progress.add_task(label, total=total, visible=missing > 0, unit="tokens", part="states")
    progress.advance(task, total - missing)
    done = partial(progress.advance, task)
    with writing("teacher states", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for chunk in _chunks(left):
            file = f"states-{len(shards):05d}.safetensors"
            tensors, part = _make_shard(target, chunk, wanted, done), folder / f"{file}.part"
            try:
                save_file(tensors, part)
                part.replace(folder / file)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            shards.append({"file": file, "answers": len(chunk)})
            write_atomically(folder / INDEX, json.dumps(index, indent=1).encode())
    return [record for shard in shards for record in _records(_load(folder, shard), wanted)]


def _chunks(answers: Sequence[TrainingAnswer]) -> Iterator[list[TrainingAnswer]]:
    """Cut the answers, in order, into those of a shard each: the fewest that have ``SHARD_TOKENS`` tokens together."""
    chunk, tokens = list[TrainingAnswer](), 0
    for answer in answers:
        chunk.append(answer)
        tokens += len(answer)
        if tokens >= SHARD_TOKENS:
            yield chunk
            chunk, tokens = [], 0
    if chunk:
        yield chunk


@torch.inference_mode()
def _make_shard(
    target: Target,
    answers: Sequence[TrainingAnswer],
    wanted: StateSelection,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Tensor]:
    """Run ``target`` over the answers; return the tensors of their shard, on the CPU.

    wanted: the layers whose states are computed. progress: called after each pass with its number of tokens.
    Keys of the result: "lengths" and "prompts" (numbers of tokens of each text and of its prompt), "ids", "best",
    "log_z", "hidden.LAYER", "k.LAYER" and "v.LAYER". These have the entries of all answers one after the other, which
    ``AnswerStates`` describes.
    """
    texts = [torch.tensor(answer.prompt_ids + answer.response_ids) for answer in answers]
    found: list[dict[str, Tensor]] = [{} for _ in texts]
    for some in _grouped([len(text) for text in texts]):
        ids = pad_sequence([texts[i] for i in some], batch_first=True).to(target.device)
        cache = target.new_cache(len(some))
        taps = {layer: ids for layer in wanted.hidden}
        final = whole_pass(target, ids, cache, taps)
        stored = [slice(first_stored(len(answers[i].prompt_ids)), len(answers[i]) - 1) for i in some]
        read = _read_out(target, torch.cat([final[b, own] for b, own in enumerate(stored)]))
        counts = [own.stop - own.start for own in stored]
        for b, (i, best, log_z) in enumerate(zip(some, *(each.split(counts) for each in read), strict=True)):
            length, own = len(texts[i]), found[i]
            own |= {"best": best, "log_z": log_z}
            own |= {f"hidden.{layer}": taps[layer][b, stored[b]].clone() for layer in wanted.hidden}
            for layer in wanted.kv:
                own |= {f"{name}.{layer}": x[:length].clone() for name, x in cache.of_layer(layer, b).items()}
        progress(sum(len(texts[i]) for i in some))
    shard = {"ids": torch.cat(texts).int(), "lengths": torch.tensor([len(text) for text in texts])}
    shard["prompts"] = torch.tensor([len(answer.prompt_ids) for answer in answers])
    return shard | {key: torch.cat([own[key] for own in found]).cpu() for key in found[0]}


def _grouped(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield groups of indices into ``lengths`` (tokens per text): texts of similar length that fit into one pass."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    while order:
        count = max(1, PASS_TOKENS // lengths[order[-1]])
        yield order[-count:]
        del order[-count:]


def _read_out(target: Target, x: Tensor) -> tuple[Tensor, Tensor]:
    """Apply ``target``'s final norm and output head to final states ``x`` [n, D], a few rows at a time.

    Returns the most likely token after each, int32 [n], and log(sum(exp(logits))) of each, float32 [n].
    """
    best, log_z = list[Tensor](), list[Tensor]()
    for rows in x.split(READOUT_ROWS):
        logits = target.readout(rows[None])[0]
        best.append(logits.argmax(-1).int())
        log_z += [few.float().logsumexp(-1) for few in logits.split(SUM_ROWS)]
    return torch.cat(best), torch.cat(log_z)


def whole_pass(target: Target, ids: Tensor, cache: KVCache, taps: dict[int, Tensor]) -> Tensor:
    """Run all layers of ``target`` over B texts; return the last layer's output [B, L, D], before the final norm.

    ids: the texts' tokens, int64 [B, L], padded at the end. cache: an empty cache of B rows, which receives the keys
    and values, uncommitted.
    taps: its keys are layers; the values are replaced by the inputs of these layers [B, L, D].
    """
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    given = Pass(positions, cache.register(0, positions), cache, taps)
    return target.layers(target.embed(ids, positions), 0, target.num_layers, given)


def _records(tensors: dict[str, Tensor], wanted: StateSelection) -> list[AnswerStates]:
    """Cut the tensors of a shard into the states of its answers, which are views of these tensors.

    tensors: the result of ``_make_shard``; "lengths" and "prompts" are removed from it. wanted: the layers to return.
    """
    lengths, prompts = tensors.pop("lengths").tolist(), tensors.pop("prompts").tolist()
    counts = [length - 1 - first_stored(prompt) for length, prompt in zip(lengths, prompts, strict=True)]
    split = {key: tensor.split(lengths if key.startswith(EVERY_TOKEN) else counts) for key, tensor in tensors.items()}
    return [
        AnswerStates(
            split["ids"][i],
            prompt,
            first_stored(prompt),
            {n: (split[f"k.{n}"][i], split[f"v.{n}"][i]) for n in wanted.kv if f"k.{n}" in split},
            {layer: split[f"hidden.{layer}"][i] for layer in wanted.hidden},
            split["best"][i],
            split["log_z"][i],
        )
        for i, prompt in enumerate(prompts)
    ]


def _read_index(folder: Path) -> dict[str, Any]:
    what = f"'{folder / INDEX}' is not an index of teacher states; delete the folder"
    with errors_as(what, ValueError, KeyError, TypeError):
        index: dict[str, Any] = inputs.parse_json((folder / INDEX).read_bytes())
        counts = [shard["answers"] for shard in index["shards"]]
        if index["version"] != VERSION or not all(type(count) is int and count > 0 for count in counts):
            raise ValueError("another format")
    return index


def _load(folder: Path, shard: dict[str, str]) -> dict[str, Tensor]:
    path = folder / str(shard["file"])
    with errors_as(f"shard '{path}' is missing or truncated; delete '{folder}'", SafetensorError):
        return load_file(path)
