"""Find the files of a model by its name: an embedded model, a folder, a GGUF file, or a Hugging Face id to download."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from specdec.base.errors import SpecDecError, one_line
from specdec.models import hub, names
from specdec.models.catalogue import EMBEDDED
from specdec.models.gguf import model as gguf_model
from specdec.models.gguf.file import GGUFFile, read_header
from specdec.models.prepare import GGUF, PARTS, prepare_embedded, prepare_gguf

WEIGHTS = ["model*.safetensors"]  # files of a repository that are downloaded only when they are read
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Source:
    """The files of a model that a user has named; ``find_source`` makes it.

    name: the name by which the user gave the model.
    folder: the folder with config and tokenizer.
    entry: the folder in specdec's cache with config and tokenizer in the form that this package reads itself; None:
        transformers has to read those in ``folder``.
    file: the header of the GGUF file with the weights; None: they are in safetensors files.
    remote: whether ``folder`` lies in Hugging Face's cache. Its name is then the commit, and weights may be missing.
    """

    name: str
    folder: Path
    entry: Path | None = None
    file: GGUFFile | None = None
    remote: bool = False

    def fetch_weights(self) -> None:
        """Download the safetensors files of a Hugging Face id into ``folder``, unless all exist; nothing for others.

        Raises SpecDecError if they cannot be downloaded.
        """
        files = self.weight_files() if self.remote else []
        if self.remote and not (files and all(file.is_file() for file in files)):
            hub.fetch("model", self.name, self.folder.name, WEIGHTS)

    def weight_files(self) -> list[Path]:
        """Return the paths of the model's safetensors files; those of a Hugging Face id may not be downloaded yet.

        Returns [] for a GGUF file, and if there are neither weights nor their index in ``folder``.
        """
        if self.file is not None:
            return []
        if (only := self.folder / ONE_FILE).is_file():
            return [only]
        if (index := self.folder / INDEX).is_file():
            with explain_errors(self.name):
                files: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
                return [self.folder / name for name in sorted(set(files.values()))]
        return []


def find_source(name: str, revision: str | None = None) -> Source:
    """Find the files of the model ``name``; download an embedded model or a GGUF file of a repository if need be.

    Of a Hugging Face id, all files but the weights are downloaded.
    name: an embedded model, a folder, a ``.gguf`` file, a Hugging Face id ORG/NAME, or ORG/NAME:file.gguf.
    revision: branch, tag or commit of a Hugging Face id; None: the latest.
    Raises SpecDecError if the model is unknown, missing or broken.
    """
    names.check_model(name, revision)
    path = Path(name).expanduser()
    if name in EMBEDDED:
        path = prepare_embedded(name)
        return Source(name, path, path, read_header(path / GGUF, name))
    if name and path.is_dir():
        if (path / "config.json").is_file():
            return Source(name, path)
        path = names.gguf_in(path)
    if path.is_file():
        file = read_header(path, name)
        if file.architecture not in gguf_model.ARCHITECTURES:
            raise SpecDecError(
                f"cannot load model '{name}': GGUF files of the architecture '{file.architecture}' are not supported; "
                "give the Hugging Face id of the model, or its folder, instead"
            )
        entry = prepare_gguf(name, file)
        return Source(name, entry, entry, file)
    if of_hub := names.HUB_FILE.fullmatch(name):
        repository, member = of_hub.groups()
        return replace(find_source(str(file_in_repository(repository, member, revision))), name=name)
    folder = hub.fetch("model", name, revision, PARTS, f"{names.guess_model(name)}; {names.KNOWN}")
    if not (folder / "config.json").is_file():
        raise SpecDecError(f"'{name}' has no config.json; if it holds GGUF files, name one of them: '{name}:NAME'")
    return Source(name, folder, remote=True)


def file_in_repository(repository: str, member: str, revision: str | None) -> Path:
    """Download a GGUF file of a Hugging Face repository, with all parts if it is split, and return its path.

    repository: ORG/NAME. member: the file's path in the repository, or the end of its name, such as "Q4_K_M". revision:
    branch, tag or commit; None: the latest. Of a split file, the path is that of ``member`` or of the first part.
    Raises SpecDecError if there is no such file, or several.
    """
    if not member.endswith(".gguf"):
        files, revision = hub.list_files("model", repository, revision)
        member = _named(repository, member, files)
    url = f"https://huggingface.co/{repository}/resolve/{revision or 'main'}/{member}"
    by_hand = f"; get {url} by hand and give the path of the file instead"
    return hub.fetch_file("model", repository, revision, member, by_hand)


def _named(repository: str, wanted: str, files: list[str]) -> str:
    """Return the path of the only GGUF file in a repository that is named ``wanted`` or whose name ends with it.

    repository: ORG/NAME, for messages. wanted: such as "Qwen3-4B-Q4_K_M" or "Q4_K_M"; case is ignored. files: paths of
    all files in the repository. The first part stands for a split file. Raises SpecDecError unless exactly one file
    fits.
    """
    every = dict[str, str]()
    beside = names.is_companion(wanted)
    for file in sorted(file for file in files if file.endswith(".gguf")):
        if names.is_companion(Path(file).name) != beside:
            continue
        every.setdefault(names.whole_name(file).removesuffix(".gguf").lower(), file)
    name = wanted.lower()
    found = [file for whole, file in every.items() if name in (whole, whole.rpartition("/")[2])]
    if not found:
        found = [file for whole, file in every.items() if whole.endswith((f"-{name}", f".{name}", f"_{name}"))]
    if len(found) == 1:
        return found[0]
    if found:
        raise SpecDecError(f"'{repository}' has several GGUF files '{wanted}'; give one of them: {', '.join(found)}")
    has = f"it has {', '.join(every.values())}" if every else "it has no GGUF files at all"
    raise SpecDecError(f"'{repository}' has no GGUF file '{wanted}' on Hugging Face; {has}")


def public_name(name: str, adapter: str | None = None) -> str:
    """Return the name of a model for published files, which never shows a path of this machine.

    Embedded models and Hugging Face ids keep their name. For a file or folder, it is the last part of the path.
    adapter: path or name of its LoRA adapter, which is added as "MODEL with ADAPTER"; None: there is none.
    """
    if adapter is not None:
        return f"{public_name(name)} with {public_name(adapter)}"
    path = Path(name).expanduser()
    if name in EMBEDDED or not path.exists():
        return name
    path = path.resolve()
    return path.name if names.hub_folder(path) is None else names.display_name(path)


@contextlib.contextmanager
def explain_errors(name: str) -> Iterator[None]:
    """Turn any exception in a ``with`` block that loads a model into a SpecDecError of one line.

    name: the model's name in the message. A SpecDecError passes unchanged; KeyboardInterrupt passes, too.
    """
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
