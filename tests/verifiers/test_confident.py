"""Dynamic computing: what is accepted without scoring, what output and figures say, refusals."""

from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from tiny import greedy_reference, save_tiny
from transformers import PreTrainedModel
from typer.testing import CliRunner
from zoo import PROMPTS, heads, m2r2, routers, run

from specdec import SpecDecoder
from specdec.cli import app
from specdec.drafters.exits import DeedDrafter, EarlyExitDrafter, MixtureOfDepthsDrafter, SkipDecodeDrafter
from specdec.runtimes.target import Target
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.drafter import Drafter
from specdec.verifiers.confident import ConfidentVerifier


def leaving(target: Target) -> dict[str, Drafter]:
    return {
        "early-exit": EarlyExitDrafter(2),
        "deed": DeedDrafter(heads(target, 1, 2, 3)),
        "skip-decode": SkipDecodeDrafter(3, 1, horizon=6),
        "mixture-of-depths": MixtureOfDepthsDrafter(routers(target)),
        "m2r2": m2r2(target, 0, ((2, 4),), True, False),
        "m2r2: exits": m2r2(target, 3, (), False, True, exits=(1, 2), router=4),
    }


def test_certainty_decides_between_the_full_model_and_none_of_it(llama: PreTrainedModel) -> None:
    target, expected = TransformersTarget(llama), [greedy_reference(llama, prompt, 20) for prompt in PROMPTS]
    for name, drafter in leaving(target).items():
        out, loop = run(target, drafter, PROMPTS, 20, verifier=ConfidentVerifier(1.0))
        assert out == expected, name  # nobody is that sure
        assert all(m.mean_layers_per_token == 4 and m.exit_shares == {4: 1.0} for m in loop.metrics)
        out, loop = run(target, drafter, PROMPTS, 12, verifier=ConfidentVerifier(0.0), eos=None)
        for metrics in loop.metrics:  # every drafted token stands, four a round
            assert metrics.per_step_accepted[:2] == [4, 4]
            assert metrics.mean_layers_per_token < 4 and sum(metrics.exit_shares.values()) == pytest.approx(1)


def test_rows_leave_apart_and_the_threshold_is_kept(llama: PreTrainedModel) -> None:
    target, drafter = TransformersTarget(llama), EarlyExitDrafter(2)
    together, loop = run(target, drafter, PROMPTS, 24, verifier=ConfidentVerifier(0.03), eos=None)
    for prompt, tokens, metrics in zip(PROMPTS, together, loop.metrics, strict=True):
        (alone,), single = run(target, drafter, [prompt], 24, verifier=ConfidentVerifier(0.03), eos=None)
        assert alone[:20] == tokens[:20]  # the last round is cut where the batch ends
        assert single.metrics[0].per_step_accepted[:4] == metrics.per_step_accepted[:4]
    assert len({tuple(m.per_step_accepted) for m in loop.metrics}) > 1
    shares = [
        sum(len(m.exit_layers) for m in run(target, drafter, PROMPTS, 24, verifier=ConfidentVerifier(bar))[1].metrics)
        for bar in (0.0, 0.025, 0.03, 0.04)
    ]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1]


def test_the_command_says_lossy_and_how_deep_tokens_went(tmp_path: Path) -> None:
    command = ["generate", "hello there", "--model", str(save_tiny(tmp_path)), "--dtype", "float32", "--drafter"]
    command += ["early-exit", "--drafter-option", "exit_layer=2", "--verifier", "confident"]
    command += ["--verifier-option", "exit_threshold=0.02"]
    result = CliRunner().invoke(app, [*command, "--compare", "--max-new-tokens", "24"])
    assert result.exit_code == 0, result.output
    assert "verifier: lossy (confident, threshold 0.02); layers per token: " in result.stderr
    assert " of 4; tokens that left early: " in result.stderr and "% after 2 layers, " in result.stderr
    assert "agreement with the full model" in result.stderr
    result = CliRunner().invoke(app, [*command, "--json"])
    assert '"verifier": "lossy (confident, threshold 0.02)"' in result.stdout
    assert '"lossless": false' in result.stdout and '"exit_shares"' in result.stdout


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("early-exit", {"exit_threshold": 1.5}, "exit_threshold must be less than or equal to 1; got 1.5"),
    ("early-exit", {"exit_threshold": "high"}, "exit_threshold must be a valid number; got 'high'"),
    ("early-exit", {"epsilon": 0.1}, "verifier 'confident' has no option 'epsilon'; it belongs to 'typical'"),
    ("prompt-lookup", {}, "'confident' accepts drafts without scoring them, so it needs a drafter that leaves"),
    ("layer-skip", {}, "'layer-skip' does not"),
]


@pytest.mark.parametrize(("drafter", "options", "message"), REFUSED)
def test_bad_rules_are_refused_in_one_line(llama, drafter, options, message) -> None:
    with refused(message):
        SpecDecoder(llama, drafter=drafter, verifier="confident", verifier_options=options, runtime="transformers")
