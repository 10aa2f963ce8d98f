"""Names of models, dtypes and GGUF files, checked before anything heavy is imported."""

from __future__ import annotations

import re
from pathlib import Path

from specdec.base.errors import SpecDecError, did_you_mean
from specdec.models.catalogue import EMBEDDED

HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+):([\w./-]+\.gguf)")  # ORG/REPO:file.gguf
KNOWN = f"give an embedded model ({', '.join(EMBEDDED)}), a model folder, a .gguf file, ORG/REPO or ORG/REPO:FILE"
DTYPES = "float32", "bfloat16", "float16"
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_model(name: str, revision: str | None = None) -> None:
    """Raise SpecDecError for a name that no model can have, and for a file or folder that is none.

    Whether a repository exists is known when it is asked.
    """
    path = Path(name).expanduser()
    if revision is not None and (name in EMBEDDED or path.exists()):
        raise SpecDecError(
            f"a revision ('{revision}') needs a Hugging Face id, and '{name}' is not one; leave the revision out"
        )
    if name in EMBEDDED or HUB_FILE.fullmatch(name):
        return
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(path.glob("*.gguf"))
            hint = f"; to load the GGUF file in it, give '{found[0]}'" if found else ""
            raise SpecDecError(f"'{name}' is no model folder: config.json is missing{hint}")
    elif path.is_file():
        if not is_gguf(path):
            raise SpecDecError(f"'{name}' is not a GGUF file; give a .gguf file, a model folder or a model's name")
    elif name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise SpecDecError(f"there is no file or folder '{name}'")
    elif "/" not in name and (guess := guess_model(name)):
        raise SpecDecError(f"unknown model '{name}'{guess}; {KNOWN}")


def guess_model(name: str) -> str:
    """What the end of a message suggests for an unknown name."""
    return did_you_mean(name.rpartition("/")[2].lower(), EMBEDDED)


def is_gguf(path: Path) -> bool:
    """Whether the file has GGUF's magic number."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def dtype_name(name: str) -> str:
    """The full name of a dtype, or "auto". Raises SpecDecError for an unknown one."""
    if name == "auto" or SHORT.get(name, name) in DTYPES:
        return SHORT.get(name, name)
    known = ["auto", *DTYPES, *SHORT]
    raise SpecDecError(f"unknown dtype '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}")
