"""Dynamic computing: what stands unjudged, how skipped layers are filled, what output and figures say, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, greedy_reference, save_tiny, tiny_model
from transformers import PreTrainedModel
from typer.testing import CliRunner
from zoo import PROMPTS, heads, m2r2, routers, run

from specdec import SpecDecError, SpecDecoder
from specdec.cli import app
from specdec.drafters.exits import DeedDrafter, EarlyExitDrafter, MixtureOfDepthsDrafter, SkipDecodeDrafter
from specdec.runtimes.reference import ReferenceTarget
from specdec.runtimes.target import Pass, Target
from specdec.speculation.draft import Drafter
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


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_certainty_decides_between_the_full_model_and_none_of_it(
    llama: PreTrainedModel, prompts: list[list[int]]
) -> None:
    target = ReferenceTarget(llama)
    for name, drafter in leaving(target).items():
        out, loop = run(target, drafter, prompts, 20, verifier=ConfidentVerifier(1.0))
        assert out == [greedy_reference(llama, prompt, 20) for prompt in prompts], name  # nobody is that sure
        assert all(m.mean_layers_per_token == 4 and m.exit_shares == {4: 1.0} for m in loop.metrics)
        out, loop = run(target, drafter, prompts, 20, verifier=ConfidentVerifier(0.0), eos=None)
        for metrics in loop.metrics:  # every drafted token stands, four a round
            assert metrics.per_step_accepted[:3] == [4, 4, 4]
            assert metrics.mean_layers_per_token < 4 and sum(metrics.exit_shares.values()) == pytest.approx(1)


def test_rows_leave_apart_and_the_threshold_is_kept(llama: PreTrainedModel) -> None:
    target, drafter = ReferenceTarget(llama), EarlyExitDrafter(2)
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


# --- state propagation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_layer_makes_the_same_keys_and_values_of_a_state_whether_it_runs_or_not(family: str) -> None:
    target = ReferenceTarget(tiny_model(family))
    ids, positions = torch.arange(3, 9)[None], torch.arange(6)[None]
    x, filled = target.embed(ids, positions), target.new_cache()
    target.fill(x, 2, Pass(positions, filled.register(2, positions), filled))
    assert filled.lengths == [0, 0, 6, 6]
    for layer in (2, 3):
        own = target.new_cache()
        target.layers(x, layer, layer + 1, Pass(positions, own.register(layer, positions), own))
        for a, b in ((filled.keys, own.keys), (filled.values, own.values)):
            torch.testing.assert_close(a[layer][:, :, :6], b[layer][:, :, :6])  # type: ignore[index]


@pytest.mark.parametrize("runtime", ["reference", "fused"])
def test_states_are_propagated_and_only_the_last_token_goes_deeper(llama: PreTrainedModel, runtime: str) -> None:
    options: dict[str, Any] = {"drafter": "early-exit", "drafter_options": {"exit_layer": 2}, "verifier": "confident"}
    outs = {}
    for fill in ("exact", "propagate"):
        rule = {"exit_threshold": 0.0, "fill": fill}
        decoder = SpecDecoder(llama, runtime=runtime, verifier_options=rule, **options)
        deep, layers = [], decoder.target.layers

        def spy(x: torch.Tensor, lo: int, *args: Any, deep: list[int] = deep, layers: Any = layers) -> torch.Tensor:
            deep += [x.shape[1]] if lo == 2 else []
            return layers(x, lo, *args)  # type: ignore[no-any-return]

        decoder.target.layers = spy  # type: ignore[method-assign]
        batch = decoder.generate_batch(PROMPTS, max_new_tokens=26, num_speculative_tokens=4, ignore_eos=True)
        outs[fill] = [out.token_ids for out in batch]
        assert set(deep) == ({5} if fill == "exact" else {1})
        # The first round has no skipped layer behind it: both ways draft the same.
        assert [tokens[:5] for tokens in outs[fill]] == [tokens[:5] for tokens in outs["exact"]]
    assert outs["exact"] != outs["propagate"]


def test_propagation_is_exact_where_the_skipped_layers_change_nothing(llama: PreTrainedModel) -> None:
    from tiny import without

    model = without(llama, 2, 3)
    rule = ConfidentVerifier(0.0, "propagate")
    out, _ = run(ReferenceTarget(model), EarlyExitDrafter(2), PROMPTS, 24, verifier=rule)
    assert out == [greedy_reference(model, prompt, 24) for prompt in PROMPTS]


@pytest.mark.parametrize("drafter", ["m2r2: exits", "deed", "skip-decode"])
def test_propagation_serves_every_drafter_that_leaves_a_state(llama: PreTrainedModel, drafter: str) -> None:
    target = ReferenceTarget(llama)
    out, loop = run(
        target, leaving(target)[drafter], PROMPTS, 20, verifier=ConfidentVerifier(0.03, "propagate"), eos=None
    )
    assert [len(tokens) for tokens in out] == [20] * 3 and any(m.exit_layers for m in loop.metrics)


# --- what users see ----------------------------------------------------------------------------------------------


def test_the_command_says_lossy_and_how_deep_tokens_went(tmp_path: Path) -> None:
    command = ["generate", "hello there", "--model", str(save_tiny(tmp_path)), "--dtype", "float32", "--drafter"]
    command += ["early-exit", "--drafter-option", "exit_layer=2", "--verifier", "confident", "--exit-threshold", "0.02"]
    result = CliRunner().invoke(app, [*command, "--compare", "--max-new-tokens", "24"])
    assert result.exit_code == 0, result.output
    assert "acceptance rule: lossy (confident, threshold 0.02); layers per token: " in result.stderr
    assert " of 4; tokens that left early: " in result.stderr and "% after 2 layers, " in result.stderr
    assert "agreement with the full model" in result.stderr
    result = CliRunner().invoke(app, [*command, "--verifier-option", "fill=propagate", "--json"])
    assert '"verifier": "lossy (confident, threshold 0.02, states propagated)"' in result.stdout
    assert '"lossless": false' in result.stdout and '"exit_shares"' in result.stdout


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("early-exit", {"exit_threshold": 1.5}, r"exit_threshold must be a probability in \[0, 1\]; got 1.5"),
    ("early-exit", {"exit_threshold": "high"}, r"exit_threshold must be a probability in \[0, 1\]; got 'high'"),
    (
        "early-exit",
        {"fill": "never"},
        "option 'fill' of verifier 'confident' must be one of exact, propagate; got 'never'",
    ),
    ("early-exit", {"epsilon": 0.1}, "verifier 'confident' has no option 'epsilon'; it belongs to 'typical'"),
    ("prompt-lookup", {}, "'confident' accepts drafts without scoring them, so it needs a drafter that leaves"),
    ("layer-skip", {}, "'layer-skip' does not"),
]


@pytest.mark.parametrize(("drafter", "options", "message"), REFUSED)
def test_bad_rules_are_refused_in_one_line(
    llama: PreTrainedModel, drafter: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecDecError, match=message) as caught:
        SpecDecoder(llama, drafter=drafter, verifier="confident", verifier_options=options, runtime="reference")
    assert "\n" not in str(caught.value)


def test_propagation_needs_a_state_to_start_from(llama: PreTrainedModel) -> None:
    target = ReferenceTarget(llama)
    for name in ("m2r2", "mixture-of-depths"):
        with pytest.raises(SpecDecError, match=f"'{name}' leaves no state there; use fill=exact"):
            SpecDecoder(
                llama, drafter=leaving(target)[name], verifier="confident", verifier_options={"fill": "propagate"}
            )


@pytest.mark.parametrize("rule", ["confident", "typical"])
def test_a_lossy_rule_is_refused_where_exact_output_is_asked_for(llama: PreTrainedModel, rule: str) -> None:
    with pytest.raises(SpecDecError, match=f"'{rule}' is lossy, but exact output is asked for"):
        SpecDecoder(llama, drafter="early-exit", verifier=rule, exact=True)
    command = ["generate", "x", "--drafter", "early-exit", "--verifier", rule, "--exact"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
