"""Load models, configs and tokenizers of safetensors folders by transformers."""

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
    """Load the config of the model ``source`` by transformers, and return it.

    trust_remote_code: whether to run Python code of the repository. Raises SpecDecError if the config is broken or the
    model is not decoder-only.
    """
    with quiet_transformers(f"Loading {source.name}"), explain_errors(source.name):
        config = AutoConfig.from_pretrained(source.folder, **_options(source, trust_remote_code))
    if config.is_encoder_decoder:
        raise SpecDecError(f"'{source.name}' is an encoder-decoder model ({config.model_type}); use a decoder-only one")
    return config


def read_tokenizer(source: Source, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of the model ``source`` by transformers, and return it.

    trust_remote_code: whether to run Python code of the repository. Raises SpecDecError if there is no usable
    tokenizer, such as one without vocabulary.
    """
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
    """Load the model ``source``, a folder of safetensors files, by transformers.

    config: its config, read by ``read_config`` of this module; of a multimodal model, only the text model is loaded
    (``text_part``). kind: the dtype of the weights; "auto": the config's. device: where the weights go.
    trust_remote_code: whether to run Python code of the repository.
    Raises SpecDecError if the files are broken, weights are missing or have another shape, or memory does not suffice.
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
    """Return keyword arguments for transformers' ``from_pretrained``, with which a text model is loaded.

    They are "config" and, for a multimodal model whose text model is of a known family, "key_mapping": then the config
    is that of the text model, which alone is loaded, and names of its tensors are mapped to those of a text model.
    config: the model's config, one of transformers. Its text config may be changed in place (tied embeddings).
    """
    text, models = config.get_text_config(), MODEL_FOR_CAUSAL_LM_MAPPING
    if text.model_type not in families.FAMILIES or models.get(type(config), None) is models[type(text)]:
        return {"config": config}
    text.tie_word_embeddings = bool(text.tie_word_embeddings or config.tie_word_embeddings)
    return {"config": text, "key_mapping": safetensors_file.TEXT_NAMES}


def _check_size(name: str, config: Any, numbers: dict[str, int]) -> int:
    """Return the number of weight values that transformers copies into memory, because it joins several tensors.

    These are the weights of experts; others stay mapped from the files. name: the model's name in messages. config: the
    model's config. numbers: {tensor name: number of its values} of the files. Raises SpecDecError if the config
    describes over twice as many values as the files have.
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
    """Raise SpecDecError if the checkpoint lacks weights of the model, which transformers would leave random.

    name: the model's name in the message. model: the loaded model. info: transformers' report of keys that are missing
    or have another shape.
    """
    names = {key for key, _ in model.named_parameters()}
    unfit = sorted(names & {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if unfit:
        raise SpecDecError(
            f"the weights of '{name}' do not fit its config.json: {len(unfit)} missing or of another shape, "
            f"such as '{unfit[0]}'"
        )
