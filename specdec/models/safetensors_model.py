"""Load models from folders with safetensors files, without transformers' modelling classes.

``write_parts`` writes config, generation config, tokenizer and chat template into a folder, once. ``build`` gives the
model of this config the weights of the files, mapped into memory. transformers loads models that are not supported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.base import memory
from specdec.base.errors import SpecDecError
from specdec.models import families, granite4, weights
from specdec.models.config import CONFIG, Config, write_config, write_generation
from specdec.models.native_model import Experts, NativeModel, transformers_config
from specdec.models.safetensors_file import TEXT_NAMES
from specdec.models.source import Source
from specdec.models.tensor_file import PLAIN, TensorFile, TensorInfo
from specdec.models.tokenizer import Tokenizer, save

MIXTRAL = {r"\.block_sparse_moe\.": ".mlp."}  # names in Mixtral's files (patterns), and in ``NativeModel``
MIXTRAL |= {rf"(\.experts\.\d+)\.w{n}\.": rf"\1.{name}_proj." for n, name in enumerate(("gate", "down", "up"), 1)}
APART = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # matrices of one expert
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Texts that compare two tokenizers. Some tokenizers remove spaces before punctuation when they decode.
SAMPLES = "It's 1,234.5 naïve  tests:\n\tπ ≠ 3 🙂 </s> {x}", "Are n't they , or ?"


def is_supported(folder: Path, dtype: str | torch.dtype, device: torch.device) -> bool:
    """Return whether the model in ``folder`` can be loaded without transformers' modelling classes.

    Only its config.json is read. dtype: the wanted dtype; "auto": the config's. device: where the model is to run.
    Models of all known families are supported in bfloat16 on the CPU. A dense Granite 4, for which transformers has
    another class, is supported on every device and in every dtype that is asked for; with "auto", its config's must be
    bfloat16.
    """
    try:
        whole = json.loads((folder / CONFIG).read_text("utf-8"))
        text = whole.get("text_config") or whole
        fields = granite4.as_granite(whole | text)
        other = fields.get("model_type") != (whole | text).get("model_type")
        family = families.FAMILIES.get(fields.get("model_type", ""))
        stored = fields.get("dtype") or fields.get("torch_dtype")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # transformers says what is wrong
        return False
    if family is None or fields.get("quantization_config"):
        return False
    if other and dtype != "auto":
        return True
    in_bfloat16 = str(stored if dtype == "auto" else dtype).removeprefix("torch.") == "bfloat16"
    return in_bfloat16 and (other or device.type == "cpu")


def write_parts(source: Source, folder: Path) -> None:
    """Write config, generation config, tokenizer and chat template of the model ``source`` into ``folder``.

    Later, ``config.read_config``, ``config.read_generation`` and ``Tokenizer`` read them without transformers.
    Raises SpecDecError for a model or tokenizer that only transformers can load.
    """
    from transformers import GenerationConfig, TokenizersBackend

    from specdec.models import pretrained  # heavy

    theirs, tokenizer = pretrained.read_config(source), pretrained.read_tokenizer(source)
    text = pretrained.text_part(theirs)["config"].get_text_config()
    fields = text.to_dict()
    if text.model_type not in families.FAMILIES:
        fields = granite4.as_granite(fields)
        if fields["model_type"] not in families.FAMILIES:
            raise SpecDecError(f"'{source.name}' is of the unknown type '{text.model_type}'")
        fields = transformers_config(fields).to_dict()
        families.check_fields(Config(**fields))  # which a Granite of transformers would leave out
    if any(getattr(text, name, None) for name in families.MISSING):
        raise SpecDecError(f"'{source.name}' needs transformers")
    if not isinstance(tokenizer, TokenizersBackend) or not isinstance(tokenizer.chat_template, str | None):
        raise SpecDecError(f"the tokenizer of '{source.name}' needs transformers")
    write_config(folder, Config(**fields))
    try:
        settings = GenerationConfig.from_pretrained(source.folder)
    except OSError:  # there is no such file
        settings = GenerationConfig.from_model_config(theirs)
    write_generation(folder, settings.to_diff_dict())
    tokenizer.save_pretrained(folder)
    save(tokenizer.backend_tokenizer, folder)
    own = Tokenizer(folder)
    for text in (*SAMPLES, SAMPLES[0].join(tokenizer.all_special_tokens)):
        if _read_back(own, text) != _read_back(tokenizer, text):
            raise SpecDecError(f"the tokenizer of '{source.name}' needs transformers")


def _read_back(tokenizer: Any, text: str) -> Any:
    try:
        ids = tokenizer(text).input_ids
        return ids, tokenizer.decode(ids)
    except Exception:  # a vocabulary may lack characters; the type is the tokenizer's
        return None


def build(name: str, file: TensorFile, model: NativeModel) -> list[Tensor] | None:
    """Set the parameters of ``model`` that have no values yet from safetensors files.

    name: the model's name in messages. file: the files' header. model: filled in place. Weights of the model's dtype
    are mapped from the files, and experts stay there in any dtype. Returns the weights that had to be converted to the
    model's dtype, in the order of the parameters. Returns None, and sets nothing, if the tensors have other names or
    shapes than the model. Raises SpecDecError if converted weights need more memory than is free.
    """
    tensors = {_renamed(key): info for key, info in file.tensors.items()}
    config, found = model.config, dict[str, list[TensorInfo]]()
    if config.model_type == "granite":
        tensors = granite4.renamed(tensors)
    for parameter, values in weights.unfilled(model):
        if (infos := _tensors_of(parameter, tuple(values.shape), model, tensors)) is None:
            return None
        found[parameter] = infos
    if config.tie_word_embeddings and (head := tensors.get(HEAD)) is not None:
        if not torch.equal(file.data(head), file.data(tensors[EMBEDDING])):
            return None  # transformers does not tie them
        memory.release(file.data(head), file.data(tensors[EMBEDDING]))
    return weights.fill(name, file, model, found, keep=True)


def _tensors_of(
    parameter: str, shape: tuple[int, ...], model: NativeModel, tensors: Mapping[str, TensorInfo]
) -> list[TensorInfo] | None:
    """Return the tensors that make up one parameter of ``model``; None: one is missing, or has another shape or type.

    parameter: the parameter's name. shape: its shape. tensors: the file's tensors by name.
    The result is one tensor; for a parameter of experts it may be one matrix for each expert: all gate projections,
    then all up projections.
    """
    path, _, leaf = parameter.rpartition(".")
    module, kinds = model.get_submodule(path), (*PLAIN,)
    names: Iterable[str] = [parameter]
    if isinstance(module, Experts) and not module.is_transposed:
        kinds = weights.NUMBERS
        if parameter not in tensors:
            count, rows, width = shape
            parts, shape = APART[leaf], (rows // len(APART[leaf]), width)
            names = (f"{path}.{number}.{part}.weight" for part in parts for number in range(count))
    found = list[TensorInfo]()
    for name in names:
        info = tensors.get(name)
        if info is None or info.shape != shape or info.kind not in kinds:
            return None
        if kinds is weights.NUMBERS and not weights.is_aligned(info):
            return None
        found.append(info)
    return found


def _renamed(key: str) -> str:
    for pattern, name in (TEXT_NAMES | MIXTRAL).items():
        key = re.sub(pattern, name, key)
    return key
