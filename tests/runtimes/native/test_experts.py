"""Experts of native models on the disk: the same logits, a share in memory, chosen by itself where there is no room."""

import ctypes
import errno
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from passes import in_blocks, next_logits, play
from targets import needs_native
from tiny import rough_model, save_tiny_moe, sizes_of, tamed
from tiny_gguf import write_family
from transformers import AutoModelForCausalLM, MixtralConfig

from specdec import SpecDecoder
from specdec.base import machine, memory
from specdec.base.errors import SpecDecError
from specdec.bench import pass_times
from specdec.models import loading
from specdec.models.gguf.blocks import BlockExperts
from specdec.runtimes.native.experts import MappedExperts, _Layer
from specdec.runtimes.native.target import NativeTarget

pytestmark = [needs_native, pytest.mark.usefixtures("two_threads", "cache")]
PROMPT, COUNT = [5, 9, 11, 3, 7, 20, 31], 24


def mixture(family: str = "olmoe") -> Any:
    return in_blocks(family, ("Q5_0",), num_local_experts=6, num_experts=6, num_experts_per_tok=2)


def stored(path: Path, family: str = "gpt_oss") -> Path:
    model = rough_model(family, **sizes_of(family), num_local_experts=6, num_experts=6)
    return write_family(path / "it.gguf", tamed(model), "Q8_0")


@pytest.mark.parametrize(("family", "cache"), [("olmoe", 2 / 6), ("olmoe", 1.0), ("gpt_oss", 0.5), ("qwen3_next", 0.5)])
def test_logits_are_those_of_experts_in_memory_to_the_bit(family: str, cache: float) -> None:
    expected, target = NativeTarget(mixture(family)), NativeTarget(mixture(family), expert_cache=cache)
    assert expected.experts is None and isinstance(target.experts, MappedExperts)
    assert target.experts.slots == round(6 * cache) and target.bytes_read == expected.bytes_read
    for ours, theirs in zip(play(target), play(expected), strict=True):
        assert torch.equal(ours, theirs)


@torch.inference_mode()
def test_a_layer_keeps_the_experts_that_were_used_last() -> None:
    target, chosen = NativeTarget(mixture(), expert_cache=0.5), dict[int, list[list[int]]]()
    experts = target.experts
    for layer in experts.layers:
        experts.layers[layer].there.clear()
    demand = experts._demand

    def noted(layer: int, count: int, groups: Any, *more: Any) -> int:
        chosen.setdefault(layer, []).append(groups[: 3 * count : 3])
        return demand(layer, count, groups, *more)

    call = type(experts.call)(noted)
    target.packed.struct.demand = ctypes.cast(call, ctypes.c_void_p)
    before, cache = experts.counters.since(type(experts.counters)()), target.new_cache()
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(7))
    for begin, end in ((0, 20), *((at, at + 1) for at in range(20, 40))):
        next_logits(target, cache, ids[:, begin:end])
    last, misses, demanded = max(chosen), 0, 0
    for layer, passes in chosen.items():
        there = list[int]()
        for wanted in passes:
            there = there[max(len(there) - 3, 0) :]
            misses, demanded = misses + len({*wanted} - {*there}), demanded + len(wanted)
            there = [expert for expert in there if expert not in wanted] + wanted
        assert list(experts.layers[layer].there) == (there if layer == last else there[-3:])
    figures = experts.counters.since(before)
    assert (figures.misses, figures.demanded) == (misses, demanded)
    assert 0 < misses < demanded and figures.bytes_read == misses * experts.shape[2]
    page, layer = os.sysconf("SC_PAGESIZE"), experts.layers[0]
    for expert, (start, size) in enumerate(layer.places):  # dropped ones are not in the system's memory
        pages = (ctypes.c_ubyte * (size // page))()
        ctypes.CDLL(None).mincore(ctypes.c_void_p(layer.memory.data_ptr() + start), ctypes.c_size_t(size), pages)
        assert all(each & 1 for each in pages) == (expert in layer.there)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next", "qwen3_5_moe_text"])
def test_a_file_decodes_natively_and_its_loads_are_counted(tmp_path: Path, family: str) -> None:
    path = stored(tmp_path, family)
    expected = SpecDecoder.from_pretrained(path, "none").generate(PROMPT, max_new_tokens=COUNT, ignore_eos=True)
    assert not expected.metrics.experts
    decoder = SpecDecoder.from_pretrained(path, "prompt-lookup", expert_cache=0.5)
    found = decoder.generate(PROMPT, max_new_tokens=COUNT, ignore_eos=True)
    assert decoder.target.runtime == "native" and "3 of 6 experts per layer" in decoder.target.experts.describe()
    assert found.token_ids == expected.token_ids
    size = int(math.prod(decoder.target.experts.shape) * 0.6)  # in bytes: as --expert-cache 300MB gives it
    by_bytes = SpecDecoder.from_pretrained(path, "none", expert_cache=size)
    assert "3 of 6 experts per layer" in by_bytes.target.experts.describe()
    assert found.metrics.experts["demanded"] > 0 and found.metrics.experts["hit_rate"] > 0


@pytest.mark.parametrize(("family", "weights"), [("mixtral", "int8"), ("qwen3_moe", "auto")])
def test_experts_of_a_checkpoint_are_read_one_by_one(tmp_path: Path, family: str, weights: str) -> None:
    folder = save_tiny_moe(tmp_path, family)
    whole = SpecDecoder.from_pretrained(folder, "none", weights=weights)
    paged = SpecDecoder.from_pretrained(folder, "none", weights=weights, expert_cache=0.5)
    assert isinstance(paged.model.model.layers[0].mlp.experts, BlockExperts)
    assert isinstance(paged.target.experts, MappedExperts) and whole.target.experts is None
    for ours, theirs in zip(play(paged.target), play(whole.target), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"dtype": "float32"}, "expert_cache '0.5' is not possible here .* computes in bfloat16 on a CPU"),
        ({"expert_cache": 0.1}, "holds 0 experts per layer, but one token needs 2; give at least 0.333"),
        ({"expert_cache": 1.5}, r"an expert cache is a share in \(0, 1\] or a number of bytes; got 1.5"),
        ({"expert_cache": None, "expert_prefetch": True}, "expert_prefetch goes with expert_cache; give its size"),
        ({"expert_cache": 0}, r"an expert cache is a share in \(0, 1\] or a number of bytes; got 0"),
    ],
)
def test_a_cache_that_cannot_be_is_one_line(tmp_path: Path, given: dict[str, Any], why: str) -> None:
    folder = save_tiny_moe(tmp_path)
    with pytest.raises(SpecDecError, match=why):
        SpecDecoder.from_pretrained(folder, "none", **{"expert_cache": 0.5} | given)


def test_a_model_without_experts_has_no_cache() -> None:
    with pytest.raises(SpecDecError, match="model type 'llama' has no experts; leave out the expert cache"):
        NativeTarget(rough_model("llama", **sizes_of("llama")).bfloat16(), expert_cache=0.5)


def test_without_room_for_all_experts_some_stay_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored(tmp_path)
    model, _ = loading.load(path)
    whole = NativeTarget(model)
    size = sum(each.blocks.data.nbytes for each in model.modules() if hasattr(each, "blocks"))
    experts = sum(item.nbytes for item in whole.packed.expert_maps)
    for free, slots in ((size + 2 * experts, None), (size + int(0.8 * experts), 3), (size + experts // 10, 0)):
        monkeypatch.setattr(machine, "available_memory", lambda free=free: free)
        assert memory.free_memory(torch.device("cpu")) == free
        model, _ = loading.load(path)  # although its experts do not fit
        if slots == 0:
            with pytest.raises(SpecDecError, match=r"holds 0 experts per layer, but one token needs 2"):
                NativeTarget(model)
            continue
        found = NativeTarget(model).experts
        assert (found and found.slots) == slots
    with pytest.raises(SpecDecError, match="not enough memory"):
        loading.load(path, dtype="float32")


def test_a_pass_costs_what_the_experts_of_other_tokens_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only reading an expert moves: more tokens take more of them, and draft lengths follow."""
    target, advise, now = NativeTarget(mixture(), expert_cache=0.5), _Layer.advise, [0.0]

    def takes(layer: _Layer, expert: int, advice: int, step: int = 1 << 62) -> int:
        now[0] += 0.006 * (advice == 22)
        return advise(layer, expert, advice, step)

    monkeypatch.setattr(_Layer, "advise", takes)
    monkeypatch.setattr(pass_times.time, "perf_counter", lambda: now[0])
    score = pass_times.time_scoring(target, 4)
    assert 0 < score[1] < score[4] < score[16]


@torch.inference_mode()
def test_a_disk_that_fails_while_experts_are_read_is_one_line() -> None:
    """A file that ends too early: reading behind its end would kill the process."""
    target, ids = NativeTarget(mixture(), expert_cache=0.5), torch.arange(3, 43)[None]
    experts, cache = target.experts, target.new_cache()
    if experts.layers[0].advise(0, 22) == errno.EINVAL:
        pytest.skip("this system cannot read a file's pages ahead")
    os.ftruncate(experts.file.fileno(), 0)
    for layer in experts.layers.values():
        layer.there.clear()
    for _ in range(2):
        with pytest.raises(SpecDecError, match=r"^cannot read experts from their file in '.*': the disk failed; "):
            next_logits(target, cache, ids[:, 0:40])
        cache.roll_back()


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(SpecDecError, match=r"cannot write experts to '.*': No space left on device"):
        NativeTarget(mixture(), expert_cache=0.5)


PEAK = """
import gc, sys
from pathlib import Path
from specdec import SpecDecoder
from specdec.models import loading

large, small = sys.argv[1:]

def status(name):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])

loading.load(small)  # what it needs is imported
for given in ({"expert_cache": 0.25}, {}):
    Path("/proc/self/clear_refs").write_text("5")
    start = status("VmRSS")
    decoder = SpecDecoder.from_pretrained(large, "none", **given)
    print(decoder.generate(list(range(3, 60)), max_new_tokens=8).token_ids)
    print(status("VmHWM") - start)
    del decoder
    gc.collect()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_experts_are_never_in_memory_all_at_once(tmp_path: Path) -> None:
    small = save_tiny_moe(tmp_path / "small")
    large = shutil.copytree(small, tmp_path / "large", ignore=shutil.ignore_patterns("*.safetensors"))
    config = MixtralConfig.from_pretrained(small, hidden_size=512, intermediate_size=1024, num_local_experts=16)
    config.update({"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 8, "dtype": torch.bfloat16})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    rest = sum(p.nbytes for p in model.parameters()) - experts
    model.save_pretrained(large, max_shard_size="60MB")
    run = subprocess.run([sys.executable, "-c", PEAK, large, small], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    ours, paged, own, whole = (int(line) - rest if line.isdigit() else line for line in run.stdout.splitlines())
    assert ours == own
    assert whole > experts > 150e6  # the measure sees them
    assert paged < 0.7 * experts  # a quarter of them, those of a layer for the prompt, and what computing takes
