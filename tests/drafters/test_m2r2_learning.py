"""M2R2 that teaches itself: what it sees, when a fit serves, what it keeps. (Texts while fits are swapped in:
test_engine_schedules.)
"""

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from learners import learn_soon, read, taught, texts
from spies import noted
from targets import QUICK, needs_native, target_of
from tiny import HYBRIDS, model_of, tiny_model
from transformers import PreTrainedModel

from specdec import SpecDecError, SpecDecoder
from specdec.base.errors import SpecDecWarning
from specdec.base.ridge import Sums
from specdec.drafters.m2r2 import fits, learned, learning, replay
from specdec.drafters.m2r2.fits import learned_path
from specdec.drafters.m2r2.learning import M2R2Learner, why_not
from specdec.drafters.m2r2.network import Carry
from specdec.drafters.m2r2.replay import Text
from specdec.engine.depth.calibration import DecayedCounts
from specdec.kvcache import recurrent
from specdec.runtimes.native import library, linear
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.target import Pass, Target
from specdec.runtimes.transformers import TransformersTarget

pytestmark = pytest.mark.filterwarnings("error::specdec.base.errors.SpecDecWarning")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    learn_soon(monkeypatch, tmp_path)


@pytest.fixture
def target(llama: PreTrainedModel) -> Target:
    return TransformersTarget(llama)


@pytest.fixture(scope="module")
def quick() -> Target:
    """Of the native runtime, where there is one: it teaches itself several times as fast."""
    return target_of(QUICK)


@torch.inference_mode()
def rows_of_drafting(learner: M2R2Learner, text: Text) -> Iterator[tuple[torch.Tensor, ...]]:
    """For each token after which the model chose: the states that drafting after it sees, token by token."""
    target, [(lo, _)], network = learner.target, learner.fits.path.segments, learner.fits.network
    for at in range(text.start - 1, len(text.ids) - 1):
        cache, positions = target.new_cache(), torch.arange(at)[None]
        ids = torch.tensor([text.ids[:at]])
        embedded = target.embed(ids, positions)
        taps = {lo: embedded, target.num_layers: embedded}
        given = Pass(positions, cache.register(0, positions), cache, taps, ids=ids)
        target.layers(embedded, 0, target.num_layers, given)
        cache.commit([range(at)])
        before = Carry(taps[target.num_layers][:, -1:], [taps[lo][:, -1:]])
        place, token = torch.tensor([[at]]), torch.tensor([[text.ids[at]]])
        own = target.embed(token, place)
        x = network.project(0, own, before)
        end, _ = network.run_segment(target, 0, x, place, token, cache.register(lo, place), cache)
        yield own[0, 0], before.final[0, 0], before.inputs[0][0, 0], end[0, 0]


@pytest.mark.parametrize(
    ("kind", "runtime", "seconds"),  # 0: layer by layer
    [
        ("llama", "transformers", 0.0),
        ("llama", "native", 1e9),
        ("lfm2", "transformers", 1e9),
        ("qwen3_5_text", "native", 1e9),
        ("gemma4_text", "native", 0.0),
        pytest.param("falcon_h1", "transformers", 0.0, marks=pytest.mark.slow),
        pytest.param("gpt_oss", "native", 1e9, marks=pytest.mark.slow),
    ],
)
def test_a_text_run_again_shows_what_drafting_would_see(monkeypatch, kind: str, runtime: str, seconds: float) -> None:  # type: ignore[no-untyped-def]
    target = target_of(runtime, kind)
    learner = taught(target, 12)
    monkeypatch.setattr(replay, "PIECE", seconds)
    monkeypatch.setattr(recurrent, "BRANCH_TOKENS", 30)  # few branches run at once
    text = texts(target, 1, length=30, seed=5)[0]
    with torch.inference_mode():
        found = [rows for rows in learner.replay.rows(text, learner.fits.network) if rows is not None]
    assert [token for rows in found for token in rows.following.tolist()] == text.ids[text.start :]
    places = [(rows, n) for rows in found for n in range(len(rows.following))]
    seen = [(rows.embedded[n], rows.carry.final[n], rows.carry.inputs[0][n], rows.end[n]) for rows, n in places]
    for one, other in zip(seen, rows_of_drafting(learner, text), strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))
    lo, hi = learner.fits.path.segments[0]
    assert kind not in HYBRIDS or target.recurrent_layers.intersection(range(lo, hi))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kind", "runtime"), [("mistral", "torch"), ("llama", "native"), ("lfm2", "transformers"), ("llama", "int8")]
)
def test_a_text_whose_states_are_kept_runs_through_the_path_alone(monkeypatch, kind: str, runtime: str) -> None:  # type: ignore[no-untyped-def]
    target = target_of(runtime.replace("int8", "native"), kind)
    if runtime == "int8":
        target.int8_cache = True
    learner = taught(target, 12)
    text = texts(target, 1, length=30, seed=5)[0]
    ran = noted(monkeypatch, type(target), "layers", lambda self, x, lo, *more: lo)
    runs = list[list[torch.Tensor]]()
    for _ in range(2):
        ran.clear()
        found = [rows for rows in learner.replay.rows(text, learner.fits.network) if rows is not None]
        assert [token for rows in found for token in rows.following.tolist()] == text.ids[text.start :]
        parts = zip(*([each.carry.final, *each.carry.inputs, each.end, each.final] for each in found), strict=True)
        runs.append([torch.cat(part) for part in parts])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*runs, strict=True))
    (lo, hi) = learner.fits.path.segments[0]
    hybrid = any(lo <= layer < hi for layer in target.recurrent_layers)
    assert (min(ran) >= lo) == (not hybrid and runtime != "int8")  # these run whole again


def test_the_oldest_states_make_room(quick: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = taught(quick, 8)
    sizes = [text.states.nbytes for text in learner.latest if text.states]
    assert len(sizes) == len(learner.latest) == 8
    most = 12 * max(sizes)
    monkeypatch.setattr(learning, "STATES", most)
    fits = learner.fits.progress.fits
    read(learner, texts(quick, 24, seed=9))
    kept = [text.states.nbytes if text.states else 0 for text in learner.latest]
    assert kept[-1] and not kept[0] and sum(kept) <= most and kept == sorted(kept, key=bool)
    assert learner.fits.progress.fits > fits


def test_only_the_end_of_a_long_prompt_is_run_again() -> None:
    text = Text.of(list(range(3000)), 2000)
    assert text.ids[: text.start] == list(range(2000 - replay.CONTEXT, 2000))
    assert len(text.ids) == replay.LONGEST


def test_it_learns_to_draft_what_the_model_writes(quick: Target) -> None:
    learner = taught(quick, 60)
    assert learner.fits.progress.fits >= 2 and learner.fits.progress.agreement[-1][1] > 0.3
    tokens = [tokens for tokens, _ in learner.fits.progress.agreement]
    assert tokens == sorted(tokens)
    for share in range(300):  # those of the latest fits are kept
        learner.fits.serve(learner.fits.network, share / 300)
    assert [share for _, share in learner.fits.progress.agreement] == [share / 300 for share in range(200, 300)]


def test_a_fit_that_agrees_less_on_held_out_texts_does_not_serve(quick: Target, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    learner = taught(quick, 30)
    network, fits = learner.fits.network, learner.fits.progress.fits
    solve = Sums.solve

    def zeros(*args):  # type: ignore[no-untyped-def]
        return torch.zeros_like((yield from solve(*args)))

    monkeypatch.setattr(Sums, "solve", zeros)
    read(learner, texts(quick, 12, seed=9))
    assert learner.fits.network is network and learner.fits.progress.fits == fits


class Systems:
    """The further rows, (number of them, weight), of all systems for the second projection."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.more, solve = list[list[tuple[int, float]]](), Sums.solve

        def watched(sums, ridge, more=()):  # type: ignore[no-untyped-def]
            more = list(more)
            if sums.size == 2 * sums.outputs + 1:
                self.more.append([(len(x), weight) for x, _, weight in more])
            return solve(sums, ridge, more)

        monkeypatch.setattr(Sums, "solve", watched)


def test_a_process_of_one_text_compares_fits_on_it_before_it_learns_from_it(quick: Target, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    systems = Systems(monkeypatch)
    for number, text in enumerate(texts(quick, 30)):
        learner = M2R2Learner(quick)  # as ``specdec generate`` does
        read(learner, [text])
        learner.save()
        learner.fits.store.release()
        assert learner.fits.progress.texts == number + 1 and learner.latest.held == [text]
        assert learner.fits.progress.tokens == 24 * (number + 1)  # nothing is lost
    assert learner.fits.progress.fits > 3
    assert systems.more.count([(24, -1.0)]) > 10 and all(len(more) <= 1 for more in systems.more)


def test_one_text_of_three_is_held_out_from_fits_until_there_are_enough_later_ones(quick: Target, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    systems, learner = Systems(monkeypatch), M2R2Learner(quick)
    given = texts(quick, 20)
    for number, text in enumerate(given, start=1):
        read(learner, [text])
        assert learner.fits.progress.tokens == 24 * number
        assert learner.latest.held == given[:number:3][-3:]  # 72 tokens, and without the oldest fewer than 60
        assert sum(text.count for text in learner.latest if not text.held) <= 72
    assert [(24, -1.0)] * 3 in systems.more  # texts of 24 tokens
    last, serving = (network.projections[1].weight for network in (learner.baseline, learner.fits.network))
    assert learner.fits.progress.fits > 1 and not torch.equal(last, serving)  # which has seen them


@pytest.mark.parametrize("every", [3, 100])
def test_a_fit_that_is_better_on_one_text_alone_does_not_serve(target: Target, monkeypatch, every: int) -> None:  # type: ignore[no-untyped-def]
    """It would serve if the first fits were compared on the first text alone."""
    for name, value in {"HOLDOUT_EVERY": every, "HOLDOUT_TOKENS": 1000, "FIRST": 300, "GROWTH": 100.0}.items():
        monkeypatch.setattr(learning, name, value)
    learner, solve = taught(target, 14), Sums.solve
    assert learner.fits.progress.fits == 1 and len(learner.latest.held) == (5 if every == 3 else 1)

    def of_one_text(sums, ridge, more=()):  # type: ignore[no-untyped-def]
        sums = Sums(sums.size - 1, sums.outputs)
        for rows in learner.latest[0].rows:
            x, y = rows.products(learner.fits.basis, 1)
            sums.add(x[:14], y[:14])
        return solve(sums, 0.01)

    monkeypatch.setattr(Sums, "solve", of_one_text)
    read(learner, texts(target, 2, seed=9))
    assert learner.fits.progress.fitted > 336 and learner.fits.progress.fits == (1 if every == 3 else 2)


def test_the_latest_texts_count_more_where_that_helps(quick: Target, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    systems = Systems(monkeypatch)
    taught(quick, 30)
    assert {weight for more in systems.more for _, weight in more} == {-1.0, 4.0}
    assert any({weight for _, weight in more} == {4.0} for more in systems.more)  # the best one, with held-out texts


class Work:
    """What is done: rows of matrices quantised, parts read out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.packed = self.read = 0
        self._count(monkeypatch, NativeTarget, "readout", "read", lambda *args: 1)
        self._count(monkeypatch, library.load(), "specdec_pack_rounded", "packed", lambda source, rows, *args: rows)

    def _count(self, monkeypatch, owner, name: str, figure: str, amount) -> None:  # type: ignore[no-untyped-def]
        function = getattr(owner, name)

        def counted(*args):  # type: ignore[no-untyped-def]
            setattr(self, figure, getattr(self, figure) + amount(*args))
            return function(*args)

        monkeypatch.setattr(owner, name, counted)

    def since(self, before: dict[str, int]) -> dict[str, int]:
        return {name: count - before[name] for name, count in vars(self).items()}


@needs_native
def test_no_piece_does_much_and_the_step_after_a_swap_prepares_nothing(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(fits, "VOCABULARY", 64)
    monkeypatch.setattr(linear, "CHUNK_WEIGHTS", 1)  # 16 rows
    decoder = SpecDecoder(model_of("llama", num_hidden_layers=9), drafter="m2r2", runtime="native", learn=False)
    work, most, swaps = Work(monkeypatch), dict[str, int](), 0
    for number in range(14):
        version = decoder.drafter.learner.version
        more = True
        while more:
            before = dict(vars(work))
            more = decoder.drafter.learner.work()
            most = {name: max(done, most.get(name, 0)) for name, done in work.since(before).items()}
        before = dict(vars(work))
        out = decoder.generate([5 + number, 7, 9], max_new_tokens=24, num_speculative_tokens=3)
        if decoder.drafter.learner.version > version:
            swaps += 1
            assert work.since(before)["packed"] <= len(set(out.token_ids)) + 3  # tokens beside the vocabulary
    assert swaps > 1 and most == {"packed": 16, "read": 1}


def test_a_drafter_that_knows_nothing_drafts_nothing(llama: PreTrainedModel) -> None:
    decoder = SpecDecoder(llama, drafter="m2r2")
    for depth in ("auto", 3):
        out = decoder.generate([5, 6, 7], max_new_tokens=40, num_speculative_tokens=depth)
        assert out.metrics.num_draft_tokens == 0


@pytest.mark.parametrize("what", ["nan", "out of memory"])
def test_what_goes_wrong_ends_learning_not_requests(llama: PreTrainedModel, monkeypatch, what: str) -> None:  # type: ignore[no-untyped-def]
    decoder = SpecDecoder(llama, drafter="m2r2", runtime="transformers")
    decoder.learning = False
    expected = decoder.generate([5, 6, 7], max_new_tokens=20).token_ids
    embed = TransformersTarget.embed

    def broken(*args):  # type: ignore[no-untyped-def]
        if what == "nan":
            return embed(*args) * float("nan")
        raise MemoryError("out of memory")

    why = "a state is not finite" if what == "nan" else what
    with monkeypatch.context() as changed, pytest.warns(SpecDecWarning, match=f"stops learning: {why}") as warned:
        for number in range(2):
            decoder.generate([5, 6, 8 + number], max_new_tokens=20)
        changed.setattr(TransformersTarget, "embed", broken)
        decoder.learn()
    assert len(warned) == 1
    assert decoder.generate([5, 6, 7], max_new_tokens=20).token_ids == expected and not decoder.learn()


def test_models_that_cannot_be_tapped_are_refused_with_the_reason(target: Target, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    assert why_not(target) is None
    two = SpecDecoder(tiny_model("llama", num_hidden_layers=2), drafter="none", learn=False)
    with pytest.raises(SpecDecError, match="cannot teach itself: the model has too few layers"):
        two.with_drafter("m2r2")
    with monkeypatch.context() as changed:
        changed.setattr(TransformersTarget, "experts", object())
        assert why_not(target) == "some of its experts are on the disk"
    monkeypatch.setattr(learning, "free_memory", lambda device: 1000)
    with pytest.raises(SpecDecError, match=r"cannot teach itself: it would need 0\.1 GB of memory"):
        SpecDecoder(target.model, drafter="m2r2")
    with pytest.warns(SpecDecWarning, match="no trained drafter is shipped"):
        assert "m2r2" not in SpecDecoder(target.model, drafter="auto").drafter.traits.label


def test_the_path_follows_the_depth_and_the_size_of_the_head() -> None:
    for layers, vocab, segment in ((3, 97, (1, 2)), (28, 97, (19, 26)), (18, 8000, (8, 17))):
        path = learned_path(TransformersTarget(tiny_model("llama", num_hidden_layers=layers, vocab_size=vocab)))
        path.check(layers)
        assert path.segments == (segment,) and path.final_projection and not path.neurons


def wait_for(condition) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_engine_learns_when_it_is_idle_and_from_those_who_allow_it(llama, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("specdec.api.decoder.LEARN", True)
    decoder = SpecDecoder(llama, drafter="m2r2")
    assert "learn=False) turns this off" in capsys.readouterr().err
    learner = decoder.drafter.learner  # type: ignore[attr-defined]
    with decoder.engine(num_speculative_tokens=2) as engine:
        for number in range(6):
            request = decoder.request([5 + number, 6], max_new_tokens=30)
            request.learn = number != 3
            list(engine.submit(request))
        wait_for(lambda: learner.fits.progress.texts == 5 and not learner.queue and learner.fits.progress.fits)
    assert decoder.drafter.learner.version
    SpecDecoder(llama, drafter="m2r2", learn=True)
    assert not capsys.readouterr().err  # it is said once


def test_a_decoder_that_is_told_not_to_learn_keeps_nothing(llama, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("specdec.api.decoder.LEARN", True)
    monkeypatch.setattr("specdec.api.drafter_learning.IDLE", 0.0)
    decoder = SpecDecoder(llama, drafter="m2r2", learn=False)
    with decoder.engine(num_speculative_tokens=2) as engine:
        list(engine.submit(decoder.request([5, 6], max_new_tokens=8)))
        time.sleep(0.1)
    decoder.generate([5, 6], max_new_tokens=8)
    time.sleep(0.1)
    assert not learned.folder().exists() and not capsys.readouterr().err


def test_a_decoder_that_is_gone_learns_no_more(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()  # there is always more to learn
    monkeypatch.setattr(M2R2Learner, "work", lambda self: not (begun.set() or time.sleep(0.001)))
    decoder = SpecDecoder(llama, drafter="m2r2", learn=True)
    decoder.generate([5, 6], max_new_tokens=8)
    seen = weakref.ref(decoder.drafter)
    assert begun.wait(30)
    del decoder
    wait_for(lambda: (gc.collect(), seen())[1] is None)


def test_all_is_kept_at_most_once_in_ten_minutes_and_at_the_end(quick: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    written, save = list[int](), learned.Store.save
    monkeypatch.setattr(learned.Store, "save", lambda self, *what: (written.append(what[0].texts), save(self, *what)))
    learner = taught(quick, 12)
    assert written == [1]
    learner.fits.kept_at -= learning.SAVE_EVERY
    while learner.work():
        pass
    learner.save()
    assert written == [1, 12]


def test_a_decoder_learns_between_generations(llama: PreTrainedModel) -> None:
    decoder = SpecDecoder(llama, drafter="m2r2", learn=True)
    for number in range(5):
        decoder.generate([5 + number, 6], max_new_tokens=30)
    wait_for(lambda: decoder.drafter.learner.version)
    silent = decoder.with_drafter("m2r2")
    silent.learning, learner = False, silent.drafter.learner  # type: ignore[attr-defined]
    texts = learner.fits.progress.texts
    silent.generate([5, 6], max_new_tokens=30)
    time.sleep(0.1)
    assert learner.fits.progress.texts == texts and len(learner.queue) == 1


@pytest.mark.parametrize("within", [True, False])
def test_what_was_known_of_the_old_drafts_is_forgotten_when_a_fit_serves(llama, monkeypatch, within: bool) -> None:  # type: ignore[no-untyped-def]
    """Within a generation, and between two."""
    decoder, forgotten = SpecDecoder(llama, drafter="m2r2", learn=False), dict[int, None]()
    monkeypatch.setattr(DecayedCounts, "forget", lambda self: forgotten.setdefault(decoder.drafter.learner.version))
    for number in range(14):
        with decoder.open([[5 + number, 7]], max_new_tokens=30) as generation:
            for step, _ in enumerate(generation.steps()):
                while within and step == 3 and decoder.drafter.learner.work():
                    pass
        while not within and decoder.drafter.learner.work():
            pass
        assert number or not decoder.drafter.learner.version
    versions = list(forgotten)
    assert len(versions) > 1 and versions == sorted(versions) and versions[-1] <= decoder.drafter.learner.version
