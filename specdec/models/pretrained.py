"""Loads models and tokenizers of safetensors folders by transformers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from specdec.base.errors import SpecDecError, one_line
from specdec.base.machine import check_memory
from specdec.models import families, safetensors_file
from specdec.models.quiet import quiet_transformers
from specdec.models.source import Source, explain_errors


def read_config(source: Source, trust_remote_code: bool = False) -> Any:
    """Load the config of a model by transformers. Raises SpecDecError unless the model is decoder-only."""
    with quiet_transformers(f"Loading {source.name}"), explain_errors(source.name):
        config = AutoConfig.from_pretrained(source.folder, **_options(source, trust_remote_code))
    if config.is_encoder_decoder:
        raise SpecDecError(f"'{source.name}' is an encoder-decoder model ({config.model_type}); use a decoder-only one")
    return config


def read_tokenizer(source: Source, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model by transformers. Raises SpecDecError if there is none that can be used."""
    try:
        with quiet_transformers(f"Loading {source.name}"):
            tokenizer = AutoTokenizer.from_pretrained(source.folder, **_options(source, trust_remote_code))
        if len(tokenizer) > len(tokenizer.all_special_tokens):  # without its files, a tokenizer class may be empty
            return tokenizer
        reason = "its files are missing"
    except Exception as error:  # untrusted files: any type
        reason = one_line(error)
    raise SpecDecError(f"model '{source.name}' has no usable tokenizer, such as a tokenizer.json: {reason}")


def load(
    source: Source,
    config: Any,
    kind: str | torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load the model of a safetensors folder by transformers.

    config: as ``read_config`` returns it. kind: the dtype, or "auto": the config's.
    Raises SpecDecError if it is broken or too large, or if weights are missing.
    """
    options = _options(source, trust_remote_code) | text_part(config)
    options |= {"use_safetensors": True, "ignore_mismatched_sizes": True}  # checked below
    name, config, fused = source.name, options["config"], 0
    with explain_errors(name):
        numbers = safetensors_file.numbers_in(source.weight_files())
    if numbers and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        fused = _check_size(name, config, numbers)
    with quiet_transformers(f"Loading {name}"), explain_errors(name):
        if fused and not getattr(config, "quantization_config", None):
            dtype = kind if isinstance(kind, torch.dtype) else config.dtype or torch.bfloat16
            check_memory(name, fused * dtype.itemsize)
        load: Any = AutoModelForCausalLM.from_pretrained
        loaded = load(source.folder, dtype=kind, output_loading_info=True, **options)
        model: PreTrainedModel = loaded[0].to(device)  # type: ignore[arg-type]
    _check_fit(name, model, loaded[1])
    return model


def _options(source: Source, trust_remote_code: bool) -> dict[str, Any]:
    return {"trust_remote_code": trust_remote_code} | ({} if source.remote else {"local_files_only": True})


def text_part(config: Any) -> dict[str, Any]:
    """Return arguments for ``from_pretrained``: ``config``, or what loads only the text model of a multimodal one.

    Only the text model is loaded if the native runtime knows its type and transformers would load the whole model.
    """
    text, models = config.get_text_config(), MODEL_FOR_CAUSAL_LM_MAPPING
    if text.model_type not in families.FAMILIES or models.get(type(config), None) is models[type(text)]:
        return {"config": config}
    text.tie_word_embeddings = bool(text.tie_word_embeddings or config.tie_word_embeddings)
    return {"config": text, "key_mapping": safetensors_file.TEXT_NAMES}


def _check_size(name: str, config: Any, numbers: dict[str, int]) -> int:
    """Raise SpecDecError if ``config`` describes over twice as many weights as the files have.
    numbers: number of values of each tensor in the files. Returns the number of weights that transformers joins from
    several tensors, a layer's experts: only these need memory, because other weights stay mapped."""
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
    """Raise SpecDecError if the checkpoint lacks weights, which transformers would leave random."""
    names = {key for key, _ in model.named_parameters()}
    unfit = sorted(names & {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if unfit:
        raise SpecDecError(
            f"the weights of '{name}' do not fit its config.json: {len(unfit)} missing or of another shape, "
            f"such as '{unfit[0]}'"
        )
