"""List the models in the cache with their sizes, and delete one.

Deleting a model removes its folder in specdec's cache, and a GGUF file that was downloaded as ``ORG/REPO:file.gguf``
into Hugging Face's cache. A file or folder of the user stays, and so does a whole repository in Hugging Face's cache,
because other programs may use it.
"""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from specdec.base.errors import SpecDecError, did_you_mean, errors_as
from specdec.base.files import cache_dir, size_of
from specdec.models.catalogue import EMBEDDED
from specdec.models.config import read_config
from specdec.models.names import display_name, hub_folder
from specdec.models.prepare import MANIFEST, WORK, locked, work_folder


@dataclass(frozen=True)
class CachedModel:
    """A model that is stored in specdec's or Hugging Face's cache.

    name: the name that ``--model`` takes; for a file or folder of the user, its path.
    paths: folders, files and links in the caches that only this model needs, and that deleting it removes.
    """

    name: str
    paths: tuple[Path, ...]

    @property
    def predicts(self) -> bool:
        """Return whether the model's cached config names a multi-token prediction layer; False if it cannot be read."""
        try:
            return bool(getattr(read_config(self.paths[0]), "mtp_num_hidden_layers", 0))
        except (OSError, ValueError, TypeError):  # incomplete, or made again at its next use
            return False

    @property
    def bytes(self) -> int:
        """Return the number of bytes that deleting the model from the cache frees."""
        return size_of(*(path for path in self.paths if not path.is_symlink()))


def cached_models() -> list[CachedModel]:
    """Return all models that specdec has stored in its cache.

    These are embedded models, partly downloaded ones included, and GGUF files and model folders that specdec has loaded
    before. Entries that cannot be read are left out.
    """
    found = [CachedModel(name, paths) for name in EMBEDDED if (paths := _embedded(name))]
    for manifest in sorted(cache_dir().glob(f"models/*/{MANIFEST}")):
        try:
            made_of = json.loads(manifest.read_text("utf-8"))
            files = [made_of.get("gguf"), *(path for path, *_ in made_of.get("parts", ()))]
            folder = made_of.get("folder")
        except (OSError, ValueError, TypeError, AttributeError):  # made again at its next use
            continue
        if isinstance(folder, str):
            found.append(CachedModel(display_name(Path(folder)), (manifest.parent,)))
        elif all(isinstance(file, str) for file in files):
            names, parts = zip(*(_in_hub(Path(file)) for file in files), strict=True)
            found.append(CachedModel(names[0], (manifest.parent, *itertools.chain(*parts))))
    return found


def remove(name: str) -> int:
    """Delete the model ``name`` from the cache, and return the number of freed bytes; files of the user stay.

    name: the ``name`` of a model that ``cached_models`` returns, or another path that leads to the same file or folder.
    While another process prepares a model in the cache, this call waits.
    Raises SpecDecError if the cache has no such model, or a file cannot be deleted.
    """
    known = {model.name: model for model in cached_models()}
    found = known.get(name) or known.get(str(Path(name).expanduser().resolve()))
    if found is None:
        raise SpecDecError(f"'{name}' is not in specdec's cache{did_you_mean(name, known)}; see 'specdec models'")
    freed = found.bytes
    with errors_as(f"cannot delete '{name}'"), locked(work_folder(cache_dir()) / "lock"):
        for path in found.paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return freed


def _embedded(name: str) -> tuple[Path, ...]:
    root = cache_dir()
    folder, part = root / "models" / name, root / WORK / f"{name}-{EMBEDDED[name].sha256[:16]}.part"
    return tuple(path for path in (folder, part) if path.exists() and (path == part or (path / MANIFEST).is_file()))


def _in_hub(file: Path) -> tuple[str, list[Path]]:
    """Return (name, files) of a cached GGUF model: its name for ``--model``, and its files in Hugging Face's cache.

    file: path of the GGUF file, with links resolved. For a file in Hugging Face's cache, the name is
    ``ORG/REPO:member``, and the files are the file and all links to it. For a file elsewhere, the name is its path, and
    the list is empty.
    """
    root = hub_folder(file)
    files = [] if root is None else sorted(root.glob("snapshots/*/**/*.gguf"))
    if root is None or not (links := [link for link in files if link.resolve() == file]):
        return str(file), []
    member = "/".join(links[0].relative_to(root).parts[2:])
    return f"{display_name(root)}:{member}", [*links, file]
