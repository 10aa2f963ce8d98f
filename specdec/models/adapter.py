"""LoRA adapters: changes of a model's linear maps by products of two narrow matrices, merged when the model is loaded.

An adapter is a folder of PEFT (``adapter_config.json``, ``adapter_model.safetensors``) or, for GGUF models, a GGUF file
(``gguf.lora``). What it cannot be merged exactly for is refused. Knows no runtimes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from specdec.base import memory, terminal
from specdec.base.errors import SpecDecError, errors_as
from specdec.base.settings import short_repr
from specdec.models import identity
from specdec.models.drafter_folder import read_json
from specdec.models.gguf.blocks import BlockLinear, Blocks, dequantize, matrix
from specdec.models.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_place

if TYPE_CHECKING:
    from specdec.models.gguf.file import GGUFFile

# Settings of PEFT that change no number of a merged model, or that the tensors say themselves.
BESIDE = {
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_type", "peft_version", "task_type"),
    *("inference_mode", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "r", "lora_alpha", "alpha_pattern", "use_rslora", "eva_config", "loftq_config", "megatron_core"),
    *("runtime_config", "qalora_group_size", "init_lora_weights"),
}
MERGE = "merge it into its model with PEFT's merge_and_unload, and load that"
NAME = re.compile(r"[\w.]+")  # the end of a map's name
LARGEST = 1e30  # alpha
STARTS = True, False, "gaussian", "eva", "orthogonal"  # other values of init_lora_weights change the base model, too
_STORED = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.weight")  # a weight of the base model
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change of one map: scale * up @ down, with down [r, in] and up [out, r]."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter that was read. fingerprint: a hash of its weights. base: the base model it names, or ""."""

    name: str
    fingerprint: str
    maps: dict[str, LowRank]
    base: str = ""


@dataclass(frozen=True, eq=False)
class Merged:
    """What a model with a merged adapter, its ``merged_adapter``, knows of the adapter and of itself without it.

    fingerprint: the adapter's. base: the fingerprint of the model without the adapter.
    samples: ``identity.samples`` of the changed weights before they were.
    """

    name: str
    fingerprint: str
    base: str
    samples: dict[str, Any]


def find(name: str) -> Path:
    """The folder or GGUF file of an adapter, downloaded if need be. Raises SpecDecError if there is none."""
    place = adapter_place(name)
    if isinstance(place, Path):
        return place
    from specdec.models import hub

    repository, revision, member = place
    if member is None:
        folder = hub.fetch("adapter", repository, revision, [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
        return Path(adapter_place(str(folder)))  # type: ignore[arg-type]
    return hub.fetch_file("adapter", repository, revision, member)


def merge(model: Any, adapter: Adapter) -> list[Tensor]:
    """Merge an adapter into a model, whose changed maps get weights in its dtype; return these in their order.

    Raises SpecDecError if the adapter does not fit the model.
    """
    own = dict(model.named_modules())
    for path, change in adapter.maps.items():
        _check(adapter, model, own, path, change)
    changed = {f"{path}.weight": matrix(own[path]) for path in adapter.maps}
    kept = Merged(adapter.name, adapter.fingerprint, identity.fingerprint(model), identity.samples_of(changed))
    made = list[Tensor]()
    for path, change in adapter.maps.items():
        module, weight = own[path], changed[f"{path}.weight"]
        in_blocks, values = isinstance(weight, Blocks), _values(weight)
        up, down = change.up.to(values.device).float(), change.down.to(values.device).float()
        values = values.add_(up @ down * change.scale).to(module.dtype if in_blocks else module.weight.dtype)
        if not bool(values.isfinite().all()):
            raise SpecDecError(f"adapter '{adapter.name}' gives '{path}' infinite values or NaN; get it again")
        if in_blocks:
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.bias = module.bias
            model.set_submodule(path, linear)
            module = linear
        memory.release(weight.data)
        module.weight = nn.Parameter(values, requires_grad=False)
        made.append(values)
    model.merged_adapter = kept
    loaded = model.config._name_or_path
    if adapter.base and not _same_name(adapter.base, loaded):
        terminal.say(
            f"note: adapter '{adapter.name}' names '{adapter.base}' as its base model; its shapes fit '{loaded}', too"
        )
    return made


def _same_name(one: str, other: str) -> bool:
    """Whether two names may be those of one model: files and copies add to the name of a repository."""
    short, long = sorted(
        (re.sub(r"[\W_]", "", name.rstrip("/").rpartition("/")[2]).lower() for name in (one, other)), key=len
    )
    return short in long


def _values(weight: Tensor | Blocks) -> Tensor:
    """The weight of a map in float32, a copy."""
    if isinstance(weight, Blocks):
        return dequantize(weight, None, torch.float32)
    return weight.to(torch.float32, copy=True)


def _check(adapter: Adapter, model: Any, own: Mapping[str, Any], path: str, change: LowRank) -> None:
    """Raise SpecDecError unless a change fits the map at ``path``."""
    what = f"adapter '{adapter.name}' does not fit model '{model.config._name_or_path}'"
    made_for = f"; load the model it was made for{f' ({adapter.base})' if adapter.base else ''}"
    module = own.get(path)
    if module is None:
        raise SpecDecError(f"{what}: it changes '{path}', which the model does not have{made_for}")
    if type(module) not in (nn.Linear, BlockLinear):
        raise SpecDecError(f"{what}: it changes '{path}', and only changes of linear maps are supported")
    if path == "lm_head" and model.config.get_text_config().tie_word_embeddings:
        raise SpecDecError(f"{what}: it changes the output head, which shares its weights with the embedding")
    if (inner := change.down.shape[0]) != change.up.shape[1]:
        raise _broken(adapter.name, f"'{path}' has the ranks {inner} and {change.up.shape[1]}")
    shape = change.up.shape[0], change.down.shape[1]
    if shape != (module.out_features, module.in_features):
        size = f"{module.out_features} x {module.in_features}"
        raise SpecDecError(f"{what}: '{path}' is {size} in the model and {shape[0]} x {shape[1]} in it{made_for}")


def fingerprint(maps: Mapping[str, LowRank]) -> str:
    """32 hex digits that identify the changes: SHA-256 of every number."""
    digest = hashlib.sha256()
    for path, change in sorted(maps.items()):
        digest.update(f"{path} {change.scale!r} {tuple(change.up.shape)} {tuple(change.down.shape)}\n".encode())
        for values in (change.down, change.up):
            digest.update(values.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


# --- files -----------------------------------------------------------------------------------------------------------


def read(name: str, path: Path, model: Any, file: GGUFFile | None) -> Adapter:
    """The adapter of a folder or GGUF file, for a model with the names of transformers.

    file: that of the model, if it is of one. Raises SpecDecError for one that is broken or of an unsupported kind.
    """
    if path.is_dir():
        maps, base = _read_folder(name, path)
    elif file is None:
        raise SpecDecError(f"adapter '{name}' is a GGUF file, and the model is not; give a folder of PEFT")
    else:
        from specdec.models.gguf import lora

        found, base = lora.read(name, path, model, file)
        maps = {key: LowRank(*parts) for key, parts in found.items()}
    if not maps:
        raise SpecDecError(f"adapter '{name}' changes nothing: it has no tensors; get it again")
    return Adapter(name, fingerprint(maps), maps, base)


def _read_folder(name: str, folder: Path) -> tuple[dict[str, LowRank], str]:
    config = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise _broken(name, f"{ADAPTER_CONFIG} is no mapping")
    _refuse(name, config)
    parts: dict[str, dict[str, Tensor]] = {}
    with errors_as(f"cannot read adapter '{name}'", SafetensorError):
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    for key, tensor in tensors.items():
        found = _TENSOR.fullmatch(key)
        if found is None and "lora_" not in key and (stored := _STORED.fullmatch(key)):
            raise SpecDecError(
                f"adapter '{name}' has a whole weight for '{stored[1]}' beside its changes, which is not supported; "
                f"save it with PEFT's save_embedding_layers=False, or {MERGE}"
            )
        if found is None or tensor.dim() != 2 or not tensor.is_floating_point():
            raise SpecDecError(
                f"adapter '{name}' has the tensor '{key}', and only LoRA of linear maps is supported; {MERGE}"
            )
        parts.setdefault(found[1], {})[found[2]] = tensor
    maps = dict[str, LowRank]()
    for path, pair in parts.items():
        if pair.keys() != {"A", "B"}:
            raise _broken(name, f"'{path}' has only one of its two matrices")
        maps[path] = LowRank(pair["A"], pair["B"], _scale(name, config, path, len(pair["A"])))
    return maps, str(config.get("base_model_name_or_path") or "")


def _refuse(name: str, config: Mapping[str, Any]) -> None:
    """Raise SpecDecError for what PEFT's config asks for and merging would ignore."""
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != "LORA" or task not in (None, "CAUSAL_LM"):
        raise SpecDecError(
            f"adapter '{name}' is of the kind {kind} for the task {task}; LoRA for CAUSAL_LM is supported"
        )
    wrong = [key for key, value in config.items() if value and key not in BESIDE and (key, value) != ("bias", "none")]
    if config.get("init_lora_weights", True) not in STARTS:
        wrong.append("init_lora_weights")
    if wrong:
        setting = f"{wrong[0]}={json.dumps(config[wrong[0]])[:60]}"
        raise SpecDecError(f"adapter '{name}' has {setting}, which is not supported; {MERGE}")


def _scale(name: str, config: Mapping[str, Any], path: str, rank: int) -> float:
    """The factor of a change: alpha / r, or alpha / sqrt(r)."""
    alphas, rooted = config.get("alpha_pattern") or {}, config.get("use_rslora") or False
    if not isinstance(alphas, dict):
        raise _broken(name, f"alpha_pattern is {short_repr(alphas)}")
    for end in alphas:  # PEFT takes it for a regular expression: one of a stranger may take for ever
        if not NAME.fullmatch(end):
            raise SpecDecError(f"adapter '{name}': alpha_pattern has '{end[:60]}', which is not supported; {MERGE}")
    end = next((end for end in alphas if f".{path}".endswith(f".{end}")), None)
    what, alpha = (
        ("lora_alpha", config.get("lora_alpha", 8)) if end is None else (f"alpha_pattern of '{end}'", alphas[end])
    )
    if not isinstance(alpha, int | float) or not abs(alpha) <= LARGEST:
        raise _broken(name, f"{what} is {short_repr(alpha)}")
    if not isinstance(rooted, bool):
        raise _broken(name, f"use_rslora is {short_repr(rooted)}")
    if rank < 1:
        raise _broken(name, f"'{path}' has the rank {rank}")
    return float(alpha) / (math.sqrt(rank) if rooted else rank)


def _broken(name: str, what: str) -> SpecDecError:
    return SpecDecError(f"adapter '{name}' is broken: {what}; get it again")
