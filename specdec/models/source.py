"""Where a model is: embedded, a local folder, a GGUF file, or a Hugging Face id, which is downloaded.

Finds folders and files. Reads no weights.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import get_checkpoint_shard_files

from specdec.base.errors import SpecDecError, did_you_mean, one_line
from specdec.models import hub
from specdec.models.catalogue import EMBEDDED
from specdec.models.gguf import model as gguf_model
from specdec.models.gguf.file import GGUFFile, is_gguf, read_header
from specdec.models.prepare import GGUF, prepare_embedded, prepare_gguf

# Files of a repository: all but the weights are downloaded first, and safetensors when the weights are read.
PARTS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
WEIGHTS = ["model*.safetensors"]
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+):([\w./-]+\.gguf)")  # ORG/REPO:file.gguf


@dataclass(frozen=True)
class Source:
    """Where the model ``name`` is.

    folder: with its config and tokenizer.
    file: the GGUF file with its weights, if these stay in blocks.
    packed: the name of a GGUF file in the folder that transformers dequantises.
    remote: the folder is in Hugging Face's cache, named by the commit, and may lack the weights.
    """

    name: str
    folder: Path
    file: GGUFFile | None = None
    packed: str | None = None
    remote: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for transformers' ``from_pretrained``."""
        if self.remote:
            return {}
        return {"local_files_only": True} | ({} if self.packed is None else {"gguf_file": self.packed})

    def fetch_weights(self) -> None:
        """Download the weights of a Hugging Face id."""
        if self.remote:
            hub.fetch("model", self.name, self.folder.name, WEIGHTS)

    def weight_files(self) -> list[Path]:
        """The safetensors files in the folder; empty if the weights have another format."""
        if self.file is not None or self.packed is not None:
            return []
        if (only := self.folder / SAFE_WEIGHTS_NAME).is_file():
            return [only]
        if (index := self.folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            with explain_errors(self.name):
                return [Path(path) for path in get_checkpoint_shard_files(str(self.folder), str(index))[0]]
        return []


def find_source(name: str, revision: str | None = None) -> Source:
    """Find a model; of a Hugging Face id, download all but the weights.

    Raises SpecDecError if it is unknown, missing or broken.
    """
    path = Path(name).expanduser()
    if revision is not None and (name in EMBEDDED or path.exists()):
        raise SpecDecError(
            f"a revision ('{revision}') needs a Hugging Face id, and '{name}' is not one; leave the revision out"
        )
    if name in EMBEDDED:
        path = prepare_embedded(name)
        return Source(name, path, read_header(path / GGUF, name))
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(path.glob("*.gguf"))
            hint = f"; to load the GGUF file in it, give '{found[0]}'" if found else ""
            raise SpecDecError(f"'{name}' is no model folder: config.json is missing{hint}")
        return Source(name, path)
    if path.is_file():
        if not is_gguf(path):
            raise SpecDecError(f"'{name}' is not a GGUF file; give a .gguf file, a model folder or a model's name")
        file = read_header(path, name)
        if gguf_model.is_supported(file):
            return Source(name, prepare_gguf(name, file), file)
        return Source(name, path.parent, packed=path.name)
    if file_in_repository := _HUB_FILE.fullmatch(name):
        repository, member = file_in_repository.groups()
        place = f"https://huggingface.co/{repository}/resolve/{revision or 'main'}/{member}"
        by_hand = f"; get {place} by hand and give the path of the file instead"
        path = hub.fetch("model", repository, revision, [member], by_hand) / member
        if not path.is_file():
            raise SpecDecError(f"'{repository}' has no file '{member}' on Hugging Face")
        return find_source(str(path))
    return Source(name, _repository(name, revision), remote=True)


def _repository(name: str, revision: str | None) -> Path:
    known = f"give an embedded model ({', '.join(EMBEDDED)}), a model folder, a .gguf file, ORG/REPO or ORG/REPO:FILE"
    guess = did_you_mean(name.rpartition("/")[2].lower(), EMBEDDED)
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise SpecDecError(f"there is no file or folder '{name}'")
    if guess and "/" not in name:
        raise SpecDecError(f"unknown model '{name}'{guess}; {known}")
    folder = hub.fetch("model", name, revision, PARTS, f"{guess}; {known}")
    if not (folder / "config.json").is_file():
        raise SpecDecError(f"'{name}' has no config.json; if it holds GGUF files, name one of them: '{name}:FILE.gguf'")
    return folder


def weight_files(name: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of the model ``name``, downloaded if it is a Hugging Face id; empty for other formats."""
    local = name in EMBEDDED or Path(name).expanduser().exists()
    source = find_source(name, None if local else revision)
    source.fetch_weights()
    return source.weight_files()


def public_name(name: str) -> str:
    """The name of a model for files that are published: never a path of this machine.

    Embedded models and Hugging Face ids keep their name. A GGUF file has ``general.name``, and a folder's config has
    ``_name_or_path``; if that is missing or a path, the name of the file or folder is used.
    """
    path = Path(name).expanduser()
    if name in EMBEDDED or not path.exists():
        return name
    said = ""
    with contextlib.suppress(Exception):  # untrusted files: any type
        if path.is_file():
            said = str(read_header(path).metadata.get("general.name", ""))
        else:
            said = str(json.loads((path / "config.json").read_text("utf-8")).get("_name_or_path", ""))
    said = " ".join(said.split())
    a_path = said.startswith(("/", ".", "~")) or "\\" in said or said.count("/") > 1 or Path(said).exists()
    return path.resolve().name if a_path else said


@contextlib.contextmanager
def explain_errors(name: str) -> Iterator[None]:
    """Turn any exception that transformers raises as it reads a model into a SpecDecError of one line."""
    try:
        yield
    except SpecDecError:
        raise
    except torch.OutOfMemoryError:
        raise SpecDecError(
            f"'{name}' does not fit into the device's memory; use a smaller dtype, a smaller model or the device cpu"
        ) from None
    except Exception as error:
        reason = one_line(error)
        if isinstance(error, SafetensorError):
            reason = f"a safetensors file is truncated or broken ({reason}); get it again"
        elif "model.safetensors" in reason:
            reason += " Weights are read from safetensors only."
        elif "trust_remote_code" in str(error):
            reason = "it needs Python code of its own; pass trust_remote_code only if you trust its authors"
        raise SpecDecError(f"cannot load model '{name}': {reason}") from error
