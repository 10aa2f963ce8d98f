"""Finding and loading models: embedded ones, local folders, GGUF files and Hugging Face ids.

Knows nothing about drafters, runtimes or decoding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import get_checkpoint_shard_files

from specdec.base import memory
from specdec.base.errors import SpecDecError, did_you_mean, one_line
from specdec.base.machine import check_memory
from specdec.models import checkpoint, hub
from specdec.models.catalogue import EMBEDDED, GGUF, described, prepared, quietly
from specdec.models.gguf import model as gguf_model
from specdec.models.gguf.blocks import Blocks, named_weights
from specdec.models.gguf.file import GGUFFile, is_gguf, read_header

# What is downloaded of a repository: all but weights at once, weights (no pickles) when they are to be read.
PARTS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
WEIGHTS = ["model*.safetensors"]
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+):([\w./-]+\.gguf)")  # ORG/REPO:file.gguf


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    experts: bool = True,
    check: Callable[[Any], None] | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a decoder-only model, frozen and in evaluation mode, and its tokenizer.

    name_or_path: an embedded model's name (fetched at first use), else a local folder, a ``.gguf`` file, a Hugging Face
    id, or ``ORG/REPO:file.gguf``. Weights are read from safetensors or GGUF only, never from pickles. In bfloat16 on
    a CPU those of a GGUF file stay in its blocks, if the model is of an architecture that ``gguf.model`` serves;
    those of others are dequantised by transformers.
    dtype: "auto" (the checkpoint's own; bfloat16 for a GGUF file) or one of float32, bfloat16, float16.
    device: "auto" (the first CUDA device that can compute, else the CPU) or what PyTorch calls one.
    revision: for Hugging Face ids.
    attn_implementation: None lets transformers choose (sdpa where the model supports it, else eager).
    experts: False leaves those of a mixture in the checkpoint (``checkpoint.StoredExperts``), if it is one of
    safetensors that holds them as published models do; only ``SpecDecoder(experts=...)`` can then decode.
    check: called with the model's config before its weights are read; it raises for a model that is not wanted.
    Raises SpecDecError, in one line, for whatever is unknown, missing, broken or beyond this machine.
    """
    name = os.fspath(name_or_path)
    kind = as_dtype(dtype)
    place = find_device(device, kind)
    source, options, file = _source(name, revision)
    options |= {"trust_remote_code": trust_remote_code}
    with quietly(f"Loading {name}"):
        config, tokenizer = _parts(name, source, options)
        if check is not None:
            check(config)
    if file is not None:
        model = _of_file(name, file, source, config, kind, place, attn_implementation)
    else:
        options |= {"config": config}
        if attn_implementation is not None:
            options |= {"attn_implementation": attn_implementation}
        model = _of_checkpoint(name, source, options, kind, place, experts)
    model.config._name_or_path = name  # what messages call it, not the cache folder
    if _remote(options):
        model.config._commit_hash = source.name
    return model.eval().requires_grad_(False), tokenizer


def read_config(name: str, dtype: str | torch.dtype = "auto") -> Any:
    """The config of the model that ``load`` would load; its weights may have to be fetched, but are not read."""
    source, options, _ = _source(name, None)
    with _explained(name):
        return AutoConfig.from_pretrained(source, **options)


def _of_checkpoint(
    name: str,
    source: Path,
    options: dict[str, Any],
    kind: str | torch.dtype,
    place: torch.device,
    experts: bool,
) -> PreTrainedModel:
    """The model of safetensors files."""
    packed = options.get("gguf_file")
    if packed:  # dequantised, whatever kernels for packed weights there are
        kind = kind if isinstance(kind, torch.dtype) else torch.bfloat16
        shapes = (info.shape for info in read_header(source / packed, name).tensors.values())
        check_memory(name, sum(map(math.prod, shapes)) * kind.itemsize)
        options = {key: value for key, value in options.items() if key != "config"}
        options |= {"quantization_config": GgufConfig(dequantize=True)}
    else:
        options |= {"use_safetensors": True, "ignore_mismatched_sizes": True}  # checked below
    _fetch_weights(name, source, options)
    with quietly(f"Loading {name}"), _explained(name):
        checkpoint = None if experts or packed else _checkpoint(source, options["config"])
        if checkpoint is None:
            load: Any = AutoModelForCausalLM.from_pretrained
            loaded = load(source, dtype=kind, output_loading_info=True, **options)
        else:
            loaded = _without_experts(source, checkpoint, kind, options)
        model: PreTrainedModel = loaded[0].to(place)  # type: ignore[arg-type]
    _check_fit(name, model, loaded[1])
    return model


def _of_file(
    name: str,
    file: GGUFFile,
    folder: Path,
    config: Any,
    kind: str | torch.dtype,
    place: torch.device,
    attn_implementation: str | None,
) -> PreTrainedModel:
    """The model of a GGUF file that ``folder`` describes."""
    dtype = torch.bfloat16 if not isinstance(kind, torch.dtype) else kind
    keep_blocks = place.type == "cpu" and dtype == torch.bfloat16
    stored = (info.nbytes if keep_blocks else math.prod(info.shape) * dtype.itemsize for info in file.tensors.values())
    check_memory(name, sum(stored))
    with _explained(name):
        model = gguf_model.build(name, file, config, dtype, keep_blocks, attn_implementation)
        model.to(place)  # type: ignore[arg-type]
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _parts(name: str, source: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    """The config, of a decoder-only model, and the tokenizer."""
    with _explained(name):
        config = AutoConfig.from_pretrained(source, **options)
    if config.is_encoder_decoder:
        raise SpecDecError(f"'{name}' is an encoder-decoder model ({config.model_type}); use a decoder-only one")
    return config, _tokenizer(name, source, options)


def _check_fit(name: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse a model of which some weights were not in the checkpoint: transformers leaves them random."""
    names = {key for key, _ in model.named_parameters()}
    unfit = sorted(names & {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if unfit:
        raise SpecDecError(
            f"the weights of '{name}' do not fit its config.json: {len(unfit)} missing or of another shape, "
            f"such as '{unfit[0]}'"
        )


def own_name(name: str) -> str:
    """What to call the model ``name`` in files that others may read: never by a path of this machine.

    An embedded model's name and a Hugging Face id are that; a GGUF file says what it holds (``general.name``), and a
    folder's config what it was saved from, unless that is a path, too. Else it is called as its file or folder is.
    """
    path = Path(name).expanduser()
    if name in EMBEDDED or not path.exists():
        return name
    said = ""
    with contextlib.suppress(Exception):  # untrusted files: any type
        if path.is_file():
            said = str(read_header(path).metadata.get("general.name", ""))
        else:
            said = str(json.loads((path / "config.json").read_text("utf-8")).get("_name_or_path", ""))
    said = " ".join(said.split())
    a_path = said.startswith(("/", ".", "~")) or "\\" in said or said.count("/") > 1 or Path(said).exists()
    return path.resolve().name if a_path else said


def fingerprint(model: PreTrainedModel) -> str:
    """32 hex digits that identify a model's weights, the same whatever dtype or device they are loaded in.

    SHA-256 over every parameter's name, shape and up to 512 evenly strided elements as bf16, in order of names; of
    parameters with equal content (tied ones among them, tied or not after a runtime rearranged them) only the first.
    """
    digest, seen = hashlib.sha256(), set()
    for name, parameter in sorted(named_weights(model), key=lambda pair: pair[0]):
        sample = checkpoint.sample(parameter).to(torch.bfloat16)
        # Below 2^-16 float16 cannot hold every bf16 value; zero also has one sign only.
        sample = torch.where(sample.abs() < 2**-16, torch.zeros_like(sample), sample)
        content = f"{tuple(parameter.shape)}".encode() + sample.cpu().view(torch.int16).numpy().tobytes()
        if content not in seen:
            seen.add(content)
            digest.update(f"{name} ".encode() + content)
        memory.release(parameter.data if isinstance(parameter, Blocks) else parameter.detach())
    return digest.hexdigest()[:32]


# --- what to load, on what ---------------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def as_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """What transformers takes. Raises SpecDecError for an unknown one."""
    if dtype == "auto" or dtype in DTYPES.values():
        return dtype
    name = str(dtype).removeprefix("torch.")
    if isinstance(dtype, str) and SHORT.get(name, name) in DTYPES:
        return DTYPES[SHORT.get(name, name)]
    known = ["auto", *DTYPES, *SHORT]
    raise SpecDecError(f"unknown dtype '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}")


def find_device(device: str | torch.device, dtype: str | torch.dtype = "auto") -> torch.device:
    """The device meant, tried out in ``dtype``. Raises SpecDecError if it is unknown, not there or cannot compute."""
    if device == "auto":
        with contextlib.suppress(SpecDecError):  # a driver or a GPU that this PyTorch does not serve
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
        raise SpecDecError("device 'mps' is not there: this PyTorch or this machine has no Metal")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise SpecDecError(f"device '{place}' is not there: this PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return place


def _try_out(place: torch.device, dtype: str | torch.dtype) -> None:
    """Multiply two numbers there: the one test of a device and a dtype that no list of devices can outdate."""
    kind = dtype if isinstance(dtype, torch.dtype) else torch.float32
    try:
        one = torch.ones(1, 1, dtype=kind, device=place)
        (one @ one).item()
    except Exception as error:  # the type depends on the backend
        what = str(kind).removeprefix("torch.")
        raise SpecDecError(f"this machine cannot compute in {what} on device '{place}' ({one_line(error)})") from None


def _source(name: str, revision: str | None) -> tuple[Path, dict[str, Any], GGUFFile | None]:
    """The folder where the model is, or is now put (of a Hugging Face id all but the weights), options for
    transformers' ``from_pretrained``, and the GGUF file that its weights are in, if they are."""
    path = Path(name).expanduser()
    options: dict[str, Any] = {"local_files_only": True}
    if revision is not None and (name in EMBEDDED or path.exists()):
        raise SpecDecError(f"a revision ('{revision}') goes with a Hugging Face id, and '{name}' is not one")
    if name in EMBEDDED:
        path = prepared(name)
        return path, options, read_header(path / GGUF, name)
    elif name and path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(path.glob("*.gguf"))
            hint = f"; to load the GGUF file in it, give '{found[0]}'" if found else ""
            raise SpecDecError(f"'{name}' is no model folder: config.json is missing{hint}")
    elif path.is_file():
        if not is_gguf(path):
            raise SpecDecError(f"'{name}' is not a GGUF file; give a .gguf file, a model folder or a model's name")
        file = read_header(path, name)
        if gguf_model.serves(file):
            return described(name, file), options, file
        return path.parent, options | {"gguf_file": path.name}, None
    elif file_in_repository := _HUB_FILE.fullmatch(name):
        repository, member = file_in_repository.groups()
        place = f"https://huggingface.co/{repository}/resolve/{revision or 'main'}/{member}"
        by_hand = f"; get {place} by hand and give the path of the file instead"
        path = hub.fetch("model", repository, revision, [member], by_hand) / member
        if not path.is_file():
            raise SpecDecError(f"'{repository}' has no file '{member}' on Hugging Face")
        return _source(str(path), None)
    else:
        return _repository(name, revision), {}, None
    return path, options, None


def _repository(name: str, revision: str | None) -> Path:
    known = f"give an embedded model ({', '.join(EMBEDDED)}), a model folder, a .gguf file, ORG/REPO or ORG/REPO:FILE"
    guess = did_you_mean(name.rpartition("/")[2].lower(), EMBEDDED)
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise SpecDecError(f"there is no file or folder '{name}'")
    if guess and "/" not in name:
        raise SpecDecError(f"unknown model '{name}'{guess}; {known}")
    folder = hub.fetch("model", name, revision, PARTS, f"{guess}; {known}")
    if not (folder / "config.json").is_file():
        raise SpecDecError(f"'{name}' has no config.json; if it holds GGUF files, name one of them: '{name}:FILE.gguf'")
    return folder


def _remote(options: dict[str, Any]) -> bool:
    """Whether the options are those of a Hugging Face id."""
    return "local_files_only" not in options


def _fetch_weights(name: str, source: Path, options: dict[str, Any]) -> None:
    """Download the weights of a Hugging Face id into its folder, which is called by its commit."""
    if _remote(options):
        hub.fetch("model", name, source.name, WEIGHTS)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn whatever transformers raises while it reads a model (untrusted files: any type) into one line."""
    try:
        yield
    except SpecDecError:
        raise
    except torch.OutOfMemoryError:
        raise SpecDecError(
            f"'{name}' does not fit into the device's memory; use a smaller dtype or model, or the device cpu"
        ) from None
    except Exception as error:
        reason = one_line(error)
        if isinstance(error, SafetensorError):
            reason = f"a safetensors file is truncated or broken ({reason}); get it again"
        elif "model.safetensors" in reason:
            reason += " Weights are read from safetensors only."
        elif "trust_remote_code" in str(error):
            reason = "it needs Python code of its own; pass trust_remote_code only if you trust its authors"
        raise SpecDecError(f"cannot load model '{name}': {reason}") from error


def _checkpoint(source: Path, config: Any) -> checkpoint.Checkpoint | None:
    """The checkpoint of a mixture that can be loaded without its experts; else None."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "quantization_config", None):
        return None
    files = _weight_files(source)
    return checkpoint.open_checkpoint(files) if files else None


def weight_files(name: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a model as ``load`` takes it; none if its weights are in another format."""
    local = name in EMBEDDED or Path(name).expanduser().exists()
    source, options, file = _source(name, None if local else revision)
    if file is not None or "gguf_file" in options:
        return []
    _fetch_weights(name, source, options)
    with _explained(name):
        return _weight_files(source)


def _weight_files(folder: Path) -> list[Path]:
    if (only := folder / SAFE_WEIGHTS_NAME).is_file():
        return [only]
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return [Path(path) for path in get_checkpoint_shard_files(str(folder), str(index))[0]]
    return []


def _without_experts(
    source: Path, checkpoint: checkpoint.Checkpoint, dtype: str | torch.dtype, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What ``from_pretrained`` returns, of a model whose experts are left in ``checkpoint``."""
    config = options["config"]
    if not isinstance(dtype, torch.dtype):  # auto
        dtype = config.dtype or next(iter(checkpoint.others.values())).dtype
    given = {key: options[key] for key in options if key in ("ignore_mismatched_sizes", "attn_implementation")}
    with contextlib.suppress(OSError):  # none of its own: made of the model's
        given["generation_config"] = GenerationConfig.from_pretrained(source)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, info = kind.from_pretrained(
        None, config=config, state_dict=checkpoint.state(dtype), dtype=dtype, output_loading_info=True, **given
    )
    checkpoint.leave(model)
    return model, info


def _tokenizer(name: str, source: Path, options: dict[str, Any]) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if len(tokenizer) > len(tokenizer.all_special_tokens):  # else: a class that starts empty without its files
            if file := options.get("gguf_file"):
                gguf_model.split_digits(read_header(source / file, name), tokenizer.backend_tokenizer)
            return tokenizer
        reason = "its files are missing"
    except Exception as error:  # as above
        reason = one_line(error)
    raise SpecDecError(f"model '{name}' has no usable tokenizer, such as a tokenizer.json: {reason}")
