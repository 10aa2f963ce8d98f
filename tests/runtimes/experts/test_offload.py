"""Experts of whole models in slow memory: the same tokens, less memory, and everything put back."""

from __future__ import annotations

import json
import shutil
from functools import partial
from itertools import count

import pytest
import torch
import zoo
from recorded_experts import RecordingStore, Shuffled, replay, settle
from safetensors.torch import load_file, save_file
from scripted import Scripted
from tiny import greedy_reference, save_tiny_moe, tiny_model
from typer.testing import CliRunner

from specdec import SpecDecoder, cli
from specdec.base.errors import SpecDecError
from specdec.engine import measure as costs
from specdec.engine.depth import AutoDepth
from specdec.models import identity
from specdec.runtimes.experts import packed, predict, tiers
from specdec.runtimes.experts.layers import moe_layers
from specdec.runtimes.experts.offload import ExpertOptions, Offload
from specdec.runtimes.linear_maps import rms_unit
from specdec.runtimes.reference import ReferenceTarget
from specdec.train.data import TrainingAnswer
from specdec.train.expert_predictor import fit_predictor, recalls

PROMPT, COUNT = [5, 9, 11, 3, 7, 20, 31], 24
TINY = {"num_hidden_layers": 6, "num_experts_per_tok": 2, "eos_token_id": None}
SIZES = {
    "mixtral": {"num_local_experts": 6},
    "olmoe": {"num_experts": 6},
    "qwen2_moe": {"num_experts": 6},
    "qwen3_moe": {"num_experts": 6},
}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECDEC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=list(SIZES))
def moe(request):
    return tiny_model(request.param, **TINY, **SIZES[request.param])


@pytest.fixture(scope="module")
def mixtral():
    return tiny_model("mixtral", **TINY, **SIZES["mixtral"])


@pytest.fixture(scope="module")
def folder(mixtral, tmp_path_factory):
    """Packed experts of ``mixtral`` and a fitted predictor."""
    path = tmp_path_factory.mktemp("packed")
    fingerprint = identity.fingerprint(mixtral)
    packed.pack(moe_layers(mixtral), fingerprint, path)
    predict.write_predictor(path, fit_predictor(mixtral, texts(8)), fingerprint, {})
    return path


@pytest.fixture
def uncached(monkeypatch):
    """Experts are loaded whenever they are demanded."""
    monkeypatch.setattr("specdec.runtimes.experts.offload.ExpertStore", partial(RecordingStore, caching=False))


@pytest.fixture
def recorded(monkeypatch):
    """Stores record what they are asked for."""
    monkeypatch.setattr("specdec.runtimes.experts.offload.ExpertStore", RecordingStore)


def texts(count: int, seed: int = 0) -> list[TrainingAnswer]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 97, (count, 60), generator=generator).tolist()
    return [TrainingAnswer(tuple(row[:4]), tuple(row[4:])) for row in rows]


def decoded(model, drafter="none", experts=None, **options):
    decoder = SpecDecoder(model, None, drafter, experts=experts)
    try:
        return decoder.generate(PROMPT, max_new_tokens=COUNT, ignore_eos=True, **options)
    finally:
        decoder.close()


def bytes_of(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)


@pytest.mark.parametrize("cache", [2 / 6, 0.5, 1.0])
def test_tokens_are_the_models_own(moe, cache):
    assert decoded(moe, experts=ExpertOptions(cache, "residual")).token_ids == greedy_reference(moe, PROMPT, COUNT)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 5, 60])
@pytest.mark.parametrize("apart", [0, 1 << 30])
def test_logits_are_the_models_own_to_the_bit(dtype, count, apart, monkeypatch):
    monkeypatch.setattr(
        "specdec.runtimes.experts.store.OVERLAP_FROM", apart
    )  # those that are there at once, or all together
    threads = torch.get_num_threads()
    model = tiny_model("qwen3_moe", **TINY, **SIZES["qwen3_moe"]).to(dtype)
    ids = torch.randint(3, 97, (1, count), generator=torch.Generator().manual_seed(0))
    own = model(ids).logits
    torch.set_num_threads(1)  # with several, the last bit of a float32 product may depend on where its weights lie
    alone = model(ids).logits
    decoder = SpecDecoder(model, None, "none", experts=ExpertOptions(2 / 6, "residual"))
    try:
        assert all(torch.equal(model(ids).logits, alone) for _ in range(2))
        torch.set_num_threads(threads)
        assert torch.allclose(model(ids).logits, own, atol=2e-6 if dtype == torch.float32 else 0, rtol=0)
    finally:
        torch.set_num_threads(threads)
        decoder.close()


@pytest.mark.parametrize("prefetch", ["none", "previous-token", "residual", "m2r2"])
@pytest.mark.parametrize("cache", [2 / 6, 1.0])
def test_no_predictor_and_no_cache_changes_a_token(mixtral, folder, prefetch, cache):
    options = ExpertOptions(cache, prefetch, folder, adaptive=False)
    assert decoded(mixtral, experts=options).token_ids == greedy_reference(mixtral, PROMPT, COUNT)


def test_wrong_predictions_change_no_token(mixtral, folder):
    decoder = SpecDecoder(mixtral, None, "none", experts=ExpertOptions(2 / 6, "m2r2", folder, adaptive=False))
    decoder.target.experts.predictor = Shuffled(decoder.target.experts.predictor, 6, 6)
    out = decoder.generate(PROMPT, max_new_tokens=COUNT, ignore_eos=True)
    decoder.close()
    assert out.token_ids == greedy_reference(mixtral, PROMPT, COUNT)


def test_every_drafter_gives_the_models_tokens(mixtral, folder):
    target = ReferenceTarget(mixtral)
    own = [greedy_reference(mixtral, PROMPT, 8)]
    target.experts = offload = Offload(mixtral, target.fingerprint, ExpertOptions(0.5, "m2r2", folder, adaptive=False))
    try:
        made = zoo.trees(target)
        assert {"m2r2", "prompt-lookup", "medusa"} <= {name.partition(":")[0] for name in made}
        for name, drafter in made.items():
            assert zoo.run(target, drafter, [PROMPT], 8, eos=None)[0] == own, name
    finally:
        offload.close()


@pytest.mark.usefixtures("uncached")
def test_figures_of_a_drafter_are_per_accepted_token(mixtral, folder):
    drafter = zoo.m2r2(ReferenceTarget(mixtral), 2, ((4, 6),), True, True)
    plain, drafted = (
        decoded(mixtral, d, ExpertOptions(2 / 6, "none", folder), num_speculative_tokens=3) for d in ("none", drafter)
    )
    assert drafted.token_ids == plain.token_ids and drafted.metrics.num_draft_tokens
    figures = drafted.metrics.experts
    assert figures["bytes_per_token"] == figures["bytes_read"] / (COUNT - 1)
    assert figures["bytes_per_token"] > plain.metrics.experts["bytes_per_token"]  # rejected drafts had experts, too


def test_the_cost_of_scoring_includes_the_experts_that_more_rows_need(mixtral, folder, monkeypatch):
    """On a clock that only reading an expert moves."""
    target, read, now = ReferenceTarget(mixtral), tiers.DiskTier.read, [0.0]
    options = ExpertOptions(2 / 6, "none", folder)

    def takes(*args):
        now[0] += 0.006
        return read(*args)

    monkeypatch.setattr(tiers.DiskTier, "read", takes)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: now[0])
    target.experts = offload = Offload(mixtral, target.fingerprint, options)
    try:
        score = costs.time_scoring(target, 1)
    finally:
        offload.close()
    assert score[8] > 1.3 * score[1]
    policies = AutoDepth(shares=(0.01,)), AutoDepth(shares=(0.01,))
    for policy, seconds in zip(policies, (score, dict.fromkeys(score, score[1])), strict=True):
        for tokens in [*seconds] * 3:
            policy.model.add_pass(tokens, seconds[tokens])
    slow, fast = (policy.choose([policy.begin()]).depth for policy in policies)
    assert slow < fast


def test_trees_in_a_batch_give_the_models_tokens(mixtral, folder):
    tree = Scripted(lambda ids, limit: [(ids[-1], 0), (5, 0), (9, 1)][: 3 if limit > 1 else 2])
    own = greedy_reference(mixtral, PROMPT, COUNT)
    decoder = SpecDecoder(mixtral, None, tree, experts=ExpertOptions(0.5, "m2r2", folder))
    outs = decoder.generate_batch([PROMPT, PROMPT[:4]], max_new_tokens=COUNT, num_speculative_tokens=2, ignore_eos=True)
    decoder.close()
    assert [out.token_ids for out in outs] == [own, greedy_reference(mixtral, PROMPT[:4], COUNT)]


def test_sampling_draws_the_same_tokens(mixtral, folder):
    own = decoded(mixtral, temperature=0.9, seed=3).token_ids
    assert decoded(mixtral, experts=ExpertOptions(0.5, "m2r2", folder), temperature=0.9, seed=3).token_ids == own


def test_memory_shrinks_and_close_restores_every_bit(moe):
    before = {name: p.clone() for name, p in moe.named_parameters()}
    held = sum(layer.experts.gate_up_proj.nbytes + layer.experts.down_proj.nbytes for layer in moe_layers(moe))
    decoder = SpecDecoder(moe, None, "none", experts=ExpertOptions(2 / 6))
    assert bytes_of(moe) == sum(p.numel() * p.element_size() for p in before.values()) - held
    assert decoder.target.experts.store.resident_bytes <= decoder.target.experts.index.total_bytes / 3
    with pytest.raises(SpecDecError, match="offloaded already; close the decoder"):
        SpecDecoder(moe, None, "none", experts=ExpertOptions(2 / 6))
    decoder.close()
    decoder.close()
    after = dict(moe.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], p) for name, p in before.items())


def test_a_drafter_that_is_refused_costs_the_model_nothing(mixtral, folder):
    before = bytes_of(mixtral)
    with pytest.raises(SpecDecError, match="m2r3"):
        SpecDecoder(mixtral, None, "m2r3", experts=ExpertOptions(0.5, folder=folder))
    assert bytes_of(mixtral) == before


@pytest.mark.usefixtures("recorded")
def test_figures_are_of_the_decoding_alone_and_agree_with_a_replay(mixtral, folder):
    decoder = SpecDecoder(mixtral, None, "none", experts=ExpertOptions(2 / 6, "m2r2", folder, adaptive=False))
    store = decoder.target.experts.store
    figures = decoder.generate(PROMPT, max_new_tokens=COUNT, ignore_eos=True).metrics.experts
    assert figures["demanded"] == (COUNT - 1) * 6 * 2  # one token a pass: layers times k
    assert figures["bytes_per_token"] == figures["bytes_read"] / (COUNT - 1)
    settle(store)
    same = replay(store.trace, len(store.caches[0].slots))
    assert (same.demanded, same.hits, same.prefetched, same.evictions, same.unused) == (
        store.counters.demanded,
        store.counters.hits,
        store.counters.prefetched,
        store.counters.evictions,
        store.counters.unused,
    )
    decoder.close()


def test_a_predictor_that_can_be_fitted_is_fitted_and_kept(mixtral, folder):
    fitted = fit_predictor(mixtral, texts(16))
    kept = predict.read_predictor(folder, identity.fingerprint(mixtral), 6, 32)
    assert [len(t) for t in kept.targets] == [3] * 6 and kept.targets[5] == [1, 0, 5]
    predictors = {"m2r2": fitted, "residual": predict.residual(moe_layers(mixtral))}
    by = recalls(mixtral, predictors, texts(4, seed=1))
    share = {name: [each[d] for d in (0, 1, 2)] for name, each in by.items()}
    assert share["m2r2"][2] > share["residual"][2] and share["m2r2"][0] > share["previous-token"][0]


def test_a_predictor_with_broken_or_boundless_figures_is_one_line(mixtral, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)

    def refused() -> str:
        with pytest.raises(SpecDecError) as error:
            SpecDecoder(mixtral, None, "none", experts=ExpertOptions(0.5, "m2r2", tmp_path))
        return str(error.value)

    file = tmp_path / predict.FOLDER / "model.safetensors"
    whole = load_file(file)
    save_file(whole | {"0/weight": torch.full_like(whole["0/weight"], torch.nan)}, file)
    assert "tensor '0/weight' in" in (message := refused()) and "NaN or infinite" in message
    save_file(whole | {"0/weight": whole["0/weight"][:-1]}, file)
    assert "is not an expert predictor for this model" in refused()
    save_file(whole, file)
    config = tmp_path / predict.FOLDER / "config.json"
    for odd in ({"top_k": 1e400}, {"top_k": 10**9}, {"top_k": 2, "slope": torch.nan}):
        config.write_text(json.dumps(json.loads(config.read_text()) | odd))
        assert "is not an expert predictor for this model" in refused()


def test_a_damaged_expert_is_named_and_the_decoder_survives(mixtral, tmp_path):
    index = packed.pack(moe_layers(mixtral), identity.fingerprint(mixtral), tmp_path)
    decoder = SpecDecoder(mixtral, None, "none", experts=ExpertOptions(0.5, folder=tmp_path))
    good = (tmp_path / packed.BLOCKS).read_bytes()
    with (tmp_path / packed.BLOCKS).open("r+b") as file:
        for block in range(len(index.checksums)):
            file.seek(block * index.stride + 8)
            file.write(b"\xff\xff\xff")
    with pytest.raises(SpecDecError, match=r"damaged: expert \d of layer 0"):
        decoder.generate(PROMPT, max_new_tokens=4)
    settle(decoder.target.experts.store)
    with (tmp_path / packed.BLOCKS).open("r+b") as file:
        file.write(good)
    out = decoder.generate(PROMPT, max_new_tokens=COUNT, ignore_eos=True)
    decoder.close()
    assert out.token_ids == greedy_reference(mixtral, PROMPT, COUNT)


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), RuntimeError()])
def test_prefetches_that_fail_change_no_token(mixtral, folder, fault):
    options = ExpertOptions(0.5, "m2r2", folder, adaptive=False)
    decoder = SpecDecoder(mixtral, None, "none", experts=options)
    store, reads = decoder.target.experts.store, count()
    real = store.tier.read

    def flaky(block, slot, start, stop):
        if not store._demands and next(reads) % 2:
            slot[start:stop] = 7  # and what it left is of no use
            raise fault
        return real(block, slot, start, stop)

    store.tier.read = flaky
    out = decoder.generate(PROMPT, max_new_tokens=COUNT, ignore_eos=True)
    failed = store.counters.failed
    decoder.close()
    assert out.token_ids == greedy_reference(mixtral, PROMPT, COUNT) and failed > 3


def broken_after(reads: int, monkeypatch) -> None:
    real, left = tiers.DiskTier.read, count()

    def read(self, block, slot, start, stop):
        if next(left) >= reads:
            raise OSError(5, "Input/output error")
        return real(self, block, slot, start, stop)

    monkeypatch.setattr(tiers.DiskTier, "read", read)


@pytest.mark.usefixtures("uncached")
def test_tokens_that_came_before_a_failure_are_kept(mixtral, folder):
    own = greedy_reference(mixtral, PROMPT, COUNT)
    decoder = SpecDecoder(mixtral, None, "none", experts=ExpertOptions(2 / 6, "none", folder))
    with pytest.MonkeyPatch.context() as patch:
        broken_after(100, patch)  # a token needs 12
        with decoder.open([PROMPT], max_new_tokens=COUNT, ignore_eos=True) as generation:
            seen = []
            with pytest.raises(SpecDecError, match=r"loading expert \d of layer \d failed"):
                for events in generation.steps():
                    seen += events[0][1]
            (out,) = generation.outputs()
    assert out.finish_reason == "interrupted" and out.token_ids == seen == own[: len(seen)] and 0 < len(seen) < COUNT
    assert decoder.generate(PROMPT, max_new_tokens=COUNT, ignore_eos=True).token_ids == own
    decoder.close()


def test_a_prefetch_evicts_only_what_is_clearly_less_needed(mixtral, folder):
    decoder = SpecDecoder(mixtral, None, "none", experts=ExpertOptions(2 / 6, folder=folder))
    offload = decoder.target.experts
    with offload.store.demand(3, [0, 1]):
        pass
    for third, there in ((0.7, {0, 1}), (0.8, {0, 2})):  # a cached one gets 0.25
        offload.prefetch(2, [(3, [0.9, 0.5, third, 0.0, 0.0, 0.0])])
        settle(offload.store)
        assert set(offload.store.caches[3].where) == there
    decoder.close()


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_forecast_is_a_projection_of_the_residual_to_router_logits(tokens, dtype):
    torch.manual_seed(0)
    targets = [[2, 1, 0], [], [0, 2]]
    weight, bias = [torch.randn(len(t), 6, 40) / 6 for t in targets], [torch.randn(len(t), 6) for t in targets]
    predictor = predict.LinearPredictor(targets, weight, bias, 1.5, 2)
    x = torch.randn(tokens, 40).to(dtype)
    for j, ahead in enumerate(targets):
        logits = torch.einsum("ned,td->tne", weight[j], rms_unit(x.float())) + bias[j]
        assert torch.allclose(torch.from_numpy(predictor.logits(j, x)), logits, atol=1e-5)
        found = predictor.ahead(j, x)
        assert [target for target, _ in found] == ahead
        for i, (_, need) in enumerate(found):
            top = logits[:, i].topk(3).values
            likely = torch.sigmoid(1.5 * (logits[:, i] - top[:, 1:].mean(1, keepdim=True)))
            assert need == pytest.approx((1 - (1 - likely).prod(0)).tolist(), abs=1e-5)


def test_without_prefetching_no_forecast_is_made(mixtral, folder, monkeypatch):
    decoder = SpecDecoder(mixtral, None, "none", experts=ExpertOptions(0.5, "m2r2", folder, adaptive=False))
    offload = decoder.target.experts
    ahead, calls = offload.predictor.ahead, []
    monkeypatch.setattr(offload.predictor, "ahead", lambda row, x: calls.append(row) or ahead(row, x))
    offload.controller.on = False
    out = decoder.generate(3 * PROMPT, max_new_tokens=8, ignore_eos=True)
    assert not calls and offload.store.counters.prefetched == 0
    offload.controller.on = True
    again = decoder.generate(3 * PROMPT, max_new_tokens=8, ignore_eos=True)
    assert len(calls) == 7 * 6 and again.token_ids == out.token_ids  # not for the prompt
    decoder.close()


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    return str(save_tiny_moe(tmp_path_factory.mktemp("moe")))


def run(*args: str):
    return CliRunner().invoke(cli.app, list(args))


def error(result) -> str:
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


FAST = ("--drafter", "none", "--max-new-tokens", "12", "--raw")


def test_packing_fitting_and_generating(saved, tmp_path):
    prompts = tmp_path / "answers.jsonl"
    rows = [{"prompt_ids": list(a.prompt_ids), "response_ids": list(a.response_ids)} for a in texts(12)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ("--fit", str(prompts), "--expert-cache", "0.5")
    result = run("pack-experts", saved, str(tmp_path / "x"), *args)
    assert result.exit_code == 0, result.stderr
    assert "4 layers of 6 experts" in result.stdout and "m2r2\t" in result.stdout
    plain = run("generate", "Hello", "--model", saved, *FAST)
    options = ("--expert-cache", "0.5", "--expert-prefetch", "m2r2", "--expert-option", f"folder={tmp_path / 'x'}")
    ours = run("generate", "Hello", "--model", saved, *FAST, *options)
    assert ours.exit_code == 0 and ours.stdout == plain.stdout
    assert "3 of 6 experts per layer cached" in ours.stderr and "read per accepted token: " in ours.stderr
    asked = run("generate", "Hello", "--model", saved, *FAST, "--json", "--compare", *options)
    assert json.loads(asked.stdout)["metrics"]["experts"]["demanded"] == 11 * 4 * 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--expert-prefetch", "m2r2"], "go with --expert-cache"),
        (["--expert-cache", "much"], "takes a share in (0, 1], such as 0.25, or a size"),
        (["--expert-cache", "0"], "takes a share"),
        (["--expert-cache", "0.2"], "holds 1 experts per layer, but one token needs 2"),
        (["--expert-cache", "0.5", "--expert-prefetch", "m2r3"], "'m2r2' (did you mean 'm2r2'?); got 'm2r3'"),
        (["--expert-cache", "0.5", "--expert-prefetch", "m2r2"], "no expert predictor in"),
        (["--expert-cache", "0.5", "--expert-option", "colour=red"], "unknown setting 'colour'"),
        (["--expert-cache", "0.5", "--expert-option", "adaptive=often"], "adaptive must be True or False; got 'often'"),
        (["--expert-cache", "0.5", "--expert-option", "folder=nowhere"], "holds no packed experts"),
    ],
)
def test_bad_input_is_one_line(saved, args, message):
    assert message in error(run("generate", "Hello", "--model", saved, *FAST, *args))


def test_a_model_without_experts_is_one_line(tmp_path):
    from tiny import save_tiny

    folder = str(save_tiny(tmp_path / "dense"))
    assert "has no experts" in error(run("generate", "Hello", "--model", folder, *FAST, "--expert-cache", "0.5"))
    assert "has no experts" in error(run("pack-experts", folder, str(tmp_path / "x")))


def test_experts_of_another_model_or_dtype_are_one_line(saved, folder, tmp_path):
    own = tmp_path / "own"
    assert run("pack-experts", saved, str(own)).exit_code == 0
    for place, more, message in (
        (folder, [], "those of a model with fingerprint"),
        (own, ["--dtype", "bfloat16"], "packed in float32, the model is loaded in bfloat16"),
    ):
        args = ["--expert-cache", "0.5", "--expert-option", f"folder={place}", *more]
        assert message in error(run("generate", "Hello", "--model", saved, *FAST, *args))


@pytest.mark.usefixtures("uncached")
def test_the_text_that_came_before_a_failure_is_printed(saved):
    options = ("--expert-cache", "0.5")  # a token needs 8
    plain = run("generate", "Hello", "--model", saved, *FAST, *options).stdout

    def broken(*more: str):
        with pytest.MonkeyPatch.context() as patch:
            broken_after(60, patch)
            result = run("generate", "Hello", "--model", saved, *FAST, *options, *more)
        assert result.exit_code == 2 and "loading expert" in result.stderr.splitlines()[-1]
        return result.stdout

    text = broken("--quiet").removesuffix("\n")
    assert plain.startswith(text) and 0 < len(text) < len(plain) - 1
    asked = json.loads(broken("--json"))
    assert asked["text"] == text and asked["finish_reason"] == "interrupted"
