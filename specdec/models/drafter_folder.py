"""Read and write trained drafters: folders with ``config.json`` and ``model.safetensors``.

Files are untrusted. Counts in a config are bounded. The drafter's module is built without memory and compared with the
header of the weights before they are read, and weights must be finite. A config names its drafter (field ``drafter``)
and the base model that it was trained for (field ``base``): by a fingerprint of the model's weights and, to recognize
the model in other precisions, by sampled values of them. This module knows no particular drafter.

A matrix NAME may be stored quantized to 8 bits, as the tensors ``NAME.codes``, int8 [..., n], and ``NAME.scales``, bf16
[..., n / g]: g consecutive values have one scale. It is read as bf16.
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
    """A protocol for a loaded model as the base of a drafter, such as a ``Target``: its sizes and its fingerprint.

    model: the module, with a ``config`` as transformers has it.
    fingerprint: 32 hex digits, a hash of sampled weights; the same model in another precision has another one.
    num_layers: number of decoder layers.
    hidden_size: width of the hidden states.
    vocab_size: number of tokens in the vocabulary.
    """

    model: Any
    fingerprint: str
    num_layers: int
    hidden_size: int
    vocab_size: int


def read_config(folder: Path, drafter: str | None = None, base: Identified | None = None) -> dict[str, Any]:
    """Return the content of a drafter folder's ``config.json``, also of one in the format of the library speculators.

    The result has at least "drafter", the drafter's name. If it has "base", that is a mapping (``describe_base``).
    drafter: name of the drafter that the folder must have; None: any drafter.
    base: the model that the drafter must have been trained for, in any precision; None: any model.
    Raises SpecDecError if the config is missing or broken, or is for another drafter or model.
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
    """Return the value in a JSON file. Raises SpecDecError if it is broken, unreadable or larger than 4 MB."""
    with errors_as(f"cannot read '{path}'", ValueError):
        return inputs.parse_json(inputs.read_text(path, CONFIG_BYTES))


class StoredTensors:
    """The tensors of an opened safetensors file. A matrix stored in 8 bits, as codes and scales, counts as one tensor.

    The constructor reads names, dtypes and shapes, and raises SpecDecError for those that no drafter can have. ``read``
    reads values.

    path: the file's path, for messages.
    file: the file, opened by ``safetensors.safe_open``; it must stay open.
    header: for each tensor name, a tensor without values (on the device "meta") with its shape and dtype.
    coded: names of the matrices that are stored in 8 bits, which ``read`` dequantizes.
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
        """Return the tensor ``name`` on the CPU; a matrix stored in 8 bits is dequantized to bf16.

        Raises SpecDecError if it has NaN or infinite values.
        """
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
    """Quantize the matrix ``values`` [..., n] to 8 bits; return (codes int8 [..., n], scales bf16 [..., n / g]).

    Each group of g consecutive values has one scale, and code times scale approximates a value. g is 32, or n if 32
    does not divide n.
    """
    size = values.shape[-1]
    groups = values.detach().float().unflatten(-1, (-1, GROUP if size % GROUP == 0 else size))
    scales = (groups.abs().amax(-1) / 127).bfloat16()
    steps = scales.float()[..., None]
    codes = torch.where(steps > 0, groups / steps, 0).round().clamp(-127, 127)
    return codes.to(torch.int8).flatten(-2), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the bf16 matrix [..., n] of int8 ``codes`` [..., n] and ``scales`` [..., n / g]: codes times scales.

    Each group of g consecutive values has one scale.
    """
    values = codes.unflatten(-1, (scales.shape[-1], -1)).bfloat16()  # exact
    values *= scales[..., None]
    return values.flatten(-2)


@contextmanager
def open_tensors(path: Path) -> Iterator[StoredTensors]:
    """Open the safetensors file ``path`` of a drafter folder, and close it after the ``with`` block.

    Raises SpecDecError if it is missing, truncated or no safetensors file.
    """
    if not path.is_file():
        raise SpecDecError(f"'{path.parent}' is no complete drafter folder: {path.name} is missing")
    what = f"'{path}' is truncated or no safetensors file; copy or train it again"
    with errors_as(what, SafetensorError), safe_open(path, framework="pt") as file:
        yield StoredTensors(path, file)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of the drafter in ``folder`` by name, on the CPU; matrices stored in 8 bits are dequantized.

    Raises SpecDecError if the file with them is missing or broken, or a value is NaN or infinite.
    """
    with open_tensors(folder / WEIGHTS) as stored:
        return {name: stored.read(name) for name in stored.header}


def load(
    folder: Path, vocab_size: int, make: Callable[[Tensor | None], M], rename: Callable[[str], str] = lambda name: name
) -> M:
    """Build a drafter's module and return it with the weights in ``folder``, on the CPU.

    vocab_size: vocabulary size of the target model. make: returns the module; it is called once, where new tensors are
    on the device "meta", with the ids of the tokens that the drafter can draft, an int vector (None: all tokens).
    rename: maps a tensor's name in the file to the name of the module's parameter. Values get the module's dtypes.
    Module and file header are compared before tensors are read. Raises SpecDecError, with the name of the tensor, if
    names or shapes differ, if only one of both is floating-point, and for values that are not finite.
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
    """Return the ids of the tokens that the drafter in ``folder`` can draft, an int vector; None: all tokens.

    vocab_size: vocabulary size of the target model. Raises SpecDecError if the stored vector has other numbers than
    token ids of the target.
    """
    with open_tensors(folder / WEIGHTS) as stored:
        return draft_vocabulary(folder, stored, vocab_size)


def draft_vocabulary(folder: Path, stored: StoredTensors, vocab_size: int, name: str = "draft_vocab") -> Tensor | None:
    """Return the ids of the tokens that a drafter can draft, an int vector, from an opened safetensors file.

    Returns None if the file has no such tensor: the drafter can draft all tokens.
    folder: the drafter's folder, for messages. stored: the opened file. vocab_size: vocabulary size of the target
    model. name: name of the tensor with the ids.
    Raises SpecDecError if the tensor is no vector, or has other numbers than token ids of the target.
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
    """Raise SpecDecError unless a drafter's file has the tensor names and shapes that its module needs.

    Tensors of whole numbers and of floats must not be swapped, either; a float may have another precision.
    folder: the drafter's folder, for messages. needed: the tensors of the module by name. found: the tensors of the
    file by name. No values are read, so both may be on the device "meta".
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
    """Return ``value`` if it is an int from 1 to 16 times ``hidden_size``; raise SpecDecError otherwise.

    name: the field's name in the drafter's config, for the message. hidden_size: width of the base model.
    """
    return options.check_int(f"{name} in the drafter's config.json", value, 1, WIDEST * hidden_size)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], storage: str = "") -> None:
    """Write a drafter folder with ``config`` as config.json and ``tensors`` as model.safetensors, each file atomically.

    folder: made if it is missing; older files in it are replaced. tensors: the drafter's tensors by name, on any
    device. storage: how floating-point tensors are stored: PyTorch's name of a dtype, such as "bfloat16", or "int8" to
    quantize large matrices to 8 bits and store other tensors in float32; "": unchanged.
    Raises SpecDecError if the folder cannot be written.
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
    """Return the field ``base`` of a drafter's config: a JSON object that identifies the model ``base``.

    Its keys are "fingerprint", "name", "model_type", "num_layers", "hidden_size", "vocab_size", and "samples": sampled
    values of the weights, which identify the model in other precisions.
    name: the model's name, for messages when the drafter is loaded.
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
    """Return the folder of a trained drafter for the model ``base``.

    drafter: name of the drafter. training: the command that trains one, such as "specdec train m2r2", for the error
    message; None: there is none. source: the folder that the user gave, which is returned unchecked; None: the one in
    this package for ``base``.
    Raises SpecDecError if ``source`` is None and the package has no such drafter for ``base``.
    """
    folder = find_shipped(drafter, base) if source is None else Path(source)
    if folder is None:
        raise not_shipped(drafter, training, base.model.config._name_or_path)
    return folder


def not_shipped(drafter: str, training: str | None, model: str) -> SpecDecError:
    """Return (not raise) the error that says that this package has no trained drafter for a model, and how to get one.

    drafter: name of the drafter. training: the command that trains one, such as "specdec train m2r2"; None: there is
    none. model: name of the model.
    """
    if training is None:
        return SpecDecError(f"no {drafter} drafter is shipped; give one with --drafter {drafter}=DIR or =ORG/NAME")
    return SpecDecError(
        f"no {drafter} drafter is shipped for this model; train one: {training_command(training, model)}, then pass "
        "--drafter DIR"
    )


def training_command(training: str, model: str) -> str:
    """Return the text of the command that trains a drafter for a model, for messages.

    training: the start of the command, such as "specdec train m2r2". model: the model's name; "": unknown, so that the
    command has a placeholder.
    """
    return f"{training} --model {model or 'MODEL'} --prompts FILE --output DIR"


def find_shipped(drafter: str, base: Identified) -> Path | None:
    """Return the folder of the trained drafter in this package for the model ``base``; None: there is none.

    drafter: name of the drafter. A folder that was trained for exactly these weights is preferred to one that was
    trained for the same model in another precision.
    """
    found = list(_shipped(drafter))
    own = (folder for folder, trained in found if _is_of(trained, base))
    near = (folder for folder, trained in found if _difference(trained, base, str(folder)) is None)
    return next(own, None) or next(near, None)


def may_be_shipped(drafter: str, config: Any) -> bool:
    """Return whether this package has a trained drafter for some model with the type and sizes in ``config``.

    drafter: name of the drafter. config: the model's config, a ``Config`` or one of transformers. Weights are not
    compared, so ``find_shipped`` may still find none.
    """
    return any(_of_size(trained, config) for _, trained in _shipped(drafter))


def _shipped(drafter: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield (folder, base) of each trained drafter in this package that has the name ``drafter``, sorted by folder.

    base: the object ``base`` in the drafter's config, which identifies the model that it was trained for; {} if the
    config has none.
    """
    root = Path(str(importlib.resources.files("specdec.drafters"))) / "pretrained"
    for path in sorted(root.glob(f"{drafter}/*/{CONFIG}")):
        yield path.parent, read_config(path.parent).get("base", {})


def _of_size(trained: Mapping[str, Any], config: Any) -> bool:
    text = config.get_text_config()
    size = {"num_layers": text.num_hidden_layers, "hidden_size": text.hidden_size, "model_type": config.model_type}
    return all(trained.get(key, value) == value for key, value in size.items())


def _is_of(trained: Mapping[str, Any], base: Identified) -> bool:
    """Return whether a drafter was trained for exactly the weights of ``base``.

    trained: the object ``base`` in the drafter's config, with the fingerprint of the model it was trained for. If
    ``base`` has a merged LoRA adapter, its weights before the merge also count.
    """
    merged = identity.merged_adapter(base.model)
    return trained.get("fingerprint") in (base.fingerprint, None if merged is None else merged.base)


def _difference(trained: Mapping[str, Any], base: Identified, where: str) -> str | None:
    """Return how ``base`` differs, by more than rounding, from the model that a drafter was trained for, as text.

    trained: the object ``base`` in the drafter's config, which identifies that model. where: the drafter's folder, for
    messages. Returns None if the models do not differ, and "" if that is unknown, because the config has no sampled
    values.
    """
    if not _of_size(trained, base.model.config):
        return "it is of another architecture or size"
    return identity.difference(trained["samples"], base.model, where) if "samples" in trained else ""


def check_base(config: dict[str, Any], base: Identified, where: str) -> None:
    """Raise SpecDecError if the drafter with this ``config`` was trained for another model than ``base``.

    where: the drafter's folder, for messages. The same model in another precision is accepted, with a note on stderr.
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
