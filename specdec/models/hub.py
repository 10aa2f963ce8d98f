"""Folders of Hugging Face repositories; drafters in them, ``ORG/NAME[@revision]``.

Of a drafter's repository only the configuration and the safetensors file are downloaded: nothing else is read or run.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from specdec.base.errors import SpecDecError, one_line
from specdec.models.drafter_folder import CONFIG, WEIGHTS

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@([\w./-]+))?", re.ASCII)
TIMEOUT = 10  # seconds for the repository to answer


def parse_repo_id(text: str) -> tuple[str, str | None] | None:
    """The repository and the revision that ``text`` names; None if it cannot name one."""
    found = _ID.fullmatch(text)
    return None if found is None else (found[1], found[2])


@functools.lru_cache(maxsize=64)
def fetch_drafter(text: str) -> Path:
    """The folder of a drafter in Hugging Face's cache, downloaded if need be. Raises SpecDecError with the reason."""
    named = parse_repo_id(text)
    if named is None:
        raise SpecDecError(f"drafter folder '{text}' does not exist")
    folder = fetch("drafter", *named, [CONFIG, WEIGHTS])
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise SpecDecError(f"'{named[0]}' on Hugging Face is no drafter: {name} is missing")
    return folder


def fetch(kind: str, repository: str, revision: str | None, files: list[str], hint: str = "") -> Path:
    """The folder in Hugging Face's cache with those files (patterns), downloaded if need be; without a network what the
    cache has.

    kind: what it holds, for messages. hint: their end. Raises SpecDecError if there is no such repository or revision,
    or it cannot be had.
    """
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files, etag_timeout=TIMEOUT))
    except RevisionNotFoundError:
        raise SpecDecError(f"{kind} '{repository}' has no revision '{revision}' on Hugging Face") from None
    except (RepositoryNotFoundError, HFValidationError):
        what = "no folder of that name, and not on Hugging Face, or private (then 'hf auth login')"
        raise SpecDecError(f"unknown {kind} '{repository}': {what}{hint}") from None
    except LocalEntryNotFoundError as error:
        what = "is not in the local Hugging Face cache, and the network cannot be used"
        raise SpecDecError(f"{kind} '{repository}' {what} ({one_line(error)}){hint}") from None
    except Exception as error:  # a full disk, ...; the type depends on the HTTP library
        raise SpecDecError(f"cannot download {kind} '{repository}' ({one_line(error)}){hint}") from None
