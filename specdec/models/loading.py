"""Load a model, frozen, with its tokenizer; find dtypes and devices by name. Knows no runtimes and no decoding.

A GGUF file of a known architecture, and a folder with a model of a known family in bfloat16 on the CPU, become a
``NativeModel``, which does without transformers' modelling classes. transformers loads all other models.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from specdec.base import terminal
from specdec.base.errors import SpecDecError, one_line
from specdec.models import adapter as adapters
from specdec.models import config, families, packed, prepare, safetensors_file, safetensors_model
from specdec.models.gguf import model as gguf_model
from specdec.models.gguf.file import GGUFFile
from specdec.models.names import dtype_name
from specdec.models.native_model import AnyModel, NativeModel
from specdec.models.source import Source, explain_errors, find_source
from specdec.models.tensor_file import TensorFile
from specdec.models.tokenizer import Tokenizer


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    check: Callable[[Any], None] | None = None,
) -> tuple[AnyModel, Any]:
    """Load a decoder-only model and its tokenizer; return (model, tokenizer), the model frozen and in evaluation mode.

    name_or_path: an embedded model (downloaded at first use), a folder, a ``.gguf`` file, a Hugging Face id, or
        ``ORG/REPO:file.gguf``.
    dtype: float32, bfloat16, float16 or "auto": the checkpoint's, and bfloat16 for a GGUF file.
    device: PyTorch's name of a device, or "auto": the first CUDA device that can compute, else the CPU.
    revision: branch, tag or commit of a Hugging Face id; None: the latest.
    trust_remote_code: whether to run Python code of the repository.
    adapter: a LoRA adapter to merge into the weights: a folder of PEFT, a ``.gguf`` file or a Hugging Face id; None:
        none is merged.
    check: called with the model's config before the weights are downloaded and read; what it raises passes through.
    Weights are read from safetensors or GGUF, never from pickles. In bfloat16 on the CPU, those of a GGUF file stay in
    its quantization blocks. Raises SpecDecError for what is unknown, missing, broken or too large for this machine.
    """
    name = os.fspath(name_or_path)
    kind = as_dtype(dtype)
    place = find_device(device, kind)
    change = None if adapter is None else (os.fspath(adapter), adapters.find(os.fspath(adapter)))
    source = find_source(name, revision)
    if source.entry is None and not trust_remote_code and safetensors_model.is_supported(source.folder, kind, place):
        write = functools.partial(safetensors_model.write_parts, source)
        source = replace(source, entry=prepare.prepare_folder(source.name, source.folder, write))
    found, tokenizer = _config(source, trust_remote_code), _tokenizer(source, trust_remote_code)
    if check is not None:
        check(found)
    source.fetch_weights()
    model: Any = None
    if source.entry is not None:
        model = _native(source, source.entry, found, kind, place, change)
    if model is None:
        from specdec.models import pretrained  # heavy

        if source.entry is not None:
            found = _config(replace(source, entry=None))
        model = pretrained.load(source, found, kind, place, trust_remote_code)
        model.config._name_or_path = name  # for messages
        _merge(model, change)
    if source.remote:
        model.config._commit_hash = source.folder.name
    return model.eval().requires_grad_(False), tokenizer


def read_config(name: str) -> Any:
    """Return the config of the model ``name``, a ``Config`` or one of transformers; downloads it if need be.

    Reads no weights. Raises SpecDecError for an unknown or broken model.
    """
    return _config(find_source(name))


def _config(source: Source, trust_remote_code: bool = False) -> Any:
    if source.entry is not None:
        with explain_errors(source.name):
            found: Any = config.read_config(source.entry)
    else:
        from specdec.models import pretrained  # heavy

        found = pretrained.read_config(source, trust_remote_code)
    families.check_sizes(source.name, found)
    return found


def _tokenizer(source: Source, trust_remote_code: bool = False) -> Any:
    if source.entry is not None:
        with explain_errors(source.name):
            return Tokenizer(source.entry)
    from specdec.models import pretrained  # heavy

    return pretrained.read_tokenizer(source, trust_remote_code)


def _merge(model: Any, change: tuple[str, Path] | None, file: GGUFFile | None = None) -> list[torch.Tensor]:
    """Merge a LoRA adapter into the weights of ``model``, in place; return the changed weights, [out, in] each.

    change: (name, path) of the adapter; None: there is no adapter, and the result is []. file: header of the GGUF file
    that the model is from; None: the model is not from a GGUF file.
    """
    return [] if change is None else adapters.merge(model, adapters.read(*change, model, file))


def _native(
    source: Source,
    entry: Path,
    found: config.Config,
    kind: str | torch.dtype,
    place: torch.device,
    change: tuple[str, Path] | None,
) -> NativeModel | None:
    """Return the model of ``source`` as a ``NativeModel`` with weights, merged adapter and generation config.

    entry: the model's folder in specdec's cache, with its config files. found: the config in that folder. kind: the
    dtype of the weights; "auto": bfloat16. place: the device. change: (name, path) of the LoRA adapter to merge; None:
    none. Returns None if the safetensors files have other tensors than the model needs, so that transformers must load
    it. Raises SpecDecError if files are broken or the device has too little memory.
    """
    dtype = kind if isinstance(kind, torch.dtype) else torch.bfloat16
    with terminal.status(f"Loading {source.name}"), explain_errors(source.name):
        file: TensorFile = source.file or safetensors_file.read_header(source.weight_files())
        if source.file is None and found.num_hidden_layers > len(file.tensors):
            return None
        model, made = NativeModel(found, dtype), list[torch.Tensor]()
        keep = place.type == "cpu" and dtype == torch.bfloat16
        if source.file is not None:
            gguf_model.build(source.name, source.file, model, keep)
        elif (built := safetensors_model.build(source.name, file, model)) is None:
            return None
        else:
            made = built
        model.file = file if source.file is None else source.file.without_tokenizer()
        model.config._name_or_path = source.name  # for messages, instead of the cache folder
        merged = _merge(model, change, source.file)
        if keep:
            changed = model.merged_adapter.fingerprint if merged else ""
            model.origin = packed.Origin(entry, file.paths, file.state, file.maps, changed, (*made, *merged))
        model.to(place)
        model.generation_config = config.read_generation(entry)
    return model


def as_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Return PyTorch's dtype for a dtype or for a name such as "bf16" or "torch.bfloat16"; returns "auto" for "auto".

    Raises SpecDecError for an unknown name.
    """
    name = dtype_name(str(dtype).removeprefix("torch."))
    found: torch.dtype | str = name if name == "auto" else getattr(torch, name)
    return found


def find_device(device: str | torch.device, dtype: str | torch.dtype = "auto") -> torch.device:
    """Return PyTorch's device of this name; "auto": the first CUDA device if it can compute in ``dtype``, else the CPU.

    dtype: the dtype that the device must compute in, which a small product on it tests; "auto": float32.
    Raises SpecDecError if the device is unknown or missing, or cannot compute in ``dtype``.
    """
    if device == "auto":
        with contextlib.suppress(SpecDecError):  # this PyTorch does not support the driver or the GPU
            return find_device("cuda", dtype)
        device = "cpu"
    place = _device(device)
    _try_out(place, dtype)
    return place


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise SpecDecError(f"unknown device '{device}'; known: auto, cpu, cuda, cuda:N, mps") from None
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise SpecDecError("device 'mps' is missing: this PyTorch or this machine has no Metal; use cpu")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise SpecDecError(
            f"device '{place}' is missing: PyTorch finds {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return place


def _try_out(place: torch.device, dtype: str | torch.dtype) -> None:
    """Multiply two numbers on the device ``place``; raise SpecDecError if it cannot compute in ``dtype``.

    dtype: "auto" is float32. A trial is needed because no list of devices can be complete.
    """
    kind = dtype if isinstance(dtype, torch.dtype) else torch.float32
    try:
        one = torch.ones(1, 1, dtype=kind, device=place)
        (one @ one).item()
    except Exception as error:  # the type depends on the backend
        what = str(kind).removeprefix("torch.")
        raise SpecDecError(f"this machine cannot compute in {what} on device '{place}' ({one_line(error)})") from None
