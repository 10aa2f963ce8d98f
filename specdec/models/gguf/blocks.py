"""Weights that stay in the blocks of a GGUF file, and the modules of a model that have such weights.

A model loaded from such a file has ``BlockLinear`` and ``BlockEmbedding`` modules. Their ``weight`` is dequantized by
``gguf`` on every access and not kept. Runtimes pack the blocks themselves. Experts may also be stored unquantized
(``PLAIN`` types), as in safetensors files. A block is a GGUF quantization block: a few values of a row with a scale.
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
    """A weight matrix [out, in] in GGUF blocks along its rows.

    data: uint8 [rows, bytes of a row], usually mapped from a file.
    kind: the GGUF type, one of ``KINDS``; for experts also one of ``PLAIN``.
    inputs: number of columns of the matrix.
    rows: int32 [out], the index of the row of ``data`` for each row of the matrix; None: the same rows in order.
    columns: int64 [in], the matrix column for each column of ``data``; None: the same order.
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
        """The tensors that hold the blocks, for releasing or reading ahead their memory."""
        return (self.data,)

    def in_order(self, values: Tensor) -> Tensor:
        """Reorder the columns of ``values`` [..., in] from the order of ``data`` to the order of the matrix."""
        return values if self.columns is None else values[..., self.columns.argsort()]

    def dequantized(self, index: Tensor | None = None) -> Tensor:
        """Return rows ``index`` [n] of the matrix in float32 [n, in]; None: all rows."""
        if index is None:
            index = torch.arange(self.shape[0])
        if self.rows is not None:
            index = self.rows[index].long()
        return self.in_order(dequantize_rows(self.data[index], self.kind))

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return single elements of the matrix, by row and column index, both [n], in float32 [n]."""
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
    """Dequantize rows of blocks of the GGUF type ``kind``, uint8 [n, bytes of a row], to float32 [n, in]."""
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))


def common_kind(kinds: set[str]) -> str | None:
    """Return the GGUF type that matrices of the types ``kinds`` can share without loss; None if there is none.

    It is the type itself if all are equal, and Q5_K for Q4_K and Q5_K, because zero bits make Q5_K of Q4_K.
    """
    return "Q5_K" if kinds == {"Q4_K", "Q5_K"} else next(iter(kinds)) if len(kinds) == 1 else None


def of_one_kind(matrices: list[Blocks]) -> list[Blocks]:
    """Return the matrices with equal values in their common type (``common_kind``); an empty list if it is None."""
    kind = common_kind({each.kind for each in matrices})
    return [each if each.kind == kind else _with_fifth_bits(each) for each in matrices] if kind else []


def _with_fifth_bits(matrix: Blocks) -> Blocks:
    """Convert a matrix from Q4_K to Q5_K, whose blocks have 32 bytes of fifth bits (here 0) after the scales."""
    scales, others = matrix.data.view(-1, 144).split([16, 128], 1)
    data = torch.cat((scales, scales.new_zeros(len(scales), 32), others), 1)
    return replace(matrix, data=data.view(matrix.data.shape[0], -1), kind="Q5_K")


def bits(kind: str) -> int:
    """Return the number of bits of a quantized value in the GGUF type ``kind``, such as 4 for Q4_K."""
    return int(next(filter(str.isdigit, kind)))


Dequantize = Callable[[Blocks, Tensor | None, torch.dtype], Tensor]  # the signature of ``dequantize``


def dequantize(blocks: Blocks, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return rows ``index`` [n] of a matrix in ``dtype`` [n, in]; None: all rows."""
    count = blocks.shape[0] if index is None else len(index)
    step, out = max(1, DEQUANTIZE_CHUNK // blocks.inputs), torch.empty(count, blocks.inputs, dtype=dtype)
    for start in range(0, count, step):
        stop = min(start + step, count)
        out[start:stop] = blocks.dequantized(torch.arange(start, stop) if index is None else index[start:stop])
    return out


class _OfBlocks(nn.Module):
    """Base class of modules with weights in blocks, on the CPU. ``to`` changes the dtype of the results alone.

    dtype: the dtype of the weights that the module computes with.
    unpack: function that dequantizes rows of a matrix; a runtime may set a faster one with equal results.
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
    """Base class of modules with one weight, in ``blocks``."""

    blocks: Blocks

    @property
    def weight(self) -> Tensor:
        """The weight, dequantized at each access [out, in]."""
        values = self.unpack(self.blocks, None, self.dtype)
        memory.release(self.blocks.data)  # the system reads the pages again from the file
        return values

    def to_transformers(self, weight: nn.Parameter | None = None) -> nn.Linear | nn.Embedding:
        """Return an ordinary module with the parameter ``weight`` [out, in]; None: the dequantized blocks."""
        with without_memory():
            made = self._without_weight()
        made.weight = nn.Parameter(self.weight, requires_grad=False) if weight is None else weight
        return made.train(self.training)

    def _without_weight(self) -> nn.Linear | nn.Embedding:
        """Return an ordinary module of the same shape, whose weight is still to be set."""
        raise NotImplementedError


class BlockLinear(_BlockModule, nn.Linear):  # type: ignore[override, misc]
    """A linear layer without gradients whose weight stays in blocks.

    bias: the bias [out]; None: the layer has none. dtype: dtype of weight and bias in products.
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
    """An embedding whose result is multiplied by ``embed_scale`` in the dtype of its weight, as in Gemma.

    embed_scale: a scalar tensor; None: no multiplication.
    """

    embed_scale: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        return self.scaled(super().forward(ids))

    def scaled(self, x: Tensor) -> Tensor:
        return x if self.embed_scale is None else x * self.embed_scale.to(x.dtype)


class BlockEmbedding(_BlockModule, ScaledEmbedding):  # type: ignore[override, misc]
    """An embedding without gradients whose table stays in blocks. dtype: that of the result. embed_scale: a factor."""

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
    """The experts of a layer with weights in blocks, without gradients; they replace ``own``, the model's own module.

    gate_up: for each expert, the rows of its gate projection and then of its up projection, in one matrix or two.
    down: for each expert, its down projection.
    transposed: whether the model's module has biases and transposed matrices in which gate and up alternate (gpt-oss).
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
        """Return the dequantized matrices gate_up [2 F, D] and down [D, F] of expert ``number``.

        If ``transposed``, they are [D, 2 F], with columns of gate and up in alternation, and [F, D].
        """
        matrices, last, *_ = expert(self, number)
        *parts, down = [
            each.to(self.dtype) if isinstance(each, Tensor) else self.unpack(each, None, self.dtype)
            for each in (*matrices, last)
        ]
        gate_up = torch.cat(parts)
        return (torch.stack(gate_up.chunk(2), 1).flatten(0, 1).T, down.T) if self.transposed else (gate_up, down)

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run tokens ``x`` [R, D] through their experts and return the weighted sums [R, D].

        top_k_index, top_k_weights: the experts of each token and their weights, both [R, k].
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
        """Return a copy of the model's own module of experts, with parameters of equal values instead of blocks."""
        made = copy.deepcopy(self.own[0])
        pairs = zip(*map(self.expert, range(len(self.down))), strict=True)
        for name, values in zip(EXPERTS, pairs, strict=True):
            setattr(made, name, nn.Parameter(torch.stack(values), requires_grad=False))
        for name, bias in self.named_parameters():
            setattr(made, name, bias)
        return made


def matrices_of(own: Any, number: int) -> tuple[list[Tensor], Tensor]:
    """Return the matrices of expert ``number`` of a model's module ``own``: gate and up, and down [D, F].

    Gate and up are a list of one matrix [2 F, D] or of two [F, D].
    """
    gate_up, down = own.gate_up_proj[number].detach(), own.down_proj[number].detach()
    return ([gate_up.T[::2], gate_up.T[1::2]], down.T) if own.is_transposed else ([gate_up], down)


def expert(experts: Any, number: int) -> tuple[Any, ...]:
    """Return (gate and up, down, bias of gate and up, bias of down) of expert ``number`` of a module of experts.

    Gate and up are a list of one matrix [2 F, D] or of two [F, D]; down is [D, F]. A matrix is a ``Blocks``, or a
    tensor if it is not quantized. The biases are None if the experts have none.
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
    """Return a matrix of a type in ``PLAIN`` as a tensor in ``dtype``, mapped if stored so, and others unchanged."""
    if matrix.kind not in PLAIN:
        return matrix
    values = matrix.data.view(PLAIN[matrix.kind])
    if values.dtype != dtype:
        values = values.to(dtype)
        memory.release(matrix.data)
    return values


@dataclass(frozen=True)
class ExpertBlocks(Blocks):
    """One parameter of a module of experts [experts, rows, inputs], as matrices in blocks.

    matrices: the matrices of all experts, in order. data, kind, inputs: those of the first matrix.
    experts: number of experts.
    interleaved: for transposed matrices, of shape [experts, inputs, rows], the number of parts (such as gate and up)
    whose columns alternate; 0: matrices are not transposed.
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
    """Quantize a matrix [out, in] to blocks of the GGUF type ``kind``: Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0.

    Raises SpecDecError if the number of inputs is no multiple of 32, the size of a block.
    """
    if values.shape[1] % 32:
        raise SpecDecError(f"{kind} blocks need a multiple of 32 inputs; a linear layer has {values.shape[1]}")
    data = gguf.quants.quantize(values.detach().float().numpy(), gguf.GGMLQuantizationType[kind])
    return Blocks(torch.from_numpy(data), kind, values.shape[1])


def quantize_experts(experts: Any, kind: str) -> BlockExperts:
    """Quantize a layer's module of unquantized experts to blocks of the GGUF type ``kind``, as ``quantize`` does.

    The memory of the old matrices is released.
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
    """Yield (name, weight) of all parameters of a model, also of those in blocks; shared ones under each name."""
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
    """Return the weight of a linear layer or an embedding: a tensor [out, in], or its blocks."""
    found: Tensor | Blocks = module.blocks if isinstance(module, _BlockModule) else module.weight.detach()
    return found


def weight_rows(module: Any, index: Tensor) -> Tensor:
    """Return rows ``index`` [n] of the weight of a linear layer or an embedding, dequantized if needed: [n, in]."""
    if isinstance(module, _BlockModule):
        return module.unpack(module.blocks, index, module.dtype)
    chosen: Tensor = module.weight.detach()[index]
    return chosen


def to_transformers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, ordinary module with equal values) for all modules of ``model`` with weights in blocks.

    Modules that share a weight share the parameter. The model stays as it is. Raises SpecDecError if the dequantized
    weights need more memory than is free.
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
    """Replace all modules of ``model`` with weights in blocks by those of ``to_transformers``, in place."""
    for path, made in to_transformers(model):
        model.set_submodule(path, made)


@contextmanager
def temporarily_dense(model: nn.Module) -> Iterator[None]:
    """Replace modules as ``densify`` does during the ``with`` block, and restore the blocks after it.

    For callers that run the model's own ``forward`` many times. No effect on models without blocks.
    """
    modules = model.named_modules(remove_duplicate=False)
    replaced = [(path, module) for path, module in modules if isinstance(module, _OfBlocks)]
    densify(model)
    try:
        yield
    finally:
        for path, module in replaced:
            model.set_submodule(path, module)
        if replaced:
            memory.trim_heap()
