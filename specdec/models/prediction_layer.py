"""Find the multi-token prediction layer in a model's files, and load it as a model of one layer.

transformers does not load it. Safetensors files name its tensors by the model's family. In a GGUF file it is the block
behind the model's last layer, with further tensors called "nextn", or it is in a companion file, "mtp-...gguf", beside
the model's. Files are untrusted: names, shapes and types of tensors are checked before values are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from specdec.base.errors import SpecDecError, errors_as, one_line
from specdec.models import names, safetensors_file, safetensors_model, weights
from specdec.models.config import Config
from specdec.models.gguf import model as gguf_model
from specdec.models.gguf.blocks import KINDS, Blocks
from specdec.models.gguf.file import GGUFFile, read_header
from specdec.models.native_model import AnyModel, NativeModel
from specdec.models.source import file_in_repository, find_source
from specdec.models.tensor_file import PLAIN, TensorFile, TensorInfo
from specdec.models.weights import Matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TensorNames(NamedTuple):
    """The names of the tensors of a model family's multi-token prediction layer, and how the family runs the layer.

    The layer's input is projection([norm of the token embedding; norm of the hidden state]), or the other way round;
    the full name of a tensor is prefix + name + ".weight".

    prefix: start of all the names; ``{n}`` stands for the number of the model's layers.
    layer: what follows the prefix in the names of the decoder layer's tensors.
    token_norm: name of the norm of the token embedding.
    state_norm: name of the norm of the hidden state.
    projection: name of the linear layer that joins both into the decoder layer's input.
    norm: name of the norm after the decoder layer.
    token_first: whether the embedding is the first half of the projection's input; if not, the state is.
    reads_norm: whether the layer reads the model's final states after the model's final norm, not before it.
    feeds_norm: whether the state for the next drafted token is the layer's output after its norm, not before it.
    """

    prefix: str
    layer: str
    token_norm: str
    state_norm: str
    projection: str
    norm: str
    token_first: bool
    reads_norm: bool
    feeds_norm: bool


FORMATS = (  # as vLLM runs them
    # Qwen3-Next, Qwen3.5
    TensorNames("mtp.", "layers.0.", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm", True, True, True),
    # MiMo
    TensorNames(
        *("model.mtp_layers.0.", "", "token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
        *(False, False, True),
    ),
    # DeepSeek V3, GLM 4.5
    TensorNames("model.layers.{n}.", "", "enorm", "hnorm", "eh_proj", "shared_head.norm", True, True, False),
)
GGUF = TensorNames(  # Qwen3-Next and Qwen3.5, as llama.cpp runs them
    *("blk.{n}.", "", "nextn.enorm", "nextn.hnorm", "nextn.eh_proj", "nextn.shared_head_norm", True, True, True)
)
FINAL_NORM = "output_norm.weight"  # of a GGUF file; stands for a norm of the layer that is not there
# Copies of the model's own embedding and output head.
COPIES = "shared_head.head.", "embed_tokens.", "nextn.shared_head_head.", "nextn.embed_tokens."
ONE_LAYER = {  # config entries, where they exist: the layer has full attention, and experts if the model has them
    "layer_types": ["full_attention"],
    "mlp_layer_types": ["sparse"],
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "first_k_dense_replace": 0,
}
PREDICTS = "mtp_num_hidden_layers", "num_nextn_predict_layers"  # config fields: the number of such layers
FAMILIES = "Qwen3-Next, Qwen3.5, DeepSeek V3, GLM 4.5 and MiMo"


@dataclass(frozen=True)
class Found:
    """The place of a multi-token prediction layer: a file, and descriptions of the layer's tensors, not read yet.

    name: the checkpoint's name, for messages.
    file: the header of the file that has the layer.
    names: the naming scheme of the layer's tensors in the file.
    prefix: ``names.prefix`` with the number of this model's layers, with which the full names begin.
    tensors: descriptions of the layer's tensors; the key is the full name without ``prefix``. Copies of the model's
        embedding and output head are left out.
    """

    name: str
    file: TensorFile
    names: TensorNames
    prefix: str
    tensors: dict[str, TensorInfo]


@dataclass
class PredictionLayer:
    """A multi-token prediction layer with its weights.

    names: the family's tensor names, which also say how to run the layer.
    model: a model of one layer: the decoder layer with the norm after it. It shares embedding and output head with the
        target model.
    token_norm: weight of the norm of token embeddings, [D].
    state_norm: weight of the norm of hidden states, [D].
    projection: the matrix [D, 2 D] that joins embedding and state into the layer's input.
    """

    names: TensorNames
    model: AnyModel
    token_norm: Tensor
    state_norm: Tensor
    projection: Matrix


def find(model: AnyModel, source: str | None = None) -> Found | None:
    """Find the multi-token prediction layer of ``model``; return its place for ``read``; None: the files have none.

    model: the loaded target model. source: the checkpoint that has the layer, as a model's name (downloaded if need
    be), or the path of a companion GGUF file "mtp-..."; None: the files of ``model`` and companion files beside them.
    Raises SpecDecError if the files are missing or broken.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, file in _files(model, source):
        for each in [GGUF] if isinstance(file, GGUFFile) else FORMATS:
            prefix = each.prefix.format(n=count)
            parts = {key.removeprefix(prefix): info for key, info in file.tensors.items() if key.startswith(prefix)}
            tensors = {part: info for part, info in parts.items() if not part.startswith(COPIES)}
            if tensors:
                return Found(name, file, each, prefix, tensors)
    return None


def announced(model: AnyModel) -> bool:
    """Return whether the files of ``model`` may have a multi-token prediction layer, without reading them.

    False: the config tells of none, or the files are not known. True: ``find`` has to look.
    """
    text = model.config.get_text_config()
    known = any(getattr(text, field, 0) for field in PREDICTS)
    return (isinstance(model, NativeModel) and model.file is not None) or (known and bool(_own_name(model)))


def _files(model: AnyModel, source: str | None) -> Iterator[tuple[str, TensorFile]]:
    """Yield (name for messages, header) of each file that may have the prediction layer: the model's, then companions.

    model: the target model. source: the checkpoint that has the layer, as a model's name, or the path of a companion
    GGUF file; None: the files of ``model`` and companion files beside them. Raises SpecDecError if the files are
    missing or broken.
    """
    own, name = model.file if isinstance(model, NativeModel) else None, source or _own_name(model)
    if source is not None or own is None:
        own = _read(name, None if source else getattr(model.config, "_commit_hash", None))
    yield name, own
    if source is None and isinstance(own, GGUFFile):
        for path in names.companions(own.paths[0]):
            beside = read_header(path)
            if _is_of(beside, own):
                yield str(path), beside


def _read(name: str, revision: str | None) -> TensorFile:
    path, of_hub = Path(name).expanduser(), names.HUB_FILE.fullmatch(name)
    if path.is_file() or of_hub:  # a companion file is no model
        return read_header(file_in_repository(of_hub[1], of_hub[2], revision) if of_hub else path, name)
    source = find_source(name, None if path.exists() else revision)
    source.fetch_weights()
    with errors_as(f"cannot read '{name}'", SafetensorError, ValueError, LookupError):
        return source.file or safetensors_file.read_header(source.weight_files())


def _own_name(model: AnyModel) -> str:
    return str(model.config.get_text_config()._name_or_path or model.config._name_or_path)


def _is_of(beside: GGUFFile, own: GGUFFile) -> bool:
    """Return whether a companion file belongs to a model with the architecture and sizes of the file ``own``.

    beside: header of the companion file, which has a prediction layer. own: header of the model's GGUF file.
    """

    def size(file: GGUFFile) -> tuple[Any, ...]:
        width, blocks, more = (
            file.metadata.get(f"{file.architecture}.{key}", 0)
            for key in ("embedding_length", "block_count", "nextn_predict_layers")
        )
        return file.architecture, width, blocks - more if type(blocks) is type(more) is int else None

    return size(beside) == size(own)


# --- reading ---------------------------------------------------------------------------------------------------------


def read(model: AnyModel, found: Found) -> PredictionLayer:
    """Load a multi-token prediction layer; its weights have the dtype and device of ``model``.

    model: the target model, which is not changed. found: the result of ``find``. Weights stay in GGUF quantization
    blocks if those of the target do. Raises SpecDecError if the layer does not fit the target.
    """
    of_gguf, tensors = isinstance(found.file, GGUFFile), dict(found.tensors)
    d, around = model.config.get_text_config().hidden_size, dict[str, TensorInfo]()
    if of_gguf and FINAL_NORM in found.file.tensors:
        tensors.setdefault(f"{found.names.norm}.weight", found.file.tensors[FINAL_NORM])
    for part in (found.names.token_norm, found.names.state_norm, found.names.projection, found.names.norm):
        info, shape = tensors.pop(f"{part}.weight", None), (d, 2 * d) if part == found.names.projection else (d,)
        if info is None or info.shape != shape or not (info.kind in PLAIN or (of_gguf and len(shape) == 2)):
            is_so = "missing" if info is None else f"{info.kind} {info.shape}, not {shape}"
            raise _unfit(found.name, f"'{found.prefix}{part}' is {is_so}")
        around[part] = info
    inside = {part.removeprefix(found.names.layer): info for part, info in tensors.items()}
    norm = around.pop(found.names.norm)
    native = of_gguf or isinstance(model, NativeModel)
    made: AnyModel = (_native if native else _of_transformers)(model, found, inside, norm)
    values = [weights.stored(found.file, info) for info in around.values()]
    if of_gguf:
        gguf_model.check_types(found.name, around.values())
        named = zip(around, values, strict=True)
        config: Any = made.config
        values = [gguf_model.restored(config, f"{part}.weight", value) for part, value in named]
    *norms, projection = values
    if not (_stays(model) and isinstance(projection, Blocks) and projection.kind in KINDS):
        projection = weights.dense(projection, model.dtype).to(model.device)
    token_norm, state_norm = (weights.dense(norm, model.dtype).to(model.device) for norm in norms)
    return PredictionLayer(found.names, made, token_norm, state_norm, projection)


def _unfit(name: str, why: str) -> SpecDecError:
    return SpecDecError(f"the multi-token prediction layer of '{name}' does not fit: {why}")


def _config(model: AnyModel) -> dict[str, Any]:
    """Return the config fields, {name: value}, of a model that has a prediction layer as its only layer.

    They are those of the text config of ``model``, but for one layer, which has full attention, and experts if
    ``model`` has them.
    """
    fields: dict[str, Any] = model.config.get_text_config().to_dict()
    changes = {key: value for key, value in ONE_LAYER.items() if fields.get(key) is not None}
    return fields | changes | {"num_hidden_layers": 1}


def _stays(model: AnyModel) -> bool:
    """Return whether weights that are read for ``model`` may stay in GGUF quantization blocks.

    They may if ``model`` is a ``NativeModel`` in bfloat16 on the CPU.
    """
    return isinstance(model, NativeModel) and model.device.type == "cpu" and model.dtype == torch.bfloat16


def _native(model: AnyModel, found: Found, inside: dict[str, TensorInfo], norm: TensorInfo) -> NativeModel:
    """Load a prediction layer as a ``NativeModel`` of one layer, with the embedding and output head of ``model``.

    model: the target model. found: the result of ``find``. inside: descriptions of the decoder layer's tensors by name
    within the layer, such as "self_attn.q_proj.weight" (in GGUF's names, "attn_q.weight"). norm: description of the
    weight of the norm after the layer. Raises SpecDecError if the tensors do not fit.
    """
    layer = NativeModel(Config(**_config(model) | {"tie_word_embeddings": False}), model.dtype)
    ends: Any = model.get_input_embeddings(), model.get_output_embeddings()
    layer.model.embed_tokens, layer.lm_head = ends
    if isinstance(found.file, GGUFFile):
        tensors = {f"blk.0.{part}": info for part, info in inside.items()} | {FINAL_NORM: norm}
        gguf_model.build(found.name, replace(found.file, tensors=tensors), layer, _stays(model))
    else:
        tensors = {f"model.layers.0.{part}": info for part, info in inside.items()} | {"model.norm.weight": norm}
        if safetensors_model.build(found.name, replace(found.file, tensors=tensors), layer) is None:
            raise _unfit(found.name, f"its tensors are not those of a {model.config.model_type} layer")
    return layer.to(model.device).eval().requires_grad_(False)


def _of_transformers(model: Any, found: Found, inside: dict[str, TensorInfo], norm: TensorInfo) -> PreTrainedModel:
    """Load a prediction layer as a transformers model of one layer, with the embedding and output head of ``model``.

    model: the target model, one of transformers. found: the result of ``find``. inside: descriptions of the decoder
    layer's tensors by name within the layer, such as "self_attn.q_proj.weight". norm: description of the weight of the
    norm after the layer. Raises SpecDecError if the tensors do not fit.
    """
    make, base = type(model).from_pretrained, model.base_model_prefix
    named = {f"{base}.layers.0.{part}": info for part, info in inside.items()} | {f"{base}.norm.weight": norm}
    if odd := [key for key, info in named.items() if info.kind not in PLAIN]:
        raise _unfit(found.name, f"'{odd[0]}' is of type {named[odd[0]].kind}")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    state = {key: weights.stored(found.file, info) for key, info in named.items()}
    state |= {f"{base}.embed_tokens.weight": embedding.weight, "lm_head.weight": head.weight}
    config = model.config.get_text_config()
    try:
        own, info = make(
            None,
            config=type(config).from_dict(_config(model)),
            state_dict=state,
            dtype=model.dtype,
            attn_implementation=config._attn_implementation,
            output_loading_info=True,
        )
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise SpecDecError(
            f"cannot load the multi-token prediction layer of '{found.name}' ({one_line(error)})"
        ) from error
    for what in ("missing_keys", "unexpected_keys"):
        if keys := sorted(info[what]):
            raise _unfit(found.name, f"{what}: {keys[0]}")
    own = own.to(model.device).eval().requires_grad_(False)
    own.set_input_embeddings(embedding)
    own.set_output_embeddings(head)
    return own  # type: ignore[no-any-return]
