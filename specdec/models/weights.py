"""Fill a model with weights from the tensors of a GGUF or safetensors file that is mapped into memory.

The callers, one for each file format, find the tensors of each parameter. Matrices in GGUF quantization blocks, and
experts, stay in the file. Other weights are mapped from the file if it has them in the model's dtype, and converted
otherwise. A block is a group of neighbouring values that GGUF stores quantized, with a common scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from specdec.base import memory
from specdec.base.machine import check_memory
from specdec.models.gguf import blocks
from specdec.models.gguf.blocks import BlockEmbedding, BlockExperts, BlockLinear, Blocks
from specdec.models.native_model import Experts, NativeModel
from specdec.models.tensor_file import PLAIN, TensorFile, TensorInfo

EXPERTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}  # the matrices in a parameter of experts
NUMBERS = "BF16", "F16", "F32"  # types without blocks in which experts may stay in a file
Found = Mapping[str, Sequence[TensorInfo]]  # the tensors of each parameter, by its name
Matrix = Tensor | Blocks
Restore = Callable[[str, Matrix], Matrix]  # name of a parameter, the tensor of the file -> the parameter


def fill(
    name: str, file: TensorFile, model: NativeModel, found: Found, keep: bool, restore: Restore | None = None
) -> list[Tensor]:
    """Set the weights of ``model``; return the dense ones that are copies, not mapped, in the order of ``found``.

    name: the model's name in messages.
    file: the opened file.
    model: a model without values; some of its modules are replaced.
    found: parameter name -> the tensors in ``file`` that it is made of. Several tensors of a matrix are joined by rows.
        A parameter of experts is one tensor [experts, out, in] for each of gate, up and down (or gate and up in one),
        or one matrix for each expert.
    keep: whether matrices in GGUF quantization blocks, and experts, stay in the file.
    restore: called with a parameter's name and its stored value; returns the parameter's value. None: stored values are
        used as they are, and transposed experts become ordinary parameters.
    Raises SpecDecError if the weights that do not stay in the file need more memory than is free.
    """
    dtype, made = model.dtype, list[Tensor]()
    experts = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Experts) and not (module.is_transposed and restore is None)
    }
    check_memory(name, _needed_memory(model, found, restore is None, keep))
    for parameter, infos in found.items():
        path, _, leaf = parameter.rpartition(".")
        if path in experts and leaf in EXPERTS:
            continue
        module, parts = model.get_submodule(path), [stored(file, info) for info in infos]
        if path in experts:  # biases of gates and ups alternate
            each = torch.cat([dense(part, dtype) for part in parts], 1)
            matrix: Matrix = torch.stack(each.chunk(len(EXPERTS[leaf.removesuffix("_bias")]), 1), -1).flatten(1)
        else:
            matrix = _joined(parts, dtype)
            matrix = matrix if restore is None else restore(parameter, matrix)
        if keep and isinstance(matrix, Blocks) and stays(module, infos):
            model.set_submodule(path, _in_blocks(module, matrix, dtype))
            continue
        values = dense(matrix, dtype)
        if not any(values.untyped_storage().data_ptr() == part.data_ptr() for part in file.maps):
            made.append(values)
            memory.release(matrix.data)
        setattr(module, leaf, nn.Parameter(values, requires_grad=False))
    for path, module in experts.items():
        infos = tensors_of(f"{path}.down_proj", module, found)
        packed = _experts(module, file, infos, dtype)
        model.set_submodule(path, packed if keep and stays(module, infos) else packed.to_transformers())
    if model.config.tie_word_embeddings:
        _tie(model)
    return made


def unfilled(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor on the device "meta") for each parameter of ``model`` that has no values yet.

    Modules that belong to another model, too, such as a shared embedding, have values already.
    """
    return ((name, values) for name, values in model.named_parameters() if values.is_meta)


def tensors_of(parameter: str, module: nn.Module, found: Found) -> Sequence[TensorInfo]:
    """Return the descriptions of the tensors that ``stays`` needs to decide whether a parameter can stay in the file.

    For a matrix of experts, they are all matrices of the layer's experts; for others, the parameter's own tensors.
    parameter: its name. module: the module that it belongs to. found: parameter name -> the tensors that it is made of.
    """
    path, _, leaf = parameter.rpartition(".")
    if isinstance(module, Experts) and leaf in EXPERTS:
        return [info for each in EXPERTS for info in found[f"{path}.{each}"]]
    return found[parameter]


def stays(module: nn.Module, infos: Sequence[TensorInfo]) -> bool:
    """Return whether the weights of ``module``, made of the tensors ``infos``, can stay in the file as they are stored.

    A linear layer or an embedding can, if its tensors are in GGUF quantization blocks of one type, or of types that
    ``blocks.common_kind`` can join. Experts can also be unquantized. Other modules, such as routers of experts, cannot.
    """
    kinds = {info.kind for info in infos}
    if isinstance(module, Experts):
        return kinds <= {*blocks.KINDS, *NUMBERS}
    joined = isinstance(module, nn.Linear | nn.Embedding) and blocks.common_kind(kinds)
    return kinds <= {*blocks.KINDS} and bool(joined)


def _needed_memory(model: NativeModel, found: Found, mapped: bool, keep: bool) -> int:
    """Return the bytes of memory that the weights of ``model`` need, besides those that stay in the file.

    model: the model, still without values. found: parameter name -> its tensors in the file. mapped: whether weights
    that the file has in the model's dtype are mapped from it, and need no memory. keep: whether matrices keep their
    GGUF blocks, which then need as many bytes as in the file, and experts stay in the file.
    """
    need, dtype = 0, model.dtype
    for parameter, values in unfilled(model):
        path, _, leaf = parameter.rpartition(".")
        module = model.get_submodule(path)
        apart = mapped and isinstance(module, Experts) and module.is_transposed  # ordinary parameters
        infos = found[parameter] if apart else tensors_of(parameter, module, found)
        if apart or not (keep and stays(module, infos)):
            as_they_are = all(PLAIN.get(info.kind) == dtype and is_aligned(info) for info in infos)
            need += 0 if mapped and as_they_are else values.numel() * dtype.itemsize
        elif leaf not in EXPERTS:
            need += sum(info.nbytes for info in infos)
    return need


def is_aligned(info: TensorInfo) -> bool:
    return info.offset % PLAIN[info.kind].itemsize == 0


def _experts(own: Experts, file: TensorFile, infos: Sequence[TensorInfo], dtype: torch.dtype) -> BlockExperts:
    matrices, count = list[Blocks](), len(own.get_parameter("down_proj"))
    for info in infos:
        rows = file.data(info).view(math.prod(info.shape[:-2]), info.shape[-2], -1)
        matrices += [Blocks(each, info.kind, info.shape[-1]) for each in rows]
    *parts, down = (matrices[n : n + count] for n in range(0, len(matrices), count))
    return BlockExperts(own, [list(each) for each in zip(*parts, strict=True)], down, dtype)


def stored(file: TensorFile, info: TensorInfo) -> Matrix:
    """Return the tensor ``info`` of ``file``: in its own dtype, or as a ``Blocks`` if it is stored in GGUF blocks.

    It is a view of the mapped file, or a copy if its position in the file is not aligned to its dtype.
    """
    part = file.data(info)
    if info.kind in PLAIN:
        return (part if is_aligned(info) else part.clone()).view(PLAIN[info.kind]).view(info.shape)
    return Blocks(part.view(info.shape[0], -1), info.kind, info.shape[1])


def _joined(parts: list[Matrix], dtype: torch.dtype) -> Matrix:
    """Return matrices joined by rows: in GGUF blocks if one type can represent all of them exactly, else in ``dtype``.

    parts: matrices with equally many columns. One alone is returned as it is. Of several, the result has copies, and
    the memory of the mapped originals is freed (``memory.release``).
    """
    if len(parts) == 1:
        return parts[0]
    packed = blocks.of_one_kind([part for part in parts if isinstance(part, Blocks)])
    if len(packed) == len(parts):
        found: Matrix = replace(packed[0], data=torch.cat([part.data for part in packed]))
    else:
        found = torch.cat([dense(part, dtype) for part in parts])
    memory.release(*(part.data for part in parts))
    return found


def dense(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """Return a matrix as a tensor in ``dtype``, dequantized if it is stored in GGUF blocks.

    A tensor that has this dtype already is returned itself.
    """
    return blocks.dequantize(matrix, None, dtype) if isinstance(matrix, Blocks) else matrix.to(dtype)


def _in_blocks(module: nn.Module, packed: Blocks, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return BlockEmbedding(packed, dtype, getattr(module, "embed_scale", None))
    made: Any = BlockLinear(packed, None, dtype)
    made.bias = module.bias  # the file's, or still to be set
    return made  # type: ignore[no-any-return]


def _tie(model: NativeModel) -> None:
    embedding: Any = model.get_input_embeddings()
    if isinstance(embedding, BlockEmbedding):
        model.set_output_embeddings(BlockLinear(embedding.blocks, None, embedding.dtype))
    else:
        model.lm_head.weight = embedding.weight
