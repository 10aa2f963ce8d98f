"""Weights mapped from a file: their memory is given back once a runtime holds its own form, and nothing is lost."""

import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import model_of
from transformers import AutoModelForCausalLM

from specdec.base import memory
from specdec.base.errors import SpecDecError
from specdec.models import identity
from specdec.runtimes.native import library
from specdec.runtimes.native.target import NativeTarget

if not Path("/proc/self/pagemap").exists():
    pytest.skip("needs /proc/self/pagemap", allow_module_level=True)


def present(tensor: torch.Tensor) -> float:
    """The share of the tensor's whole pages that are in this process's memory."""
    first, last = -(-tensor.data_ptr() // mmap.PAGESIZE), (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(8 * first)
        entries = torch.frombuffer(bytearray(file.read(8 * (last - first))), dtype=torch.int64)
    return (entries < 0).float().mean().item()


def test_pages_of_a_file_are_given_back_and_come_again(tmp_path: Path) -> None:
    weights = torch.randn(300, 1000)
    save_file({"w": weights}, tmp_path / "w.safetensors")
    mapped = load_file(tmp_path / "w.safetensors")["w"]
    assert torch.equal(mapped, weights) and present(mapped) == 1
    assert memory.release(mapped) > 0 and present(mapped) == 0
    assert torch.equal(mapped, weights)


def test_what_was_written_to_is_never_given_back(tmp_path: Path) -> None:
    weights = torch.randn(300, 1000)
    save_file({"w": weights}, tmp_path / "w.safetensors")
    mapped = load_file(tmp_path / "w.safetensors")["w"]
    mapped[120, 7] = 5
    weights[120, 7] = 5
    assert memory.release(mapped) == memory.release(weights) == 0
    assert torch.equal(mapped, weights)
    assert memory.release(weights.t(), torch.empty(9, device="meta")) == 0


def test_the_native_runtime_leaves_the_models_weights_in_their_file(tmp_path: Path) -> None:
    try:
        library.load()
    except SpecDecError as error:
        pytest.skip(str(error))
    model_of("llama", vocab_size=4096).save_pretrained(tmp_path)
    ids = torch.arange(3, 9)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert identity.fingerprint(model)
    NativeTarget(model)
    linears = [p for name, p in model.named_parameters() if name.endswith(("proj.weight", "lm_head.weight"))]
    assert len(linears) == 29 and max(map(present, linears)) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    other.load_state_dict(before)
    assert torch.equal(model(ids).logits, other(ids).logits)
