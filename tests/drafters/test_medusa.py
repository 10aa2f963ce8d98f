"""Medusa: what its heads draft, public checkpoints, and what is refused. (Output: test_drafters_matrix.)"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import Tensor
from transformers import PreTrainedModel
from zoo import PROMPTS, run, watched

from specdec import SamplingParams, SpecDecError, SpecDecoder
from specdec.drafters.medusa import Medusa, MedusaDrafter
from specdec.models import drafter_folder, loading
from specdec.runtimes.draft_path import KNOTS
from specdec.runtimes.prefill import run_tokens
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.draft import Draft
from specdec.speculation.sampling import RowSampler, Sampler
from specdec.speculation.state import State
from specdec.speculation.trees import Prices
from specdec.train import data, states
from specdec.train.batches import assemble, windows
from specdec.train.data import TrainingAnswer
from specdec.train.medusa import MedusaMethod, MedusaSettings
from specdec.train.settings import from_mapping
from specdec.train.trainer import train, training_target

V, D = 97, 32


def random_network(heads: int = 2, layers: int = 1, rooted: bool = False, vocab: Tensor | None = None) -> Medusa:
    torch.manual_seed(3)
    network = Medusa(D, heads, layers, rooted, vocab)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def drafts(target: TransformersTarget, drafter: MedusaDrafter, count: int = 12) -> list[tuple[list[int], Draft]]:
    """The texts of a generation and what was drafted after each."""
    seen = watched(drafter)
    run(target, drafter, PROMPTS[:1], count)
    return [(ids, draft) for [ids], draft in seen]


def public(folder: Path, network: Medusa, heads: Tensor, **config: Any) -> Path:
    """Write ``network`` and output heads [K, V, D] as a public checkpoint."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for k in range(network.heads):
        for n in range(network.layers):
            tensors[f"{k}.{n}.linear.weight"] = network.weights[n][k].detach().clone()
            tensors[f"{k}.{n}.linear.bias"] = network.biases[n][k].detach().clone()
        tensors[f"{k}.{network.layers}.weight"] = heads[k].clone()
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    settings = {"medusa_num_heads": network.heads, "medusa_num_layers": network.layers} | config
    (folder / "config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "some/base"}))
    return folder


def test_nodes_are_taken_by_the_heads_own_probabilities_while_they_pay(llama: PreTrainedModel) -> None:
    target = TransformersTarget(llama)
    drafter = MedusaDrafter(random_network())
    drafter.bind(target)
    state = State(
        target, target.new_cache(), Sampler([RowSampler(SamplingParams())]), [[5, 6]], row_states=[drafter.begin()]
    )
    sure = torch.tensor([[0.15 / 95], [0.2 / 95]]).repeat(1, 1, V).view(1, 2, V)
    sure[0, 0, [7, 8]], sure[0, 1, [3, 4]] = torch.tensor([0.6, 0.25]), torch.tensor([0.55, 0.25])
    drafter._logits = lambda *inputs: sure.log()  # type: ignore[method-assign]
    assert drafter.propose(state, 1).parents == (0,)
    assert drafter.propose(state, 2).parents == (0, 1)  # 0.6, then 0.33 under it rather than 0.25 beside it
    state.prices = Prices([0.14 * n for n in range(25)])
    draft = drafter.propose(state, 2)
    assert draft.parents == (0, 1, 0, 1)  # 0.6, 0.33, 0.25, 0.15, and no 0.1375
    assert draft.tokens.tolist() == [[7, 3, 8, 4]]
    assert sum(map(math.exp, draft.found.rows[0].scores[:4])) == pytest.approx(1.33)
    assert draft.found.rows[0].raw[0][:4] == pytest.approx([0.6, 0.55, 0.25, 0.25])
    state.prices = Prices([0.14 * n for n in range(25)], tables=[[[0.1] * len(KNOTS)]])
    assert drafter.propose(state, 2).parents == ()  # the heads are known to be too sure
    sure = torch.cat((sure, torch.full((1, 2, V), 1 / V)))  # a second row, of which nothing is known
    state.ids, state.depths, state.prices = [[5, 6]] * 2, [2, 0], Prices([0.14 * n for n in range(25)])
    state.sampler = Sampler([RowSampler(SamplingParams(), stream=n) for n in (0, 1)])
    draft = drafter.propose(state, 2)
    assert draft.lists() == [[7, 3, 8, 4], [-1] * 4]


def test_a_folder_may_be_called_as_a_drafter_is(llama: PreTrainedModel, tmp_path, monkeypatch) -> None:
    target = TransformersTarget(llama)
    base = {"fingerprint": target.fingerprint}
    config = {"drafter": "medusa", "heads": 2, "layers": 1, "rooted": False, "base": base}
    drafter_folder.write(tmp_path / "medusa", config, dict(random_network(2, 1, False, None).state_dict()))
    monkeypatch.chdir(tmp_path)
    assert SpecDecoder(llama, drafter=Path("medusa")).drafter.name == "medusa"
    with pytest.raises(SpecDecError, match="no medusa drafter is shipped"):
        SpecDecoder(llama, drafter="medusa")


def test_a_folder_is_read_back_and_checked(llama: PreTrainedModel, tmp_path: Path) -> None:
    target = TransformersTarget(llama)
    network = random_network(2, 2, True, torch.arange(0, 97, 2, dtype=torch.int32))
    config = {"drafter": "medusa", "base": {"fingerprint": target.fingerprint}, "heads": 2, "layers": 2, "rooted": True}
    tensors = dict(network.state_dict())

    def write(change: dict[str, Any], **other: Tensor) -> str:
        drafter_folder.write(tmp_path, config | change, tensors | other)
        return str(tmp_path)

    read = MedusaDrafter.load(target, write({}))
    same = [torch.equal(a, b) for a, b in zip(read.network.parameters(), network.parameters(), strict=True)]
    assert all(same)
    for change, other, message in (
        ({"heads": 3}, {}, r"tensor 'biases.0' is \(2, 32\); for this model it should be \(3, 32\)"),
        ({"rooted": False}, {}, r"tensor 'weights.0' is \(2, 32, 64\); .* should be \(2, 32, 32\)"),
        ({"layers": 0}, {}, "layers of the Medusa drafter must be greater than or equal to 1; got 0"),
        ({}, {"draft_vocab": torch.tensor([97], dtype=torch.int32)}, "names tokens that the model does not have"),
    ):
        with pytest.raises(SpecDecError, match=message):
            MedusaDrafter.load(target, write(change, **other))


def test_what_cannot_be_used_is_refused_in_one_line(llama: PreTrainedModel, tmp_path: Path) -> None:
    pickled = public(tmp_path / "pickled", random_network(), torch.randn(2, V, D))
    (pickled / "medusa_lm_head.safetensors").rename(pickled / "medusa_lm_head.pt")
    broken = public(tmp_path / "broken", random_network(), torch.randn(2, V, D))
    (broken / "medusa_lm_head.safetensors").write_bytes(b"x" * 50)
    fewer = public(tmp_path / "fewer", random_network(), torch.randn(2, V, D), medusa_num_heads=3)
    wide = public(tmp_path / "wide", Medusa(48, 2), torch.randn(2, V, 48))
    other = public(tmp_path / "other", random_network(), torch.randn(2, 60, D))
    for source, options, message in (
        (None, {}, "no medusa drafter is shipped for this model; train one: specdec train medusa"),
        (fewer, {"nodes": 0}, "tensor '2.0.linear.bias' is missing"),
        (pickled, {}, r"medusa_lm_head.pt is a pickle, .* not read"),
        (broken, {}, "no safetensors file"),
        (wide, {}, r"'0.0.linear.bias' is \(48,\); for this model it should be \(32,\)"),
        (other, {}, r"tensor '0.1.weight' is \(60, 32\)"),
        (tmp_path / "nothing", {}, "does not exist"),
    ):
        name = "medusa" if source is None else f"medusa={source}"
        with refused(message):
            SpecDecoder(llama, drafter=name, drafter_options=options, runtime="transformers")
    with pytest.raises(SpecDecError, match="nodes must be greater than or equal to 1; got 0"):
        MedusaDrafter(random_network(), nodes=0)


def vllm(folder: Path, network: Medusa, heads: Tensor, bias: bool = True, **config: Any) -> Path:
    """Write ``network`` and output heads [K, V, D] as vLLM's Medusa has them."""
    folder.mkdir(exist_ok=True)
    tensors = {f"lm_heads.{k}.weight": head.clone() for k, head in enumerate(heads)}
    for k in range(network.heads):
        for n in range(network.layers):
            tensors[f"blocks.{k}.layers.{n}.weight"] = network.weights[n][k].detach().clone()
            if bias:
                tensors[f"blocks.{k}.layers.{n}.bias"] = network.biases[n][k].detach().clone()
    settings = {"model_type": "medusa", "num_heads": network.heads, "num_hidden_layers": network.layers}
    settings |= {"medusa_fc_bias": bias, "hidden_size": D, "vocab_size": V} | config
    tensors |= settings.pop("tensors", {})
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def vllm_chooses(llama: PreTrainedModel, folder: Path, ids: list[int]) -> list[int]:
    """What vLLM's Medusa proposes after the last of ``ids``, by its formula: each head's best token."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    shared, tokens = config["original_lm_head"], tensors.get("token_map")
    h, chosen = llama.model(torch.tensor([ids])).last_hidden_state[0, -1], []
    for k in range(config["num_heads"]):
        x = h
        for n in range(config["num_hidden_layers"]):
            block = f"blocks.{k}.layers.{n}"
            bias = tensors[f"{block}.bias"] if config["medusa_fc_bias"] else 0
            x = x + torch.nn.functional.silu(tensors[f"{block}.weight"] @ x + bias)
        best = int((tensors[f"lm_heads.{0 if shared else k}.weight"] @ x).argmax())
        chosen.append(best if tokens is None else int(tokens[best]))
    return chosen


FORMATS = "public", "whole", "no bias", "one head", "token map", "token map of whole heads", "prefix"


@pytest.mark.parametrize("kind", FORMATS)
def test_heads_of_each_format_draft_what_their_formula_says(llama: PreTrainedModel, tmp_path: Path, kind: str) -> None:
    layers = 2 if kind in ("whole", "public") else 1
    network, heads, given = random_network(2, layers), torch.randn(2, V, D), dict[str, Any]()
    tokens = torch.arange(1, V, 3)
    if kind.startswith("token map"):
        given = {"truncated_vocab_size": len(tokens), "tensors": {"token_map": tokens}}
    written = heads[:, tokens] if kind == "token map" else heads[:1] if kind == "one head" else heads
    given["original_lm_head"] = kind == "one head"
    folder, target = vllm(tmp_path / "heads", network, written, kind != "no bias", **given), TransformersTarget(llama)
    drafter = MedusaDrafter.load(target, str(folder), nodes=6)
    every = heads[:, tokens] if given.get("tensors") else written
    check = vllm(tmp_path / "check", network, every, kind != "no bias", **given)
    if kind == "prefix":
        stored = load_file(folder / "model.safetensors")
        save_file({f"medusa_heads.{name}": t for name, t in stored.items()}, folder / "model.safetensors")
        drafter = MedusaDrafter.load(target, str(folder), nodes=6)
    if kind == "public":
        drafter = MedusaDrafter.load(target, str(public(tmp_path / "public", network, heads)), nodes=6)
    for ids, draft in drafts(target, drafter):
        expected = vllm_chooses(llama, check, ids[:-1])
        for k, token in enumerate(expected[: max(draft.depths())]):
            at = [draft.tokens[0, i].item() for i, depth in enumerate(draft.depths()[1:]) if depth == k + 1]
            assert token in at


def test_vllms_files_that_do_not_fit_are_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    target, heads = TransformersTarget(llama), torch.randn(2, V, D)
    far = {"truncated_vocab_size": 3, "tensors": {"token_map": torch.tensor([1, 2, V])}}
    for given, text in (
        ({"num_heads": 3}, "tensor 'blocks.2.layers.0.bias' is missing"),
        ({"num_hidden_layers": 0}, "layers of the Medusa drafter must be greater than or equal to 1"),
        ({**far, "tensors": {"token_map": torch.ones(3)}}, r"the draft vocabulary in .* is \(3,\); it must be"),
        (far, "the draft vocabulary in .* names tokens that the model does not have"),
    ):
        folder = vllm(tmp_path / "heads", random_network(), heads, **given)  # type: ignore[arg-type]
        with pytest.raises(SpecDecError, match=text):
            MedusaDrafter.load(target, str(folder))


def settings(**changes: Any) -> MedusaSettings:
    values = {"method": "medusa", "dtype": "float32", "heads": 2, "draft_vocab": 60, "minutes": None, "steps": 100}
    values |= {"rows": 4, "window": 8, "eval_fraction": 0.15, "relative_rate": 0.2}
    return from_mapping(MedusaSettings, values | changes, "test")


@torch.inference_mode()
def test_heads_learn_exactly_what_the_drafter_drafts() -> None:
    target = training_target(tiny_model("llama"))
    method = MedusaMethod(settings(heads=3, blocks=2), target)
    method.build(None)
    network = random_network(3, 2, True)
    drafter = MedusaDrafter(network)
    drafter.bind(target)
    ids = torch.randint(3, V, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    answer, wanted = TrainingAnswer(tuple(ids[:4]), tuple(ids[4:])), method.teacher_states()
    records = states._records(states._make_shard(target, [answer], wanted), wanted)
    batch = assemble(records, rows := windows(records, 64), target.device)
    learned = [method.teacher.logits(final)[0] for final, _ in method._drafts(network, batch)]
    for length in (9, 20, 31):  # the last token of so many is the root
        taps, cache, row_states = {4: torch.empty(0)}, target.new_cache(1), [drafter.begin()]
        run_tokens(target, cache, [ids[: length - 1]], taps, whole=True)
        drafter.observe(row_states, [list(range(length - 1))], taps)
        state = State(target, cache, Sampler([RowSampler(SamplingParams())]), [ids[:length]], row_states=row_states)
        root = length - 1 - rows[0][1]
        heads, forbidden = drafter.vocabulary.heads, drafter.vocabulary.forbidden
        drafted = drafter._logits(row_states[0].final, state.roots, state.positions, heads, forbidden)
        for k, logits in enumerate(drafted[0]):
            torch.testing.assert_close(logits, learned[k][root + k], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_heads_learn_from_windows_shorter_than_their_number(count: int) -> None:
    target = training_target(tiny_model("llama"))
    method = MedusaMethod(settings(heads=4, blocks=1), target)
    method.build(None)
    answer, wanted = TrainingAnswer((5, 6, 7), tuple(range(8, 9 + count))[:count]), method.teacher_states()
    records = states._records(states._make_shard(target, [answer], wanted), wanted)
    batch = assemble(records, windows(records, 64), target.device)
    network = random_network(4, 1, True)
    found = [valid.sum().item() for _, valid in method._drafts(network, batch)]
    assert batch.ids.shape == (1, count) and found == [max(count - late, 0) for late in range(4)]
    assert method.loss(network, batch)[0].isfinite()


def test_training_makes_a_drafter_that_drafts_as_its_figures_say(answers: Path, tmp_path: Path) -> None:
    model, output = loading.load("tiny")[0], tmp_path / "out"
    figures = train(settings(prompts=[str(answers)], output=str(output)))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    agree = [line["agree"] for line in lines if "agree" in line]  # with the answers it learns from
    assert agree[-1] > agree[0] + 0.1
    assert figures["score"] == pytest.approx(1 + sum(figures["chain"]), abs=1e-3)
    decoder = SpecDecoder(model, None, drafter=str(output), drafter_options={"nodes": 5})
    held = [a for a in data.split(data.read([answers]), 0.15)[1] if isinstance(a, TrainingAnswer)]
    outs = decoder.generate_batch([list(a.prompt_ids) for a in held], max_new_tokens=24, num_speculative_tokens=2)
    assert [out.token_ids for out in outs] == [list(a.response_ids) for a in held]
    kept = sum(o.metrics.num_accepted_draft_tokens for o in outs) / sum(o.metrics.num_spec_steps for o in outs)
    assert kept + 1 > figures["score"] - 0.25  # a tree keeps at least what its chain keeps
