"""Read LoRA adapters and merge them into the weights of a model when it is loaded.

An adapter changes linear layers by low-rank products. It is a folder of PEFT (``adapter_config.json`` and
``adapter_model.safetensors``) or, for models of GGUF files, a GGUF file. An adapter with settings that change its
result, and that a merge of low-rank products cannot express, is refused with SpecDecError.
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

# Settings of PEFT that do not change a merged model, or that the tensors show.
IGNORED = {
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_type", "peft_version", "task_type"),
    *("inference_mode", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "r", "lora_alpha", "alpha_pattern", "use_rslora", "eva_config", "loftq_config", "megatron_core"),
    *("runtime_config", "qalora_group_size", "init_lora_weights"),
}
MERGE = "merge it into its model with PEFT's merge_and_unload, and load that"
NAME = re.compile(r"[\w.]+")  # the end of a module's name
LARGEST = 1e30  # maximum of alpha
STARTS = True, False, "gaussian", "eva", "orthogonal"  # other values of init_lora_weights change the base model, too
_STORED = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.weight")  # a weight of the base model
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True, eq=False)
class LowRank:
    """The LoRA change of one linear layer: ``scale * up @ down`` [out, in] is to be added to its ``weight`` [out, in].

    down: LoRA's matrix A without the scale, [r, in], in any float dtype on the CPU. r is the rank.
    up: LoRA's matrix B, likewise, [out, r].
    scale: factor of the product, computed from LoRA's alpha: alpha / r, or alpha / sqrt(r) with rsLoRA.
    """

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter that was read from its files and is not merged yet.

    name: the name or path by which the user gave the adapter.
    fingerprint: 32 hex digits, a hash of all its matrices and scales.
    maps: the change of each adapted linear layer, by module path such as "model.layers.0.self_attn.q_proj".
    base: name of the base model in the adapter's config; "": the config names none.
    """

    name: str
    fingerprint: str
    maps: dict[str, LowRank]
    base: str = ""


@dataclass(frozen=True, eq=False)
class Merged:
    """A record of the adapter that is merged into a model, kept in the model's attribute ``merged_adapter``.

    name: the name or path by which the user gave the adapter.
    fingerprint: the adapter's fingerprint, 32 hex digits.
    base: fingerprint of the model's weights before the merge, 32 hex digits.
    samples: some values of each changed weight before the merge, by which a drafter's base is recognised: {weight's
        name: {"shape": [...], "values": up to 32 decimal numbers as one text, separated by spaces}}.
    """

    name: str
    fingerprint: str
    base: str
    samples: dict[str, Any]


def find(name: str) -> Path:
    """Return the path of the LoRA adapter ``name``, a folder of PEFT or a GGUF file; downloads it if need be.

    name: a path, or ORG/NAME on Hugging Face with an optional @revision and :file.gguf. Raises SpecDecError if there is
    no such adapter.
    """
    found = adapter_place(name)
    if isinstance(found, Path):
        return found
    from specdec.models import hub

    repository, revision, member = found
    if member is None:
        folder = hub.fetch("adapter", repository, revision, [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
        return Path(adapter_place(str(folder)))  # type: ignore[arg-type]
    return hub.fetch_file("adapter", repository, revision, member)


def merge(model: Any, adapter: Adapter) -> list[Tensor]:
    """Add the low-rank changes of ``adapter`` to the weights of ``model``, in place; return the changed weights.

    The result has one tensor [out, in] in the model's dtype for each changed layer, in the order of ``adapter.maps``. A
    weight that is stored in GGUF quantization blocks becomes an ordinary dense weight. The model gets the attribute
    ``merged_adapter``, a ``Merged``. Raises SpecDecError if the adapter does not fit the model (which then stays as it
    is), or makes weights that are not finite (some layers may be changed then).
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
    """Return whether two model names may name one model: one's last path component contains the other's.

    Punctuation and case are ignored. So the name of a file or of a copy matches that of its repository.
    """
    short, long = sorted(
        (re.sub(r"[\W_]", "", name.rstrip("/").rpartition("/")[2]).lower() for name in (one, other)), key=len
    )
    return short in long


def _values(weight: Tensor | Blocks) -> Tensor:
    if isinstance(weight, Blocks):
        return dequantize(weight, None, torch.float32)
    return weight.to(torch.float32, copy=True)


def _check(adapter: Adapter, model: Any, own: Mapping[str, Any], path: str, change: LowRank) -> None:
    """Raise SpecDecError unless the model has a linear layer at ``path`` whose weight has the shape of ``change``.

    adapter, model: named in the message. own: all modules of the model by path. path: module path of the changed layer.
    change: the LoRA change for it, whose two matrices must fit each other, too. An output head that shares its weight
    with the embedding is refused as well.
    """
    what = f"adapter '{adapter.name}' does not fit model '{model.config._name_or_path}'"
    made_for = f"; load the model it was made for{f' ({adapter.base})' if adapter.base else ''}"
    module = own.get(path)
    if module is None:
        raise SpecDecError(f"{what}: it changes '{path}', which the model does not have{made_for}")
    if type(module) not in (nn.Linear, BlockLinear):
        raise SpecDecError(f"{what}: it changes '{path}', and only changes of linear layers are supported")
    if path == "lm_head" and model.config.get_text_config().tie_word_embeddings:
        raise SpecDecError(f"{what}: it changes the output head, which shares its weights with the embedding")
    if (inner := change.down.shape[0]) != change.up.shape[1]:
        raise _broken(adapter.name, f"'{path}' has the ranks {inner} and {change.up.shape[1]}")
    shape = change.up.shape[0], change.down.shape[1]
    if shape != (module.out_features, module.in_features):
        size = f"{module.out_features} x {module.in_features}"
        raise SpecDecError(f"{what}: '{path}' is {size} in the model and {shape[0]} x {shape[1]} in it{made_for}")


def fingerprint(maps: Mapping[str, LowRank]) -> str:
    """Return 32 hex digits that identify a set of LoRA changes: the start of a SHA-256 of all matrices and scales.

    maps: the change of each linear layer, by module path.
    """
    digest = hashlib.sha256()
    for path, change in sorted(maps.items()):
        digest.update(f"{path} {change.scale!r} {tuple(change.up.shape)} {tuple(change.down.shape)}\n".encode())
        for values in (change.down, change.up):
            digest.update(values.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


# --- files -----------------------------------------------------------------------------------------------------------


def read(name: str, path: Path, model: Any, file: GGUFFile | None) -> Adapter:
    """Read the adapter in the PEFT folder or GGUF file ``path``.

    name: the adapter's name in messages and in the result. model: the base model, with transformers' module names; it
    is not changed.
    file: header of the GGUF file that the base model is from; None: the model is not from a GGUF file.
    Raises SpecDecError for an adapter that is broken, empty or of an unsupported kind.
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
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != "LORA" or task not in (None, "CAUSAL_LM"):
        raise SpecDecError(
            f"adapter '{name}' is of the kind {kind} for the task {task}; LoRA for CAUSAL_LM is supported"
        )
    wrong = [key for key, value in config.items() if value and key not in IGNORED and (key, value) != ("bias", "none")]
    if config.get("init_lora_weights", True) not in STARTS:
        wrong.append("init_lora_weights")
    if wrong:
        setting = f"{wrong[0]}={json.dumps(config[wrong[0]])[:60]}"
        raise SpecDecError(f"adapter '{name}' has {setting}, which is not supported; {MERGE}")


def _scale(name: str, config: Mapping[str, Any], path: str, rank: int) -> float:
    """Return the factor of the LoRA product of one linear layer: alpha / rank, or alpha / sqrt(rank) with rsLoRA.

    name: the adapter's name in messages. config: the content of its adapter_config.json. path: module path of the
    layer; if a key of the config's ``alpha_pattern`` is an end of it, that alpha counts, else ``lora_alpha``. rank: the
    inner size of the layer's two matrices.
    Raises SpecDecError for an impossible alpha, rank or pattern.
    """
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
