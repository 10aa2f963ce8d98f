"""Drafters in Hugging Face repositories, ``ORG/NAME[@revision]``.

Of a repository only the configuration and the safetensors file are downloaded: nothing else in it is read or run.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from specdec.base.errors import SpecDecError
from specdec.models.catalogue import one_line
from specdec.models.drafter_folder import CONFIG, WEIGHTS

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@([\w./-]+))?", re.ASCII)
TIMEOUT = 10  # seconds for the repository to answer


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
        # Without a network this is what the cache has.
        found = snapshot_download(repository, revision=revision, allow_patterns=[CONFIG, WEIGHTS], etag_timeout=TIMEOUT)
    except RevisionNotFoundError:
        raise SpecDecError(f"drafter '{repository}' has no revision '{revision}' on Hugging Face") from None
    except RepositoryNotFoundError:
        raise SpecDecError(
            f"drafter folder '{text}' does not exist, nor does the repository on Hugging Face, or it is private (then "
            "'hf auth login')"
        ) from None
    except LocalEntryNotFoundError as error:
        raise SpecDecError(
            f"drafter folder '{text}' does not exist, nor is it in the local Hugging Face cache, and the network "
            f"cannot be used ({one_line(error)})"
        ) from None
    except Exception as error:  # a full disk, ...
        raise SpecDecError(f"cannot download drafter '{text}' ({one_line(error)})") from None
    for name in (CONFIG, WEIGHTS):
        if not (Path(found) / name).is_file():
            raise SpecDecError(f"'{repository}' on Hugging Face is no drafter: {name} is missing")
    return Path(found)
