"""Whatever changes a model's logits changes the identity under which its keys and values are kept on disk."""

import copy
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from targets import needs_native
from tiny import SIZES, save_native, tiny_model
from tiny_gguf import write_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from specdec.models import identity, loading
from specdec.runtimes.native import library
from specdec.runtimes.prefill import run_tokens
from specdec.runtimes.select import make_target
from specdec.runtimes.target import Target
from specdec.runtimes.transformers import TransformersTarget

IDS = [(7 * n * n + 3) % 90 + 3 for n in range(40)]
OTHERS = {"silu": "gelu", "gelu_pytorch_tanh": "relu", "default": "linear", "eager": "sdpa", "sdpa": "eager"}


def logits_of(target: Target) -> torch.Tensor:
    """Of all tokens of a text that is run in two passes, so that cached keys and values count."""
    cache, every = target.new_cache(), list[torch.Tensor]()
    with torch.inference_mode():
        for part in (IDS[:30], IDS[30:]):
            run_tokens(target, cache, [part], every=every)
        return target.readout(torch.cat(every)[None]).float()


def changed(value: Any) -> Iterator[Any]:
    """Other values of a field, or of one inside it."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, max(value // 2, 1))
    elif isinstance(value, float):
        yield value * 1.7 + 0.01
    elif isinstance(value, str) and value in OTHERS:
        yield OTHERS[value]
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (value | {key: other} for other in changed(inner))
    elif isinstance(value, list):
        yield from (value[::-1], value[:1] * len(value))
    elif value is None:
        yield from (5, 0.3)


def variants(family: str) -> Iterator[tuple[str, PreTrainedModel]]:
    """The tiny model with its weights, and each change of one field of its config with which these fit."""
    model = tiny_model(family)
    fields = model.config.to_dict()
    extra = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}
    changes = [(key, other) for key, value in fields.items() for other in changed(value)] + [*extra.items()]
    for key, other in changes:
        if key in ("model_type", "num_hidden_layers"):
            continue
        try:
            config = AutoConfig.for_model(**{**fields, key: other})
            made = AutoModelForCausalLM.from_config(config, attn_implementation=model.config._attn_implementation)
            made.load_state_dict(model.state_dict())
        except Exception:  # any kind: it is no model, or one of other weights
            continue
        yield f"{key}={other}", made.eval().requires_grad_(False)


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_every_field_of_a_config_that_changes_logits_changes_the_identity(family: str) -> None:
    target = TransformersTarget(tiny_model(family))
    logits, own, moved = logits_of(target), identity.numbers(target), set[str]()
    assert identity.numbers(TransformersTarget(tiny_model(family))) == own
    for what, model in variants(family):
        try:
            other = TransformersTarget(model)
            found = logits_of(other)
        except Exception:  # any kind: it does not run
            continue
        if not torch.equal(found, logits):
            assert identity.numbers(other) != own, what
            moved.add(what.partition("=")[0])
    assert {"rope_parameters", "rms_norm_eps"} <= moved


def test_frequencies_that_a_file_brings_change_the_identity() -> None:
    """Those of a GGUF file's rope_freqs are no weights and no fields."""
    target, other = (TransformersTarget(tiny_model()) for _ in range(2))
    other.model.model.rotary_emb.inv_freq /= torch.tensor([1.0, 1.0, 2.0, 4.0])
    assert not torch.equal(logits_of(target), logits_of(other))
    assert identity.numbers(target) != identity.numbers(other)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_content_of_a_model_is_that_of_its_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    path = write_model(tmp_path / "it.gguf", "qwen2", "Q8_0", 128) if kind == "file" else save_native(tmp_path / "it")
    model, again = (loading.load(path)[0] for _ in range(2))
    assert model.origin is not None and identity.content(model) == identity.content(again)
    file, times = model.origin.paths[0], model.origin.paths[0].stat()
    with file.open("rb+") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last[0] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identity.content(loading.load(path)[0]) != identity.content(model)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"dtype": "float32"},
    {"dtype": "float16", "runtime": "transformers"},
    {"attention": "eager", "runtime": "transformers"},
    {"runtime": "transformers"},
    {"runtime": "torch"},
    {"runtime": "native"},
    {"weights": "int8"},
    {"weights": "int8", "kv_cache": "int8"},
    {"weights": "int4"},
    {"weights": "dense"},
    {"kv_cache": "int8"},
]


@needs_native
def test_every_loading_option_that_changes_logits_changes_the_identity() -> None:
    found = list[tuple[dict[str, Any], torch.Tensor, str]]()
    for options in OPTIONS:
        how = copy.copy(options)
        model = tiny_model(attention=how.pop("attention", None), **SIZES)
        model = model.to(getattr(torch, how.pop("dtype", "bfloat16")))
        target, _ = make_target(model, **how)
        found.append((options, logits_of(target), identity.numbers(target)))
    different = 0
    for (a, own, name), (b, others, other) in itertools.combinations(found, 2):
        if not torch.equal(own, others):
            assert name != other, (a, b)
            different += 1
    assert different > len(OPTIONS) * (len(OPTIONS) - 1) // 2 - 12


@needs_native
def test_the_kernels_are_part_of_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, _ = make_target(tiny_model(**SIZES).bfloat16(), "native")
    own = identity.numbers(target)
    (tmp_path / "_native.so").write_bytes(library.LIBRARY.read_bytes() + b"another")
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "_native.so")
    assert identity.numbers(target) != own
