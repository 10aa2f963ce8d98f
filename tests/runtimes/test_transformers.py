"""The reference runtime computes what the model itself computes, in pieces, on every supported family."""

import pytest
import torch
from passes import apart
from tiny import FAMILIES, HYBRIDS, OTHERS, greedy_reference, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from specdec import SpecDecoder
from specdec.base.errors import SpecDecError, SpecDecWarning
from specdec.runtimes.decoder_layer import Adapters
from specdec.runtimes.prefill import run_tokens
from specdec.runtimes.select import make_target
from specdec.runtimes.target import Pass
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.draft import Draft

COUNTING = "gpt_neo", "llama4_text"  # these run by default
PIECES = ((0, 9), (9, 10), (10, 14))  # a prompt, a single token, a block


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_pieces_equal_the_whole(family: str) -> None:
    model = tiny_model(family)
    target, state_keys = TransformersTarget(model), list(model.state_dict())
    ids = torch.randint(3, 97, (2, 14))
    positions = torch.arange(14)[None].expand(2, -1)
    cache, outs = target.new_cache(2), []
    for a, b in PIECES:
        part = positions[:, a:b]
        x = target.layers(target.embed(ids[:, a:b], part), 0, 3, Pass(part, cache.register(0, part), cache))
        x = target.layers(x, 3, 4, Pass(part, cache.register(3, part), cache))
        outs.append(target.readout(x))
        cache.commit([list(range(b - a))] * 2)
    assert torch.allclose(torch.cat(outs, 1), model(ids).logits, atol=2e-5, rtol=1e-5)
    assert list(model.state_dict()) == state_keys  # the model's own module tree is untouched


def test_texts_of_longrope_end_where_its_rotations_change() -> None:
    scaling = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    scaling |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = tiny_model("phi3", rope_parameters=scaling, original_max_position_embeddings=32, num_key_value_heads=2)
    with pytest.warns(SpecDecWarning, match="texts may have 32 tokens"):
        decoder = SpecDecoder(model, drafter="prompt-lookup")
    prompt = [5, 6, 7, 8, 5, 6, 7]
    out = decoder.generate(prompt, max_new_tokens=99, ignore_eos=True, num_speculative_tokens=4).token_ids
    assert len(out) == 25
    assert out == greedy_reference(model, prompt, 25)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_every_tree_branch_equals_its_own_sequence(family: str) -> None:
    model = tiny_model(family)
    target = TransformersTarget(model)
    prompt, block, parents = [5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23, 24, 25], (0, 0, 1, 2, 3)
    draft = Draft(torch.tensor([block[1:]]), parents)
    cache = target.new_cache()
    positions = torch.arange(7)[None]
    given = Pass(positions, cache.register(0, positions), cache)
    target.layers(target.embed(torch.tensor([prompt]), positions), 0, 4, given)
    cache.commit([list(range(7))])
    positions = 7 + torch.tensor([draft.depths()])
    x = target.embed(torch.tensor([block]), positions)
    x = target.layers(x, 0, 4, Pass(positions, cache.register(0, positions, draft.ancestors()), cache))
    logits = target.readout(x)[0]
    for node in range(len(block)):
        path = [node]
        while path[0]:
            path.insert(0, parents[path[0] - 1])
        alone = model(torch.tensor([prompt + [block[i] for i in path]])).logits[0, -1]
        assert torch.allclose(logits[node], alone, atol=2e-5, rtol=1e-5), f"node {node}"


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS, *OTHERS])
def test_ragged_rows_with_trees_equal_their_own_sequences(family: str) -> None:
    ragged_rows_with_trees(family)


@pytest.mark.parametrize("family", COUNTING)
def test_attention_that_counts_tokens_reads_positions(family: str) -> None:
    """A mask of its own, and a temperature."""
    ragged_rows_with_trees(family)


@torch.inference_mode()
def ragged_rows_with_trees(family: str) -> None:
    """The longer row is beyond windows, chunks and steps of a temperature."""
    model = tiny_model(family)
    target = TransformersTarget(model)
    torch.manual_seed(1)
    texts = [torch.randint(3, 97, (count,)).tolist() for count in (29, 6)]
    cache = target.new_cache(2)
    run_tokens(target, cache, [text[:-1] for text in texts])
    nodes, parents = [[5, 9, 11, 12, 13, 14], [7, 8, 21, 22, 23, 24]], (0, 0, 1, 2, 3, 4)  # two branches
    draft = Draft(nodes, parents)
    tokens = torch.tensor([[text[-1], *own] for text, own in zip(texts, nodes, strict=True)])
    positions = torch.tensor(cache.rows)[:, None] + torch.tensor([draft.depths()])
    mask = cache.register(0, positions, draft.ancestors())
    x = target.layers(target.embed(tokens, positions), 0, 4, Pass(positions, mask, cache, ids=tokens))
    logits = target.readout(x)
    for row, text in enumerate(texts):
        for path in [0, 1, 3, 5], [0, 2, 4, 6]:
            own = model(torch.tensor([text + tokens[row, path[1:]].tolist()]), use_cache=False).logits[0, -4:]
            assert apart(logits[row, path], own) < 1e-5, f"row {row}, nodes {path}"


IGNORING, OBEYING = ["llama", "granite", "olmoe", "gpt_neox"], ["mistral", "phi3", "mixtral", "starcoder2"]


@pytest.mark.parametrize("family", [*IGNORING, *OBEYING])
@torch.inference_mode()
def test_a_window_in_the_config_counts_where_the_family_reads_it(family: str) -> None:
    """Checkpoints that were converted from another family may have the field of that one."""
    model = tiny_model(family, sliding_window=8)
    target, ids = TransformersTarget(model), torch.randint(3, 97, (30,), generator=torch.Generator().manual_seed(1))
    found = target.readout(run_tokens(target, target.new_cache(), [ids.tolist()]))
    assert torch.allclose(found[0], model(ids[None], use_cache=False).logits[0, -1:], atol=2e-5, rtol=1e-5)
    assert set(target.windows) == {None if family in IGNORING else 8}


@torch.inference_mode()
def test_taps_record_layer_inputs() -> None:
    model = tiny_model("llama")
    target, ids, positions = TransformersTarget(model), torch.tensor([[3, 4, 5]]), torch.arange(3)[None]
    states = model(ids, output_hidden_states=True).hidden_states
    cache, taps = target.new_cache(), {0: torch.empty(0), 2: torch.empty(0), 4: torch.empty(0)}
    x = target.layers(target.embed(ids, positions), 0, 4, Pass(positions, cache.register(0, positions), cache, taps))
    assert torch.equal(taps[0], states[0]) and torch.equal(taps[2], states[2])
    assert torch.equal(taps[4], x)  # before the final norm, unlike the last of HF's states
    assert torch.allclose(target.readout(x, target.reduced_head(torch.tensor([7, 3]))), target.readout(x)[..., [7, 3]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
@torch.inference_mode()
def test_adapters_act_and_untrained_ones_change_nothing(family: str) -> None:
    target = TransformersTarget(tiny_model(family))
    adapters = Adapters({1: target.linears(1)}, rank=2)
    ids, positions = torch.tensor([[3, 4, 5, 6]]), torch.arange(4)[None]

    def run(given: Adapters | None) -> torch.Tensor:
        cache = target.new_cache()
        mask = cache.register(0, positions)
        x = target.embed(ids, positions)
        return target.layers(x, 0, 2, Pass(positions, mask, cache, adapters=given))

    plain = run(None)
    assert torch.allclose(run(adapters), plain, atol=1e-6)
    for parameter in adapters.parameters():
        parameter.normal_()
    assert ((run(adapters) - plain).abs().amax(-1) > 1e-3).all()


def test_unsupported_models_are_refused_with_the_reason() -> None:
    t5 = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)
    )
    bloom_config = AutoConfig.for_model("bloom", hidden_size=16, n_layer=2, n_head=2, vocab_size=50)
    bloom = AutoModelForCausalLM.from_config(bloom_config)
    zamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "zamba2", hidden_size=16, num_hidden_layers=2, layer_types=["linear_attention", "hybrid"], vocab_size=50
        )
    )
    by_layer = tiny_model("gemma4_text", hidden_size_per_layer_input=8, vocab_size_per_layer_input=97)
    sharing = tiny_model("gemma4_text", num_kv_shared_layers=2)
    for model, reason in (
        (t5, "encoder-decoder"),
        (bloom, "not supported"),
        (zamba, "its layers read the token embeddings again"),
        (by_layer, "its layers read the token embeddings again"),
        (sharing, "its layers share keys and values"),
    ):
        elsewhere = model in (by_layer, sharing)  # other runtimes take them
        for make in (TransformersTarget,) if elsewhere else (TransformersTarget, make_target):
            with pytest.raises(SpecDecError, match=rf"^model type '{model.config.model_type}' .*{reason}") as caught:
                make(model.eval())
            assert "runtime" not in str(caught.value)  # it is about the model
