"""Trained drafters on disk: a folder with ``config.json`` and ``model.safetensors``.

Files are untrusted data. Counts in a config are bounded, the drafter's module is built without memory and compared with
the header of the weights, and weights must be finite. A config names its drafter (``drafter``) and its base model
(``base``): by a fingerprint of the model's weights and, for other precisions, by sampled values. Knows no particular
drafter.

A matrix NAME may be quantized to 8 bits: ``NAME.codes`` int8 [..., n] and ``NAME.scales`` bf16 [..., n / g], one scale
for g inputs. It is read as bf16.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from specdec.base import files, inputs, options, terminal
from specdec.base.devices import without_memory
from specdec.base.errors import SpecDecError, errors_as
from specdec.models import identity
from specdec.models.names import display_name
from specdec.models.tensor_file import PLAIN

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CONFIG_BYTES = 4_000_000  # no config.json is larger
WIDEST = 16  # maximum of a drafter's inner size / the hidden size of its target
INTEGERS = {"I64": torch.int64, "I32": torch.int32}
FLAGS = {"BOOL": torch.bool}
CODES, SCALES = ".codes", ".scales"
LARGE, GROUP = 1 << 10, 32  # matrices with this many elements are quantized; elements that share a scale
M = TypeVar("M", bound=nn.Module)


class Identified(Protocol):
    """A loaded model, the base of a drafter: its sizes and the fingerprint of its weights. A ``Target`` is one.

    fingerprint: a hash of sampled weights, another one in another precision.
    """

    model: Any
    fingerprint: str
    num_layers: int
    hidden_size: int
    vocab_size: int


def read_config(folder: Path, drafter: str | None = None, base: Identified | None = None) -> dict[str, Any]:
    """Return the ``config.json`` of a drafter folder, also one in the speculators format.

    drafter: the drafter that it must describe; None: any. base: the model that it must be trained for; None: any.
    Raises SpecDecError if the config is missing or broken, or of another drafter or base.
    """
    if not folder.is_dir():
        raise SpecDecError(f"drafter folder '{folder}' does not exist")
    path = folder / CONFIG
    if not path.is_file():
        raise SpecDecError(f"'{folder}' is no drafter folder: {CONFIG} is missing")
    config = read_json(path)
    if isinstance(config, dict) and isinstance(kind := config.get("speculators_model_type"), str):
        config.setdefault("drafter", kind)
    if not isinstance(config, dict) or not isinstance(config.get("drafter"), str):
        raise SpecDecError(f"'{path}' does not describe a specdec drafter (no 'drafter' entry)")
    if not isinstance(config.get("base", {}), dict):
        raise SpecDecError(f"'{path}' does not say what base model it is for ('base' is not a mapping)")
    if drafter is not None and config["drafter"] != drafter:
        raise SpecDecError(f"'{display_name(folder)}' holds the drafter '{config['drafter']}', not '{drafter}'")
    if base is not None:
        check_base(config, base, display_name(folder))
    return config


def read_json(path: Path) -> Any:
    """Return the value in a JSON file of at most ``CONFIG_BYTES``. Raises SpecDecError if it cannot be read."""
    with errors_as(f"cannot read '{path}'", ValueError):
        return inputs.parse_json(inputs.read_text(path, CONFIG_BYTES))


class StoredTensors:
    """The tensors of an open safetensors file. A quantized matrix is one tensor.

    path: the file's path, for messages. file: the opened safetensors file.
    header: name -> a tensor without values (on the device "meta") with the shape and dtype. coded: names of the
    quantized matrices.
    """

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self.file = path, file
        parts = {name: self._part(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        self.coded = {name.removesuffix(CODES) for name in parts if name.endswith(CODES)}
        for name in self.coded:
            codes, scales = parts.pop(name + CODES), parts.pop(name + SCALES, None)
            if name in parts or scales is None or not _scaled(codes, scales):
                raise SpecDecError(
                    f"matrix '{name}' in '{path}' is stored twice or in 8-bit codes without scales that fit them; "
                    "train or get it again"
                )
            parts[name] = torch.empty(codes.shape, dtype=scales.dtype, device="meta")  # empty_like imports SymPy
        self.header = parts

    def _part(self, name: str) -> Tensor:
        part, known = self.file.get_slice(name), PLAIN | INTEGERS | FLAGS
        dtype = torch.int8 if name.endswith(CODES) and part.get_dtype() == "I8" else known.get(part.get_dtype())
        if dtype is None:
            raise SpecDecError(
                f"tensor '{name}' in '{self.path}' is {part.get_dtype()}; it must be one of {', '.join(known)}"
            )
        try:
            return torch.empty(part.get_shape(), dtype=dtype, device="meta")
        except (RuntimeError, TypeError, OverflowError):  # empty, with dimensions whose product overflows
            what = f"the impossible shape {part.get_shape()}"
            raise SpecDecError(f"tensor '{name}' in '{self.path}' has {what}") from None

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``, dequantized. Raises SpecDecError if it holds NaN or infinite values."""
        if name in self.coded:
            codes, scales = self.file.get_tensor(name + CODES), self.file.get_tensor(name + SCALES)
            tensor, finite = dequantize(codes, scales), (128 * scales.float()).isfinite()  # codes are not above 128
        else:
            tensor = self.file.get_tensor(name)
            finite = tensor.isfinite() if tensor.is_floating_point() else None
        if finite is not None and not bool(finite.all()):
            raise SpecDecError(f"tensor '{name}' in '{self.path}' holds NaN or infinite values; train or get it again")
        return tensor


def _scaled(codes: Tensor, scales: Tensor) -> bool:
    return (
        codes.dtype == torch.int8
        and scales.is_floating_point()
        and codes.dim() == scales.dim() > 0
        and codes.shape[:-1] == scales.shape[:-1]
        and 0 < scales.shape[-1] <= codes.shape[-1]
        and codes.shape[-1] % scales.shape[-1] == 0
    )


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize the matrix ``values`` [..., n] to 8 bits: return codes int8 [..., n] and scales bf16 [..., n / g].

    g is ``GROUP``, or n if ``GROUP`` does not divide n.
    """
    size = values.shape[-1]
    groups = values.detach().float().unflatten(-1, (-1, GROUP if size % GROUP == 0 else size))
    scales = (groups.abs().amax(-1) / 127).bfloat16()
    steps = scales.float()[..., None]
    codes = torch.where(steps > 0, groups / steps, 0).round().clamp(-127, 127)
    return codes.to(torch.int8).flatten(-2), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the matrix bf16 [..., n] with codes [..., n] and scales [..., n / g]."""
    values = codes.unflatten(-1, (scales.shape[-1], -1)).bfloat16()  # exact
    values *= scales[..., None]
    return values.flatten(-2)


@contextmanager
def open_tensors(path: Path) -> Iterator[StoredTensors]:
    """Open a safetensors file. Raises SpecDecError if it is missing, truncated or another kind of file."""
    if not path.is_file():
        raise SpecDecError(f"'{path.parent}' is no complete drafter folder: {path.name} is missing")
    what = f"'{path}' is truncated or no safetensors file; copy or train it again"
    with errors_as(what, SafetensorError), safe_open(path, framework="pt") as file:
        yield StoredTensors(path, file)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors in ``folder`` by name. Raises SpecDecError if the file is missing, broken or not finite."""
    with open_tensors(folder / WEIGHTS) as stored:
        return {name: stored.read(name) for name in stored.header}


def load(
    folder: Path, vocab_size: int, make: Callable[[Tensor | None], M], rename: Callable[[str], str] = lambda name: name
) -> M:
    """Return the drafter's module with the weights in ``folder``.

    vocab_size: vocabulary size of the target. make: builds the module, without memory, for a draft vocabulary, int [V']
    (None: all tokens). rename: maps the name of a tensor in the file to its name in the module.
    The module is compared with the file's header before tensors are read. Raises SpecDecError, with the name of the
    tensor, if file and module do not fit, and for impossible values.
    """
    with open_tensors(folder / WEIGHTS) as stored:
        names = {rename(name): name for name in stored.header}
        header = {name: stored.header[of] for name, of in names.items()}
        vocab = draft_vocabulary(folder, stored, vocab_size)
        with without_memory():
            module = make(vocab)
        own = module.state_dict()
        check_fit(folder, own, header)
        tensors = {name: stored.read(of).to(own[name].dtype, copy=True) for name, of in names.items()}
    module.load_state_dict(tensors, assign=True)
    return module


def read_vocabulary(folder: Path, vocab_size: int) -> Tensor | None:
    """Return the draft vocabulary in ``folder``, int [V']; None: all tokens. Raises SpecDecError if it is impossible.

    vocab_size: vocabulary size of the target.
    """
    with open_tensors(folder / WEIGHTS) as stored:
        return draft_vocabulary(folder, stored, vocab_size)


def draft_vocabulary(folder: Path, stored: StoredTensors, vocab_size: int, name: str = "draft_vocab") -> Tensor | None:
    """Return the draft vocabulary in the tensor ``name``, int [V']; None: the file has none.

    folder: for messages. stored: the open file. vocab_size: vocabulary size of the target. Raises SpecDecError if the
    tensor is no list of token ids.
    """
    if (found := stored.header.get(name)) is None:
        return None
    if found.dtype not in INTEGERS.values() or found.dim() != 1 or not 1 <= len(found) <= vocab_size:
        raise SpecDecError(
            f"the draft vocabulary in '{folder}' is {_kind(found)}; it must be a list of 1 .. {vocab_size} whole "
            "numbers"
        )
    vocab = stored.read(name)
    if int(vocab.min()) < 0 or int(vocab.max()) >= vocab_size:
        raise SpecDecError(f"the draft vocabulary in '{folder}' names tokens that the model does not have")
    return vocab


def check_fit(folder: Path, needed: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise SpecDecError unless ``found`` has the names, shapes and kinds (float, integer) of ``needed``.

    needed: the tensors of the drafter's module. found: those of the file, both by name. folder: for messages.
    """
    for name in sorted(needed.keys() | found.keys()):
        kinds = [_kind(part[name]) if name in part else "missing" for part in (needed, found)]
        if kinds[0] != kinds[1]:
            raise SpecDecError(
                f"config.json and model.safetensors in '{folder}' do not fit each other: tensor '{name}' is "
                f"{kinds[1]}; for this model it should be {kinds[0]}"
            )


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else ' of whole numbers'}"


def check_inner_size(name: str, value: Any, hidden_size: int) -> int:
    """Return ``value`` if it is an int from 1 to ``WIDEST`` hidden sizes, else raise SpecDecError.

    name: the field's name in the drafter's config. hidden_size: that of the base model.
    """
    return options.check_int(f"{name} in the drafter's config.json", value, 1, WIDEST * hidden_size)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], storage: str = "") -> None:
    """Write a drafter folder with ``config`` and ``tensors``, each file atomically.

    storage: format of the floating-point tensors: the name of a dtype, or "int8" to quantize large matrices; "": as
    they are. Raises SpecDecError if the folder cannot be written.
    """
    text = json.dumps(config, indent=2) + "\n"
    kept = dict[str, Tensor]()
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not storage:
            kept[name] = tensor
        elif storage != "int8":
            kept[name] = tensor.to(getattr(torch, storage))
        elif tensor.dim() > 1 and tensor.numel() >= LARGE:
            kept[name + CODES], kept[name + SCALES] = quantize(tensor)
        else:
            kept[name] = tensor.float()
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}
    with errors_as(f"cannot write the drafter to '{folder}'"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in ((WEIGHTS, save(contiguous)), (CONFIG, text.encode())):
            files.write_atomically(folder / name, data)


def describe_base(base: Identified, name: str) -> dict[str, Any]:
    """Return the entry ``base`` of the config of a drafter for the model ``base``.

    name: the model's name in messages. The entry has the fingerprint, the sizes and "samples" of the weights' values,
    by which the model is known in other precisions.
    """
    return {
        "fingerprint": base.fingerprint,
        "name": name,
        "model_type": base.model.config.model_type,
        "num_layers": base.num_layers,
        "hidden_size": base.hidden_size,
        "vocab_size": base.vocab_size,
        "samples": identity.samples(base.model),
    }


def find(drafter: str, training: str | None, base: Identified, source: str | None) -> Path:
    """Return the folder of a drafter for the model ``base``: ``source``, or (None) the one in the package.

    drafter: name of the drafter. training: the command that trains one, as in ``not_shipped``, for the error.
    Raises SpecDecError if ``source`` is None and none is shipped for this model.
    """
    folder = find_shipped(drafter, base) if source is None else Path(source)
    if folder is None:
        raise not_shipped(drafter, training, base.model.config._name_or_path)
    return folder


def not_shipped(drafter: str, training: str | None, model: str) -> SpecDecError:
    """Return the error for a ``model`` for which no ``drafter`` is shipped.

    training: the command that trains one, such as "specdec train m2r2"; None: there is none.
    """
    if training is None:
        return SpecDecError(f"no {drafter} drafter is shipped; give one with --drafter {drafter}=DIR or =ORG/NAME")
    return SpecDecError(
        f"no {drafter} drafter is shipped for this model; train one: {training_command(training, model)}, then pass "
        "--drafter DIR"
    )


def training_command(training: str, model: str) -> str:
    """Return the whole command that trains a drafter for ``model``. training: its beginning."""
    return f"{training} --model {model or 'MODEL'} --prompts FILE --output DIR"


def find_shipped(drafter: str, base: Identified) -> Path | None:
    """Return the folder of a trained drafter in the package for the model ``base``; None: there is none.

    drafter: name of the drafter. A folder for exactly this model goes before one for another precision of the model.
    """
    found = list(_shipped(drafter))
    own = (folder for folder, trained in found if _is_of(trained, base))
    near = (folder for folder, trained in found if _difference(trained, base, str(folder)) is None)
    return next(own, None) or next(near, None)


def may_be_shipped(drafter: str, config: Any) -> bool:
    """Return whether the package has a trained ``drafter`` for a model with the architecture and size of ``config``."""
    return any(_of_size(trained, config) for _, trained in _shipped(drafter))


def _shipped(drafter: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the folders ``pretrained/DRAFTER/MODEL`` of ``drafter`` in the package.

    Each comes with the entry ``base`` of its config; {} if it has none.
    """
    root = Path(str(importlib.resources.files("specdec.drafters"))) / "pretrained"
    for path in sorted(root.glob(f"{drafter}/*/{CONFIG}")):
        yield path.parent, read_config(path.parent).get("base", {})


def _of_size(trained: Mapping[str, Any], config: Any) -> bool:
    text = config.get_text_config()
    size = {"num_layers": text.num_hidden_layers, "hidden_size": text.hidden_size, "model_type": config.model_type}
    return all(trained.get(key, value) == value for key, value in size.items())


def _is_of(trained: Mapping[str, Any], base: Identified) -> bool:
    """Return whether a drafter was trained for exactly the model ``base``, or for it without its merged adapter.

    trained: the entry ``base`` of the drafter's config.
    """
    merged = identity.merged_adapter(base.model)
    return trained.get("fingerprint") in (base.fingerprint, None if merged is None else merged.base)


def _difference(trained: Mapping[str, Any], base: Identified, where: str) -> str | None:
    """Return how the model ``base`` differs, by more than rounding, from the one that a drafter was trained for.

    trained: the entry ``base`` of the drafter's config. where: the drafter's folder, for messages.
    None: it does not differ. "": unknown, because the config has no samples.
    """
    if not _of_size(trained, base.model.config):
        return "it is of another architecture or size"
    return identity.difference(trained["samples"], base.model, where) if "samples" in trained else ""


def check_base(config: dict[str, Any], base: Identified, where: str) -> None:
    """Raise SpecDecError if the drafter of ``config`` was trained for another model than ``base``.

    Accepts another precision of the same model, with a note on stderr. where: the drafter's folder, for messages.
    """
    trained = config.get("base", {})
    if _is_of(trained, base):
        return
    why = _difference(trained, base, where)
    if why is None:
        own, other = base.model.config._name_or_path, trained.get("name", "the same model")
        terminal.say(f"note: drafter '{where}' was trained on {other}; '{own}' is another precision of that model")
        return
    raise SpecDecError(
        f"drafter '{where}' was trained for base weights {trained.get('fingerprint')}, but the loaded model's are "
        f"{base.fingerprint}{f' ({why})' if why else ''}; train one for this model with 'specdec train' or load the "
        "model it belongs to"
    )
