"""Download models, drafters and adapters from the Hugging Face Hub into Hugging Face's cache, and list their files.

Of a drafter, named ``ORG/NAME`` with an optional ``@revision``, only config and weights are downloaded.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from specdec.base.errors import SpecDecError, one_line
from specdec.models.drafter_folder import CONFIG, WEIGHTS
from specdec.models.names import part_paths

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@([\w./-]+))?", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")
TIMEOUT = 10  # seconds for the Hub to answer


def parse_repo_id(text: str) -> tuple[str, str | None] | None:
    """Split ``text``, such as "ORG/NAME@revision", into (repository, revision).

    The revision is None if the text names none, which stands for the latest. Returns None if ``text`` is no name of a
    repository.
    """
    found = _ID.fullmatch(text)
    return None if found is None else (found[1], found[2])


@functools.lru_cache(maxsize=64)
def fetch_drafter(text: str) -> Path:
    """Download the drafter ``text``, ORG/NAME with an optional @revision; return its folder in Hugging Face's cache.

    The folder has config.json and model.safetensors. In one process, a drafter is looked up once.
    Raises SpecDecError if the download fails or the repository is no drafter.
    """
    named = parse_repo_id(text)
    if named is None:
        raise SpecDecError(f"drafter folder '{text}' does not exist; give a folder or ORG/NAME")
    folder = fetch("drafter", *named, [CONFIG, WEIGHTS])
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise SpecDecError(f"'{named[0]}' on Hugging Face is no drafter: {name} is missing")
    return folder


def snapshot_download(*args: Any, **more: Any) -> str:
    from huggingface_hub import snapshot_download as download  # heavy

    return str(download(*args, **more))


def list_files(kind: str, repository: str, revision: str | None) -> tuple[list[str], str]:
    """Return (paths of all files in a repository, its commit as 40 hex digits).

    Without a network, the files and the commit are those of the copy in Hugging Face's cache.

    kind: "model", "drafter" or "adapter", for messages. repository: ORG/NAME. revision: branch, tag or commit; None:
    the latest. Raises SpecDecError if the repository or the revision does not exist or cannot be reached.
    """
    from huggingface_hub import HfApi  # heavy
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT)
        return [file.rfilename for file in found.siblings or ()], str(found.sha)
    except HfHubHTTPError:  # also an unknown repository, which ``fetch`` explains
        fetch(kind, repository, revision, [CONFIG])
        raise SpecDecError(f"cannot list the files of {kind} '{repository}' on Hugging Face; try again") from None
    except Exception:  # an invalid name, which ``fetch`` explains, or no network: the type depends on the library
        folder = fetch(kind, repository, revision, [CONFIG])
        return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))], folder.name


def fetch(kind: str, repository: str, revision: str | None, files: list[str], hint: str = "") -> Path:
    """Download files of a repository; return the folder with them in Hugging Face's cache, whose name is the commit.

    kind: "model", "drafter" or "adapter", for messages. repository: ORG/NAME. revision: branch, tag or commit; None:
    the latest. files: paths in the repository, or glob patterns of paths. It is no error if some do not exist. hint:
    text at the end of error messages. Without a network, cached files are used; cached files of a commit never need
    one. Raises SpecDecError if the repository or the revision does not exist or cannot be downloaded.
    """
    from huggingface_hub import errors  # heavy

    try:
        if revision is not None and _COMMIT.fullmatch(revision) and (folder := _cached(repository, revision, files)):
            return folder
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files, etag_timeout=TIMEOUT))
    except errors.RevisionNotFoundError:
        raise SpecDecError(f"{kind} '{repository}' has no revision '{revision}' on Hugging Face") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        what = "there is no such folder or Hugging Face repository; for a private one run 'hf auth login'"
        raise SpecDecError(f"unknown {kind} '{repository}': {what}{hint}") from None
    except errors.LocalEntryNotFoundError as error:
        what = "is not in the Hugging Face cache, and the network is unavailable"
        raise SpecDecError(f"{kind} '{repository}' {what} ({one_line(error.__cause__ or error)}){hint}") from None
    except Exception as error:  # a full disk, ...; the type depends on the HTTP library
        raise SpecDecError(f"cannot download {kind} '{repository}' ({one_line(error)}){hint}") from None


def fetch_file(kind: str, repository: str, revision: str | None, name: str, hint: str = "") -> Path:
    """Download the file ``name`` of a repository into Hugging Face's cache, and return its path there.

    Of a split GGUF file, all parts are downloaded. kind: "model", "drafter" or "adapter", for messages. repository:
    ORG/NAME. revision: branch, tag or commit; None: the latest. hint: text at the end of error messages.
    Raises SpecDecError if the file does not exist or cannot be downloaded.
    """
    path = fetch(kind, repository, revision, [str(part) for part in part_paths(Path(name))], hint) / name
    if not path.is_file():
        raise SpecDecError(f"'{repository}' has no file '{name}' on Hugging Face")
    return path


def _cached(repository: str, commit: str, files: list[str]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # heavy

    found = [try_to_load_from_cache(repository, file, revision=commit) for file in files]
    paths = [Path(path) for path in found if isinstance(path, str)]
    return paths[0].parents[files[0].count("/")] if paths and len(paths) == len(files) else None
