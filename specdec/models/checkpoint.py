"""A mixture-of-experts checkpoint whose experts stay in its files and are read one by one.

transformers fuses the experts of a layer into two tensors as it loads them, so all of them are in memory. Here a model
gets modules instead that know where each expert is in the files, and its samples for the fingerprint. Knows nothing of
caches or decoding.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from specdec.base.errors import SpecDecError, errors_as
from specdec.models.gguf.blocks import Blocks
from specdec.models.tensor_file import PLAIN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FUSED = ("gate_up_proj", "down_proj")  # [E, 2 F, D] and [E, D, F]
SAMPLES = 512  # elements of a parameter in a fingerprint
DTYPES = PLAIN | {"I64": torch.int64}
# Names of the tensors of a multimodal checkpoint's text model, in the text model alone.
TEXT_NAMES = {r"^language_model\.lm_head\.": "lm_head.", r"^(model\.)?language_model\.(model\.)?": "model."}
# A layer's experts in a checkpoint are fused, or have matrices of their own, of which gate and up are concatenated.
_EXPERTS = r"(?:model\.)?layers\.(\d+)\.\w+\.experts"
_TENSOR = re.compile(rf"({_EXPERTS})(?:\.(\d+)\.(\w+)\.weight|\.({'|'.join(FUSED)}))")
_PLACES = {"gate_proj": (0, 0), "up_proj": (0, 1), "down_proj": (1, 0), "w1": (0, 0), "w3": (0, 1), "w2": (1, 0)}


@dataclass(frozen=True)
class Span:
    """A tensor in row-major order in a file. offset: of its first byte."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def row(self, number: int) -> Span:
        """Index ``number`` of the first dimension."""
        step = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, offset=self.offset + number * step, shape=self.shape[1:])

    def read(self) -> Tensor:
        return self.numbers(0, math.prod(self.shape)).view(self.shape)

    def numbers(self, first: int, count: int) -> Tensor:
        """``count`` elements from number ``first`` on, [count]. Raises SpecDecError if the file cannot be read."""
        values = torch.empty(count, dtype=self.dtype)
        with errors_as(f"cannot read weights in '{self.path}'"), self.path.open("rb") as file:
            file.seek(self.offset + first * self.dtype.itemsize)
            got = file.readinto(memoryview(values.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        if got != values.nbytes:
            raise SpecDecError(f"'{self.path}' is truncated: it ends within its weights; get it again")
        return values


@dataclass
class Fused:
    """The tensor [E, rows, columns] that transformers would make: of each expert, its concatenated matrices."""

    experts: list[list[Span]]

    @property
    def shape(self) -> tuple[int, int, int]:
        first = self.experts[0]
        return len(self.experts), sum(m.shape[0] for m in first), first[0].shape[1]

    def read(self, expert: int, into: Tensor) -> None:
        """Copy one expert into a tensor [rows, columns] of any dtype."""
        matrices = self.experts[expert]
        for matrix, rows in zip(matrices, into.split([m.shape[0] for m in matrices]), strict=True):
            rows.copy_(matrix.read())

    def sample(self, dtype: torch.dtype) -> Tensor:
        """The result of ``sample`` for the fused tensor, in ``dtype``."""
        count, rows, columns = self.shape
        values = []
        for position in sample_positions(count * rows * columns).tolist():
            expert, number = divmod(position, rows * columns)
            for matrix in self.experts[expert]:
                if number < (size := math.prod(matrix.shape)):
                    values.append(matrix.numbers(number, 1))
                    break
                number -= size
        return torch.cat(values).to(dtype)


class StoredExperts(nn.Module):
    """The experts of a layer in a checkpoint: parameters of the same names and shapes, without memory.

    Running them reads each expert that is needed; the native runtime takes them from here once.
    """

    def __init__(self, own: nn.Module, fused: Sequence[Fused]) -> None:
        super().__init__()
        self.act_fn: Any = own.act_fn
        self.fused = fused
        for name, each in zip(FUSED, fused, strict=True):
            weight: Any = nn.Parameter(getattr(own, name).detach().to("meta"), requires_grad=False)
            weight.sample = each.sample(weight.dtype)
            self.register_parameter(name, weight)

    def _apply(self, fn: Any, recurse: bool = True) -> StoredExperts:
        return self  # nothing to move

    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up [2 F, D] and down [D, F] of an expert. Raises SpecDecError if its file cannot be read."""
        matrices = [torch.empty(weight.shape[1:], dtype=weight.dtype) for weight in self.parameters()]
        for fused, into in zip(self.fused, matrices, strict=True):
            fused.read(expert, into)
        return matrices[0], matrices[1]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Hidden states [T, D], each token's experts and their weights [T, k] -> [T, D]."""
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            tokens, place = (top_k_index == expert).nonzero(as_tuple=True)
            gate_up, down = self.read(expert)
            gate, up = F.linear(hidden_states[tokens], gate_up).chunk(2, -1)
            result = F.linear(self.act_fn(gate) * up, down) * top_k_weights[tokens, place, None]
            out.index_add_(0, tokens, result.to(out.dtype))
        return out


def sample_positions(size: int) -> Tensor:
    """Evenly strided indices of up to ``SAMPLES`` of ``size`` elements."""
    count = min(size, SAMPLES)
    return torch.arange(count) * size // max(count, 1)


def sample(parameter: Tensor | Blocks) -> Tensor:
    """Up to ``SAMPLES`` evenly strided elements of a parameter, [n]. Works for those of ``StoredExperts``, too."""
    if isinstance(parameter, Blocks):
        positions = sample_positions(parameter.shape.numel())
        return parameter.at(positions // parameter.shape[-1], positions % parameter.shape[-1])
    if parameter.is_meta:
        values: Tensor = parameter.sample  # type: ignore[attr-defined]
        return values
    index = sample_positions(parameter.numel()).to(parameter.device)
    places = list[Tensor]()
    for size in parameter.shape[::-1]:  # torch.unravel_index imports SymPy
        places.append(index % size)
        index = index // size
    return parameter.detach()[tuple(places[::-1])]


@dataclass
class Checkpoint:
    """The tensors in safetensors files by name. fused: those of experts."""

    others: dict[str, Span] = field(default_factory=dict)
    fused: dict[str, Fused] = field(default_factory=dict)

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All tensors by name, as a state dict. Those of experts are zeros of ``dtype`` without memory."""
        zero = torch.zeros((), dtype=dtype)
        experts = {name: zero.expand(fused.shape) for name, fused in self.fused.items()}
        return experts | {name: span.read() for name, span in self.others.items()}

    def leave(self, model: PreTrainedModel) -> None:
        """Put ``StoredExperts`` into ``model``, which was loaded from ``state``."""
        layers = {_layer(name): name.rpartition(".")[0] for name in self.fused}
        for name, module in list(model.named_modules()):
            if re.fullmatch(_EXPERTS, name) and _layer(name) in layers:
                prefix, parent = layers[_layer(name)], model.get_submodule(name.rpartition(".")[0])
                parent.experts = StoredExperts(module, [self.fused[f"{prefix}.{each}"] for each in FUSED])


def open_checkpoint(files: Iterable[Path]) -> Checkpoint | None:
    """The checkpoint in ``files``; None if it has no experts or an unknown layout.

    Raises SafetensorError for a broken file, SpecDecError for experts of different shapes.
    """
    found, parts = Checkpoint(), defaultdict[str, dict[tuple[int, int], Span]](dict)
    for path in files:
        begin, entries = header(path)
        for name, entry in entries.items():
            if entry["dtype"] not in DTYPES:
                return None
            span = Span(path, begin + entry["data_offsets"][0], tuple(entry["shape"]), DTYPES[entry["dtype"]])
            match = _TENSOR.fullmatch(name)
            if match is None:
                if ".experts." in name:  # biases, scales of codes
                    return None
                found.others[name] = span
                continue
            prefix, _, expert, part, fused = match.groups("")
            if fused:
                parts[name] = {(number, 0): span.row(number) for number in range(span.shape[0])}
            elif part in _PLACES:
                tensor, place = _PLACES[part]
                parts[f"{prefix}.{FUSED[tensor]}"][int(expert), place] = span
            else:
                return None
    found.fused = {name: Fused(_in_order(name, matrices)) for name, matrices in parts.items()}
    whole = all(f"{name.rpartition('.')[0]}.{other}" in parts for name in parts for other in FUSED)
    return found if parts and whole else None


def header(path: Path) -> tuple[int, dict[str, Any]]:
    """The offset of the data in a safetensors file, and its header."""
    with safe_open(path, framework="numpy"):  # raises for a broken file; for torch it would map the whole file
        pass
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries: dict[str, Any] = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return 8 + size, entries


def numbers_in(path: Path) -> dict[str, int]:
    """How many numbers each tensor of a safetensors file holds; of other types than ``DTYPES`` up to eight a byte.

    Raises SafetensorError for a broken file.
    """
    found = dict[str, int]()
    for name, entry in header(path)[1].items():
        begin, end = entry["data_offsets"]
        found[name] = math.prod(entry["shape"]) if entry["dtype"] in DTYPES else 8 * (end - begin)
    return found


def _in_order(name: str, matrices: dict[tuple[int, int], Span]) -> list[list[Span]]:
    """The matrices of each expert. Raises SpecDecError unless all experts have matrices of the same shapes."""
    experts = defaultdict[int, list[Span]](list)
    for (expert, _), matrix in sorted(matrices.items()):
        experts[expert].append(matrix)
    kinds = {tuple((m.shape, m.dtype) for m in each) for each in experts.values()}
    if list(experts) != list(range(len(experts))) or len(kinds) != 1:
        raise SpecDecError(f"the checkpoint lacks a part of '{name}', or has it in several shapes; get it again")
    return list(experts.values())


def _layer(name: str) -> int:
    """The layer of a module or tensor that matches ``_EXPERTS``."""
    return int(name.partition("layers.")[2].partition(".")[0])
