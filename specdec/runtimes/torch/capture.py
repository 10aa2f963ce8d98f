"""Captured functions: functions of tensors that are recorded once, as CUDA graphs, and replayed.

On a GPU, launching many small kernels one by one takes longer than running them; a replay launches all at once. A
captured function is recorded over tensors at fixed addresses, and replayed after new values are copied into these. It
must neither read its results on the CPU nor depend on values there. A function that is called inside a captured one is
not captured itself.
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
    """Return whether this thread is inside a function that is being captured as a CUDA graph.

    Such a function must not read tensors on the CPU, and functions that it calls are not captured themselves.
    """
    return getattr(_thread, "inside", False)


@contextmanager
def _inside() -> Iterator[None]:
    _thread.inside = True
    try:
        yield
    finally:
        _thread.inside = False


class CudaRecorder:
    """Records functions as CUDA graphs on one device. Calling it with a function returns one that replays the graph.

    The functions have no arguments and no results. All graphs share one memory pool, and one side stream on which each
    function runs once before it is recorded.

    device: the CUDA device.
    """

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
    """A function of tensors that is recorded once, as a CUDA graph, over inputs at fixed addresses, then replayed.

    It keeps alive all that the function reads. The constructor records: it runs the function a few times with the
    present values of ``inputs``, which must do no harm, such as writing into a sequence in use.

    function: takes ``inputs`` and returns a sequence of tensors.
    inputs: the tensors into which each call copies its arguments.
    record: records a function without arguments, and returns a function that replays it on the same memory.
    outputs: tensors at fixed addresses that each replay writes the results to.
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
        """Copy the arguments into the fixed inputs, replay the function, and return its outputs.

        The outputs are the same tensors at every call: the next call overwrites them.

        whole: values of the first inputs, of the same shapes as these.
        rows: values of the remaining inputs, of B rows (sequences) each. They may be smaller than the fixed inputs; the
            rest is then set to zero.
        lanes: indices along the first axis of the fixed inputs at which the rows are put, int64 [B]; None: the first B
            indices.
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
    """Flatten nested tuples of tensors and None into a list of tensors.

    Returns a tuple of three: the list of tensors without the Nones; the shape of each leaf, None for a None; and a
    function that takes a list of as many tensors and returns them in the same nesting, with the Nones.

    parts: the nested tuples.
    """
    leaves, spec = tree_flatten(parts)
    shapes = tuple(None if leaf is None else leaf.shape for leaf in leaves)

    def rebuild(tensors: Sequence[Tensor]) -> Any:
        left = iter(tensors)
        return tree_unflatten([None if shape is None else next(left) for shape in shapes], spec)

    return [leaf for leaf in leaves if leaf is not None], shapes, rebuild
