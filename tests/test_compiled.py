"""The fused and graphs runtimes with compiled layers: the eager one's numbers, and few things that are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import greedy_reference, tiny_model
from test_fused import adapted_pass, random_adapters, rough_model
from tiny import save_tiny
from torch._dynamo.utils import counters
from zoo import PROMPTS, every, run

from specdec import SpecDecoder, compiled
from specdec.errors import SpecDecError
from specdec.fused import FusedTarget
from specdec.graphs import GraphedTarget
from specdec.runtimes import make_target
from specdec.target import Target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the compiler keeps its files; the tests are skipped if it does not work here."""
    path = tmp_path_factory.mktemp("inductor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(path))
        try:
            compiled.check(torch.device("cpu"))
            torch.compile(lambda x: x + 1)(torch.ones(2))
        except Exception:
            pytest.skip("torch.compile does not work here")
        yield path


@pytest.fixture
def count(folder: Path) -> Iterator[Callable[[], int]]:
    """How many graphs were compiled so far."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("layers", [4, 8])
def test_all_layers_share_what_is_compiled(layers: int, count: Callable[[], int]) -> None:
    """One row and several, before and after attention: compiled at load, and good for every chain that follows."""
    model = tiny_model("llama", num_hidden_layers=layers)
    target = FusedTarget(model, compile=True)
    assert (target.runtime, count()) == ("fused compiled", 4)
    out, loop = run(target, every(target)["prompt-lookup"], PROMPTS[1:2], 24)
    assert out == [greedy_reference(model, PROMPTS[1], 24)] and loop.metrics[0].num_draft_tokens > 0
    assert count() == 4


@pytest.mark.slow
def test_another_family_passes_the_check_on_load(count: Callable[[], int]) -> None:
    """Norms on queries, keys and results, rotary in float32: a prompt and single tokens against the model's own."""
    target = FusedTarget(rough_model("olmo2"), compile=True)
    assert target.spread < 1e-5 and count() == 4


def test_the_check_on_load_sees_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "check", lambda device: None)
    after = FusedTarget._after
    monkeypatch.setattr(compiled, "part", lambda f, varying: (lambda *a: 1.1 * f(*a)) if f is after else f)
    with pytest.raises(SpecDecError, match="the fused compiled runtime gives other logits"):
        FusedTarget(tiny_model("llama"), compile=True)


class Rerun:
    """Stands in for a CUDA graph: what runs while one is recorded or replayed cannot be compiled."""

    recorded = replayed = 0

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function
        self._run()
        Rerun.recorded += 1

    def _run(self) -> None:
        with torch.compiler.set_stance("fail_on_recompile"):
            self.function()

    def replay(self) -> None:
        self._run()
        Rerun.replayed += 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runtime", "drafter"), [("fused", "m2r2: leap"), ("graphs", "m2r2: leap"), ("graphs", "prompt-lookup")]
)
def test_generations_are_the_models_own(runtime: str, drafter: str, count: Callable[[], int]) -> None:
    """A batch whose rows end one after the other, in one buffer for all of it."""
    model = tiny_model("llama")
    target: Target
    if runtime == "fused":
        target = FusedTarget(model, compile=True)
    else:
        Rerun.recorded = Rerun.replayed = 0
        target = GraphedTarget(model, record=Rerun, compile=True)
    for _ in range(2):
        out, _loop = run(target, every(target)[drafter], PROMPTS, 20)
        assert out == [greedy_reference(model, prompt, 20) for prompt in PROMPTS]
        del _loop
    assert runtime == "fused" or Rerun.replayed > Rerun.recorded > 0
    assert 4 <= count() <= 16


@pytest.mark.slow
def test_the_stand_in_fails_where_something_would_be_compiled(count: Callable[[], int]) -> None:
    quick = torch.compile(lambda x: x * 2)
    with pytest.raises(RuntimeError, match="fail_on_recompile"), torch.inference_mode():
        Rerun(lambda: quick(torch.ones(3)))


@pytest.mark.slow
def test_gradients_pass_it_by(count: Callable[[], int]) -> None:
    model, grads = rough_model("llama"), []
    for target in (FusedTarget(model), FusedTarget(model, compile=True)):
        before = count()
        torch.manual_seed(3)
        adapters = random_adapters(target)
        adapted_pass(target, adapters, 5, None).square().sum().backward()
        grads.append([p.grad for p in adapters.parameters()])
        assert count() == before
    for a, b in zip(*grads, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


@pytest.mark.slow
def test_chosen_by_the_public_api(tmp_path: Path, count: Callable[[], int]) -> None:
    path = save_tiny(tmp_path / "model")
    plain = SpecDecoder.from_pretrained(str(path), "none").generate("once upon a time", max_new_tokens=12)
    decoder = SpecDecoder.from_pretrained(str(path), "prompt-lookup", compile=True)
    assert (decoder.target.runtime, decoder.runtime_note) == ("fused compiled", "")
    assert decoder.generate("once upon a time", max_new_tokens=12).token_ids == plain.token_ids


def test_the_native_runtime_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "check", lambda device: None)
    monkeypatch.setattr(compiled, "part", lambda function, varying: function)
    target, note = make_target(tiny_model("llama").bfloat16(), compile=True)
    assert (target.runtime, note) == ("fused compiled", "no native runtime: there is nothing in it to compile")


@pytest.mark.parametrize(
    ("runtime", "weights", "text"),
    [
        ("native", "auto", "not for the native runtime"),
        ("reference", "auto", "not for the reference runtime"),
        ("fused", "int4", "not for int4 weights"),
        ("auto", "int8", "not for int8 weights"),
    ],
)
def test_what_cannot_be_compiled_is_refused(runtime: str, weights: str, text: str) -> None:
    with pytest.raises(SpecDecError, match=text):
        make_target(tiny_model("llama").bfloat16(), runtime, weights, compile=True)


def test_a_family_that_only_the_reference_runtime_takes_is_refused() -> None:
    with pytest.raises(SpecDecError, match=r"compile is not possible here .*'gemma2' is unknown"):
        make_target(tiny_model("gemma2"), compile=True)


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "g++")
    with pytest.raises(SpecDecError, match=r"needs a C\+\+ compiler .*; install it"):
        make_target(tiny_model("llama"), "fused", compile=True)
