"""Teacher states on disk: states of the base model for each training answer, computed once for all epochs.

A store is a folder of safetensors shards (memory-mapped when read) and an ``index.json`` with their SHA-256, the base
model's fingerprint and a digest of the answers. It is written shard by shard, so a killed run can resume.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specdec.base import inputs
from specdec.base.errors import SpecDecError
from specdec.base.files import write_atomically
from specdec.base.terminal import Progress, duration, megabytes, tell
from specdec.kvcache.cache import KVCache, Mask
from specdec.runtimes import linear_maps
from specdec.runtimes.target import Pass, Target
from specdec.train.data import TrainingAnswer
from specdec.train.output import writing

INDEX, VERSION = "index.json", 1
SHARD_ANSWERS = 256
PASS_TOKENS = 1024  # tokens per layer pass, padding included: intermediate results fit into the CPU cache
READOUT_ROWS, SUM_ROWS = 256, 8  # positions per readout, in the model's dtype and in float32


@dataclass(frozen=True)
class StateSelection:
    """The layers whose states are stored.

    kv: keys and values of every token; for a recurrent layer the input of its mixer, from which its states follow.
    hidden: layer inputs (layer N: final states), from two positions before the first answer token on.
    context: layer inputs of every token.
    """

    kv: tuple[int, ...]
    hidden: tuple[int, ...]
    context: tuple[int, ...] = ()


@dataclass(frozen=True)
class AnswerStates:
    """The states of an answer of L tokens, as views of a memory-mapped shard. They begin at position ``first``."""

    ids: Tensor  # int32 [L]
    prompt: int  # tokens of the prompt
    first: int
    kv: dict[int, tuple[Tensor, Tensor]]  # layer -> keys and values [L, H', d]
    hidden: dict[int, Tensor]  # layer -> [L - 1 - first, D]
    best: Tensor  # int32 [L - 1 - first], the base's most likely next token
    log_z: Tensor  # float32 [L - 1 - first], log of the base's partition sum over the full vocabulary
    context: dict[int, Tensor]  # layer -> [L, D]
    mixed: dict[int, Tensor]  # recurrent layer -> input of its mixer [L, D]


def first_kept(prompt: int) -> int:
    return max(prompt - 2, 0)


def digest(answers: Sequence[TrainingAnswer]) -> str:
    """A digest of the token ids of the answers, in order."""
    sha = hashlib.sha256()
    for answer in answers:
        sha.update(json.dumps([answer.prompt_ids, answer.response_ids]).encode())
    return sha.hexdigest()


def compute_states(
    folder: Path,
    target: Target,
    answers: Sequence[TrainingAnswer],
    wanted: StateSelection,
    progress: Progress | None = None,
    name: str = "",
) -> list[AnswerStates]:
    """Complete the store in ``folder`` for these answers and read it.

    progress: shows the expected size and time, then the finished tokens of ``name``.
    Raises SpecDecError if the folder holds states of another model or other answers, for damaged or missing shards, and
    if the disk is too small.
    """
    progress = progress or Progress(console=Console(quiet=True))
    name = f"teacher states ({name})" if name else "teacher states"
    index: dict[str, Any] = {
        "version": VERSION,
        "fingerprint": target.fingerprint,
        "answers": digest(answers),
        "dtype": str(target.dtype).removeprefix("torch."),
        "kv": wanted.kv,
        "hidden": wanted.hidden,
        "context": wanted.context,
        "shards": [],
    }
    if (folder / INDEX).exists():
        found = _read_index(folder)
        differs = [key for key in ("fingerprint", "answers", "dtype") if found.get(key) != index[key]]
        differs += [key for key in ("kv", "hidden", "context") if not set(index[key]) <= set(found.get(key, ()))]
        if differs:
            raise SpecDecError(
                f"'{folder}' holds teacher states of other {', '.join(differs)}; use another --output or delete it"
            )
        index = found
    kept = StateSelection(*(tuple(index.get(key, ())) for key in ("kv", "hidden", "context")))
    shards = index["shards"]
    left = answers[len(shards) * SHARD_ANSWERS :]
    total, missing = (sum(map(len, some)) for some in (answers, left))
    task = progress.add_task(name, total=total, completed=total - missing, visible=missing > 0, unit="tokens")
    done = partial(progress.advance, task)
    with writing("teacher states", folder):
        folder.mkdir(parents=True, exist_ok=True)
        if left:
            size, seconds = estimate(target, left, kept)
            tell(progress.console, f"{name}: {missing} tokens, about {megabytes(size)} and {duration(seconds)}")
            if (free := shutil.disk_usage(folder).free) < size:
                raise SpecDecError(
                    f"{name} take about {megabytes(size)}, and '{folder}' has {megabytes(free)} free; free space and "
                    "--resume, or train on fewer answers"
                )
        for start in range(len(shards) * SHARD_ANSWERS, len(answers), SHARD_ANSWERS):
            chunk, file = answers[start : start + SHARD_ANSWERS], f"states-{len(shards):05d}.safetensors"
            save_file(_teach(target, chunk, kept, done), folder / f"{file}.part")
            (folder / f"{file}.part").replace(folder / file)
            shards.append({"file": file, "sha256": inputs.sha256(folder / file), "answers": len(chunk)})
            write_atomically(folder / INDEX, json.dumps(index, indent=1).encode())
    return [record for shard in shards for record in _records(_load(folder, shard), wanted)]


@torch.inference_mode()
def estimate(target: Target, answers: Sequence[TrainingAnswer], wanted: StateSelection) -> tuple[int, float]:
    """Bytes on the disk and seconds for these answers, estimated from one layer pass and one readout."""
    rows = next(_grouped([len(answer) for answer in answers]))
    texts = [torch.tensor(answers[i].prompt_ids + answers[i].response_ids) for i in rows]
    block = _block(target, rows, texts, 0)

    def timed(stage: int, call: Callable[[], Tensor]) -> float:
        """The seconds of the second call; the first one warms up."""
        with target.prepared(stage):
            call()
            start = time.perf_counter()
            call().flatten()[-1].item()  # waits for a GPU
            return time.perf_counter() - start

    def run(layer: int) -> dict[str, Tensor]:
        block.x = x
        return _run(target, layer, block)

    x = block.x
    recurrent = [layer for layer in wanted.kv if layer in target.recurrent_layers]
    attending = [layer for layer in wanted.kv if layer not in target.recurrent_layers]
    first = min(wanted.kv, default=0)
    layer = timed(first, lambda: (run(first), block.x)[1])
    sample = block.x.flatten(0, 1)[:READOUT_ROWS]
    readout = timed(target.num_layers, lambda: _read_out(target, sample)[0])
    tokens = sum(map(len, answers))
    kept = sum(len(answer) - 1 - first_kept(len(answer.prompt_ids)) for answer in answers)
    state = sample.shape[1] * sample.itemsize
    per_token = 4 + len(wanted.context) * state  # as in a ``AnswerStates``
    for layers in filter(None, (recurrent, attending)):
        per_token += len(layers) * sum(entries[0, 0].nbytes for entries in run(layers[0]).values())
    per_kept = 8 + len(wanted.hidden) * state
    seconds = target.num_layers * tokens * layer / sum(map(len, texts)) + kept * readout / len(sample)
    return tokens * per_token + kept * per_kept, seconds


@dataclass
class _Block:
    """Answers that run together, padded on the right. x: input of the next layer [B, T, D]."""

    answers: Sequence[int]
    x: Tensor
    positions: Tensor
    mask: Mask


@torch.inference_mode()
def _teach(
    target: Target, answers: Sequence[TrainingAnswer], wanted: StateSelection, progress: Callable[[int], None]
) -> dict[str, Tensor]:
    """Run the base over the answers and return the tensors of a shard, answers in the given order.

    All answers pass through a layer before the next layer runs, so its weights are prepared once, and only its keys and
    values are in memory. The common beginning of all answers runs once.
    """
    texts = [torch.tensor(answer.prompt_ids + answer.response_ids) for answer in answers]
    lengths, firsts = [len(text) for text in texts], [first_kept(len(answer.prompt_ids)) for answer in answers]
    kept = [length - 1 - first for length, first in zip(lengths, firsts, strict=True)]
    shard = {"ids": torch.cat(texts).int(), "lengths": torch.tensor(lengths)}
    shard["prompts"] = torch.tensor([len(answer.prompt_ids) for answer in answers])
    token_rows, kept_rows = torch.arange(sum(lengths)).split(lengths), torch.arange(sum(kept)).split(kept)
    common = 0 if target.recurrent_layers else _common(texts, min(firsts))
    beginning = _block(target, [0], [texts[0][:common]], 0) if common else None
    blocks = [_block(target, some, [texts[i][common:] for i in some], common) for some in _grouped(lengths)]
    stages, reported = target.num_layers + 1, 0

    def put(key: str, rows: Tensor, count: int, values: Tensor) -> None:
        if key not in shard:
            shard[key] = torch.empty(count, *values.shape[1:], dtype=values.dtype)
        shard[key][rows[0] : rows[-1] + 1] = values

    def states(block: _Block) -> list[Tensor]:
        """The stored part of each answer's states."""
        return [block.x[b, firsts[i] - common :][: kept[i]] for b, i in enumerate(block.answers)]

    for stage in range(stages):
        with target.prepared(stage):
            begun = [] if beginning is None else [beginning.x[0]]  # layer input at the common beginning
            if stage < target.num_layers:
                start = None if beginning is None else _run(target, stage, beginning)
            for block in blocks:
                if stage in wanted.hidden:
                    for i, x in zip(block.answers, states(block), strict=True):
                        put(f"hidden.{stage}", kept_rows[i], sum(kept), x)
                if stage in wanted.context:
                    for b, i in enumerate(block.answers):
                        whole = torch.cat((*begun, block.x[b, : lengths[i] - common]))
                        put(f"context.{stage}", token_rows[i], sum(lengths), whole)
                if stage < target.num_layers:
                    for name, entries in _run(target, stage, block, start).items():
                        for b, i in enumerate(block.answers if stage in wanted.kv else ()):
                            put(f"{name}.{stage}", token_rows[i], sum(lengths), entries[b, : lengths[i]])
                else:
                    counts = [kept[i] for i in block.answers]
                    read = _read_out(target, torch.cat(states(block)))
                    for name, values in zip(("best", "log_z"), read, strict=True):
                        for i, own in zip(block.answers, values.split(counts), strict=True):
                            put(name, kept_rows[i], sum(kept), own)
        done = sum(lengths) * (stage + 1) // stages
        progress(done - reported)
        reported = done
    return shard


def _common(texts: Sequence[Tensor], most: int) -> int:
    """The length of the common beginning of all texts, at most ``most``."""
    heads = torch.stack([text[:most] for text in texts])
    return int((heads == heads[0]).all(0).cumprod(0).sum())


def _grouped(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of texts of similar length, as many as fit into a pass."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    while order:
        count = max(1, PASS_TOKENS // lengths[order[-1]])
        yield order[-count:]
        del order[-count:]


def _block(target: Target, answers: Sequence[int], texts: Sequence[Tensor], start: int) -> _Block:
    """``texts``, whose first token has position ``start``."""
    ids = pad_sequence(list(texts), batch_first=True).to(target.device)
    keys = torch.arange(start + ids.shape[1], device=ids.device).expand(len(ids), -1)
    positions = keys[:, start:]
    return _Block(answers, target.embed(ids, positions), positions, _causal(positions, keys))


def _causal(positions: Tensor, keys: Tensor) -> Mask:
    return Mask(positions, keys, lambda: keys[:, None] <= positions[:, :, None], causal=True)


def _run(target: Target, layer: int, block: _Block, before: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Run ``block`` through a layer. before: the result of an earlier call for one row of preceding tokens.

    Returns keys and values of all tokens [B, S, H', d] as "k" and "v", or the input of a recurrent mixer [B, S, D] as
    "m".
    """
    cache = KVCache(target.num_layers, len(block.x), target.device)
    if before:
        k, v = (before[name].transpose(1, 2).expand(len(block.x), -1, -1, -1) for name in "kv")
        cache.append(layer, k, v)
    block.x = target.layers(block.x, layer, layer + 1, Pass(block.positions, block.mask, cache))
    found, end = dict[str, Tensor](), cache.lengths[layer]
    for name, entries in (("k", cache.keys[layer]), ("v", cache.values[layer])):
        if entries is not None:
            found[name] = entries[:, :, :end].transpose(1, 2)
    if layer in cache.recurrent and (mixed := cache.recurrent[layer].inputs) is not None:
        found["m"] = mixed
    return found


def _read_out(target: Target, x: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely tokens (int32 [M]) after final states ``x`` [M, D], and the log partition sums (float32 [M])."""
    best, log_z = list[Tensor](), list[Tensor]()
    for rows in x.split(READOUT_ROWS):
        logits = target.readout(rows[None])[0]
        best.append(linear_maps.argmax(logits).int())
        log_z += [few.float().logsumexp(-1) for few in logits.split(SUM_ROWS)]
    return torch.cat(best), torch.cat(log_z)


def whole_pass(target: Target, ids: Tensor, cache: KVCache, taps: dict[int, Tensor]) -> Tensor:
    """The final states [B, L, D] of rows of text ``ids`` [B, L]."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    given = Pass(positions, _causal(positions, positions), cache, taps)
    return target.layers(target.embed(ids, positions), 0, target.num_layers, given)


def _records(tensors: dict[str, Tensor], wanted: StateSelection) -> list[AnswerStates]:
    lengths, prompts = tensors.pop("lengths").tolist(), tensors.pop("prompts").tolist()
    kept = [length - 1 - first_kept(prompt) for length, prompt in zip(lengths, prompts, strict=True)]
    split = {
        key: tensor.split(
            lengths if key.startswith(("ids", "k.", "v.", "m.", "context.")) else kept
        )  # of every token, or from ``first`` on
        for key, tensor in tensors.items()
    }
    return [
        AnswerStates(
            split["ids"][i],
            prompt,
            first_kept(prompt),
            {n: (split[f"k.{n}"][i], split[f"v.{n}"][i]) for n in wanted.kv if f"k.{n}" in split},
            {layer: split[f"hidden.{layer}"][i] for layer in wanted.hidden},
            split["best"][i],
            split["log_z"][i],
            {layer: split[f"context.{layer}"][i] for layer in wanted.context},
            {layer: split[f"m.{layer}"][i] for layer in wanted.kv if f"m.{layer}" in split},
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
    raise SpecDecError(f"shard '{path}' is missing, truncated or changed; delete '{folder}'")
