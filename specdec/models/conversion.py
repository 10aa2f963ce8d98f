"""Convert a GGUF file to a model folder: ``python -m specdec.models.conversion NAME FILE FOLDER DTYPE``.

Every weight is dequantised and held in memory until the folder is written, so this is a process of its own, which ends
when its standard input does. What the user should know, if it fails, is the last line of its output.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from gguf import GGUFReader
from tokenizers import pre_tokenizers

from specdec.base.errors import SpecDecError
from specdec.models import catalogue, loading

# Values of tokenizer.ggml.pre that split off digits one by one and then words as GPT-2 does. transformers splits the
# words only, so that a digit would take the line break or space before it along.
DIGITS_APART = {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}
VOCABULARY_BYTES = 64_000_000  # more than a tokenizer.json has


def convert(name: str, file: Path, folder: Path, dtype: str) -> None:
    """Write config, safetensors in ``dtype``, tokenizer and chat template into ``folder``. Raises SpecDecError."""
    try:
        reader = GGUFReader(file)
        weights = sum(int(tensor.n_elements) for tensor in reader.tensors) * loading.DTYPES[dtype].itemsize
        kinds = [reader.fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre")]
        model_kind, pre = (None if kind is None else kind.contents() for kind in kinds)
    except Exception as error:  # an untrusted file: any type
        reason = f"the GGUF file is truncated or broken ({catalogue.one_line(error)}); get it again"
        raise SpecDecError(f"cannot load model '{name}': {reason}") from error
    with catalogue.room(weights + VOCABULARY_BYTES):
        model, tokenizer = loading.dequantized(name, file, dtype)
        if model_kind == "gpt2" and pre in DIGITS_APART:
            digits = pre_tokenizers.Digits(individual_digits=True)
            words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
        with catalogue.quietly():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


def main() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    name, file, folder, dtype = sys.argv[1:]
    try:
        convert(name, Path(file), Path(folder), dtype)
    except SpecDecError as error:
        print(error, flush=True)
        sys.exit(catalogue.REFUSED)


if __name__ == "__main__":
    main()
