"""A stand-in for an accelerator: tensors whose numbers the host has only if it reads them.

It refuses operations on tensors of both sides, and counts reads and uploads that would wait for a device. Its numbers
are those of tensors on the CPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("standin")  # type: ignore[no-untyped-call]
DEVICE = torch.device("standin:0")
READS = "_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero"
INDEXED = "index", "index_put_", "index_put", "_index_put_impl_"
# Operations that launch nothing.
VIEWS = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "diagonal", "empty", "empty_like"),
    *("empty_strided", "expand", "lift_fresh", "new_empty", "permute", "select", "slice", "split", "split_with_sizes"),
    *("squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view"),
}
reads, uploads, launches, replays, recordings = (Counter[str]() for _ in range(5))
captured = [False]  # whether a captured function runs


class Trace:
    """The operations of a captured function, with the addresses of tensors that were made outside of it."""

    def __init__(self) -> None:
        self.seen, self.made, self.inside = list[tuple[Any, ...]](), list[Tensor](), set[int]()

    def add(self, name: str, given: Sequence[Tensor], found: Any) -> None:
        places = (each.untyped_storage().data_ptr() for each in given)
        self.seen.append((name, *("made" if place in self.inside else place for place in places)))
        for each in found if isinstance(found, list | tuple) else [found]:
            if isinstance(each, Tensor):
                self.made.append(each)  # no other tensor may get its memory
                self.inside.add(each.untyped_storage().data_ptr())


trace: list[Trace] = []  # of the captured function that runs


def record(run: Callable[[], None]) -> Callable[[], None]:
    """A recorder that runs the function again, and fails where a graph would do something else."""

    def replay() -> list[tuple[Any, ...]]:
        captured[0] = True
        replays["replay"] += 1
        waits = reads.total(), uploads.total()
        trace[:] = [Trace()]
        try:
            run()
        finally:
            captured[0] = False
            [own], trace[:] = list(trace), []
        assert waits == (reads.total(), uploads.total()), f"a captured function waits: {reads} {uploads}"
        return own.seen

    recorded = replay()
    recordings["record"] += 1

    def again() -> None:
        now = replay()
        if now != recorded:
            other = [pair for pair in zip(recorded, now, strict=False) if pair[0] != pair[1]][:1]
            raise AssertionError(
                f"a graph would do what was recorded, on the same memory: {other or 'fewer operations'}"
            )

    return again


class Remote(Tensor):
    """A tensor of the device. raw: its numbers."""

    @staticmethod
    def __new__(cls, raw: Tensor) -> Remote:
        assert raw.dtype != torch.float64, "some devices, such as mps, have no float64"
        kind = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype, "device": DEVICE}
        return torch.Tensor._make_wrapper_subclass(cls, raw.size(), **kind)  # type: ignore[no-any-return, attr-defined]

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        reads["tolist"] += 1
        return self.raw.tolist()

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_index(index))

    def __setitem__(self, index: Any, values: Any) -> None:
        super().__setitem__(_index(index), values)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Remote({self.raw})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class FakeDevice(TorchDispatchMode):
    """In this mode tensors that are made for the device are its own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _index(index: Any) -> Any:
    """An index of a tensor of the device. A list is an upload, and so is a tensor of the host."""

    def one(part: Any) -> Any:
        if isinstance(part, list | range) or (isinstance(part, Tensor) and not isinstance(part, Remote) and part.dim()):
            uploads["index"] += 1
            return Remote(torch.as_tensor(part if isinstance(part, Tensor) else list(part)))
        return part

    return tuple(map(one, index)) if isinstance(index, tuple) else one(index)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.__name__.partition(".")[0]
    own, others = list[Remote](), list[Tensor]()

    def unwrap(each: Any) -> Any:  # ``tree_map`` takes many times as long
        if isinstance(each, Remote):
            own.append(each)
            return each.raw
        if isinstance(each, Tensor):
            others.append(each)
        if isinstance(each, list | tuple):
            return [unwrap(part) for part in each]
        return each

    inner, named = [unwrap(each) for each in args], {key: unwrap(each) for key, each in kwargs.items()}
    if own and name not in ("copy_", "_to_copy") and any(each.dim() for each in others):
        if name not in INDEXED:
            raise RuntimeError(f"{func} of tensors on several devices")
        uploads[name] += 1
    if name in READS and own:
        reads[name] += 1
    if own and name not in VIEWS and not captured[0]:
        launches[name] += 1
    made = bool(own)
    if (target := kwargs.get("device")) is not None:
        made, named = torch.device(target).type == "standin", named | {"device": torch.device("cpu")}
        if name == "_to_copy" and own and not made:
            reads["to"] += 1
        if name == "_to_copy" and made and not own:
            uploads["to"] += 1
    if name == "copy_" and own:
        if not isinstance(args[0], Remote):
            reads[name], made = reads[name] + 1, False
        elif not isinstance(args[1], Remote):
            uploads[name] += 1
    if name == "_local_scalar_dense":
        made = False
    back = {id(each.raw): each for each in own} | {id(each): each for each in others}

    def wrap(found: Any) -> Any:
        if isinstance(found, list | tuple):
            return tuple(wrap(part) for part in found) if isinstance(found, tuple) else [wrap(part) for part in found]
        if not isinstance(found, Tensor):
            return found
        return back[id(found)] if id(found) in back else Remote(found) if made else found

    result = func(*inner, **named)
    if trace:
        trace[0].add(name, [*(each.raw for each in own), *others], result)
    return wrap(result)


def upload(values: Any, device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """``devices.upload``, which does not wait."""
    if isinstance(values, Remote):
        return values
    made = torch.as_tensor(values, dtype=dtype)
    return Remote(made) if device.type == "standin" else made


def move(module: Any) -> None:
    """Move the parameters and buffers of a module to the device; other objects stay as they are."""
    for part in module.modules() if isinstance(module, nn.Module) else ():
        for held in (part._parameters, part._buffers):
            for name, values in held.items():
                if values is not None and not isinstance(values.data, Remote):
                    raw = Remote(values.detach().clone())
                    held[name] = nn.Parameter(raw, requires_grad=False) if held is part._parameters else raw


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine use the device, whose tensors know no inference mode: gradients are off in its place."""

    def enter(self: Any) -> None:
        self.before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)

    def leave(self: Any, *_: object) -> None:
        torch.set_grad_enabled(self.before)  # a result that is true would hide errors

    monkeypatch.setattr(torch.inference_mode, "__enter__", enter)
    monkeypatch.setattr(torch.inference_mode, "__exit__", leave)
    monkeypatch.setattr(torch, "is_inference_mode_enabled", lambda: True)
    for name, module in [*sys.modules.items()]:
        if name.startswith("specdec.") and hasattr(module, "upload"):
            monkeypatch.setattr(module, "upload", upload)
