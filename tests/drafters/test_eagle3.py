"""EAGLE-3: what a head drafts, the speculators format, what is refused. (Output: test_drafters_matrix.)"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import Tensor

from specdec import SpecDecError, SpecDecoder
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.eagle3.network import Eagle3, Eagle3Config
from specdec.engine.depth import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.runtimes.transformers import TransformersTarget
from specdec.verifiers.exact import ExactVerifier

TEXT = [5, 6, 7, 8, 5, 6, 9, 3, 12]


@pytest.fixture
def target() -> TransformersTarget:
    return TransformersTarget(tiny_model())


def save(folder: Path, network: Eagle3, target: TransformersTarget, **changes: Any) -> Path:
    """Write a head as others do."""
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    tokens = network.tokens
    tensors["t2d"] = torch.zeros(target.vocab_size, dtype=torch.bool).index_fill(0, tokens, True)
    save_file(tensors, folder / "model.safetensors")
    config = config_of(network.config, target) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_of(head: Eagle3Config, target: TransformersTarget) -> dict[str, Any]:
    """config.json in the speculators format."""
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
            "verifier": {"name_or_path": "org/base", "architectures": list(target.model.config.architectures or [])},
        },
        "draft_vocab_size": head.vocab,
        "target_hidden_size": target.hidden_size,
        "norm_before_residual": head.norm_first,
        "eagle_aux_hidden_state_layer_ids": list(head.layers),
        "tie_word_embeddings": False,
        "transformer_layer_config": {
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": head.width,
            "intermediate_size": head.intermediate_size,
            "num_attention_heads": head.heads,
            "num_key_value_heads": head.kv_heads,
            "head_dim": head.head_dim,
            "num_hidden_layers": 1,
            "rms_norm_eps": head.eps,
            "vocab_size": target.vocab_size,
            "max_position_embeddings": target.context,
            **head.rope,
        },
    }


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions, by the formula: x [H, T, d]."""
    half = x.shape[-1] // 2
    angles = positions[:, None] / 10000.0 ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


def pass_of(w: dict[str, Tensor], embedded: Tensor, known: Tensor, norm_first: bool) -> Tensor:
    """One decoder layer over pairs [T, D']."""
    layer = "layers.0."
    normed = norm(known, w[layer + "hidden_norm.weight"])
    both = torch.cat((norm(embedded, w[layer + "input_layernorm.weight"]), normed), -1)
    q, k, v = ((both @ w[f"{layer}self_attn.{n}_proj.weight"].T).view(len(both), -1, 8).transpose(0, 1) for n in "qkv")
    places = torch.arange(len(both)).float()
    q, k = turned(q, places), turned(k, places)
    k, v = (part.repeat_interleave(len(q) // len(part), 0) for part in (k, v))
    scores = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(torch.ones(len(both), len(both)).triu(1).bool(), -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    x = (normed if norm_first else known) + mixed @ w[layer + "self_attn.o_proj.weight"].T
    y = norm(x, w[layer + "post_attention_layernorm.weight"])
    gate, up = (y @ w[f"{layer}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w[layer + "mlp.down_proj.weight"].T


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


def proposed(target: TransformersTarget, drafter: Eagle3Drafter, prompts: list[list[int]], count: int = 9) -> list[Any]:
    """The texts of all rows and the draft, of each step of a generation."""
    seen = zoo.watched(drafter)
    zoo.run(target, drafter, prompts, count, eos=None)
    return seen


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
    folder = save(tmp_path / "head", made.network, target)
    decoder = SpecDecoder(tiny_model(), drafter=str(folder))
    assert decoder.drafter.name == "eagle3"
    read = Eagle3Drafter.load(target, str(folder))
    before, after = (proposed(target, drafter, [TEXT]) for drafter in (made, read))
    assert [draft.lists() for _, draft in before] == [draft.lists() for _, draft in after]


def test_names_of_the_first_heads_and_a_bias_are_read(target: TransformersTarget, tmp_path: Path) -> None:
    made = zoo.eagle3(target)
    folder = save(tmp_path / "head", made.network, target)
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
    save_file(renamed | {"fc.bias": torch.ones(target.hidden_size)}, folder / "model.safetensors")
    network = Eagle3Drafter.load(target, str(folder)).network
    states = torch.randn(1, 2, len(network.config.layers) * target.hidden_size)
    for each in (network, made.network):
        each.freeze(target)
    torch.testing.assert_close(network.map("fc", states), made.network.map("fc", states) + 1)


LAYER = {"model_type": "llama", "vocab_size": 97, "num_attention_heads": 4, "intermediate_size": 40, "head_dim": 8}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"speculators_model_type": "eagle"}, "holds the drafter 'eagle', not 'eagle3'"),
        ({"transformer_layer_config": 5}, "is not an EAGLE-3 head in the speculators format"),
        ({"target_hidden_size": 64}, "made for a model of hidden size 64; this model's is 32"),
        ({"transformer_layer_config": LAYER | {"vocab_size": 50}}, "made for a model of vocabulary 50"),
        ({"transformer_layer_config": LAYER | {"model_type": "qwen3"}}, "has the model_type 'qwen3'; only 'llama'"),
        ({"transformer_layer_config": LAYER | {"num_hidden_layers": 2}}, "has the num_hidden_layers 2; only 1 can"),
        ({"transformer_layer_config": LAYER | {"hidden_size": 10**9}}, "hidden_size"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, r"reads layers \[1, 2, 9\]; this model has 4"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, "tensor 'fc.weight' is"),
        ({"draft_vocab_size": 30}, "do not fit each other"),
        ({"draft_vocab_size": 98}, "draft_vocab_size"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(target, tmp_path, changes, text) -> None:
    folder = save(tmp_path / "head", zoo.eagle3(target).network, target, **changes)
    with refused(text):
        Eagle3Drafter.load(target, str(folder))


@pytest.mark.parametrize(
    ("name", "tensor", "text"),
    [
        ("d2t", torch.full((49,), 96), "names tokens that the model does not have"),
        ("norm.weight", torch.full((32,), torch.nan), "holds NaN"),
        ("norm.weight", None, "tensor 'norm.weight' is missing"),
        ("d2t", None, "does not say which"),
    ],
)
def test_broken_tensors_are_refused(target, tmp_path, name, tensor, text) -> None:
    folder = save(tmp_path / "head", zoo.eagle3(target).network, target)
    tensors = load_file(folder / "model.safetensors")
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor[: len(tensors[name])]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SpecDecError, match=text):
        Eagle3Drafter.load(target, str(folder))
