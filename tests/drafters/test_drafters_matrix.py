"""All drafters, as chains and trees, greedy and sampled, on tiny model families: plain decoding's very output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sampled import AcceptsAll, expected, fit, small
from scripted import Scripted
from tiny import FAMILIES, HYBRIDS, greedy_reference, tiny_model
from transformers import PreTrainedModel
from zoo import EVERY, PROMPTS, chains, run, trees

from specdec.drafters.layer_skip import LayerSkipDrafter
from specdec.runtimes.fused import FusedTarget
from specdec.runtimes.reference import ReferenceTarget
from specdec.runtimes.target import Target
from specdec.speculation import registry
from specdec.speculation.draft import Draft

WHOLE = ("llama", "gpt2", "qwen3_next")  # families for which all variants are run


def test_the_matrix_has_every_drafter(llama: PreTrainedModel) -> None:
    target = ReferenceTarget(llama)
    made = {name.partition(":")[0] for name in (*chains(target), *trees(target)) if "+" not in name}
    assert made == set(registry.DRAFTERS) - {"auto"}  # that one loads another


def cases() -> Iterator[Any]:
    """(family, runtime, some drafters): four parts, of which one is run by default, another for each family in turn.

    With ``slow``, all parts of some families: drafters know no family.
    """
    yield pytest.param("llama", ReferenceTarget, tuple(EVERY), id="llama")
    others = [(family, ReferenceTarget) for family in FAMILIES | HYBRIDS if family != "llama"]
    for number, (family, runtime) in enumerate([*others, ("qwen3", FusedTarget)]):
        names = [name for name in EVERY if family in WHOLE or runtime is FusedTarget or ":" not in name]
        for part in range(4) if family in WHOLE else (-number % 4,):
            marks = [pytest.mark.slow] * ((number + part) % 4 != 0)
            yield pytest.param(
                family, runtime, tuple(names[part::4]), marks=marks, id=f"{family}-{runtime.runtime}-{part}"
            )


@pytest.mark.parametrize(("family", "runtime", "names"), list(cases()))
def test_greedy_equals_generate_in_a_ragged_batch(family: str, runtime: type[Target], names: tuple[str, ...]) -> None:
    model = tiny_model(family)
    expected = [greedy_reference(model, prompt, 12) for prompt in PROMPTS]
    target = runtime(model)  # type: ignore[call-arg]
    for name in names:
        assert run(target, EVERY[name](target), PROMPTS, 12)[0] == expected, name


# --- sampling ------------------------------------------------------------------------------------------------------


SOME = ("none", "m2r2 (tree)", "medusa (tree)", "early-exit", "layer-skip", "lookahead (tree)", "hybrid")


def test_sampling_follows_the_model() -> None:
    """The tokens of a seed are those of plain decoding whatever drafts (test_drafters_pairwise), so some will do."""
    model = small("mistral")
    assert sum(p > 1e-3 for p in expected(model, 0.8, 0.9).values()) > 8
    target = ReferenceTarget(model)
    p = {name: fit(target, EVERY[name](target)) for name in SOME}
    assert min(p.values()) > 1e-4, p


# --- controls that must fail -----------------------------------------------------------------------------------------


def test_a_rule_that_accepts_everything_fails_sampling_too() -> None:
    target = ReferenceTarget(small("llama"))
    assert fit(target, LayerSkipDrafter([1])) > 1e-4 > fit(target, LayerSkipDrafter([1]), verifier=AcceptsAll())


def test_a_rule_that_accepts_everything_fails() -> None:
    model = tiny_model("llama")
    target, reference = ReferenceTarget(model), greedy_reference(model, PROMPTS[0], 16)
    out, _ = run(target, LayerSkipDrafter([0]), PROMPTS[:1], 16, verifier=AcceptsAll())
    assert out != [reference]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_tree_scored_as_a_chain_fails(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    target, [prompt, *_] = ReferenceTarget(model), PROMPTS
    reference = greedy_reference(model, prompt, 24)

    def script(ids: list[int], limit: int) -> list[tuple[int, int]]:
        """Three wrong tokens beside each right one, before it."""
        nodes, parent = list[tuple[int, int]](), 0
        for token in reference[len(ids) - len(prompt) :][:limit]:
            nodes += [((token + n) % 97, parent) for n in (7, 29, 53, 0)]
            parent = len(nodes)
        return nodes

    assert run(target, Scripted(script), [prompt], 24)[0] == [reference]
    monkeypatch.setattr(Draft, "ancestors", lambda draft: None)  # siblings see one another
    assert run(target, Scripted(script), [prompt], 24)[0] != [reference]
