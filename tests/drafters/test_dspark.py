"""DFlash and DSpark: what a head drafts, the speculators format, what is refused. (Output: test_drafters_matrix.)"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from heads import TEXT, attended, config_of, fed_forward, norm, proposed, save, turned
from refusals import refused
from tiny import greedy_reference, tiny_model
from torch import Tensor

from specdec import SpecDecoder
from specdec.drafters import pairs
from specdec.drafters.dspark import BlockHead, DFlashDrafter, DSparkDrafter
from specdec.kvcache.cache import KVCache
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.state import State

HEADS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "recurrent, from the second slot, windows in both directions": {"markov": "rnn", "first": 1, "causal": False},
    "gated, biased, confidence without the token": {
        "markov": "gated",
        "biased": True,
        "sure": 32,
        "windows": (2, None),
    },
    "of all tokens": {"vocab": 97},
    "no further heads": {"markov": "", "rank": 0, "sure": 0},
}


@pytest.fixture
def target() -> TransformersTarget:
    return TransformersTarget(tiny_model())


# -- the formula ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def block_of(target: TransformersTarget, network: BlockHead, text: list[int]) -> Tensor:
    """States [S, D] of the block after a text."""
    w, config, n = network.state_dict(), network.config, len(text) - 1
    hidden = target.model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
    seen = norm(
        torch.cat([hidden[layer][0] for layer in config.layers], -1) @ w["fc.weight"].T, w["hidden_norm.weight"]
    )
    tokens = torch.tensor([text[-1], *[config.mask_token] * (config.block - 1)])
    x, places = target.model.get_input_embeddings().weight[tokens], torch.arange(n + config.block).float()
    for number, window in enumerate(config.windows):
        layer, y = f"layers.{number}.", norm(x, w[f"layers.{number}.input_layernorm.weight"])

        def made(name: str, x: Tensor, layer: str = layer) -> Tensor:
            out = x @ w[f"{layer}self_attn.{name}_proj.weight"].T + w.get(f"{layer}self_attn.{name}_proj.bias", 0)
            return out.view(len(x), -1, 8).transpose(0, 1)

        both = torch.cat((seen, y))
        q = turned(norm(made("q", y), w[layer + "self_attn.q_norm.weight"]), places[n:])
        k = turned(norm(made("k", both), w[layer + "self_attn.k_norm.weight"]), places)
        own, keys = torch.arange(config.block)[:, None], torch.arange(n + config.block)
        visible = (keys >= n) | (keys >= n - (window or n))
        if window and config.causal:
            visible = visible & (keys <= n + own)
        mixed = attended(q, k, made("v", both), visible)
        x = x + mixed @ w[layer + "self_attn.o_proj.weight"].T + w.get(layer + "self_attn.o_proj.bias", 0)
        x = fed_forward(w, layer, x)
    return norm(x, w["norm.weight"])


@torch.no_grad()
def expected(
    target: TransformersTarget, network: BlockHead, states: Tensor, root: int, drafted: list[int]
) -> tuple[Tensor, Tensor | None]:
    """Logits [V'] of what follows ``drafted`` tokens after ``root``, and the log-odds of the confidence head."""
    w, config = network.state_dict(), network.config
    slot, memory = config.first + len(drafted), torch.zeros(config.rank)
    logits = states[slot] @ w.get("lm_head.weight", target.model.get_output_embeddings().weight).T
    before = torch.zeros(0)
    if config.markov:
        tokens = [*[root] * config.first, root, *drafted]  # before each slot
        for x, token in zip(states, tokens, strict=False):
            kept = before = w["markov_head.markov_w1.weight"][token]
            if config.markov == "gated":
                gate = w["markov_head.gate_proj.weight"] @ torch.cat((x, before)) + w["markov_head.gate_proj.bias"]
                kept = gate.sigmoid() * before
            if config.markov == "rnn":
                z = torch.cat((memory, before, x))
                z = w["markov_head.joint_proj.weight"] @ z + w["markov_head.joint_proj.bias"]
                gate, new, out = z.chunk(3)
                memory = gate.sigmoid() * memory + (1 - gate.sigmoid()) * new.tanh()
                kept = out.tanh()
        logits = logits + w["markov_head.markov_w2.weight"] @ kept
    if not config.sure:
        return logits, None
    features = torch.cat((states[slot], before))[: config.sure]
    return logits, w["confidence_head.proj.weight"] @ features + w["confidence_head.proj.bias"]


def likely(logits: Tensor, odds: Tensor | None) -> Tensor:
    """Log-probabilities: the confidence is that of the likeliest token, as long as it stays the likeliest."""
    if odds is not None:
        best, first = logits.topk(2).values, logits.argmax()
        others = torch.cat((logits[:first], logits[first + 1 :])).logsumexp(0)
        logits = logits.index_fill(0, first, float(torch.maximum(others + odds, best[1:] + 1e-3)))
    return logits.log_softmax(-1)


# -- what is drafted --------------------------------------------------------------------------------------------------


def ids_of(target: TransformersTarget, drafter: DSparkDrafter) -> Tensor:
    tokens = drafter.network.tokens
    return torch.arange(target.vocab_size) if tokens is None else tokens


@pytest.mark.parametrize("name", HEADS)
def test_chains_of_ragged_rows_are_what_the_formula_says(target, monkeypatch, name) -> None:
    monkeypatch.setattr(pairs, "PASS_TOKENS", 4)  # a long text is read in parts
    drafter = zoo.dspark(target, **HEADS[name])
    steps = proposed(target, drafter, [TEXT * 4, TEXT[3:5], TEXT[2:]])
    most = min(4, 5 - drafter.network.config.first)
    assert len(steps) > 2 and max(len(draft.parents) for _, draft in steps) == most
    ids = ids_of(target, drafter)
    for texts, draft in steps:
        assert draft.parents == tuple(range(len(draft.parents)))
        for row, text in enumerate(texts):
            states = block_of(target, drafter.network, text)
            for *before, token in draft.paths(row):
                assert token == ids[expected(target, drafter.network, states, text[-1], before)[0].argmax()]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("prompts", [[TEXT], [TEXT, TEXT[3:5]]])
def test_a_tree_has_the_likeliest_tokens(target, name, prompts) -> None:
    drafter = zoo.dspark(target, **HEADS[name], nodes=7, width=3)
    ids, steps = ids_of(target, drafter), proposed(target, drafter, prompts)
    assert any(draft.parents != tuple(range(len(draft.parents))) for _, draft in steps)
    for texts, draft in steps:
        for row, text in enumerate(texts):
            states, nodes = block_of(target, drafter.network, text), draft.paths(row)

            def logs(before: list[int], states: Tensor = states, text: list[int] = text) -> Tensor:
                return likely(*expected(target, drafter.network, states, text[-1], before))

            def total(path: list[int], logs: Any = logs) -> float:
                return sum(float(logs(path[:n])[(ids == token).nonzero()[0, 0]]) for n, token in enumerate(path))

            least, best = min(map(total, nodes), default=0.0), logs([]).topk(3)
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                assert value < least + 1e-4 or [int(ids[index])] in nodes


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("kind", [DSparkDrafter, DFlashDrafter])
def test_a_folder_in_the_speculators_format_drafts_as_it_did(target, tmp_path, kind, name) -> None:
    plain = {"markov": "", "rank": 0, "sure": 0} if kind is DFlashDrafter else {}
    made = zoo.dspark(target, kind, **HEADS[name] | plain)
    folder = save(tmp_path / "head", made.network, target, kind.name)
    read = kind.load(target, str(folder))
    assert type(read) is kind and replace(read.network.config, rope={}) == made.network.config
    before, after = (proposed(target, drafter, [TEXT]) for drafter in (made, read))
    assert [draft.lists() for _, draft in before] == [draft.lists() for _, draft in after]


def test_a_decoder_finds_it_by_its_folder_and_joins_it_with_ngrams(target, tmp_path: Path) -> None:
    folder = save(tmp_path / "head", zoo.dspark(target).network, target, "dspark")
    model = tiny_model()
    for spec in (str(folder), f"ngram+dspark={folder}"):
        decoder = SpecDecoder(model, drafter=spec)
        assert "dspark" in decoder.drafter.traits.label
        outputs = decoder.generate_batch(zoo.PROMPTS, max_new_tokens=30)
        assert [out.token_ids for out in outputs] == [greedy_reference(model, prompt, 30) for prompt in zoo.PROMPTS]
        assert any(out.metrics.num_draft_tokens for out in outputs)


# -- the package ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*HEADS, "dflash"])
@torch.no_grad()
def test_a_head_of_the_package_computes_what_the_package_does(target, tmp_path: Path, name: str) -> None:
    core = pytest.importorskip("speculators.models.dspark.core", reason="speculators is not installed")
    like = zoo.dspark(target, **HEADS["no further heads" if name == "dflash" else name])
    network = like.network
    kind = core.DFlashDraftModel if name == "dflash" else core.DSparkDraftModel
    config = config_of(network, target, "dflash" if name == "dflash" else "dspark")
    layer = config.pop("transformer_layer_config") | {"attn_implementation": "eager"}
    whole = kind.config_class(transformer_layer_config=core.DFlashDraftModel.config_class().transformer_layer_config)
    whole = kind.config_class(
        **{key: value for key, value in config.items() if key != "speculators_version"},
        transformer_layer_config=type(whole.transformer_layer_config)(**layer),
    )
    theirs = kind(whole).float().eval()
    torch.manual_seed(6)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    theirs.embed_tokens.weight.copy_(target.model.get_input_embeddings().weight)
    if theirs.use_draft_vocab:
        theirs.d2t.copy_(network.d2t)
        theirs.t2d.index_fill_(0, network.tokens, True)
    else:
        theirs.lm_head.weight.copy_(target.model.get_output_embeddings().weight)
    theirs.save_pretrained(tmp_path)
    drafter = (DFlashDrafter if name == "dflash" else DSparkDrafter).load(target, str(tmp_path))
    drafter.bind(target)
    texts = [TEXT * 3, TEXT[2:]]
    rows = [drafter.begin() for _ in texts]
    drafted = torch.randint(0, target.vocab_size, (len(texts), drafter.network.config.block + 1))
    cache = KVCache(1, len(texts))
    for entries, row, text in zip(cache.entries, rows, texts, strict=True):
        entries.count = len(text) - 1
        row.add(tapped(target, drafter, text[:-1]))
    state = State(target, cache, None, texts, row_states=rows)
    states = drafter.block(state, drafter.catch_up(state))
    for text, after, own in zip(texts, drafted, states, strict=True):
        check_package(theirs, drafter, tapped(target, drafter, [*text, *after.tolist()]), text, after, own[None])


def tapped(target: TransformersTarget, drafter: DSparkDrafter, text: list[int]) -> Tensor:
    hidden = target.model(torch.tensor([text]), output_hidden_states=True).hidden_states
    return torch.cat([hidden[layer][0] for layer in drafter.network.config.layers], -1)


def check_package(
    theirs: Any, drafter: DSparkDrafter, seen: Tensor, text: list[int], after: Tensor, own: Tensor
) -> None:
    """Compare with what the package computes where it trains on a text, for the block at the text's last token."""
    config, ids = drafter.network.config, torch.tensor([[*text, *after.tolist()]])
    anchors = torch.zeros_like(ids).index_fill(1, torch.tensor([len(text) - 1]), 1)
    last = torch.zeros(1, ids.shape[1], config.width)
    hidden, logits, *_ = theirs._backbone_forward(seen[None], ids, anchors, last, torch.zeros_like(ids), max_anchors=1)
    torch.testing.assert_close(own, hidden, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(drafter.logits(own), logits, atol=2e-4, rtol=1e-4)
    block = ids[:, len(text) - 1 :][:, : config.block]
    before = torch.cat((block[:, : config.first], block), 1)[:, : config.block]
    markov, memory = getattr(theirs, "markov_head", None), torch.zeros(1, 1, config.rank)
    for slot in range(config.block):
        added, odds, memory = drafter.network.follow(before[:, slot : slot + 1], own[:, slot : slot + 1], memory)
        assert (added is None, odds is None) == (markov is None, getattr(theirs, "confidence_head", None) is None)
        if added is not None:
            bias = markov.block_bias(prev_token_ids=before, hidden_states=hidden)
            torch.testing.assert_close(added[:, 0], bias[:, slot], atol=2e-4, rtol=1e-4)
        if odds is not None:
            features = torch.cat((hidden, markov.prev_embeddings(before)), -1)[..., : config.sure]
            sure = theirs.confidence_head(features)
            torch.testing.assert_close(odds[:, 0, 0], sure[:, slot], atol=2e-4, rtol=1e-4)


# -- bad files --------------------------------------------------------------------------------------------------------

LAYER = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
LAYER |= {"intermediate_size": 40, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"transformer_layer_config": LAYER | {"hidden_size": 64}}, "model of hidden size 64; this model's is 32"),
        ({"transformer_layer_config": LAYER | {"hidden_act": ["a"]}}, "has the hidden_act"),
        ({"transformer_layer_config": LAYER | {"num_hidden_layers": 1}}, r"tensor 'layers.1.* is"),
        (
            {"transformer_layer_config": LAYER | {"layer_types": ["full_attention"]}},
            "unusable transformer_layer_config",
        ),
        ({"transformer_layer_config": LAYER | {"layer_types": ["chunked_attention"] * 2}}, "of the layer_types"),
        ({"transformer_layer_config": LAYER | {"head_dim": "x"}}, "unusable transformer_layer_config"),
        ({"aux_hidden_state_layer_ids": None}, "tapped layers of the dspark head"),
        ({"block_size": 0}, "block_size of the dspark head"),
        ({"block_size": 10**9}, "block_size of the dspark head"),
        ({"mask_token_id": None}, "mask_token_id of the dspark head"),
        ({"mask_token_id": 97}, "mask_token_id of the dspark head"),
        ({"markov_head_type": "other"}, "has the markov_head_type 'other'; only vanilla and gated and rnn"),
        ({"markov_head_type": "gated"}, "'markov_head.gate_proj.bias' is missing"),
        ({"markov_rank": -1}, "markov_rank"),
        ({"markov_rank": 10**9}, "markov_rank"),
        ({"markov_rank": 0}, "reads a Markov head that is not there"),
        ({"confidence_head_with_markov": False}, "tensor 'confidence_head.proj.weight' is"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(target, tmp_path, changes, text) -> None:
    folder = save(tmp_path / "head", zoo.dspark(target).network, target, "dspark", **changes)
    with refused(text):
        DSparkDrafter.load(target, str(folder))
