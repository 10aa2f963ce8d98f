"""What a model in GGUF blocks should cost on a machine, from its shape and two constants; no model is run.

    python benchmarks/reckoning.py
    python benchmarks/reckoning.py --measured result.json    # constants and a check, from gguf_files.py --json

A pass over T tokens on c cores with memory that is read at B bytes per second takes

    max(bytes / B, bytes / (c unpack)) + (T - 1) products / (c multiply)

``bytes``: of all matrices but the embedding. ``unpack``: bytes per second at which one core unpacks blocks and
multiplies them with one token. ``multiply``: products per second of one core for each further token. Attention
is left out: contexts are short. With ``--measured`` the constants are those of the largest
model in the file; the others are reckoned with them and compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from rich.console import Console
from rich.table import Table

MEMORY = {  # GB/s of the data sheet
    "DDR5-4800, 2 channels": 76.8,
    "DDR5-5600, 2 channels": 89.6,
    "DDR5-6400, 2 channels": 102.4,
    "DDR5-4800, 8 channels": 307.2,
}
REACHED = 0.75  # of the data sheet's bandwidth, by reading threads
CORES = (8, 16)
TOKENS = (1, 16)


@dataclass
class Shape:
    """What a pass over one token reads and multiplies."""

    vocabulary: int
    bytes: Counter[str] = field(default_factory=Counter)  # by role and type of a tensor
    products: int = 0
    bytes_read: int = 0
    file_bytes: int = 0

    def add(self, role: str, kind: str, rows: int, width: int, read: bool = True) -> None:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        nbytes = rows * width // block * size
        self.file_bytes += nbytes
        if read:
            self.bytes[f"{role} {kind}"] += nbytes
            self.bytes_read += nbytes
            self.products += rows * width if rows > 1 else 0


@dataclass(frozen=True)
class Constants:
    unpack: float  # bytes/s of a core
    multiply: float  # products/s of a core

    def seconds(self, shape: Shape | Any, tokens: int, cores: int, bandwidth: float) -> float:
        reading = max(shape.bytes_read / bandwidth, shape.bytes_read / (cores * self.unpack))
        return reading + (tokens - 1) * shape.products / (cores * self.multiply)


ASSUMED = Constants(unpack=7.5e9, multiply=9e11)  # of two AMX cores: 1.5B, rounded 4-bit weights, 65 ms and 1.19 x


def read_shape(file: Path) -> Shape:
    """The shape of a GGUF file, from its header."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    embedding = tensors["token_embd.weight"]
    shape, own_head = Shape(int(embedding.shape[1])), "output.weight" in tensors
    for name, tensor in tensors.items():
        width, rows = int(tensor.shape[0]), int(tensor.n_elements) // int(tensor.shape[0])
        role = "output" if name == "token_embd.weight" else name.split(".")[-2]
        shape.add(role, tensor.tensor_type.name, rows, width, read=tensor is not embedding or not own_head)
    return shape


def q4_k_m(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, head_dim: int, vocabulary: int) -> Shape:
    """A dense model as llama.cpp writes it in Q4_K_M: half of the values' and the down matrices are in Q6_K."""
    shape, eighth = Shape(vocabulary), layers // 8
    for layer in range(layers):
        more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        wide = "Q6_K" if more else "Q4_K"
        shape.add("attn_q", "Q4_K", heads * head_dim, hidden)
        shape.add("attn_k", "Q4_K", kv_heads * head_dim, hidden)
        shape.add("attn_v", wide, kv_heads * head_dim, hidden)
        shape.add("attn_output", "Q4_K", hidden, heads * head_dim)
        shape.add("ffn_gate", "Q4_K", inner, hidden)
        shape.add("ffn_up", "Q4_K", inner, hidden)
        shape.add("ffn_down", wide, hidden, inner)
        shape.add("norms", "F32", 1, 2 * hidden)
    shape.add("norms", "F32", 1, hidden)
    shape.add("output", "Q6_K", vocabulary, hidden)
    shape.add("token_embd", "Q4_K", vocabulary, hidden, read=False)
    return shape


MODELS = {
    "Llama 3.1 8B": q4_k_m(32, 4096, 14336, 32, 8, 128, 128256),
    "Qwen3 8B": q4_k_m(36, 4096, 12288, 32, 8, 128, 151936),
}


def fitted(result: dict[str, Any]) -> Constants:
    """The constants that reproduce a measured file. Where memory limited it, ``unpack`` is a lower bound."""
    one, sixteen = (median(result, f"rows_{count}") for count in TOKENS)
    unpack = result["bytes_read"] / one / result["threads"]
    return Constants(unpack, 15 * result["products"] / max(sixteen - one, 1e-9) / result["threads"])


def median(result: dict[str, Any], key: str) -> float:
    return statistics.median(figures[key] for figures in result["rounds"]["specdec"]) / 1e3


def check(results: list[dict[str, Any]], constants: Constants, console: Console) -> None:
    """Compare what was measured with what the constants give."""
    table = Table("file", "tokens", "measured ms", "reckoned ms", title="the same formula on the measured files")
    for result in results:
        shape = Shape(0, products=result["products"], bytes_read=result["bytes_read"])
        for tokens in TOKENS:
            seconds = constants.seconds(shape, tokens, result["threads"], 1e9 * result["gb_per_s"])
            table.add_row(
                result["file"], str(tokens), f"{1e3 * median(result, f'rows_{tokens}'):.1f}", f"{1e3 * seconds:.1f}"
            )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, help="results of benchmarks/gguf_files.py --json")
    parser.add_argument("--unpack", type=float, default=ASSUMED.unpack / 1e9, help="GB/s of a core")
    parser.add_argument("--multiply", type=float, default=ASSUMED.multiply / 1e9, help="10^9 products/s of a core")
    args = parser.parse_args()
    console, constants = Console(), Constants(1e9 * args.unpack, 1e9 * args.multiply)
    if args.measured is not None:
        results = sorted(json.loads(args.measured.read_text("utf-8"))["results"], key=lambda r: r["bytes_read"])
        constants = fitted(results[-1])
        check(results, constants, console)
    console.print(
        f"one core: unpacks {constants.unpack / 1e9:.1f} GB/s, multiplies {constants.multiply / 1e9:.0f} x 10^9/s"
    )
    for name, shape in MODELS.items():
        console.print(f"{name}: file {shape.file_bytes / 1e9:.2f} GB, read {shape.bytes_read / 1e9:.2f} GB")
        kinds = Table("tensors", "MB")
        for kind, size in shape.bytes.most_common():
            kinds.add_row(kind, f"{size / 1e6:.1f}")
        console.print(kinds)
        table = Table("memory", "cores", "1 token, ms", "16 tokens, ms", "limit", title=name)
        for memory, peak in MEMORY.items():
            for cores in CORES:
                bandwidth = 1e9 * REACHED * peak
                cells = [f"{1e3 * constants.seconds(shape, n, cores, bandwidth):.0f}" for n in TOKENS]
                limit = "memory" if bandwidth < cores * constants.unpack else "cores"
                table.add_row(memory, str(cores), *cells, limit)
        console.print(table)


if __name__ == "__main__":
    main()
