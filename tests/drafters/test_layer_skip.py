"""Layer skipping: parts of layers, what is drafted without them, the file a skip set comes from, and its search."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from pages import ROOT
from tiny import FAMILIES, greedy_reference, save_tiny, tiny_model
from transformers import PreTrainedModel
from zoo import PROMPTS

from specdec import SpecDecError, SpecDecoder
from specdec.drafters.layer_skip import LayerSkipDrafter, steps_without
from specdec.runtimes.reference import ReferenceTarget
from specdec.runtimes.target import Pass, prefill
from specdec.speculation.draft import State
from specdec.speculation.sampling import Sampler, SamplingParams

RECIPE = runpy.run_path(str(ROOT / "examples" / "layer_skip.py"))
Prices, Search, Skips = (RECIPE[name] for name in ("Prices", "Search", "Skips"))

PARALLEL = ("phi", "gpt_neox")  # attention and MLP read the same input


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_parts_of_a_layer_make_the_layer(family: str) -> None:
    target = ReferenceTarget(tiny_model(family))
    positions = torch.arange(7)[None]
    x = target.embed(torch.arange(3, 10)[None], positions)

    def run(*parts: str) -> torch.Tensor:
        cache, y = target.new_cache(), x
        mask = cache.mask(0, positions)
        for part in parts:
            if part == "layer":
                y = target.layers(y, 1, 2, Pass(positions, mask, cache))
            else:
                y = target.sublayer(y, 1, part, Pass(positions, mask, cache))  # type: ignore[arg-type]
        assert cache.lengths[1] == (7 if parts[0] != "mlp" else 0)
        return y

    whole, attention, mlp = run("layer"), run("attention"), run("mlp")
    assert not any(torch.allclose(a, b) for a, b in ((whole, attention), (whole, mlp), (attention, x), (mlp, x)))
    both = attention + mlp - x if family in PARALLEL else run("attention", "mlp")
    torch.testing.assert_close(both, whole)
    torch.testing.assert_close(run("layer"), whole)  # the model has its parts back


def without(model: PreTrainedModel, attn: tuple[int, ...], mlp: tuple[int, ...]) -> PreTrainedModel:
    """A copy of a llama in which these parts change nothing."""
    model = copy.deepcopy(model)
    for layers, path in ((attn, "self_attn.o_proj"), (mlp, "mlp.down_proj")):
        for layer in layers:
            torch.nn.init.zeros_(model.model.layers[layer].get_submodule(path).weight)
    return model


SETS = [((1,), ()), ((), (0, 3)), ((0, 1, 2, 3), (2,)), ((2,), (0, 1, 2, 3)), ((1, 2), (2, 3))]


@pytest.mark.parametrize("runtime", ["reference", "fused"])
@pytest.mark.parametrize(("attn", "mlp"), SETS)
def test_parts_that_change_nothing_are_not_missed(
    llama: PreTrainedModel, attn: tuple[int, ...], mlp: tuple[int, ...], runtime: str
) -> None:
    model = without(llama, attn, mlp)
    decoder = SpecDecoder(
        model, drafter="layer-skip", drafter_options={"attn": list(attn), "mlp": list(mlp)}, runtime=runtime
    )
    outs = decoder.generate_batch(PROMPTS, max_new_tokens=21, num_speculative_tokens=4, ignore_eos=True)
    for out, prompt in zip(outs, PROMPTS, strict=True):
        assert out.token_ids == greedy_reference(model, prompt, 21) or 2 in out.token_ids
        assert set(out.metrics.per_step_accepted[:-1]) == {4}
    # ... and those that do are missed, but never by the output.
    decoder = SpecDecoder(
        llama, drafter="layer-skip", drafter_options={"attn": list(attn), "mlp": list(mlp)}, runtime=runtime
    )
    out = decoder.generate(PROMPTS[0], max_new_tokens=21, num_speculative_tokens=4)
    assert out.token_ids == greedy_reference(llama, PROMPTS[0], 21)


def test_the_way_without_some_parts() -> None:
    assert steps_without({2}, {2}, 5) == [("layers", 0, 2), ("layers", 3, 5)]
    assert steps_without({1, 2}, {2, 3}, 5) == [("layers", 0, 1), ("mlp", 1, 2), ("attention", 3, 4), ("layers", 4, 5)]
    assert steps_without({0, 1}, {0, 1}, 2) == []


# --- the search ----------------------------------------------------------------------------------------------------

CHEAP = Prices(layer=1.0, attention=0.4, mlp=0.6, ends=0.1, score={1: 4.1, 4: 4.2, 16: 4.5})


def search(model: PreTrainedModel, prices=CHEAP):
    texts = [(prompt, greedy_reference(model, prompt, 12)) for prompt in PROMPTS]
    return Search(ReferenceTarget(model), texts, prices)


def test_a_candidate_is_measured_by_what_it_would_draft_first(llama: PreTrainedModel) -> None:
    target, looking = ReferenceTarget(llama), search(llama)
    answers = [greedy_reference(llama, prompt, 12) for prompt in PROMPTS]
    for attn, mlp in SETS[2:4]:
        skips, drafter = looking.measure(Skips(frozenset(attn), frozenset(mlp))), LayerSkipDrafter(attn=attn, mlp=mlp)
        drafter.bind(target)
        right = []
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            for cut, token in enumerate(answer):
                ids, row_states = [*prompt, *answer[:cut]], [drafter.begin()]
                state = State(target, target.new_cache(), Sampler(SamplingParams()), [ids], row_states=row_states)
                if len(state.ids[0]) > 1:
                    prefill(target, state.cache, [state.ids[0][:-1]])
                right.append(int(drafter.propose(state, 1).tokens[0, 0]) == token)
        assert 0 < skips.agreement < 1 and skips.agreement == pytest.approx(sum(right) / len(right))


def test_what_is_never_missed_is_found_and_priced(llama: PreTrainedModel) -> None:
    model = without(llama, (1, 2), (2,))
    best = search(model).run(3.0, lambda text: None)[0]
    assert {*best.attn, *best.mlp} >= {1, 2} and 1 in best.attn and 2 in best.attn and 2 in best.mlp
    found = search(model).measure(Skips(frozenset({1, 2}), frozenset({2})))
    assert found.agreement == 1 and found.tokens == found.depth + 1
    # Per draft: ends, layers 0 and 3, the MLP of 1. Scoring without layer 0, which drafting has run, but for one token.
    score = CHEAP.score[4] + (found.depth - 3) / 12 * 0.3
    seconds = found.depth * (0.1 + 2 * 1.0 + 0.6) + score - (score - 0.1) / 4 + 1.0
    assert found.predicted == pytest.approx(found.tokens / seconds * 4.1)


def test_parts_that_cost_as_much_as_the_layer_are_left_in(llama: PreTrainedModel) -> None:
    dear = Prices(layer=1.0, attention=1.5, mlp=1.2, ends=0.1, score=CHEAP.score)
    assert all(s.attn == s.mlp for s in search(llama, dear).run(1.0, lambda text: None))


def test_tokens_of_a_step_are_expected_from_hits_along_a_text() -> None:
    assert RECIPE["expected_tokens"]([[True] * 6], 2) == 3
    assert RECIPE["expected_tokens"]([[False] * 5], 3) == 1
    assert RECIPE["expected_tokens"]([[True, False, True, True]], 3) == 2  # the second step runs out of text
    assert RECIPE["expected_tokens"]([[True]], 3) == 1


def test_the_recipe_writes_a_file_that_drafts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = save_tiny(tmp_path / "model"), tmp_path / "skips.yaml"
    (tmp_path / "prompts.txt").write_text("What is rain?\nName a river.\n")
    options = f"--prompts {tmp_path / 'prompts.txt'} --model {folder} --output {output} --minutes 0.05"
    RECIPE["main"](options.split())
    printed = capsys.readouterr()
    assert "measured x" in printed.out and "plain decoding" in printed.err
    data = yaml.safe_load(output.read_text())
    assert data["base"]["name"] == "model" and str(tmp_path) not in output.read_text()
    assert data["drafter"] == "layer-skip" and data["attn"] + data["mlp"]
    decoder = SpecDecoder.from_pretrained(str(folder), drafter=f"layer-skip={output}")
    assert sorted(decoder.drafter.attn) == data["attn"] and sorted(decoder.drafter.mlp) == data["mlp"]  # type: ignore[attr-defined]
    plain = decoder.with_drafter("none").generate("ab", max_new_tokens=12)
    assert decoder.generate("ab", max_new_tokens=12, num_speculative_tokens=3).token_ids == plain.token_ids


def test_files_that_are_no_skip_sets_are_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    path, target = tmp_path / "skips.yaml", ReferenceTarget(llama)
    for text, options, message in (
        ("- 1\n", {}, "is not a skip set; make one: python examples/layer_skip.py"),
        ("drafter: m2r2\n", {}, "is not a skip set"),
        ("drafter: layer-skip\nlayers: [1]\n", {}, "is not a skip set"),
        ("drafter: [", {}, "cannot read the skip set"),
        ("drafter: layer-skip\nattn: [a]\n", {}, "attn must be a list of whole numbers"),
        ("drafter: layer-skip\nbase: {name: other, fingerprint: 1}\nattn: [1]\n", {}, "was tuned on other, not on"),
        ("drafter: layer-skip\nattn: [1]\n", {"skip": [2]}, "or from 'skip', not both"),
    ):
        path.write_text(text)
        with pytest.raises(SpecDecError, match=message) as caught:
            LayerSkipDrafter.load(target, str(path), **options)
        assert "\n" not in str(caught.value)
