"""EAGLE-3: what a head drafts, the speculators format, what is refused. (Output: test_drafters_matrix.)"""

from pathlib import Path

import pytest
import torch
import zoo
from heads import TEXT, attended, fed_forward, norm, proposed, save, turned
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import Tensor

from specdec import SpecDecoder
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.eagle3.network import Eagle3
from specdec.engine.depth import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.runtimes.transformers import TransformersTarget
from specdec.verifiers.exact import ExactVerifier


@pytest.fixture
def target() -> TransformersTarget:
    return TransformersTarget(tiny_model())


def pass_of(w: dict[str, Tensor], embedded: Tensor, known: Tensor, norm_first: bool) -> Tensor:
    """One decoder layer over pairs [T, D']."""
    layer = "layers.0."
    normed = norm(known, w[layer + "hidden_norm.weight"])
    both = torch.cat((norm(embedded, w[layer + "input_layernorm.weight"]), normed), -1)
    q, k, v = ((both @ w[f"{layer}self_attn.{n}_proj.weight"].T).view(len(both), -1, 8).transpose(0, 1) for n in "qkv")
    places = torch.arange(len(both)).float()
    q, k = turned(q, places), turned(k, places)
    mixed = attended(q, k, v, torch.ones(len(both), len(both)).tril().bool())
    x = (normed if norm_first else known) + mixed @ w[layer + "self_attn.o_proj.weight"].T
    return fed_forward(w, layer, x)


@torch.no_grad()
def expected(target: TransformersTarget, network: Eagle3, text: list[int], drafted: list[int]) -> Tensor:
    """Logits [V'] of what the head expects after ``text`` and ``drafted`` tokens."""
    w, config = network.state_dict(), network.config
    hidden = target.model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
    known = torch.cat([hidden[layer][0] for layer in config.layers], -1) @ w["fc.weight"].T
    embedding = w.get("embed_tokens.weight", target.model.get_input_embeddings().weight)
    for count in range(len(drafted) + 1):
        tokens = torch.tensor([*text, *drafted][1 : len(text) + count])
        out = pass_of(w, embedding[tokens], known, config.norm_first)
        known = torch.cat((known, out[-1:]))
    return norm(out[-1], w["norm.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("own", [False, True])
def test_chains_of_ragged_rows_are_what_the_formula_says(target: TransformersTarget, own: bool) -> None:
    drafter = zoo.eagle3(target, own)
    steps = proposed(target, drafter, [TEXT, TEXT[3:5], TEXT[2:]])
    assert len(steps) > 2
    tokens = drafter.network.tokens
    for texts, draft in steps:
        for row, text in enumerate(texts):
            for *before, token in draft.paths(row):
                assert token == tokens[expected(target, drafter.network, text, before).argmax()]


def test_chains_of_several_rows_have_not_more_nodes_either(target: TransformersTarget) -> None:
    for nodes, most in ((2, 2), (9, 4)):
        _, loop = zoo.run(target, zoo.eagle3(target, nodes=nodes), zoo.PROMPTS, 12)
        assert max(drafted for each in loop.metrics for drafted in each.per_step_drafted) == most


@pytest.mark.parametrize("own", [False, True])
def test_a_grown_tree_has_the_likeliest_paths(target: TransformersTarget, own: bool) -> None:
    drafter = zoo.eagle3(target, own, nodes=7, width=3)
    tokens = drafter.network.tokens
    steps = proposed(target, drafter, [TEXT])
    assert any(len(draft.parents) == 7 and draft.parents != tuple(range(7)) for _, draft in steps)
    for [text], draft in steps:

        def likely(path: list[int], text: list[int] = text) -> float:
            total = 0.0
            for n, token in enumerate(path):
                logs = expected(target, drafter.network, text, path[:n]).log_softmax(-1)
                total += float(logs[tokens.tolist().index(token)])
            return total

        nodes = draft.paths(0)
        least = min(map(likely, nodes))
        first = expected(target, drafter.network, text, []).log_softmax(-1)
        best = first.topk(3)
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            assert value < least + 1e-4 or [int(tokens[index])] in nodes


def test_a_prompt_in_parts_and_a_row_that_joins_later_change_nothing(target: TransformersTarget) -> None:
    whole = zoo.eagle3(target)
    alone = [draft.lists() for _, draft in proposed(target, whole, [TEXT])]
    drafter = zoo.eagle3(target)
    drafter.bind(target)
    steps = zoo.watched(drafter)
    engine = Engine(target, drafter, ExactVerifier(), FixedDepth(4), prefill_chunk=2)
    engine.submit(Request([9, 10], 30))
    for _ in range(3):
        zoo.step(engine)
    zoo.finish(engine, Request(TEXT, 9))
    seen = [draft.lists()[b] for texts, draft in steps for b, ids in enumerate(texts) if ids[: len(TEXT)] == TEXT]
    assert len(seen) >= len(alone) > 1
    for mine, [theirs] in zip(seen, alone, strict=False):  # the last drafts are as deep as the longest row's may be
        depth = min(len(mine), len(theirs))
        assert mine[:depth] == theirs[:depth]


@pytest.mark.parametrize("own", [False, True])
def test_a_folder_in_the_speculators_format_drafts_as_it_did(target: TransformersTarget, tmp_path, own: bool) -> None:
    made = zoo.eagle3(target, own)
    folder = save(tmp_path / "head", made.network, target, "eagle3")
    decoder = SpecDecoder(tiny_model(), drafter=str(folder))
    assert decoder.drafter.name == "eagle3"
    read = Eagle3Drafter.load(target, str(folder))
    before, after = (proposed(target, drafter, [TEXT]) for drafter in (made, read))
    assert [draft.lists() for _, draft in before] == [draft.lists() for _, draft in after]


def test_names_of_the_first_heads_and_a_bias_are_read(target: TransformersTarget, tmp_path: Path) -> None:
    made = zoo.eagle3(target)
    folder = save(tmp_path / "head", made.network, target, "eagle3")
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
    save_file(renamed | {"fc.bias": torch.ones(target.hidden_size)}, folder / "model.safetensors")
    network = Eagle3Drafter.load(target, str(folder)).network
    states = torch.randn(1, 2, len(network.config.layers) * target.hidden_size)
    for each in (network, made.network):
        each.freeze(target)
    torch.testing.assert_close(network.map("fc", states), made.network.map("fc", states) + 1)


def test_a_head_for_a_model_of_another_size_is_refused(target: TransformersTarget, tmp_path: Path) -> None:
    folder = save(tmp_path / "head", zoo.eagle3(target).network, target, "eagle3", target_hidden_size=64)
    with refused("made for a model of hidden size 64; this model's is 32"):
        Eagle3Drafter.load(target, str(folder))
