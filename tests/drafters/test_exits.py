"""Drafters that leave the model early: nothing is computed twice, what they refuse. (Output: test_drafters_matrix.)"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import without
from transformers import PreTrainedModel
from zoo import PROMPTS, heads, layers_run, routers, run

from specdec import SpecDecError, SpecDecoder
from specdec.drafters.exits import DeedDrafter, MixtureOfDepthsDrafter, Routers, SkipDecodeDrafter
from specdec.models import drafter_folder
from specdec.runtimes.target import Target
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.drafter import Drafter


def test_a_token_that_goes_deeper_takes_the_earlier_ones_along_at_once(llama: PreTrainedModel) -> None:
    target = TransformersTarget(llama)
    drafter = DeedDrafter(heads(target, 1, 2, 3), 0.5)
    certainties = iter([0.9, 0.9, 0.1, 0.9, 0.9])  # the third token goes on to the second exit
    read = drafter.read

    def unsure(*given: Any) -> tuple[torch.Tensor, ...]:
        logits, _, layers = read(*given)
        return logits, torch.tensor([[next(certainties, 0.9)]]), layers

    drafter.read = unsure  # type: ignore[method-assign]
    assert layers_run(target, drafter)[: 4 + 1 + 1 + 1 + 1] == [
        *[(0, 1, 1)] * 3,
        (1, 2, 3),
        (0, 1, 1),
        (1, 2, 1),  # the fourth token follows: scoring resumes at one layer for all
        (0, 2, 1),  # the last drafted token has not been run yet
        (2, 4, 5),
    ]


def test_the_exit_falls_with_position(llama: PreTrainedModel) -> None:
    calls = layers_run(TransformersTarget(llama), SkipDecodeDrafter(3, 1, horizon=5))
    # Exits 3, 2, 2, 1; then all catch up with the deepest, and the last drafted token is run for the first time.
    assert calls[:8] == [(0, 3, 1), *[(0, 2, 1)] * 2, (0, 1, 1), (1, 2, 1), (2, 3, 3), (0, 3, 1), (3, 4, 5)]


@pytest.mark.parametrize("exit", [0, 1, None])
def test_no_token_goes_beyond_the_exit_that_the_controller_chose(llama: PreTrainedModel, exit: int | None) -> None:
    """Nothing is sure, so each token goes as far as it may: without a choice, to the last exit."""
    target = TransformersTarget(llama)
    calls = layers_run(target, DeedDrafter(heads(target, 1, 3), 1.0), exit=exit)
    drafted = itertools.takewhile(lambda call: call[1] < 4, calls)
    assert max(end for _, end, _ in drafted) == (1 if exit == 0 else 3)


@pytest.mark.parametrize("useless", [(2,), (1, 3)])
def test_a_router_passes_by_the_layers_it_scores_below_zero(llama: PreTrainedModel, useless: tuple[int, ...]) -> None:
    target = TransformersTarget(without(llama, *useless))
    network = Routers(1, target)
    with torch.no_grad():
        network.bias[[layer - 1 for layer in useless]] = -1
    _, loop = run(target, MixtureOfDepthsDrafter(network), PROMPTS[:1], 21)
    assert set(loop.metrics[0].per_step_accepted) == {4}
    ran = [lo for lo, hi, _ in layers_run(target, MixtureOfDepthsDrafter(network), 6) if hi == lo + 1]
    assert set(ran) | {0} == {0, 1, 2, 3} - set(useless) | {0}


def test_what_passed_a_layer_by_leaves_keys_there_for_a_later_token(llama: PreTrainedModel) -> None:
    target = TransformersTarget(llama)
    drafter = MixtureOfDepthsDrafter(Routers(3, target))
    scores = iter([-1.0, -1.0, 1.0, -1.0])
    drafter.network.score = lambda layer, x: torch.tensor([[[next(scores, -1.0)]]])  # type: ignore[method-assign]
    assert layers_run(target, drafter)[:6] == [*[(0, 3, 1)] * 3, (3, 4, 3), (0, 3, 1), (0, 3, 1)]


def folder(path: Path, target: Target, name: str, network: torch.nn.Module, config: dict[str, Any]) -> Path:
    base = {"fingerprint": target.fingerprint}
    drafter_folder.write(path, {"drafter": name, "base": base, **config}, network.state_dict())
    return path


def test_folders_bring_back_the_drafter(llama: PreTrainedModel, tmp_path: Path) -> None:
    target = TransformersTarget(llama)
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
        loaded = SpecDecoder(llama, drafter=path, drafter_options=options, runtime="transformers").drafter
        expected = run(target, drafter, PROMPTS, 16)[1]
        assert [m.per_step_accepted for m in run(target, loaded, PROMPTS, 16)[1].metrics] == [
            m.per_step_accepted for m in expected.metrics
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exits": [3, 1]}, r"exits must be rising layers in 1 .. 3; got \[3, 1\]"),
        ({"exits": [1, 4]}, r"exits must be rising layers in 1 .. 3; got \[1, 4\]"),
        ({"exits": [1]}, "do not fit each other"),
        ({"width": "wide"}, "width in the drafter.s config.json must be a valid integer; got .wide."),
        ({"drafter": "early-exit"}, "holds the drafter 'early-exit', not 'deed'"),
        ({"base": {"fingerprint": "other"}}, "trained for base weights other"),
    ],
)
def test_damaged_folders_are_refused(llama: PreTrainedModel, tmp_path, change: dict[str, Any], message: str) -> None:
    target = TransformersTarget(llama)
    network = heads(target, 1, 3)
    folder(tmp_path, target, "deed", network, network.config() | change)
    with pytest.raises(SpecDecError, match=message):
        SpecDecoder(llama, drafter=f"deed={tmp_path}", runtime="transformers")
