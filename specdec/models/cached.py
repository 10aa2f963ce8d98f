"""The models in the cache: their sizes, and deleting one.

A GGUF file that was downloaded as ``ORG/REPO:file.gguf`` lies in Hugging Face's cache and belongs to the model. A file
or folder of the user, and a whole repository, which other programs may use, do not.
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
    """A model in the cache.

    name: its name for ``--model``; for a file or folder of the user, the path.
    paths: folders, files and links in the cache that only this model needs.
    """

    name: str
    paths: tuple[Path, ...]

    @property
    def predicts(self) -> bool:
        """Return whether the model's config, where it is known, says that it has a multi-token prediction layer."""
        try:
            return bool(getattr(read_config(self.paths[0]), "mtp_num_hidden_layers", 0))
        except (OSError, ValueError, TypeError):  # incomplete, or made again at its next use
            return False

    @property
    def bytes(self) -> int:
        """Return the bytes that deleting the model frees."""
        return size_of(*(path for path in self.paths if not path.is_symlink()))


def cached_models() -> list[CachedModel]:
    """Return all models in the cache, incomplete ones included."""
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
    """Delete the model ``name`` from the cache and return the freed bytes; files of the user stay.

    name: as in ``CachedModel``, or a path that leads to the same file. Raises SpecDecError if it is not in the cache.
    """
    known = {model.name: model for model in cached_models()}
    found = known.get(name) or known.get(str(Path(name).expanduser().resolve()))
    if found is None:
        raise SpecDecError(f"'{name}' is not in specdec's cache{did_you_mean(name, known)}; see 'specdec models'")
    freed = found.bytes
    with locked(work_folder(cache_dir()) / "lock"):
        for path in found.paths:
            with errors_as(f"cannot delete '{path}'"):
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
    """Return the name by which ``--model`` takes a GGUF file, and what belongs to it in Hugging Face's cache.

    file: its path with links resolved. The name is ``ORG/REPO:member``, and the links to the file and the file itself
    belong to it. For a file elsewhere, it is the path, and nothing belongs to it ([]).
    """
    root = hub_folder(file)
    files = [] if root is None else sorted(root.glob("snapshots/*/**/*.gguf"))
    if root is None or not (links := [link for link in files if link.resolve() == file]):
        return str(file), []
    member = "/".join(links[0].relative_to(root).parts[2:])
    return f"{display_name(root)}:{member}", [*links, file]
