"""Convert a GGUF file to a model folder: ``python -m specdec.models.conversion NAME FILE FOLDER DTYPE``.

Every weight is dequantised and held in memory until the folder is written, so this is a process of its own, which ends
when its standard input does. What the user should know, if it fails, is the last line of its output.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from pathlib import Path

from specdec.base.errors import SpecDecError
from specdec.models import catalogue, loading
from specdec.models.gguf_file import read_header
from specdec.models.gguf_model import split_digits


def convert(name: str, file: Path, folder: Path, dtype: str) -> None:
    """Write config, safetensors in ``dtype``, tokenizer and chat template into ``folder``. Raises SpecDecError."""
    header = read_header(file, name)
    weights = sum(math.prod(tensor.shape) for tensor in header.tensors.values()) * loading.DTYPES[dtype].itemsize
    with catalogue.room(weights + catalogue.VOCABULARY_BYTES):
        model, tokenizer = loading.dequantized(name, file, dtype)
        split_digits(header, tokenizer.backend_tokenizer)
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
