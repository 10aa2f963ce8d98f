"""Load a model, frozen, and its tokenizer; the names of dtypes and devices. Knows no runtimes and no decoding."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
)

from specdec.base.errors import SpecDecError, did_you_mean, one_line
from specdec.base.machine import check_memory
from specdec.models import checkpoint, families, packed
from specdec.models.gguf import model as gguf_model
from specdec.models.gguf.file import GGUFFile, read_header
from specdec.models.prepare import quiet_transformers
from specdec.models.source import Source, explain_errors, find_source

TEXT_NAMES = {r"^language_model\.lm_head\.": "lm_head.", r"^(model\.)?language_model\.(model\.)?": "model."}


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    experts: bool = True,
    check: Callable[[Any], None] | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a decoder-only model, frozen and in evaluation mode, and its tokenizer.

    Weights are read from safetensors or GGUF, never from pickles. Weights of a GGUF file stay in its blocks if the
    dtype is bfloat16, the device is the CPU and ``gguf.model`` supports the architecture.

    name_or_path: an embedded model (downloaded at first use), a folder, a ``.gguf`` file, a Hugging Face id, or
    ``ORG/REPO:file.gguf``.
    dtype: "auto" (the checkpoint's; bfloat16 for a GGUF file), float32, bfloat16 or float16.
    device: "auto" (the first CUDA device that can compute, else the CPU) or PyTorch's name of a device.
    revision: of a Hugging Face id.
    experts: False leaves the experts of a mixture in the safetensors files (``checkpoint.StoredExperts``).
    check: called with the model's config before the weights are read; may raise.
    Raises SpecDecError, in one line, for what is unknown, missing, broken or too large for this machine.
    """
    name = os.fspath(name_or_path)
    kind = as_dtype(dtype)
    place = find_device(device, kind)
    source = find_source(name, revision)
    options = source.options | {"trust_remote_code": trust_remote_code}
    with quiet_transformers(f"Loading {name}"):
        config, tokenizer = _parts(source, options)
        if check is not None:
            check(config)
    if source.file is not None:
        model = _of_file(source, source.file, config, kind, place)
    else:
        model = _of_checkpoint(source, options | _text_part(config), kind, place, experts)
    model.config._name_or_path = name  # for messages, instead of the cache folder
    if source.remote:
        model.config._commit_hash = source.folder.name
    return model.eval().requires_grad_(False), tokenizer


def read_config(name: str, dtype: str | torch.dtype = "auto") -> Any:
    """The config of the model ``name``. Downloads the model if need be; reads no weights."""
    source = find_source(name)
    with explain_errors(name):
        return AutoConfig.from_pretrained(source.folder, **source.options)


def read_tokenizer(name: str) -> Any:
    """The tokenizer of the model ``name``. Downloads the model if need be; reads no weights."""
    source = find_source(name)
    with quiet_transformers(f"Loading {name}"):
        return _tokenizer(source, source.options)


def _text_part(config: Any) -> dict[str, Any]:
    """Options that load the text model alone of a multimodal checkpoint, where transformers would load all of it and
    the native runtime knows the text model; else ``config``."""
    text, models = config.get_text_config(), MODEL_FOR_CAUSAL_LM_MAPPING
    if text.model_type not in families.FAMILIES or models.get(type(config), None) is models[type(text)]:
        return {"config": config}
    text.tie_word_embeddings = bool(text.tie_word_embeddings or config.tie_word_embeddings)
    return {"config": text, "key_mapping": TEXT_NAMES}


def _of_checkpoint(
    source: Source, options: dict[str, Any], kind: str | torch.dtype, place: torch.device, experts: bool
) -> PreTrainedModel:
    """The model of safetensors files, or of a GGUF file that transformers dequantises."""
    name, config = source.name, options["config"]
    if source.packed:  # dequantised even if there are kernels for packed weights
        kind = kind if isinstance(kind, torch.dtype) else torch.bfloat16
        infos = read_header(source.folder / source.packed, name).tensors
        numbers = {key: math.prod(info.shape) for key, info in infos.items()}
        check_memory(name, sum(numbers.values()) * kind.itemsize)
        options = {key: value for key, value in options.items() if key != "config"}
        options |= {"quantization_config": GgufConfig(dequantize=True)}
    else:
        options |= {"use_safetensors": True, "ignore_mismatched_sizes": True}  # checked below
        source.fetch_weights()
        with explain_errors(name):
            numbers = dict(pair for path in source.weight_files() for pair in checkpoint.numbers_in(path).items())
    fused = 0
    if numbers and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        fused = _check_size(name, config, numbers)
    with quiet_transformers(f"Loading {name}"), explain_errors(name):
        stored = None if experts or source.packed else _checkpoint(source, config)
        if stored is None:
            if fused and not source.packed and not getattr(config, "quantization_config", None):
                dtype = kind if isinstance(kind, torch.dtype) else config.dtype or torch.bfloat16
                check_memory(name, fused * dtype.itemsize, "leave a part of its experts on the disk (--expert-cache)")
            load: Any = AutoModelForCausalLM.from_pretrained
            loaded = load(source.folder, dtype=kind, output_loading_info=True, **options)
        else:
            loaded = _without_experts(source.folder, stored, kind, options)
        model: PreTrainedModel = loaded[0].to(place)  # type: ignore[arg-type]
    _check_fit(name, model, loaded[1])
    return model


def _of_file(
    source: Source, file: GGUFFile, config: Any, kind: str | torch.dtype, place: torch.device
) -> PreTrainedModel:
    """The model of a GGUF file whose config is in the source's folder."""
    dtype = torch.bfloat16 if not isinstance(kind, torch.dtype) else kind
    keep_blocks = place.type == "cpu" and dtype == torch.bfloat16
    with explain_errors(source.name):
        state = packed.stamp(file.path)
        model = gguf_model.build(source.name, file, config, dtype, keep_blocks)
        if keep_blocks:
            model.origin = packed.Origin(source.folder, file.path, state, file.map())  # type: ignore[assignment]
        model.to(place)  # type: ignore[arg-type]
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model


def _parts(source: Source, options: dict[str, Any]) -> tuple[Any, Any]:
    """The config and the tokenizer. Raises SpecDecError unless the model is decoder-only."""
    with explain_errors(source.name):
        config = AutoConfig.from_pretrained(source.folder, **options)
    families.check_sizes(source.name, config)
    if config.is_encoder_decoder:
        raise SpecDecError(f"'{source.name}' is an encoder-decoder model ({config.model_type}); use a decoder-only one")
    return config, _tokenizer(source, options)


def _check_size(name: str, config: Any, numbers: dict[str, int]) -> int:
    """Raise SpecDecError if ``config`` describes over twice the weights of files whose tensors have so many
    ``numbers``: transformers would allocate those, too. ``_check_fit`` names what else is missing.

    Returns how many weights transformers makes of several tensors: a layer's experts. Others stay mapped.
    """
    stored = sum(numbers.values())
    fits = (getattr(config, "num_hidden_layers", None) or 1) <= len(numbers)  # an empty model has a size, too
    if fits:
        with explain_errors(name), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
            model.tie_weights()
        fits = sum(values.numel() for values in model.parameters()) <= 2 * stored
    if not fits:
        raise SpecDecError(
            f"cannot load model '{name}': its config describes over twice the {stored} weights of its files"
        )
    whole = {key.partition("layers.")[2] for key in numbers}  # of a text model, prefixes differ
    experts = (pair for pair in model.named_parameters() if ".experts." in pair[0])
    return sum(values.numel() for key, values in experts if key.partition("layers.")[2] not in whole)


def _check_fit(name: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise SpecDecError if weights are missing in the checkpoint: transformers would leave them random."""
    names = {key for key, _ in model.named_parameters()}
    unfit = sorted(names & {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if unfit:
        raise SpecDecError(
            f"the weights of '{name}' do not fit its config.json: {len(unfit)} missing or of another shape, "
            f"such as '{unfit[0]}'"
        )


def _checkpoint(source: Source, config: Any) -> checkpoint.Checkpoint | None:
    """The checkpoint of a mixture if it can be loaded without its experts, else None."""
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and config.model_type in families.FAMILIES
    if not known or getattr(config, "quantization_config", None):
        return None
    files = source.weight_files()
    return checkpoint.open_checkpoint(files) if files else None


def _without_experts(
    folder: Path, checkpoint: checkpoint.Checkpoint, dtype: str | torch.dtype, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The result of ``from_pretrained`` for a model whose experts stay in ``checkpoint``."""
    config = options["config"]
    if not isinstance(dtype, torch.dtype):  # auto
        dtype = config.dtype or next(iter(checkpoint.others.values())).dtype
    given: dict[str, Any] = {"ignore_mismatched_sizes": True}
    with contextlib.suppress(OSError):  # without a file, transformers makes it from the config
        given["generation_config"] = GenerationConfig.from_pretrained(folder)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, info = kind.from_pretrained(
        None, config=config, state_dict=checkpoint.state(dtype), dtype=dtype, output_loading_info=True, **given
    )
    checkpoint.leave(model)
    return model, info


def _tokenizer(source: Source, options: dict[str, Any]) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, **options)
        if len(tokenizer) > len(tokenizer.all_special_tokens):  # without its files, a tokenizer class may be empty
            if source.packed:
                gguf_model.split_digits(
                    read_header(source.folder / source.packed, source.name), tokenizer.backend_tokenizer
                )
            return tokenizer
        reason = "its files are missing"
    except Exception as error:  # untrusted files: any type
        reason = one_line(error)
    raise SpecDecError(f"model '{source.name}' has no usable tokenizer, such as a tokenizer.json: {reason}")


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def as_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """The dtype for transformers, or "auto". Raises SpecDecError for an unknown name."""
    if dtype == "auto" or dtype in DTYPES.values():
        return dtype
    name = str(dtype).removeprefix("torch.")
    if isinstance(dtype, str) and SHORT.get(name, name) in DTYPES:
        return DTYPES[SHORT.get(name, name)]
    known = ["auto", *DTYPES, *SHORT]
    raise SpecDecError(f"unknown dtype '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}")


def find_device(device: str | torch.device, dtype: str | torch.dtype = "auto") -> torch.device:
    """The device by name. Raises SpecDecError if it is unknown, missing, or cannot compute in ``dtype``."""
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
    """Raise SpecDecError if the device cannot multiply two numbers in ``dtype``; no list of devices can be complete."""
    kind = dtype if isinstance(dtype, torch.dtype) else torch.float32
    try:
        one = torch.ones(1, 1, dtype=kind, device=place)
        (one @ one).item()
    except Exception as error:  # the type depends on the backend
        what = str(kind).removeprefix("torch.")
        raise SpecDecError(f"this machine cannot compute in {what} on device '{place}' ({one_line(error)})") from None
