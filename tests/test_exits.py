"""Drafters that leave the model early: exact when judged, nothing computed twice, what they refuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, greedy_reference, tiny_model
from test_drafters import without
from test_exact import p_value
from test_loop import PROMPTS, run, run_no_eos
from transformers import PreTrainedModel

from specdec import SpecDecError, SpecDecoder, artifacts
from specdec.draft import Drafter
from specdec.drafters.deed import DeedDrafter
from specdec.drafters.early_exit import EarlyExitDrafter
from specdec.drafters.exits import ExitHeads
from specdec.drafters.mixture_of_depths import MixtureOfDepthsDrafter, Routers
from specdec.drafters.skip_decode import SkipDecodeDrafter
from specdec.target import ReferenceTarget, Target


def heads(target: Target, *exits: int, vocab: int | None = 2) -> ExitHeads:
    """Random modules, over every second token."""
    torch.manual_seed(2)
    some = None if vocab is None else torch.arange(0, target.vocab_size, vocab, dtype=torch.int32)
    network = ExitHeads(exits, 8, target, some)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def routers(target: Target, first: int = 1, vocab: int | None = 2) -> Routers:
    """Random routers: about half of the routed layers are run."""
    torch.manual_seed(3)
    some = None if vocab is None else torch.arange(0, target.vocab_size, vocab, dtype=torch.int32)
    network = Routers(first, target, some)
    torch.nn.init.normal_(network.weight)
    torch.nn.init.zeros_(network.bias)
    return network


def drafters(target: Target) -> dict[str, Drafter]:
    return {
        "early-exit": EarlyExitDrafter(),
        "early-exit: tree": EarlyExitDrafter(3, (2, 1)),
        "early-exit: trained, tree": EarlyExitDrafter(heads=heads(target, 2), siblings=(2, 1)),
        "deed": DeedDrafter(heads(target, 1, 2, 3), 0.2),
        "deed: always deep, tree": DeedDrafter(heads(target, 1, 3, vocab=None), 1.0, (2, 0, 1)),
        "skip-decode": SkipDecodeDrafter(3, 1, horizon=9),
        "skip-decode: tree": SkipDecodeDrafter(3, 1, horizon=9, siblings=(1, 1)),
        "mixture-of-depths": MixtureOfDepthsDrafter(routers(target)),
        "mixture-of-depths: tree": MixtureOfDepthsDrafter(routers(target, 2, None), (1, 2)),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_in_a_ragged_batch_and_alone(family: str) -> None:
    model = tiny_model(family)
    target = ReferenceTarget(model)
    expected = [greedy_reference(model, prompt, 16) for prompt in PROMPTS]
    for name, drafter in drafters(target).items():
        assert run(target, drafter, PROMPTS, 16)[0] == expected, name
        assert run(target, drafter, PROMPTS[:1], 16, depth=7)[0] == expected[:1], name


@pytest.mark.parametrize("name", ["early-exit: trained, tree", "deed", "skip-decode: tree", "mixture-of-depths: tree"])
def test_sampling_follows_the_model(name: str) -> None:
    model = tiny_model("llama", vocab_size=5, eos_token_id=None, pad_token_id=None, bos_token_id=None)
    target, prompt, total = ReferenceTarget(model), [1, 2, 1, 2], 1024
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(0, total, 512):
        drafter = drafters(target)[name]
        out, _ = run_no_eos(target, drafter, [prompt] * 512, 2, temperature=1.5, top_k=3, seed=seed)
        counts.update(tuple(tokens) for tokens in out)
    expected = {}
    for outcome in product(range(5), repeat=2):
        logits = model(torch.tensor([[*prompt, *outcome[:1]]])).logits[0, -2:].double() / 1.5
        floor = logits.topk(3, -1).values[:, -1:]
        p = logits.masked_fill(logits < floor, float("-inf")).softmax(-1)
        expected[outcome] = float(p[range(2), list(outcome)].prod())
    assert p_value(counts, expected, total) > 1e-3


def calls_of(target: Target, drafter: Drafter, count: int = 6) -> list[tuple[int, int, int]]:
    """(first layer, end, tokens) of every pass after the prompt's."""
    calls: list[tuple[int, int, int]] = []
    layers = ReferenceTarget.layers

    def spy(x: torch.Tensor, lo: int, hi: int, *args: Any, **more: Any) -> torch.Tensor:
        if lo < hi:
            calls.append((lo, hi, x.shape[1]))
        return layers(target, x, lo, hi, *args, **more)  # type: ignore[arg-type]

    target.layers = spy  # type: ignore[method-assign]
    run(target, drafter, PROMPTS[:1], count)
    return calls[1:]


def test_a_token_that_goes_deeper_takes_the_earlier_ones_along_at_once(llama: PreTrainedModel) -> None:
    target = ReferenceTarget(llama)
    drafter = DeedDrafter(heads(target, 1, 2, 3), 0.5)
    certainties = iter([0.9, 0.9, 0.1, 0.9, 0.9])  # the third token goes on to the second exit
    read = drafter.read
    drafter.read = lambda h, index=0: (read(h, index)[0], torch.tensor([[next(certainties, 0.9)]]))  # type: ignore[method-assign]
    assert calls_of(target, drafter)[: 4 + 1 + 1 + 1 + 1] == [
        *[(0, 1, 1)] * 3,
        (1, 2, 3),
        (0, 1, 1),
        (1, 2, 1),  # the fourth token follows: scoring resumes at one layer for all
        (0, 2, 1),  # the last drafted token has not been run yet
        (2, 4, 5),
    ]


def test_the_exit_falls_with_position(llama: PreTrainedModel) -> None:
    calls = calls_of(ReferenceTarget(llama), SkipDecodeDrafter(3, 1, horizon=5))
    # Exits 3, 2, 2, 1; then all catch up with the deepest, and the last drafted token is run for the first time.
    assert calls[:8] == [(0, 3, 1), *[(0, 2, 1)] * 2, (0, 1, 1), (1, 2, 1), (2, 3, 3), (0, 3, 1), (3, 4, 5)]


@pytest.mark.parametrize("useless", [(2,), (1, 3)])
def test_a_router_passes_by_the_layers_it_scores_below_zero(llama: PreTrainedModel, useless: tuple[int, ...]) -> None:
    target = ReferenceTarget(without(llama, *useless))
    network = Routers(1, target)
    with torch.no_grad():
        network.bias[[layer - 1 for layer in useless]] = -1
    _, loop = run(target, MixtureOfDepthsDrafter(network), PROMPTS[:1], 21)
    assert set(loop.metrics[0].per_step_accepted) == {4}
    ran = [lo for lo, hi, _ in calls_of(target, MixtureOfDepthsDrafter(network), 6) if hi == lo + 1]
    assert set(ran) | {0} == {0, 1, 2, 3} - set(useless) | {0}


def test_what_passed_a_layer_by_leaves_keys_there_for_a_later_token(llama: PreTrainedModel) -> None:
    target = ReferenceTarget(llama)
    drafter = MixtureOfDepthsDrafter(Routers(3, target))
    scores = iter([-1.0, -1.0, 1.0, -1.0])
    drafter.routers.score = lambda layer, x: torch.tensor([[[next(scores, -1.0)]]])  # type: ignore[method-assign]
    assert calls_of(target, drafter)[:6] == [*[(0, 3, 1)] * 3, (3, 4, 3), (0, 3, 1), (0, 3, 1)]


# --- files and options ---------------------------------------------------------------------------------------------


def folder(path: Path, target: Target, name: str, network: torch.nn.Module, config: dict[str, Any]) -> Path:
    base = {"fingerprint": target.fingerprint}
    artifacts.write(path, {"drafter": name, "base": base, **config}, network.state_dict())
    return path


def test_folders_bring_back_the_drafter(llama: PreTrainedModel, tmp_path: Path) -> None:
    target = ReferenceTarget(llama)
    exits, depth = heads(target, 1, 3), routers(target, 2)
    made: list[tuple[Drafter, Path]] = [
        (DeedDrafter(exits, 0.2), folder(tmp_path / "a", target, "deed", exits, exits.config())),
        (
            MixtureOfDepthsDrafter(depth),
            folder(tmp_path / "b", target, "mixture-of-depths", depth, {"first": depth.first}),
        ),
    ]
    for drafter, path in made:
        options = {"exit_confidence": 0.2} if path.name == "a" else {}
        loaded = SpecDecoder(llama, drafter=path, drafter_options=options, runtime="reference").drafter
        expected = run(target, drafter, PROMPTS, 16)[1]
        assert [m.per_step_accepted for m in run(target, loaded, PROMPTS, 16)[1].metrics] == [
            m.per_step_accepted for m in expected.metrics
        ]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("deed", {}, "'deed' needs trained exits and none are shipped for this model; train them: specdec train deed"),
    ("deed", {"exit_layer": 3}, "no option 'exit_layer'"),
    ("mixture-of-depths", {}, "needs trained routers and none are shipped for this model"),
    ("skip-decode", {"deepest": 4}, "deepest must be a whole number in 1 .. 3; got 4"),
    ("skip-decode", {"deepest": 1, "shallowest": 2}, "falls from deepest to shallowest; got 1 and 2"),
    ("skip-decode", {"horizon": 0}, "horizon must be a whole number >= 1"),
    ("skip-decode=folder", {}, "'skip-decode' is not loaded from anything"),
    ("early-exit=folder", {"exit_layer": 2}, "has its own exit layer"),
]


@pytest.mark.parametrize(("drafter", "options", "message"), REFUSED)
def test_bad_options_are_refused_in_one_line(
    llama: PreTrainedModel, drafter: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecDecError, match=message) as caught:
        SpecDecoder(llama, drafter=drafter, drafter_options=options, runtime="reference")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exits": [3, 1]}, r"exits must be rising layers in 1 .. 3; got \[3, 1\]"),
        ({"exits": [1, 4]}, r"exits must be rising layers in 1 .. 3; got \[1, 4\]"),
        ({"exits": [1]}, "do not fit each other"),
        ({"width": "wide"}, "no valid exits and width"),
        ({"drafter": "early-exit"}, "holds a 'early-exit' drafter, not a deed one"),
        ({"base": {"fingerprint": "other"}}, "trained for base weights other"),
    ],
)
def test_damaged_folders_are_refused(
    llama: PreTrainedModel, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    target = ReferenceTarget(llama)
    network = heads(target, 1, 3)
    folder(tmp_path, target, "deed", network, network.config() | change)
    with pytest.raises(SpecDecError, match=message):
        SpecDecoder(llama, drafter=f"deed={tmp_path}", runtime="reference")


make: Callable[..., Any] = DeedDrafter  # what follows is about values that only Python can give


@pytest.mark.parametrize("value", [-0.1, 1.5, "high"])
def test_an_exit_confidence_is_a_probability(llama: PreTrainedModel, value: Any) -> None:
    with pytest.raises(SpecDecError, match="exit_confidence must be a probability"):
        make(heads(ReferenceTarget(llama), 1), value)
