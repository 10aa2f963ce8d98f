"""Models of folders with safetensors files, without transformers' modelling classes.

``write_parts`` writes config, generation config, tokenizer and chat template into a folder once, as transformers reads
them. ``build`` makes the model of that config, whose weights are mapped from the files. What either does not support
is loaded by transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.base import memory
from specdec.base.errors import SpecDecError
from specdec.base.machine import check_memory
from specdec.models import families
from specdec.models.config import CONFIG, Config, write_config, write_generation
from specdec.models.gguf.blocks import BlockExperts, Blocks
from specdec.models.native_model import Experts, NativeModel
from specdec.models.safetensors_file import TEXT_NAMES
from specdec.models.source import Source
from specdec.models.tensor_file import PLAIN, TensorFile, TensorInfo
from specdec.models.tokenizer import FILE, Tokenizer

MIXTRAL = {r"\.block_sparse_moe\.": ".mlp."}  # what that family's tensors are called here
# Of an expert that has matrices of its own: the names of its gate, its up and its last one.
APART = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
NUMBERS = "BF16", "F16", "F32"  # types of experts that stay in their files
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Texts for a comparison of tokenizers. Some remove spaces before signs when they decode.
SAMPLES = "It's 1,234.5 naïve  tests:\n\tπ ≠ 3 🙂 </s> {x}", "Are n't they , or ?"


def is_supported(folder: Path, dtype: str | torch.dtype) -> bool:
    """Whether the native runtime may serve the model of a folder in this dtype, or "auto": that of its config."""
    try:
        whole = json.loads((folder / CONFIG).read_text("utf-8"))
        text = whole.get("text_config") or whole
        fields = whole | text
        family = families.FAMILIES.get(fields.get("model_type"))
        stored = fields.get("dtype") or fields.get("torch_dtype")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # transformers says what is wrong
        return False
    if family is None or fields.get("quantization_config"):
        return False
    return str(stored if dtype == "auto" else dtype).removeprefix("torch.") == "bfloat16"


def write_parts(source: Source, folder: Path) -> None:
    """Write config, generation config, tokenizer and chat template into ``folder``.

    Raises SpecDecError for what ``config.Config`` and ``tokenizer.Tokenizer`` do not support.
    """
    from transformers import GenerationConfig, TokenizersBackend

    from specdec.models import pretrained  # heavy

    theirs, tokenizer = pretrained.read_config(source), pretrained.read_tokenizer(source)
    text = pretrained.text_part(theirs)["config"].get_text_config()
    if text.model_type not in families.FAMILIES:
        raise SpecDecError(f"'{source.name}' is of the unknown type '{text.model_type}'")
    if not isinstance(tokenizer, TokenizersBackend) or not isinstance(tokenizer.chat_template, str | None):
        raise SpecDecError(f"the tokenizer of '{source.name}' needs transformers")
    write_config(folder, Config(**text.to_dict()))
    try:
        settings = GenerationConfig.from_pretrained(source.folder)
    except OSError:  # there is no such file
        settings = GenerationConfig.from_model_config(theirs)
    write_generation(folder, settings.to_diff_dict())
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / FILE), pretty=False)
    own = Tokenizer(folder)
    for text in (*SAMPLES, SAMPLES[0].join(tokenizer.all_special_tokens)):
        if _read_back(own, text) != _read_back(tokenizer, text):
            raise SpecDecError(f"the tokenizer of '{source.name}' needs transformers")


def _read_back(tokenizer: Any, text: str) -> Any:
    """The token ids of a text, and their text; None if there are none."""
    try:
        ids = tokenizer(text).input_ids
        return ids, tokenizer.decode(ids)
    except Exception:  # a vocabulary may lack characters; the type is the tokenizer's
        return None


def build(name: str, file: TensorFile, config: Config) -> tuple[NativeModel, list[Tensor]] | None:
    """The model of ``config`` with the weights of ``file`` in bfloat16, and those that are not mapped from it.

    Experts stay in the file, in its type. None: the tensors are not those of the model. Raises SpecDecError without
    memory for what is not mapped.
    """
    tensors = {_renamed(key): info for key, info in file.tensors.items()}
    if config.num_hidden_layers > len(tensors):
        return None
    model = NativeModel(config, torch.bfloat16)
    for path, module in [*model.named_modules()]:
        if isinstance(module, Experts) and not module.is_transposed:
            if (experts := _experts(module, path, file, tensors)) is None:
                return None
            model.set_submodule(path, experts)
    wanted = dict(model.named_parameters())
    infos = {key: tensors[key] for key in wanted if key in tensors}
    fits = all(info.kind in PLAIN and info.shape == tuple(wanted[key].shape) for key, info in infos.items())
    if len(infos) < len(wanted) or not fits:
        return None
    if config.tie_word_embeddings and (head := tensors.get(HEAD)) is not None:
        if not torch.equal(file.data(head), file.data(tensors[EMBEDDING])):
            return None  # transformers does not tie them
        memory.release(file.data(head), file.data(tensors[EMBEDDING]))
    check_memory(name, sum(wanted[key].nbytes for key, info in infos.items() if not _is_mapped(info)))
    made = list[Tensor]()
    for key, info in infos.items():
        path, _, leaf = key.rpartition(".")
        data = file.data(info)
        aligned = data if info.offset % PLAIN[info.kind].itemsize == 0 else data.clone()
        weight = aligned.view(PLAIN[info.kind]).view(info.shape).to(torch.bfloat16)
        if not _is_mapped(info):
            made.append(weight)
            memory.release(data)
        setattr(model.get_submodule(path), leaf, nn.Parameter(weight, requires_grad=False))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model, made


def _experts(own: Experts, path: str, file: TensorFile, tensors: Mapping[str, TensorInfo]) -> BlockExperts | None:
    """The experts of a layer in the place of the module ``own``: each has three matrices, or they are joined in two
    tensors. None: these are not there, or of another shape or type."""
    (count, inner, width), parts = own.get_parameter("gate_up_proj").shape, list[list[Blocks]]()
    shapes = (inner // 2, width), (inner // 2, width), (width, inner // 2)
    joined = [tensors.get(f"{path}.{leaf}") for leaf in ("gate_up_proj", "down_proj")]
    if joined != [None, None]:
        for info, shape in zip(joined, ((inner, width), shapes[2]), strict=True):
            if info is None or not _is_readable(info, (count, *shape)):
                return None
            rows = file.data(info).view(*info.shape[:2], -1)
            parts.append([Blocks(each, info.kind, info.shape[2]) for each in rows])
    else:
        names = next((names for names in APART if f"{path}.0.{names[0]}.weight" in tensors), APART[0])
        for leaf, shape in zip(names, shapes, strict=True):
            infos = (tensors.get(f"{path}.{number}.{leaf}.weight") for number in range(count))
            parts.append([])
            for info in infos:
                if info is None or not _is_readable(info, shape):
                    return None
                parts[-1].append(Blocks(file.data(info).view(shape[0], -1), info.kind, shape[1]))
    gate_up = [list(matrices) for matrices in zip(*parts[:-1], strict=True)]
    return BlockExperts(own, gate_up, parts[-1], torch.bfloat16)


def _is_readable(info: TensorInfo, shape: tuple[int, ...]) -> bool:
    return info.shape == shape and info.kind in NUMBERS and info.offset % PLAIN[info.kind].itemsize == 0


def _renamed(key: str) -> str:
    for pattern, name in (TEXT_NAMES | MIXTRAL).items():
        key = re.sub(pattern, name, key)
    return key


def _is_mapped(info: TensorInfo) -> bool:
    """Whether a tensor can be used as it lies in its file."""
    return info.kind == "BF16" and info.offset % 2 == 0
