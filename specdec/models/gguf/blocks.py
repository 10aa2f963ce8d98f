"""Keep weights in the quantization blocks of a GGUF file, and define the modules of a model with such weights.

A GGUF quantization block is a few consecutive values of a matrix row, stored in a few bits each with a common scale.
``BlockLinear`` and ``BlockEmbedding`` modules replace ordinary ones. Their attribute ``weight`` is dequantized at every
access and not kept. Runtimes with kernels for blocks read the blocks themselves. Experts may also be stored unquantized
(types in ``PLAIN``), as in safetensors files.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import gguf
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base import memory
from specdec.base.devices import without_memory
from specdec.base.errors import SpecDecError
from specdec.base.machine import check_memory
from specdec.models.tensor_file import PLAIN

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4")  # types that stay in blocks
DEQUANTIZE_CHUNK = 1 << 20  # elements that ``dequantize`` converts at a time
LINEAR_CHUNK = 1 << 23  # elements of its weight that a ``BlockLinear`` dequantizes at a time
EXPERTS = "gate_up_proj", "down_proj"  # parameters of experts
BIASES = "gate_up_proj_bias", "down_proj_bias"  # parameters of experts with biases


@dataclass(frozen=True)
class Blocks:
    """A weight matrix [out, in] whose values stay in GGUF quantization blocks, on the CPU.

    A block holds a few consecutive values of a row.

    data: uint8 [stored rows, bytes of a row], usually mapped from a file.
    kind: the GGUF type, such as "Q4_K"; for experts also an unquantized type such as "BF16".
    inputs: number of columns of the matrix.
    rows: int32 [out], for each row of the matrix the index of its row in ``data``; None: the same rows in order.
    columns: int64 [in], for each stored column (value of a row of ``data``) the index of its column in the matrix;
        None: the same order.
    """

    data: Tensor
    kind: str
    inputs: int
    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.data if self.rows is None else self.rows), self.inputs))

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """Return the uint8 tensors that hold the stored bytes, such as for ``memory.release``."""
        return (self.data,)

    def in_order(self, values: Tensor) -> Tensor:
        """Return ``values`` [..., in] with the last dimension reordered, from the order in ``data`` to the matrix's."""
        return values if self.columns is None else values[..., self.columns.argsort()]

    def dequantized(self, index: Tensor | None = None) -> Tensor:
        """Return rows of the matrix in float32, [n, in]. index: int [n], the rows' indices; None: all rows in order."""
        if index is None:
            index = torch.arange(self.shape[0])
        if self.rows is not None:
            index = self.rows[index].long()
        return self.in_order(dequantize_rows(self.data[index], self.kind))

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return single elements of the matrix, float32 [n], dequantized.

        rows, columns: int [n], the row index and the column index of each element.
        """
        if self.rows is not None:
            rows = self.rows[rows].long()
        if self.columns is not None:
            columns = self.columns.argsort()[columns]
        size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        at = (columns // size * width)[:, None] + torch.arange(width)  # [n, bytes of a block]
        values = dequantize_rows(self.data[rows[:, None], at].view(1, -1), self.kind).view(-1, size)
        return values[torch.arange(len(rows)), columns % size]

    def __deepcopy__(self, memo: Any) -> Blocks:
        return self


def dequantize_rows(data: Tensor, kind: str) -> Tensor:
    """Return the values of stored rows, float32 [n, in].

    data: uint8 [n, bytes of a row] on the CPU, each row a sequence of GGUF quantization blocks. kind: their GGUF type,
    such as "Q4_K". Raises NotImplementedError for a type that the package gguf cannot dequantize.
    """
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))


def common_kind(kinds: set[str]) -> str | None:
    """Return the GGUF type in which matrices of all the types ``kinds`` can be stored without loss; None: no type can.

    If all types are equal, it is this type. For Q4_K and Q5_K it is Q5_K, since a Q4_K value is a Q5_K value whose
    fifth bit is 0.
    """
    return "Q5_K" if kinds == {"Q4_K", "Q5_K"} else next(iter(kinds)) if len(kinds) == 1 else None


def of_one_kind(matrices: list[Blocks]) -> list[Blocks]:
    """Return the matrices in order, with equal values, in one common GGUF type; []: no type can hold all exactly."""
    kind = common_kind({each.kind for each in matrices})
    return [each if each.kind == kind else _with_fifth_bits(each) for each in matrices] if kind else []


def _with_fifth_bits(matrix: Blocks) -> Blocks:
    """Return a new Q5_K matrix with the values of the Q4_K matrix ``matrix``.

    A Q5_K block is a Q4_K block with 32 more bytes behind the scales: the fifth bit of each value, here 0.
    """
    scales, others = matrix.data.view(-1, 144).split([16, 128], 1)
    data = torch.cat((scales, scales.new_zeros(len(scales), 32), others), 1)
    return replace(matrix, data=data.view(matrix.data.shape[0], -1), kind="Q5_K")


def bits(kind: str) -> int:
    """Return the bits of a quantized value in the GGUF type ``kind``, without its share of scales: 4 for "Q4_K"."""
    return int(next(filter(str.isdigit, kind)))


Dequantize = Callable[[Blocks, Tensor | None, torch.dtype], Tensor]  # the signature of ``dequantize``


def dequantize(blocks: Blocks, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return rows of the matrix ``blocks`` in ``dtype``, [n, in], dequantized in small portions.

    index: int [n], the rows' indices; None: all rows in order.
    """
    count = blocks.shape[0] if index is None else len(index)
    step, out = max(1, DEQUANTIZE_CHUNK // blocks.inputs), torch.empty(count, blocks.inputs, dtype=dtype)
    for start in range(0, count, step):
        stop = min(start + step, count)
        out[start:stop] = blocks.dequantized(torch.arange(start, stop) if index is None else index[start:stop])
    return out


class _OfBlocks(nn.Module):
    """Base class of modules whose weights stay in GGUF quantization blocks, on the CPU.

    ``to`` and similar methods change only the dtype of the results; another device raises SpecDecError.

    dtype: the dtype to which weights are dequantized, and in which the module computes.
    unpack: the function, called as ``dequantize`` is, that dequantizes rows of a matrix; a runtime may set a faster one
        with equal results.
    """

    dtype: torch.dtype
    unpack: Dequantize

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        like = fn(torch.empty(0, dtype=self.dtype))
        if like.device.type != "cpu":
            raise SpecDecError("weights in GGUF blocks stay on the CPU; load the model on the device where it runs")
        self.dtype = like.dtype
        return super()._apply(fn, recurse)


class _BlockModule(_OfBlocks):
    """Base class of linear layers and embeddings whose only weight matrix stays in GGUF quantization blocks.

    blocks: the weight matrix [out, in]; of an embedding, [V, D].
    """

    blocks: Blocks

    @property
    def weight(self) -> Tensor:
        """Return the weight [out, in], dequantized anew at each access."""
        values = self.unpack(self.blocks, None, self.dtype)
        memory.release(self.blocks.data)  # the system reads the pages again from the file
        return values

    def to_transformers(self, weight: nn.Parameter | None = None) -> nn.Linear | nn.Embedding:
        """Return a new ordinary linear layer or embedding with the values of this module, which stays as it is.

        weight: the parameter [out, in] of the new module, shared with another one; None: a new parameter with the
        dequantized values.
        """
        with without_memory():
            made = self._without_weight()
        made.weight = nn.Parameter(self.weight, requires_grad=False) if weight is None else weight
        return made.train(self.training)

    def _without_weight(self) -> nn.Linear | nn.Embedding:
        """Return an ordinary module of the same shape on the device "meta", whose weight the caller sets.

        A subclass implements it.
        """
        raise NotImplementedError


class BlockLinear(_BlockModule, nn.Linear):  # type: ignore[override, misc]
    """A linear layer without gradients whose weight matrix stays in GGUF quantization blocks.

    blocks: the weight matrix [out, in].
    bias: the bias [out]; None: the layer has none.
    dtype: the dtype to which weight and bias are converted for products.
    """

    def __init__(self, blocks: Blocks, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = blocks.shape
        self.blocks = blocks
        self.dtype = dtype
        self.unpack = dequantize
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        step, parts = max(1, LINEAR_CHUNK // self.in_features), list[Tensor]()
        for rows in torch.arange(self.out_features).split(step):  # the whole weight may be large
            bias = None if self.bias is None else self.bias[rows]
            parts.append(F.linear(x, self.unpack(self.blocks, rows, self.dtype), bias))
        return torch.cat(parts, -1)

    def _without_weight(self) -> nn.Linear:
        made = nn.Linear(self.in_features, self.out_features)
        made.bias = self.bias
        return made


class ScaledEmbedding(nn.Embedding):
    """A token embedding whose result is multiplied by a factor in the dtype of its weight, as in Gemma.

    embed_scale: the factor, a scalar tensor; None: no multiplication.
    """

    embed_scale: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        return self.scaled(super().forward(ids))

    def scaled(self, x: Tensor) -> Tensor:
        return x if self.embed_scale is None else x * self.embed_scale.to(x.dtype)


class BlockEmbedding(_BlockModule, ScaledEmbedding):  # type: ignore[override, misc]
    """A token embedding without gradients whose table stays in GGUF quantization blocks.

    blocks: the table [V, D].
    dtype: the dtype of the result.
    embed_scale: a scalar tensor by which the result is multiplied; None: no multiplication.
    """

    def __init__(self, blocks: Blocks, dtype: torch.dtype, embed_scale: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.embed_scale = None if embed_scale is None else embed_scale.detach()  # not as a buffer
        self.num_embeddings, self.embedding_dim = blocks.shape
        self.blocks = blocks
        self.dtype = dtype
        self.unpack = dequantize
        # What ``nn.Embedding`` would set to its defaults.
        self.padding_idx = self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = False
        self.sparse = False

    def forward(self, ids: Tensor) -> Tensor:
        return self.scaled(self.unpack(self.blocks, ids.flatten(), self.dtype).view(*ids.shape, -1))

    def _without_weight(self) -> ScaledEmbedding:
        made = ScaledEmbedding(self.num_embeddings, self.embedding_dim)
        made.embed_scale = self.embed_scale
        return made


class BlockExperts(_OfBlocks):
    """The experts of one mixture-of-experts layer, without gradients, whose matrices stay in the types of a file.

    D is the hidden size and F the inner size of an expert.

    own: the model's ordinary module of experts, which this one replaces and whose activation it uses; in a list of
        one, so that it is no submodule. The constructor takes the module itself.
    gate_up: for each expert, the rows of its gate and then of its up projection: one matrix [2 F, D] or two [F, D].
    down: for each expert, its down projection [D, F].
    dtype: the dtype in which the module computes.
    transposed: whether ``own`` has biases and stores transposed matrices with alternating gate and up columns
        (gpt-oss).
    """

    def __init__(self, own: nn.Module, gate_up: list[list[Blocks]], down: list[Blocks], dtype: torch.dtype) -> None:
        super().__init__()
        self.own: list[Any] = [own]  # in a list, so that torch does not register it as a submodule
        self.transposed = bool(own.is_transposed)
        for name in BIASES if self.transposed else ():
            self.register_parameter(name, getattr(own, name))
        self.gate_up = gate_up
        self.down = down
        self.dtype = dtype
        self.unpack = dequantize

    def expert(self, number: int) -> tuple[Tensor, Tensor]:
        """Return (gate_up [2 F, D], down [D, F]), the dequantized matrices of the expert with the index ``number``.

        D is the hidden size and F the inner size of an expert. For gpt-oss (``transposed``) the matrices are
        transposed, [D, 2 F] and [F, D], and columns of gate and up alternate.
        """
        matrices, last, *_ = expert(self, number)
        *parts, down = [
            each.to(self.dtype) if isinstance(each, Tensor) else self.unpack(each, None, self.dtype)
            for each in (*matrices, last)
        ]
        gate_up = torch.cat(parts)
        return (torch.stack(gate_up.chunk(2), 1).flatten(0, 1).T, down.T) if self.transposed else (gate_up, down)

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run T tokens ``x`` [T, D] through their experts; return the weighted sum of each token's results, [T, D].

        top_k_index: int [T, k], the indices of the k experts of each token, as its router chose them. top_k_weights:
        [T, k], their weights.
        """
        out = torch.zeros_like(x)
        for number in top_k_index.unique().tolist():
            rows, ranks = (top_k_index == number).nonzero(as_tuple=True)
            gate_up, down = self.expert(number)
            biases = [getattr(self, name)[number] if self.transposed else 0 for name in BIASES]
            inner = self.own[0]._apply_gate(x[rows] @ (gate_up if self.transposed else gate_up.T) + biases[0])
            result = (inner @ (down if self.transposed else down.T) + biases[1]) * top_k_weights[rows, ranks, None]
            out.index_add_(0, rows, result.to(out.dtype))
        return out

    def to_transformers(self) -> nn.Module:
        """Return a copy of the ordinary module of experts (``own``) with the dequantized matrices as parameters."""
        made = copy.deepcopy(self.own[0])
        pairs = zip(*map(self.expert, range(len(self.down))), strict=True)
        for name, values in zip(EXPERTS, pairs, strict=True):
            setattr(made, name, nn.Parameter(torch.stack(values), requires_grad=False))
        for name, bias in self.named_parameters():
            setattr(made, name, bias)
        return made


def matrices_of(own: Any, number: int) -> tuple[list[Tensor], Tensor]:
    """Return ([matrices of gate and up], down [D, F]) of one expert, as views of the parameters of ``own``.

    own: a model's ordinary module of experts, unquantized, with all experts in its parameters gate_up_proj and
    down_proj. number: index of the expert. The list has one matrix [2 F, D], gate before up, or two [F, D]. D is the
    hidden size and F the inner size of an expert.
    """
    gate_up, down = own.gate_up_proj[number].detach(), own.down_proj[number].detach()
    return ([gate_up.T[::2], gate_up.T[1::2]], down.T) if own.is_transposed else ([gate_up], down)


def expert(experts: Any, number: int) -> tuple[Any, ...]:
    """Return ([matrices of gate and up], down, bias of gate and up, bias of down) of one expert of a mixture.

    experts: a layer's module of experts, a ``BlockExperts`` or an ordinary one. number: index of the expert. The list
    has one matrix [2 F, D], gate before up, or two [F, D]; down is [D, F]; biases are [2 F], gate before up, and [D],
    or None if the experts have none. A matrix that is stored quantized is a ``Blocks``, any other a tensor. D is the
    hidden size and F the inner size of an expert.
    """
    if isinstance(experts, BlockExperts):
        *gate_up, down = (_unblocked(each, experts.dtype) for each in (*experts.gate_up[number], experts.down[number]))
        matrices: Any = gate_up, down
    else:
        matrices = matrices_of(experts, number)
    if not hasattr(experts, BIASES[0]):
        return *matrices, None, None
    bias = experts.gate_up_proj_bias[number].detach()  # gate and up alternate
    return *matrices, torch.cat((bias[::2], bias[1::2])), experts.down_proj_bias[number].detach()


def _unblocked(matrix: Blocks, dtype: torch.dtype) -> Tensor | Blocks:
    """Return a matrix of an unquantized type as a tensor in ``dtype``, and a quantized one unchanged.

    The tensor is a view of the mapped file if the file has this dtype; otherwise it is a copy, and the memory of the
    mapped original is freed.
    """
    if matrix.kind not in PLAIN:
        return matrix
    values = matrix.data.view(PLAIN[matrix.kind])
    if values.dtype != dtype:
        values = values.to(dtype)
        memory.release(matrix.data)
    return values


@dataclass(frozen=True)
class ExpertBlocks(Blocks):
    """One parameter of a module of experts, [experts, rows, inputs], whose matrices are in GGUF blocks.

    It has the parameter's shape, and ``at`` returns single elements, so that values can be sampled for a fingerprint.
    ``dequantized`` and ``in_order`` do not apply to it.

    matrices: the matrices of all experts, expert by expert; an expert may have several, one below the other.
    data, kind, inputs: those of the first matrix.
    experts: number of experts.
    interleaved: for a transposed parameter [experts, inputs, rows], the number of parts, such as gate and up, whose
        columns alternate; 0: the parameter is not transposed.
    """

    matrices: tuple[Blocks, ...] = ()
    experts: int = 1
    interleaved: int = 0

    @property
    def memory(self) -> tuple[Tensor, ...]:
        return tuple(matrix.data for matrix in self.matrices)

    @property
    def shape(self) -> torch.Size:
        rows = sum(m.shape[0] for m in self.matrices) // self.experts
        return torch.Size((self.experts, *((self.inputs, rows) if self.interleaved else (rows, self.inputs))))

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        if self.interleaved:
            count = self.shape[2]
            row = columns % self.interleaved * (count // self.interleaved) + columns // self.interleaved
            rows, columns = rows // self.inputs * count + row, rows % self.inputs
        ends = torch.tensor([each.shape[0] for each in self.matrices]).cumsum(0)
        which, values = torch.searchsorted(ends, rows, right=True), torch.empty(len(rows))
        for number in which.unique().tolist():
            mine, matrix = which == number, self.matrices[number]
            values[mine] = matrix.at(rows[mine] - ends[number] + matrix.shape[0], columns[mine])
        return values


def quantize(values: Tensor, kind: str) -> Blocks:
    """Return the matrix ``values`` [out, in], on the CPU, quantized to the GGUF type ``kind``.

    kind: "Q4_0", "Q4_1", "Q5_0", "Q5_1" or "Q8_0".

    Raises SpecDecError if the number of inputs is no multiple of 32, the number of values in a block.
    """
    if values.shape[1] % 32:
        raise SpecDecError(f"{kind} blocks need a multiple of 32 inputs; a linear layer has {values.shape[1]}")
    data = gguf.quants.quantize(values.detach().float().numpy(), gguf.GGMLQuantizationType[kind])
    return Blocks(torch.from_numpy(data), kind, values.shape[1])


def quantize_experts(experts: Any, kind: str) -> BlockExperts:
    """Return a new module with the experts of a layer, all matrices quantized to the GGUF type ``kind``.

    The caller puts it in place of ``experts``. The parameters of an ordinary module lose their values (device "meta").
    experts: the layer's module of experts, a ``BlockExperts`` or an ordinary one, with unquantized matrices. kind:
    "Q4_0", "Q4_1", "Q5_0", "Q5_1" or "Q8_0". Raises SpecDecError if a matrix has a number of inputs that is no multiple
    of 32.
    """
    gate_up, down = list[list[Blocks]](), list[Blocks]()
    whole = isinstance(experts, BlockExperts)
    own, dtype = (experts.own[0], experts.dtype) if whole else (experts, experts.down_proj.dtype)
    for number in range(len(experts.down if whole else experts.down_proj)):
        parts, last, *_ = expert(experts, number)
        gate_up.append([quantize(values, kind) for values in parts])
        down.append(quantize(last, kind))
        memory.release(*parts, last)
    made = BlockExperts(own, gate_up, down, dtype)
    own.gate_up_proj, own.down_proj = (nn.Parameter(t.to("meta"), False) for t in (own.gate_up_proj, own.down_proj))
    return made


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor | Blocks]]:
    """Yield (name, weight) of all parameters of a model, those stored in GGUF quantization blocks included.

    The names are those of the model without blocks, in no special order. A weight is a tensor or a ``Blocks``. A shared
    weight comes once under each of its names.
    """
    yield from model.named_parameters(remove_duplicate=False)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BlockModule):
            yield f"{name}.weight", module.blocks
        if isinstance(module, BlockExperts):
            gate_up = [matrix for expert in module.gate_up for matrix in expert]
            for part, matrices, interleaved in ("gate_up", gate_up, 2), ("down", module.down, 1):
                first, of = matrices[0], (len(module.down), interleaved * module.transposed)
                given = first.data, first.kind, first.inputs, None, None
                yield f"{name}.{part}_proj", ExpertBlocks(*given, (*matrices,), *of)


def matrix(module: Any) -> Tensor | Blocks:
    """Return the weight [out, in] of a linear layer or embedding, not a copy.

    It is a tensor, or a ``Blocks`` if it is stored in GGUF quantization blocks.
    """
    found: Tensor | Blocks = module.blocks if isinstance(module, _BlockModule) else module.weight.detach()
    return found


def weight_rows(module: Any, index: Tensor) -> Tensor:
    """Return rows of the weight of a linear layer or an embedding, [n, in].

    index: int [n], the rows' indices. The result has the module's dtype; rows that are stored in GGUF quantization
    blocks are dequantized to it.
    """
    if isinstance(module, _BlockModule):
        return module.unpack(module.blocks, index, module.dtype)
    chosen: Tensor = module.weight.detach().index_select(0, index.to(module.weight.device))
    return chosen


def to_transformers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, ordinary module with equal values) for each module of ``model`` whose weights are in GGUF blocks.

    path: where the module is in ``model``, for ``set_submodule``. Modules that share a weight share the new parameter.
    The model itself is not changed. Raises SpecDecError if the dequantized weights need more memory than is free.
    """
    found = {id(weight): weight for _, weight in named_weights(model) if isinstance(weight, Blocks)}
    if need := sum(math.prod(weight.shape) for weight in found.values()) * model.dtype.itemsize:
        check_memory(str(model.config._name_or_path), need)
    weights: dict[int, nn.Parameter] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, BlockExperts):
            yield path, module.to_transformers()
        elif isinstance(module, _BlockModule):
            made: Any = module.to_transformers(weights.get(id(module.blocks)))
            weights[id(module.blocks)] = made.weight
            yield path, made


def densify(model: nn.Module) -> None:
    """Replace, in place, all modules of ``model`` with weights in GGUF blocks by ordinary ones with equal values.

    Raises SpecDecError if the dequantized weights need more memory than is free.
    """
    for path, made in to_transformers(model):
        model.set_submodule(path, made)


@contextmanager
def temporarily_dense(model: nn.Module) -> Iterator[None]:
    """Replace modules with weights in GGUF blocks by dequantized ones for the time of a ``with`` block.

    For callers that run the model's own ``forward`` many times. ``model`` is changed in place, and gets its modules
    back after the block. Raises SpecDecError if the dequantized weights need more memory than is free.
    """
    modules = model.named_modules(remove_duplicate=False)
    replaced = [(path, module) for path, module in modules if isinstance(module, _OfBlocks)]
    try:
        densify(model)
        yield
    finally:
        for path, module in replaced:
            model.set_submodule(path, module)
        if replaced:
            memory.trim_heap()
