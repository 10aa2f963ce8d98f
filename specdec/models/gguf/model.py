"""Load models from GGUF files without conversion: matrices stay in the file's quantization blocks.

``write_parts`` writes config, generation config, tokenizer and chat template of a file into a folder, once. ``build``
gives the model of this config the weights of the file. Supports the architectures of the native runtime.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from specdec.base import terminal
from specdec.base.errors import SpecDecError, errors_as
from specdec.models import families, weights
from specdec.models.config import Config, write_config, write_generation
from specdec.models.gguf import blocks, defaults, layers, recurrent, tokenizer
from specdec.models.gguf.blocks import Blocks
from specdec.models.gguf.file import GGUFFile
from specdec.models.native_model import NativeModel, transformers_config
from specdec.models.quiet import quiet_transformers
from specdec.models.tensor_file import PLAIN, TensorInfo
from specdec.models.weights import EXPERTS

ARCHITECTURES = {family.gguf: kind for kind, family in families.FAMILIES.items() if family.gguf}
# Config fields that are floats.
FLOATS = {
    *("rope_theta", "rope_local_base_freq", "rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping"),
    *("llama_4_scaling_beta", *families.SCALED.values()),
}
# Metadata keys that need no config field.
IGNORED = {
    *("attention.key_length", "attention.layer_norm_epsilon", "attention.value_length", "attention.value_length_swa"),
    *("rope.dimension_sections", "tensor_data_layout"),
    # Of recurrent layers, which a dense Granite 4 names and lacks: layers that are there have tensors.
    *("ssm.conv_kernel", "ssm.group_count", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank"),
}
SCALING = {  # metadata keys after "rope.scaling.", and the fields of a config's ``rope_parameters``
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_log_multiplier": "mscale_all_dim",
}
NEUTRAL = {"yarn_attn_factor": 1, "yarn_ext_factor": 1}  # further keys there, which need no field with these values
LARGE_GEMMA = {"gemma2": 46, "gemma3_text": 62}  # layers of the models that scale scores by hidden size and heads
CONTROL = 3  # GGUF's type of tokens that are not text
# Control tokens that end a turn or a text in every model that has them.
END_TOKENS = {"<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"}
VISIBLE = {"<|tool_response>"}  # end tokens that files of Gemma 4 take for text
END_TOKENS |= {"<turn|>", *VISIBLE}
HARMONY = {
    "<|return|>",
    "<|call|>",
}  # also end tokens; if a model has both, "<|end|>" ends only one of several messages


def _kind(file: GGUFFile) -> str:
    kind = ARCHITECTURES[file.architecture]
    return "mixtral" if kind == "llama" and file.metadata.get("llama.expert_count") else kind


# --- config and tokenizer --------------------------------------------------------------------------------------------


def write_parts(name: str, file: GGUFFile, folder: Path) -> None:
    """Write config, generation config, tokenizer and chat template of a GGUF file into the existing ``folder``.

    The files are named as on Hugging Face: config.json, generation_config.json, tokenizer.json and so on.
    name: the model's name in messages. file: the header of the GGUF file. Raises SpecDecError for a file that is broken
    or not supported, tensors that do not fit the config included.
    """
    with errors_as(f"cannot load model '{name}': its GGUF file describes no model", Exception):
        config = config_of(name, file)
        check_tensors(name, file, NativeModel(config, torch.bfloat16))
        ends = {"eos_token_id": _eos_token_ids(file) or None}
    write_config(folder, config)
    write_generation(folder, {key: getattr(config, key) for key in ("bos_token_id", "pad_token_id")} | ends)
    tokenizer.write(name, file, config.model_type, folder)


def config_of(name: str, file: GGUFFile) -> Config:
    """Return the model config that the metadata and the tensors of a GGUF file describe.

    name: the model's name in messages. file: the header of the GGUF file. Raises SpecDecError for unknown or impossible
    metadata.
    """
    kind, prefix = _kind(file), file.architecture + "."
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    keys, values = families.KEYS | families.FAMILIES[kind].keys, dict[str, Any]()
    for part, key in tokenizer.TOKENS.items():
        if f"tokenizer.ggml.{key}_token_id" in file.metadata:
            values[f"{part}_token_id"] = file.metadata[f"tokenizer.ggml.{key}_token_id"]
    scaling = {key.removeprefix("rope.scaling."): own.pop(key) for key in list(own) if key.startswith("rope.scaling.")}
    for key, value in own.items():
        if isinstance(value, list) and len(value) == own.get("block_count") and len(set(value)) == 1:
            value = value[0]  # one number for each layer
        if key in keys:
            values[keys[key]] = value
        elif value and key not in IGNORED:
            raise SpecDecError(f"cannot load model '{name}': it is unknown what {prefix}{key} in its GGUF file means")
    further = layers.fields(name, file, values) if families.FAMILIES[kind].fields >= families.PER_LAYER else {}
    if kind == "phi3" and not values.get("sliding_window"):  # 0: there is none
        values.pop("sliding_window", None)
    if "token_embd.weight" in file.tensors:
        values["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    for field, value in values.items():
        fits = _positive(value) if field in FLOATS else type(value) is int and 0 <= value < families.LONGEST
        if not fits:
            raise SpecDecError(f"cannot load model '{name}': its GGUF file says that {field} is {str(value)[:60]!r}")
    families.check_sizes(name, Config(**values))
    ends = ".attn_output.weight", ".ssm_out.weight"  # a layer has one of them
    blocks_of_layers = {_layer(key) for key in file.tensors if key.endswith(ends)} - {-1}
    if more := values.pop("nextn_layers", 0):  # the last blocks predict further tokens
        count = values["num_hidden_layers"] = values.get("num_hidden_layers", 0) - more
        values["mtp_num_hidden_layers"] = more
        blocks_of_layers = {layer for layer in blocks_of_layers if not count <= layer < count + more}
    if values.get("num_hidden_layers") != (found := len(blocks_of_layers)):
        raise SpecDecError(
            f"cannot load model '{name}': its GGUF file has {found} layers, and its header names "
            f"{values.get('num_hidden_layers')}; get it again"
        )
    values |= further
    if families.FAMILIES[kind].mixer:
        recurrent.complete(name, values)
    values |= {"tie_word_embeddings": "output.weight" not in file.tensors, "pad_token_id": values.get("pad_token_id")}
    width, heads = values.get("hidden_size", 0), values.get("num_attention_heads", 0) or 1
    _rotate_part(name, kind, values)
    if kind in LARGE_GEMMA:
        size = width // heads if found == LARGE_GEMMA[kind] else values.get("head_dim", 256)
        values["query_pre_attn_scalar"] = size
    if kind == "qwen3_moe":
        values["norm_topk_prob"] = True
    if kind == "gpt_oss":
        values["rope_scaling"] = {"rope_type": "default"}
    if kind == "granite":
        values.setdefault("attention_multiplier", (width // heads or 1) ** -0.5)
    if (rope := scaling.pop("type", "none")) != "none" or kind == "ministral3":
        values["rope_scaling"] = _scaled_rope(name, rope, scaling, values)
        values["rope_scaling"] |= {"truncate": False} if kind == "gpt_oss" else {}
    values["model_type"] = kind
    if (known := defaults.complete(values)) is not None:
        return known
    with quiet_transformers():
        return Config(**transformers_config(values).to_dict())


def _rotate_part(name: str, kind: str, values: dict[str, Any]) -> None:
    """Replace the entry "rotated" of ``values`` by "partial_rotary_factor" or, if need be, "head_dim", in place.

    name: the model's name in messages. kind: transformers' ``model_type``. values: config fields by name and, if the
    file says it, "rotated": the number of values of a head that rotate. Raises SpecDecError if "rotated" is not the
    whole size of a head, and heads of this model type cannot rotate in part.
    """
    family = families.FAMILIES[kind]
    if "rotated" in values and families.HEAD.items() <= family.keys.items() and not family.partial:
        values.setdefault("head_dim", values["rotated"])  # older files have only one of both
    size = values.get("head_dim") or values.get("hidden_size", 0) // (values.get("num_attention_heads") or 1) or 1
    rotated = values.pop("rotated", size)
    if rotated != size and not (family.partial and rotated < size and rotated % 2 == 0):
        raise SpecDecError(
            f"cannot load model '{name}': its GGUF file says that {rotated} of the {size} numbers of a head rotate, "
            f"which is not possible in a {kind} model"
        )
    if family.partial:
        values["partial_rotary_factor"] = rotated / size


def _scaled_rope(name: str, kind: Any, scaling: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return the config field ``rope_scaling``, a dict in transformers' form, for the RoPE scaling of a GGUF file.

    name: the model's name in messages. kind: the scaling type, "linear" or "yarn". scaling: the file's metadata with
    keys after "rope.scaling.", such as {"factor": 4.0}. values: config fields by name. If they have
    "llama_4_scaling_beta", it and "rope_theta" are moved from them, in place, into the result. Raises SpecDecError for
    another type, a missing factor or impossible metadata.
    """
    found = {SCALING[key]: value for key, value in scaling.items() if key in SCALING}
    bad = [key for key, value in found.items() if not _positive(value)]
    known = {**dict.fromkeys(SCALING), "finetuned": None, **NEUTRAL}
    bad += [key for key, value in scaling.items() if key not in known or NEUTRAL.get(key, value) != value]
    if kind not in ("linear", "yarn") or "factor" not in found or bad:
        raise SpecDecError(
            f"cannot load model '{name}': its GGUF file scales rotation in an unknown way ({str(bad or kind)[:60]})"
        )
    if "mscale_all_dim" in found:
        found["mscale"] = found["mscale_all_dim"]
    if "llama_4_scaling_beta" in values:  # a config of such a family has both there
        found |= {key: values.pop(key) for key in ("llama_4_scaling_beta", "rope_theta") if key in values}
    return found | {"rope_type": kind}


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _eos_token_ids(file: GGUFFile) -> int | list[int]:
    """Return the ids of the tokens that end a turn or a text: an int if there is one, else a list, which may be empty.

    They are the end tokens that the metadata of ``file`` name, the "eos" token first, and control tokens whose text is
    known to end turns or texts, such as "<|im_end|>".
    """
    metadata = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    named = [id for key in ("eos", "eot", "eom") if type(id := metadata.get(f"{key}_token_id")) is int]
    kinds = zip(metadata.get("tokens", ()), metadata.get("token_type", ()), strict=False)
    control = ((text, token) for token, (text, kind) in enumerate(kinds) if kind == CONTROL or text in VISIBLE)
    known = {text: token for text, token in control if text in END_TOKENS | HARMONY}
    none = {metadata.get("unknown_token_id"), known.get("<|end|>") if known.keys() >= HARMONY else None}
    found = [token for token in dict.fromkeys([*named, *known.values()]) if token in named[:1] or token not in none]
    return found[0] if len(found) == 1 else found


# --- weights ---------------------------------------------------------------------------------------------------------


def check_tensors(name: str, file: GGUFFile, model: NativeModel) -> dict[str, tuple[str, ...]]:
    """Return {name of a parameter of ``model``: names of the tensors in a GGUF file that make it up}, all checked.

    name: the model's name in messages. file: the header of the GGUF file. model: the model; only its parameters without
    values (device "meta") count. Raises SpecDecError if tensors are missing, superfluous, or of another shape or an
    unknown type.
    """
    found = tensor_names(file, model)
    shapes = {key: info.shape for key, info in file.tensors.items() if info.kind in PLAIN or len(info.shape) > 1}
    unfit = list[str]()
    for parameter, values in weights.unfilled(model):
        tensors, wanted, (path, _, leaf) = found[parameter], list(values.shape), parameter.rpartition(".")
        if path.endswith("conv1d"):
            wanted.remove(1)
        if leaf in EXPERTS and model.get_submodule(path).is_transposed:
            wanted[1:] = wanted[:0:-1]
        if path.endswith("shared_expert_gate") and len(shapes.get(tensors[0], ())) == 1:
            del wanted[0]  # some converters write a vector
        each = [tuple(wanted)]
        if len(tensors) > 1 and leaf == "weight":
            each = [(rows, wanted[1]) for rows in recurrent.tensor_rows(model.config)]
        elif len(tensors) > 1:  # [E, 2 F, D] or, a bias, [E, 2 F]
            each = [(wanted[0], wanted[1] // 2, *wanted[2:])] * 2
        pairs = zip(tensors, each, strict=True)
        unfit += [key or parameter for key, shape in pairs if shapes.get(key) != shape]
    if unfit:
        raise SpecDecError(
            f"the weights of '{name}' do not fit its config: {len(unfit)} missing or of another shape, such as "
            f"'{unfit[0]}'"
        )
    further = {key for key in file.tensors if _layer(key) >= model.config.num_hidden_layers}  # for multi-token drafts
    known = further.union({layers.ROPE_FACTORS}, layers.unused(model.config), *found.values())
    if more := sorted(file.tensors.keys() - known):
        raise SpecDecError(
            f"'{name}' has {len(more)} tensors that do not belong to a {model.config.model_type} model of its config, "
            f"such as '{more[0][:60]}'"
        )
    check_types(name, (info for key, info in file.tensors.items() if key not in further))
    return found


def check_types(name: str, infos: Iterable[TensorInfo]) -> None:
    """Raise SpecDecError for a tensor of a GGUF type that cannot be read.

    name: the model's name in the message. infos: descriptions of the tensors.
    """
    for kind in {info.kind for info in infos} - {*PLAIN, *blocks.KINDS}:
        try:
            blocks.dequantize_rows(
                torch.zeros(1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]).byte(), kind
            )
        except NotImplementedError:
            raise SpecDecError(
                f"'{name}' has tensors of type {kind}, which cannot be read; get a file of another type, such as Q4_K_M"
            ) from None


def tensor_names(file: GGUFFile, model: NativeModel) -> dict[str, tuple[str, ...]]:
    """Return {name of a parameter of ``model``: names that llama.cpp gives to its tensors in a GGUF file}.

    A parameter of experts, or the input projection of Qwen3-Next, may be several tensors. The name is "" for a
    parameter to which llama.cpp gives none. The file may lack the tensors (``check_tensors``).
    file: the header of the GGUF file. model: the model; only its parameters without values (device "meta") count.
    """
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    names, found = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers), dict[str, tuple[str, ...]]()
    for parameter, _ in weights.unfilled(model):
        path, _, leaf = parameter.rpartition(".")
        matrix, end = leaf.removesuffix("_bias"), leaf if leaf in ("weight", "bias") else "weight"
        if matrix in EXPERTS:
            layer, end, parts = path.split(".")[2], "weight" if leaf in EXPERTS else "bias", EXPERTS[matrix]
            found[parameter] = (f"blk.{layer}.ffn_{'_'.join(parts)}_exps.{end}",)
            if found[parameter][0] not in file.tensors:  # gates and ups apart
                found[parameter] = tuple(f"blk.{layer}.ffn_{part}_exps.{end}" for part in parts)
        elif leaf == "A_log":
            found[parameter] = (names.get_name(parameter) or "",)
        elif leaf == "dt_bias":
            found[parameter] = (f"{names.get_name(path + '.dt_proj')}.bias",)
        else:
            tensor = names.get_name(path if leaf == end else parameter)
            found[parameter] = ("" if tensor is None else f"{tensor}.{end}",)
            if found[parameter][0] not in file.tensors and (parts := recurrent.tensors_of(path)):
                found[parameter] = tuple(f"{names.get_name(part)}.{end}" for part in parts)
    return found


def _layer(tensor: str) -> int:
    """Return the number of the layer that a GGUF tensor's name tells, such as 3 for "blk.3.attn_q.weight"; -1: none."""
    number = tensor.removeprefix("blk.").partition(".")[0]
    return int(number) if tensor.startswith("blk.") and number.isdecimal() and len(number) < 9 else -1


def build(name: str, file: GGUFFile, model: NativeModel, keep: bool) -> None:
    """Set the parameters of ``model`` that have no values yet from the tensors of a GGUF file.

    name: the model's name in messages. file: the header of the GGUF file. model: filled in place. keep: whether
    matrices and experts stay in the file's quantization blocks where kernels can read these; their modules are then
    replaced by ``BlockLinear``, ``BlockEmbedding`` and ``BlockExperts``. If not, all weights are dequantized to the
    model's dtype. Raises SpecDecError if the tensors do not fit the model, or the weights need more memory than is
    free.
    """
    config, names = model.config, check_tensors(name, file, model)
    found = {parameter: [file.tensors[tensor] for tensor in tensors] for parameter, tensors in names.items()}
    owners = {parameter: model.get_submodule(parameter.rpartition(".")[0]) for parameter in found}
    groups = {tuple(weights.tensors_of(parameter, owner, found)): owner for parameter, owner in owners.items()}
    unpacked = [infos for infos, owner in groups.items() if not weights.stays(owner, infos)]
    weights.fill(name, file, model, found, keep, lambda key, stored: restored(config, key, stored, len(found[key])))
    if layers.ROPE_FACTORS in file.tensors and "" in model.model.rotary_emb.inv_freq:
        info = file.tensors[layers.ROPE_FACTORS]  # of Llama 3.1
        model.model.rotary_emb.divide(file.data(info).view(PLAIN[info.kind]))
    if keep:
        _say_unpacked(name, unpacked, model.dtype)


def restored(config: Config, parameter: str, stored: Tensor | Blocks, tensors: int = 1) -> Tensor | Blocks:
    """Return a parameter of a GGUF file with the changes of llama.cpp's converter undone.

    The converter changes the order of some rows and columns, and adds 1 to the weights of some norms. Blocks are not
    moved: they get the order as ``rows`` and ``columns``.
    config: the model's config. parameter: the parameter's full name in the model, such as "model.norm.weight". stored:
    its values or blocks in the file. tensors: number of the file's tensors that were joined, row after row, into
    ``stored``; 2 only for the input projection of Qwen3-Next.
    """
    family, (path, _, leaf) = families.FAMILIES[config.model_type], parameter.rpartition(".")
    rows = rows_of(config, path, stored.shape[0]) if family.interleaved else None
    columns = None
    if family.tiled_heads and config.linear_num_key_heads != config.linear_num_value_heads:
        rows, columns = recurrent.rows_of(config, path, leaf), recurrent.columns_of(config, path)
    if tensors > 1:
        rows = recurrent.rows_of_two(config)
    if isinstance(stored, Blocks):
        return replace(stored, rows=None if rows is None else rows.int(), columns=columns)
    values = stored if rows is None else stored[rows.long()]
    values = values if columns is None else values[:, columns.argsort()]
    values = recurrent.restored(path, leaf, values)
    values = values[None] if path.endswith("shared_expert_gate") and values.dim() == 1 else values
    around_zero = family.around_zero and path.endswith("norm") and not path.endswith("linear_attn.norm")
    return values.float() - 1 if around_zero else values


def _say_unpacked(name: str, unpacked: list[tuple[TensorInfo, ...]], dtype: torch.dtype) -> None:
    """Print how much memory dequantized matrices need, if the file has GGUF types for which there are no kernels.

    The message is one line on stderr. name: the model's name in it. unpacked: for each dequantized weight, the
    descriptions of the tensors that it is made of. dtype: the dtype to which they are dequantized.
    """
    kinds, stored, numbers = set[str](), 0, 0
    for infos in unpacked:
        kind = " with ".join(each := dict.fromkeys(info.kind for info in infos))
        if kind not in blocks.KINDS and not each.keys() <= PLAIN.keys():
            kinds.add(kind)
            stored += sum(info.nbytes for info in infos)
            numbers += sum(math.prod(info.shape) for info in infos)
    if kinds:
        sizes = [terminal.megabytes(size) for size in (numbers * dtype.itemsize, stored)]
        terminal.say(
            f"note: there are no kernels for weights of type {', '.join(sorted(kinds))} in '{name}'; unpacked to "
            f"{str(dtype).removeprefix('torch.')}, they take {sizes[0]} of memory instead of {sizes[1]}, and each "
            "token reads all of them"
        )


def rows_of(config: Config, path: str, count: int) -> Tensor | None:
    """Return, for each row of a linear layer's weight in the model, the index of its row in the GGUF file.

    Only for families whose files interleave rows of the query and key projections: rows that rotate together are
    neighbours there. config: the model's config. path: module path of the layer. count: number of rows of its weight.
    The result is int32 [count], or None if the layer is another projection, whose rows are in the same order.
    """
    names = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    if (heads := names.get(path.rpartition(".")[2])) is None:
        return None
    order = torch.arange(count, dtype=torch.int32).view(getattr(config, heads), -1, 2)
    return order.transpose(1, 2).flatten().contiguous()
