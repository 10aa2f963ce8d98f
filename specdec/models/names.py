"""Check names of models, adapters, dtypes and GGUF files, before anything heavy is imported."""

from __future__ import annotations

import re
from pathlib import Path

from specdec.base.errors import SpecDecError, did_you_mean
from specdec.models.catalogue import EMBEDDED

HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+):([\w./-]+)")  # ORG/REPO:NAME
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # a part of a split file, as llama.cpp names it
COMPANION = "mtp-"  # how names of companion files begin
WEIGHT_TYPE = re.compile(r"[-.](ud-)?(i?q\d\w*|b?f\d\d|mxfp4\w*)$")  # how names of GGUF files end, in lower case
KNOWN = f"give an embedded model ({', '.join(EMBEDDED)}), a model folder, a .gguf file, ORG/REPO or ORG/REPO:NAME"
DTYPES = "float32", "bfloat16", "float16"
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_model(name: str, revision: str | None = None) -> None:
    """Raise SpecDecError if ``name`` cannot be a model, or is the path of a file or folder that is no model.

    name: what a user gave for a model: an embedded model, a path, ORG/REPO or ORG/REPO:NAME. revision: branch, tag or
    commit, which only a Hugging Face id may have; None: not given. Uses no network, so a repository may not exist.
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
            gguf_in(path)
    elif path.is_file():
        if not is_gguf(path):
            raise SpecDecError(f"'{name}' is not a GGUF file; give a .gguf file, a model folder or a model's name")
    elif name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise SpecDecError(f"there is no file or folder '{name}'")
    elif "/" not in name and (guess := guess_model(name)):
        raise SpecDecError(f"unknown model '{name}'{guess}; {KNOWN}")


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@([\w./-]+))?(?::([\w./-]+\.gguf))?", re.ASCII)


def adapter_place(name: str) -> Path | tuple[str, str | None, str | None]:
    """Return where the LoRA adapter ``name`` is: the path of a PEFT folder or GGUF file, or its place on Hugging Face.

    The place is (repository, revision, GGUF file); revision None: the latest; GGUF file None: the files of PEFT.
    Raises SpecDecError if ``name`` is none of these, or an incomplete folder.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        for part in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (path / part).is_file():
                hint = "; weights are read from safetensors only" if (path / "adapter_model.bin").is_file() else ""
                raise SpecDecError(f"'{name}' is no adapter folder: {part} is missing{hint}")
        return path
    if path.is_file():
        if not is_gguf(path):
            raise SpecDecError(f"adapter '{name}' is not a GGUF file; give a folder of PEFT or a .gguf file")
        return path
    found = None if name.startswith((".", "/", "~")) else ADAPTER_ID.fullmatch(name)
    if found is None:
        raise SpecDecError(f"there is no adapter '{name}'; give a folder of PEFT, a .gguf file or ORG/NAME")
    repository, revision, member = found.groups()
    return repository, revision, member


def guess_model(name: str) -> str:
    """Return " (did you mean '...'?)" with the embedded model whose name is most like ``name``, for error messages.

    name: the unknown name that the user gave. Returns "" if no embedded model has a similar name.
    """
    return did_you_mean(name.rpartition("/")[2].lower(), EMBEDDED)


def gguf_in(folder: Path) -> Path:
    """Return the path of the only GGUF file in ``folder``; of a split file, its first part that exists.

    Companion files ("mtp-...") do not count. Raises SpecDecError if the folder has no GGUF file, or several that are
    not parts of one.
    """
    found = dict[str, Path]()
    for path in sorted(path for path in folder.glob("*.gguf") if not is_companion(path.name)):
        found.setdefault(whole_name(path.name), path)
    if not found:
        raise SpecDecError(f"'{folder}' is no model folder: config.json is missing, and there is no GGUF file")
    if len(found) > 1:
        names = ", ".join(str(path) for path in found.values())
        raise SpecDecError(f"'{folder}' holds {len(found)} GGUF models; give one of them: {names}")
    return next(iter(found.values()))


def is_companion(name: str) -> bool:
    """Return whether the file name ``name`` is that of a companion file, as llama.cpp calls it: "mtp-...gguf".

    A companion file has the multi-token prediction layer of a model whose other layers are in another GGUF file.
    """
    return name.lower().startswith(COMPANION)


def companions(path: Path) -> list[Path]:
    """Return the paths of GGUF files beside ``path`` that, by their names, have its model's prediction layer.

    path: the model's GGUF file. The layer, for multi-token prediction, is in a file called "mtp-" and the model's name
    or its beginning; types of weights in the names, such as Q4_K_M, may differ.
    """
    found = list[Path]()
    for each in sorted(path.parent.glob("*.gguf")):
        of = WEIGHT_TYPE.sub("", whole_name(each.name).removesuffix(".gguf").lower().removeprefix(COMPANION))
        if is_companion(each.name) and of and path.name.lower().startswith(of) and part_paths(each)[0] == each:
            found.append(each)
    return found


def whole_name(name: str) -> str:
    """Return the file name ``name`` without the part number of a split GGUF file; other names are returned unchanged.

    For example, it is "x.gguf" for "x-00001-of-00002.gguf".
    """
    part = PART.fullmatch(name)
    return f"{part[1]}.gguf" if part else name


def part_paths(path: Path) -> list[Path]:
    """Return the paths of all parts of the split GGUF file that ``path`` is a part of, in order.

    The names tell the parts, so they need not exist. For a file that is not split, the result is [path]. Raises
    SpecDecError for an impossible part number.
    """
    if (part := PART.fullmatch(path.name)) is None:
        return [path]
    if not 1 <= int(part[2]) <= int(part[3]):
        what = f"its name says that it is part {int(part[2])} of {int(part[3])} of a split GGUF file"
        raise SpecDecError(f"cannot load '{path.name}': {what}, and there is no such part; rename it")
    return [path.with_name(f"{part[1]}-{number:05}-of-{part[3]}.gguf") for number in range(1, int(part[3]) + 1)]


def hub_folder(path: Path) -> Path | None:
    """Return the folder "models--ORG--NAME" of Hugging Face's cache that contains ``path``; None: it lies elsewhere."""
    return next((each for each in (path, *path.parents) if each.name.startswith("models--")), None)


def display_name(path: Path) -> str:
    """Return ``path`` as text for messages; for a path in Hugging Face's cache, the repository's name ORG/NAME."""
    folder = hub_folder(path)
    return str(path) if folder is None else folder.name.removeprefix("models--").replace("--", "/")


def is_gguf(path: Path) -> bool:
    """Return whether the file ``path`` begins with the magic bytes of the GGUF format. Raises OSError."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def dtype_name(name: str) -> str:
    """Return the full name of a dtype, such as "bfloat16" for "bf16"; returns "auto" for "auto".

    Raises SpecDecError for an unknown name.
    """
    if name == "auto" or SHORT.get(name, name) in DTYPES:
        return SHORT.get(name, name)
    known = ["auto", *DTYPES, *SHORT]
    raise SpecDecError(f"unknown dtype '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}")
