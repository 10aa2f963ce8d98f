"""Captured functions: on a GPU, launching many small kernels takes longer than running them.

A captured function is recorded once, over tensors at fixed addresses, and replayed after these are filled. It must
neither read its results nor depend on the host. What it calls runs as it is: nothing is captured inside of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Function = Callable[..., Sequence[Tensor]]
Record = Callable[[Callable[[], None]], Callable[[], None]]  # a function -> its replay, on the same memory

_thread = threading.local()


def capturing() -> bool:
    """Return whether this thread runs a captured function."""
    return getattr(_thread, "inside", False)


@contextmanager
def _inside() -> Iterator[None]:
    _thread.inside = True
    try:
        yield
    finally:
        _thread.inside = False


class CudaRecorder:
    """Captures functions on a CUDA device; they share one memory pool, and one stream on which they warm up."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):  # streams belong to the current device
            self.pool, self.aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            self.aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.aside):
                run()  # libraries allocate memory at first use, which cannot be captured
            torch.cuda.current_stream().wait_stream(self.aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # others use the device
                run()
        return graph.replay


class Captured:
    """A captured function of tensors at fixed addresses. It keeps alive what the function reads.

    function: takes ``inputs``. It is recorded with what they are now, which must be harmless.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor], record: Record) -> None:
        self.function = function
        self.inputs = inputs
        with _inside():
            self.outputs = [torch.empty_like(y) for y in function(*inputs)]

        def run() -> None:
            with _inside():
                for out, y in zip(self.outputs, function(*inputs), strict=True):
                    out.copy_(y)

        self.replay = record(run)

    def __call__(
        self, whole: Sequence[Tensor], rows: Sequence[Tensor] = (), lanes: Tensor | None = None
    ) -> Sequence[Tensor]:
        """Run the function, and return its results, which the next call writes over.

        whole: the first inputs. rows: the other ones, of B rows, each as large as the function's own or smaller: the
            rest is zero then.
        lanes: where the rows are in the first axis, int64 [B]; None: they are the first ones.
        """
        for held, x in zip(self.inputs, whole, strict=False):
            held.copy_(x)
        for held, x in zip(self.inputs[len(whole) :], rows, strict=True):
            if held.shape != x.shape:
                held.zero_()  # padding is finite: a mask does not hide NaN
            held[(slice(len(x)) if lanes is None else lanes, *map(slice, x.shape[1:]))] = x
        self.replay()
        return self.outputs


def flattened(parts: Any) -> tuple[list[Tensor], tuple[torch.Size | None, ...], Callable[[Sequence[Tensor]], Any]]:
    """Take nested tuples of tensors and None apart.

    Returns the tensors; the shape of each part, None for None; and a function that puts other tensors in their places.
    """
    leaves, spec = tree_flatten(parts)
    shapes = tuple(None if leaf is None else leaf.shape for leaf in leaves)

    def rebuild(tensors: Sequence[Tensor]) -> Any:
        left = iter(tensors)
        return tree_unflatten([None if shape is None else next(left) for shape in shapes], spec)

    return [leaf for leaf in leaves if leaf is not None], shapes, rebuild
