"""A device that is not there: tensors that say they are on ``cuda:0``, compute on the CPU, and cannot be mixed.

    python tests/support/elsewhere.py decode | train

Runs every drafter but a second model, or the trainers, on such tensors. As on a GPU, an operation on tensors of two
devices is an error (but for CPU scalars, and indices on the CPU). What this cannot tell: kernels' numbers, streams,
CUDA graphs, speed; and there is no backward pass, in whose place every trained parameter gets some gradient. In a
process of its own, because it registers a CUDA device with PyTorch. Exits with 1 and a line for everything that
failed.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class _NoGrad(torch.no_grad):
    """In place of inference mode, which knows what may be done to tensors of its own only."""

    def __init__(self, *_: Any) -> None:
        super().__init__()


torch.inference_mode = _NoGrad  # before anything is decorated with it

import zoo  # noqa: E402
from tiny import save_tiny, tiny_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from specdec import SpecDecoder  # noqa: E402
from specdec.cli import app  # noqa: E402
from specdec.models import loading  # noqa: E402
from specdec.runtimes import linear_maps  # noqa: E402
from specdec.speculation.draft import DrafterWarning  # noqa: E402

THERE, HERE = torch.device("cuda:0"), torch.device("cpu")
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace { using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>; }
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
"""
COPIES = ("aten::copy_", "aten::_to_copy")
INDEXED = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index")


class Away(Tensor):
    """A tensor on ``THERE`` whose numbers are those of ``inner``."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Away:
        made: Any = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=THERE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def home(x: Any) -> Any:
    return x.inner if isinstance(x, Away) else x


def send(x: Any) -> Any:
    return Away(x) if isinstance(x, Tensor) and not isinstance(x, Away) else x


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on the numbers; its result is where its tensors are, or where it is told."""
    name = func._schema.name
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    away = [x for x in tensors if isinstance(x, Away)]
    strays = [x for x in tensors if not isinstance(x, Away) and x.dim()]
    excused = name in COPIES or (name in INDEXED and isinstance(args[0], Away))
    if away and strays and not excused:
        raise RuntimeError(f"{name}: tensors on two devices: {[(str(x.device), tuple(x.shape)) for x in tensors]}")
    told = kwargs.get("device")
    if told is not None and told.type != "meta":
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"} | {"device": HERE}
    out = func(*tree_map(home, args), **tree_map(home, kwargs))
    if func._schema.is_mutable and name.endswith("_") and isinstance(args[0], Tensor):
        return args[0]
    there = bool(away) if told is None else torch.device(told).type == "cuda"
    return tree_map(send, out) if there else out


class Behind(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Before(TorchFunctionMode):
    """What PyTorch does in C++ with the name of a device, before it comes to an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given, named = getattr(func, "__name__", ""), list(args), dict(kwargs or {})
        if func is torch.device or name == "_parse_to":
            return func(*given, **named)
        if name == "unravel_index":
            with self:
                return tuple(torch.functional._unravel_index(*given, **named).unbind(-1))
        if name == "pin_memory":
            return given[0]
        if name in ("tolist", "item", "cpu") and isinstance(given[0], Away):
            return func(given[0].inner, *given[1:], **named)
        if name == "numpy" and isinstance(given[0], Away):
            raise TypeError("can't convert a cuda:0 tensor to numpy")
        if name == "to" and len(given) > 1 and isinstance(given[1], Tensor):
            given[1:2] = [given[1].device, given[1].dtype]
        told: torch.device | None = None
        for at, value in enumerate(given):
            if at and (isinstance(value, torch.device) or value == "cpu" or value == "cuda"):
                told, given[at] = torch.device(value), HERE
        meta = str(named.get("device")) == "meta"  # where models are made before their weights are loaded: left alone
        if isinstance(named.get("device"), torch.device | str) and not meta:
            told, named["device"] = torch.device(named["device"]), HERE
        if told is None:
            return self._plain(func, given, named)
        if name == "to" and told.type == "cuda" and isinstance(given[0], Away):
            kinds = [x for x in (*given[1:], named.get("dtype")) if isinstance(x, torch.dtype)]
            return func(given[0], *kinds) if kinds else given[0]
        out = func(*tree_map(home, given), **named)
        return tree_map(send, out) if told.type == "cuda" else out

    def _plain(self, func: Any, given: list[Any], named: dict[str, Any]) -> Any:
        try:
            return func(*given, **named)
        except NotImplementedError as error:  # makes a tensor of numbers beneath all modes
            if "CUDA" not in str(error):
                raise
            return tree_map(send, func(*tree_map(home, given), **tree_map(home, named)))


def move(module: nn.Module) -> nn.Module:
    """All parameters and buffers of a module there."""
    for part in module.modules():
        for values in (part._parameters, part._buffers):
            for key, value in values.items():
                if value is not None and not isinstance(value, Away):
                    there: Tensor = Away(value.detach())
                    if isinstance(value, nn.Parameter):
                        there = nn.Parameter(there, requires_grad=value.requires_grad)
                    values[key] = there
    return module


def some_gradients(loss: Tensor, *_: Any) -> None:
    """In place of ``backward``: every parameter that the loss depends on gets one."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (parameter := getattr(node, "variable", None)) is not None:
            parameter.grad = torch.zeros_like(parameter) + 0.01
        left += [following for following, _ in node.next_functions]


class Event:
    """A stamp in the work of the device that is not there."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, stream: object = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Make the device be there, as far as it can be, for the rest of the process."""
    with tempfile.TemporaryDirectory() as folder:
        root, source, made = Path(torch.__file__).parent, Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{root / 'include'}", str(source)]
        command += [f"-L{root / 'lib'}", "-lc10", "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True)
        ctypes.CDLL(str(made))
    stand_ins: Any = torch.cuda
    stand_ins._lazy_init = stand_ins.synchronize = stand_ins.set_device = lambda *_: None
    stand_ins.get_device_name, stand_ins.device_count = (lambda *_: "elsewhere"), lambda: 1
    stand_ins.mem_get_info = lambda *_: (1 << 34, 1 << 34)
    stand_ins.Event, stand_ins.current_stream = Event, lambda *_: None
    warnings.simplefilter("error", DrafterWarning)  # else decoding goes on without what fails
    usual = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not any(str(x).startswith("cuda") for x in (*args, kwargs.get("device"))):
            return usual(self, *args, **kwargs)
        for kind in (x for x in (*args, kwargs.get("dtype")) if isinstance(x, torch.dtype)):
            usual(self, kind)
        with torch.no_grad():
            return move(self)

    changed: Any = nn.Module
    changed.to = to
    anything: Any = Tensor
    anything.backward = some_gradients
    pieces: Any = linear_maps
    pieces._stack = lambda parts: torch.cat([part.detach() for part in parts])  # views need memory's addresses
    checks: Any = loading
    checks._try_out = lambda *_: None
    with Before(), Behind():
        with contextlib.suppress(RuntimeError):
            torch.ones(2, device="cuda") + torch.ones(2)
            sys.exit("tensors of two devices can be mixed: nothing is shown by this")
        yield


def place_of(error: BaseException) -> str:
    """Where in our files an error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    return ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames if "site-packages" not in f.filename)


def decode() -> list[str]:
    """Every drafter, greedy for one row and sampling for ragged ones; greedy outputs are those of the CPU."""
    plain, faults = SpecDecoder(tiny_model("llama"), drafter="none", runtime="fused"), []
    settings: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True, "num_speculative_tokens": 3}
    expected = plain.generate(zoo.PROMPTS[0], **settings).token_ids
    with elsewhere():
        model: Any = move(tiny_model("llama"))
        decoder = SpecDecoder(model, drafter="none", runtime="fused")
        for name, drafter in zoo.every(decoder.target).items():
            if name.startswith("draft-model"):  # its second model is on the CPU
                continue
            for temperature in (0.0, 0.8):
                try:
                    prompts = zoo.PROMPTS if temperature else zoo.PROMPTS[:1]
                    made = decoder.with_drafter(drafter).generate_batch(prompts, temperature=temperature, **settings)
                    if not temperature and made[0].token_ids != expected:
                        faults.append(f"{name}: another output than on the CPU")
                except Exception as error:
                    faults.append(f"{name}, temperature {temperature}: {str(error)[:200]} ({place_of(error)})")
    return faults


def train() -> list[str]:
    """The command, from prompts to a drafter: answers, states, updates, evaluation, a checkpoint."""
    own = {
        "m2r2": "segments: [[2, 4]]\nfinal_projection: true\nrank: 2\n",
        "medusa": "",
        "deed": "exits: [1, 2, 3]\n",
        "mixture-of-depths": "",
    }
    faults = []
    with tempfile.TemporaryDirectory() as name, elsewhere():
        folder = Path(name)
        prompts = folder / "prompts.txt"
        prompts.write_text("".join(f"question {n}\n" for n in range(8)))
        model = str(save_tiny(folder / "model"))
        for method, settings in own.items():
            preset = folder / f"{method}.yaml"
            small = "draft_vocab: 50\nrows: 4\nwindow: 8\nmax_new_tokens: 8\neval_fraction: 0.25\n"
            preset.write_text(settings + small)
            command = ["train", method, "--model", model, "--prompts", str(prompts), "--output", str(folder / method)]
            command += ["--preset", str(preset), "--dtype", "float32", "--steps", "2", "--device", "cuda"]
            result = CliRunner().invoke(app, command)
            if result.exit_code or not (folder / method / "model.safetensors").exists():
                faults.append(f"{method}: {result.output[-2000:]}")
    return faults


if __name__ == "__main__":
    found = {"decode": decode, "train": train}[sys.argv[1]]()
    print("\n".join(found))
    sys.exit(bool(found))
