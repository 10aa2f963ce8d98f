"""Weights that stay in the blocks of a GGUF file, and the modules of a model that have such weights.

A model loaded from such a file has ``BlockLinear`` and ``BlockEmbedding`` modules. Their ``weight`` is dequantised by
``gguf`` on every access and not kept. Runtimes pack the blocks themselves. Experts may also be in single numbers
(``PLAIN``), as in safetensors files. Knows nothing of files, models or kernels.
"""

from __future__ import annotations

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

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4")  # types of blocks that are kept
CHUNK = 1 << 20  # elements that are dequantised at a time
UNPACKED = 1 << 23  # those of a weight that a product unpacks at a time
EXPERTS = "gate_up_proj", "down_proj"  # the weights of experts
BIASES = "gate_up_proj_bias", "down_proj_bias"  # of experts, if they have any


@dataclass(frozen=True)
class Blocks:
    """A matrix [out, in] in GGUF blocks along its inputs.

    data: uint8 [out, bytes of a row], usually mapped from a file.
    kind: one of ``KINDS``; of experts also one of ``PLAIN``.
    inputs: columns of the matrix.
    rows: int32 [out], the row of ``data`` for each row of the matrix; None for all in the same order.
    columns: int64 [in], the column of the matrix that each column of ``data`` is; None for the same order.
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
        """Where its numbers are."""
        return (self.data,)

    def in_order(self, values: Tensor) -> Tensor:
        """Rows as they lie in ``data`` [..., in], with the columns of the matrix."""
        return values if self.columns is None else values[..., self.columns.argsort()]

    def numbers(self, index: Tensor | None = None) -> Tensor:
        """The matrix, or its rows ``index`` [n], in float32 [n, in]."""
        if index is None:
            index = torch.arange(self.shape[0])
        if self.rows is not None:
            index = self.rows[index].long()
        return self.in_order(numbers(self.data[index], self.kind))

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Single elements of the matrix by row and column, both [n], in float32 [n]."""
        if self.rows is not None:
            rows = self.rows[rows].long()
        if self.columns is not None:
            columns = self.columns.argsort()[columns]
        size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        places = (columns // size * width)[:, None] + torch.arange(width)  # [n, bytes of a block]
        found = numbers(self.data[rows[:, None], places].view(1, -1), self.kind).view(-1, size)
        return found[torch.arange(len(rows)), columns % size]

    def __deepcopy__(self, memo: Any) -> Blocks:
        return self


def numbers(data: Tensor, kind: str) -> Tensor:
    """Dequantise rows of blocks, uint8 [n, bytes], with ``gguf``: float32 [n, in]."""
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))


def common_kind(kinds: set[str]) -> str | None:
    """The type that matrices of ``kinds`` have, or get by zero bits (Q4_K beside Q5_K); None if there is none."""
    return "Q5_K" if kinds == {"Q4_K", "Q5_K"} else next(iter(kinds)) if len(kinds) == 1 else None


def of_one_kind(matrices: list[Blocks]) -> list[Blocks]:
    """The same matrices in their common type; without one, none."""
    kind = common_kind({each.kind for each in matrices})
    return [each if each.kind == kind else _with_fifth_bits(each) for each in matrices] if kind else []


def _with_fifth_bits(matrix: Blocks) -> Blocks:
    """A matrix of Q4_K in Q5_K, whose blocks have 32 bytes of fifth bits between scales and other bits."""
    scales, others = matrix.data.view(-1, 144).split([16, 128], 1)
    data = torch.cat((scales, scales.new_zeros(len(scales), 32), others), 1)
    return replace(matrix, data=data.view(matrix.data.shape[0], -1), kind="Q5_K")


def bits(kind: str) -> int:
    """Bits of a quantised value in blocks of ``kind``."""
    return int(next(filter(str.isdigit, kind)))


Dequantize = Callable[[Blocks, Tensor | None, torch.dtype], Tensor]


def dequantize(blocks: Blocks, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Dequantise the matrix, or its rows ``index`` [n], to ``dtype``: [n, in]."""
    count = blocks.shape[0] if index is None else len(index)
    step, out = max(1, CHUNK // blocks.inputs), torch.empty(count, blocks.inputs, dtype=dtype)
    for start in range(0, count, step):
        stop = min(start + step, count)
        out[start:stop] = blocks.numbers(torch.arange(start, stop) if index is None else index[start:stop])
    return out


class _OfBlocks(nn.Module):
    """A module of weights in blocks with the values of ``dtype``. ``to`` changes the dtype, not the blocks."""

    dtype: torch.dtype
    unpack: Dequantize

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        like = fn(torch.empty(0, dtype=self.dtype))
        if like.device.type != "cpu":
            raise SpecDecError("weights in GGUF blocks stay on the CPU; load the model on the device where it runs")
        self.dtype = like.dtype
        return super()._apply(fn, recurse)


class _BlockModule(_OfBlocks):
    """A module with one weight."""

    blocks: Blocks

    @property
    def weight(self) -> Tensor:
        values = self.unpack(self.blocks, None, self.dtype)
        memory.release(self.blocks.data)  # the system reads the pages again from the file
        return values


class BlockLinear(_BlockModule, nn.Linear):  # type: ignore[override, misc]
    """A linear layer whose weight is in blocks. Has no gradients.

    unpack: dequantises; a runtime may set a faster function with equal results.
    """

    def __init__(self, blocks: Blocks, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = blocks.shape
        self.blocks, self.dtype, self.unpack = blocks, dtype, dequantize
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        step, parts = max(1, UNPACKED // self.in_features), list[Tensor]()
        for rows in torch.arange(self.out_features).split(step):  # the whole weight may be large
            bias = None if self.bias is None else self.bias[rows]
            parts.append(F.linear(x, self.unpack(self.blocks, rows, self.dtype), bias))
        return torch.cat(parts, -1)


class ScaledEmbedding(nn.Embedding):
    """An embedding times ``embed_scale`` in the dtype of its weight (Gemma); None: as it is."""

    embed_scale: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        return self.scaled(super().forward(ids))

    def scaled(self, x: Tensor) -> Tensor:
        return x if self.embed_scale is None else x * self.embed_scale.to(x.dtype)


class BlockEmbedding(_BlockModule, ScaledEmbedding):  # type: ignore[override, misc]
    """An embedding whose table is in blocks. unpack: as in ``BlockLinear``."""

    def __init__(self, blocks: Blocks, dtype: torch.dtype, embed_scale: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.embed_scale = None if embed_scale is None else embed_scale.detach()  # not as a buffer
        self.num_embeddings, self.embedding_dim = blocks.shape
        self.blocks, self.dtype, self.unpack = blocks, dtype, dequantize
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False

    def forward(self, ids: Tensor) -> Tensor:
        return self.scaled(self.unpack(self.blocks, ids.flatten(), self.dtype).view(*ids.shape, -1))


class BlockExperts(_OfBlocks):
    """The experts of a layer in blocks, in the place of a model's ``own`` module. Have no gradients.

    gate_up: the rows of each expert's gate, then those of its up, in one matrix or two.
    down: each expert's last matrix.
    turned: whether ``own`` has biases, and matrices whose rows are inputs, gates and ups in turn (gpt-oss).
    """

    def __init__(self, own: nn.Module, gate_up: list[list[Blocks]], down: list[Blocks], dtype: torch.dtype) -> None:
        super().__init__()
        self.own: list[Any] = [own]  # in a list: no part of this module
        self.turned = bool(own.is_transposed)
        for name in BIASES if self.turned else ():
            self.register_parameter(name, getattr(own, name))
        self.gate_up, self.down, self.dtype, self.unpack = gate_up, down, dtype, dequantize

    def expert(self, number: int) -> tuple[Tensor, Tensor]:
        """gate_up [2 F, D] and down [D, F] of an expert; turned: [D, 2 F], gates and ups in turn, and [F, D]."""
        matrices, last, *_ = expert(self, number)
        *parts, down = [
            each.to(self.dtype) if isinstance(each, Tensor) else self.unpack(each, None, self.dtype)
            for each in (*matrices, last)
        ]
        gate_up = torch.cat(parts)
        return (torch.stack(gate_up.chunk(2), 1).flatten(0, 1).T, down.T) if self.turned else (gate_up, down)

    def forward(self, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """Tokens [R, D], the experts that they take and their shares, both [R, k] -> [R, D]."""
        out = torch.zeros_like(x)
        for number in experts.unique().tolist():
            rows, places = (experts == number).nonzero(as_tuple=True)
            gate_up, down = self.expert(number)
            biases = [getattr(self, name)[number] if self.turned else 0 for name in BIASES]
            inner = self.own[0]._apply_gate(x[rows] @ (gate_up if self.turned else gate_up.T) + biases[0])
            found = (inner @ (down if self.turned else down.T) + biases[1]) * shares[rows, places, None]
            out.index_add_(0, rows, found.to(out.dtype))
        return out

    def dense(self) -> nn.Module:
        """The module that this one stands for, with equal values."""
        pairs = zip(*map(self.expert, range(len(self.down))), strict=True)
        for name, values in zip(EXPERTS, pairs, strict=True):
            setattr(self.own[0], name, nn.Parameter(torch.stack(values), requires_grad=False))
        for name, bias in self.named_parameters():
            setattr(self.own[0], name, bias)
        return self.own[0]


def matrices_of(own: Any, number: int) -> tuple[list[Tensor], Tensor]:
    """gate_up [2 F, D], in one matrix or two, and down [D, F] of an expert of the module ``own``."""
    gate_up, down = own.gate_up_proj[number].detach(), own.down_proj[number].detach()
    return ([gate_up.T[::2], gate_up.T[1::2]], down.T) if own.is_transposed else ([gate_up], down)


def expert(experts: Any, number: int) -> tuple[Any, ...]:
    """The matrices of an expert: its gate's rows and then its up's, in one or two, and down; and their biases. Those in
    single numbers are tensors."""
    if isinstance(experts, BlockExperts):
        *gate_up, down = (_numbers(each, experts.dtype) for each in (*experts.gate_up[number], experts.down[number]))
        matrices: Any = gate_up, down
    else:
        matrices = matrices_of(experts, number)
    if not hasattr(experts, BIASES[0]):
        return *matrices, None, None
    bias = experts.gate_up_proj_bias[number].detach()  # of gates and ups in turn
    return *matrices, torch.cat((bias[::2], bias[1::2])), experts.down_proj_bias[number].detach()


def _numbers(matrix: Blocks, dtype: torch.dtype) -> Tensor | Blocks:
    """A matrix in single numbers as a tensor, which is mapped if it has this dtype; others as they are."""
    if matrix.kind not in PLAIN:
        return matrix
    values = matrix.data.view(PLAIN[matrix.kind])
    if values.dtype != dtype:
        values = values.to(dtype)
        memory.release(matrix.data)
    return values


@dataclass(frozen=True)
class ExpertBlocks(Blocks):
    """The matrices of all experts, one below the other. data, kind, inputs: those of the first matrix.

    turns: if not 0, each expert is transposed (``BlockExperts.turned``), of so many parts a row each in turn.
    """

    matrices: tuple[Blocks, ...] = ()
    experts: int = 1
    turns: int = 0

    @property
    def memory(self) -> tuple[Tensor, ...]:
        return tuple(matrix.data for matrix in self.matrices)

    @property
    def shape(self) -> torch.Size:
        rows = sum(m.shape[0] for m in self.matrices) // self.experts
        return torch.Size((self.experts, *((self.inputs, rows) if self.turns else (rows, self.inputs))))

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        if self.turns:
            count = self.shape[2]
            place = columns % self.turns * (count // self.turns) + columns // self.turns
            rows, columns = rows // self.inputs * count + place, rows % self.inputs
        ends = torch.tensor([each.shape[0] for each in self.matrices]).cumsum(0)
        which, found = torch.searchsorted(ends, rows, right=True), torch.empty(len(rows))
        for number in which.unique().tolist():
            mine, matrix = which == number, self.matrices[number]
            found[mine] = matrix.at(rows[mine] - ends[number] + matrix.shape[0], columns[mine])
        return found


def quantize(values: Tensor, kind: str) -> Blocks:
    """A matrix [out, in] quantised to blocks of ``kind``: Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0.

    Raises SpecDecError if its inputs are no multiple of a block.
    """
    if values.shape[1] % 32:
        raise SpecDecError(f"{kind} blocks need a multiple of 32 inputs; a linear map has {values.shape[1]}")
    data = gguf.quants.quantize(values.detach().float().numpy(), gguf.GGMLQuantizationType[kind])
    return Blocks(torch.from_numpy(data), kind, values.shape[1])


def quantize_experts(experts: Any, kind: str) -> BlockExperts:
    """The experts of a layer, which are in numbers, quantised as ``quantize`` does."""
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
    """The parameters of a model, also those in blocks. Shared ones appear under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BlockModule):
            yield f"{name}.weight", module.blocks
        if isinstance(module, BlockExperts):
            gate_up = [matrix for expert in module.gate_up for matrix in expert]
            for part, matrices, turns in ("gate_up", gate_up, 2), ("down", module.down, 1):
                first, of = matrices[0], (len(module.down), turns * module.turned)
                given = first.data, first.kind, first.inputs, None, None
                yield f"{name}.{part}_proj", ExpertBlocks(*given, (*matrices,), *of)


def matrix(module: Any) -> Tensor | Blocks:
    """The weight of a linear map or an embedding. Its ``data`` is where its numbers are."""
    found: Tensor | Blocks = module.blocks if isinstance(module, _BlockModule) else module.weight.detach()
    return found


def weight_rows(module: Any, index: Tensor) -> Tensor:
    """Rows ``index`` [n] of the weight of ``module``: [n, in]."""
    if isinstance(module, _BlockModule):
        return module.unpack(module.blocks, index, module.dtype)
    chosen: Tensor = module.weight.detach()[index]
    return chosen


def _check_room(model: Any) -> None:
    """Raise SpecDecError if there is no room for the weights in blocks in the model's dtype."""
    found = {id(weight): weight for _, weight in named_weights(model) if isinstance(weight, Blocks)}
    if need := sum(math.prod(weight.shape) for weight in found.values()) * model.dtype.itemsize:
        check_memory(str(model.config._name_or_path), need)


def dense_weights(model: Any) -> dict[str, Tensor]:
    """The weights in blocks, dequantised, by the names that ordinary modules would give them. Shared ones are one
    tensor. Raises SpecDecError without room."""
    _check_room(model)
    found, made = dict[str, Tensor](), dict[int, Tensor]()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BlockExperts):
            pairs = zip(*map(module.expert, range(len(module.down))), strict=True)
            found |= {f"{path}.{name}": torch.stack(each) for name, each in zip(EXPERTS, pairs, strict=True)}
        if isinstance(module, _BlockModule):
            if id(module.blocks) not in made:
                made[id(module.blocks)] = module.weight
            found[f"{path}.weight"] = made[id(module.blocks)]
    return found


def densify(model: Any) -> None:
    """Replace block modules by ordinary ones with equal values, in place. Raises SpecDecError without room."""
    _check_room(model)
    weights: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, BlockExperts):
            model.set_submodule(name, module.dense())
        if isinstance(module, _BlockModule):
            blocks = module.blocks
            if id(blocks) not in weights:
                weights[id(blocks)] = nn.Parameter(module.weight, requires_grad=False)
            made: Any
            with without_memory():
                if isinstance(module, BlockEmbedding):
                    made = ScaledEmbedding(blocks.shape[0], blocks.inputs)
                    made.embed_scale = module.embed_scale
                else:
                    made = nn.Linear(blocks.inputs, blocks.shape[0])
                    made.bias = module.bias
            made.weight = weights[id(blocks)]
            model.set_submodule(name, made.train(module.training))


@contextmanager
def temporarily_dense(model: nn.Module) -> Iterator[None]:
    """In this context block modules are ordinary ones, for callers that run the model's own ``forward`` many times."""
    modules = model.named_modules(remove_duplicate=False)
    kept = [(name, module) for name, module in modules if isinstance(module, _BlockModule | BlockExperts)]
    densify(model)
    try:
        yield
    finally:
        for name, module in kept:
            model.set_submodule(name, module)
        if kept:
            memory.trim_heap()
