"""Drafters in Hugging Face repositories, ``ORG/NAME[@revision]``.

Of a repository only the configuration and the safetensors file are downloaded: nothing else in it is read or run.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from specdec.base import terminal
from specdec.base.errors import SpecDecError
from specdec.models.catalogue import one_line
from specdec.models.drafter_folder import CONFIG, CONFIG_BYTES, WEIGHTS

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@([\w./-]+))?", re.ASCII)
TIMEOUT = 10  # seconds for the repository's list of files


def parts(text: str) -> tuple[str, str | None] | None:
    """The repository and the revision that ``text`` names; None if it cannot name one."""
    found = _ID.fullmatch(text)
    return None if found is None else (found[1], found[2])


@functools.lru_cache(maxsize=64)
def drafter(text: str) -> Path:
    """The folder of a drafter in Hugging Face's cache, downloaded if need be. Raises SpecDecError with the reason."""
    named = parts(text)
    if named is None:
        raise SpecDecError(f"drafter folder '{text}' does not exist")
    repository, revision = named
    try:
        files = {
            found.rfilename: found.size or 0
            for found in HfApi()
            .model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT)
            .siblings
            or ()
        }
    except RevisionNotFoundError:
        raise SpecDecError(f"drafter '{repository}' has no revision '{revision}' on Hugging Face") from None
    except RepositoryNotFoundError:
        raise SpecDecError(
            f"drafter folder '{text}' does not exist, nor does the repository on Hugging Face, or it is private (then "
            "'hf auth login')"
        ) from None
    except Exception as error:  # no answer; the type depends on the HTTP library
        return _cached(text, repository, revision, error)
    for name in (CONFIG, WEIGHTS):
        if name not in files:
            raise SpecDecError(f"'{repository}' on Hugging Face is no drafter: {name} is missing")
    if files[CONFIG] > CONFIG_BYTES:
        raise SpecDecError(f"'{repository}' on Hugging Face is no drafter: {CONFIG} has {files[CONFIG]} bytes")
    if any(name.endswith(".py") for name in files):
        terminal.say(f"note: '{repository}' has code in it, which is neither downloaded nor run")
    try:
        return [Path(hf_hub_download(repository, name, revision=revision)) for name in (CONFIG, WEIGHTS)][-1].parent
    except Exception as error:  # no network, a full disk, ...
        raise SpecDecError(f"cannot download drafter '{text}' ({one_line(error)})") from None


def _cached(text: str, repository: str, revision: str | None, error: Exception) -> Path:
    """The folder in the cache, where the network cannot be used."""
    found: list[Any] = [try_to_load_from_cache(repository, name, revision=revision) for name in (CONFIG, WEIGHTS)]
    if all(isinstance(path, str) for path in found):
        return Path(found[-1]).parent
    raise SpecDecError(
        f"drafter folder '{text}' does not exist, nor is it in the local Hugging Face cache, and the network cannot be "
        f"used ({one_line(error)})"
    ) from None
