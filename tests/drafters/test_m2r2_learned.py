"""What drafters learned, on disk: where another process goes on, and what becomes of damaged and deleted files."""

import copy
import json
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from learners import NEW, ended, learn_soon, read, taught, texts
from safetensors.torch import load_file, save_file
from targets import QUICK, target_of

from specdec.base import ridge
from specdec.base.errors import SpecDecWarning
from specdec.base.ridge import result
from specdec.drafters.m2r2 import fits, learned, learning
from specdec.drafters.m2r2.learning import M2R2Learner
from specdec.models import adapter as adapters
from specdec.models.adapter import LowRank
from specdec.runtimes.target import Target

pytestmark = pytest.mark.filterwarnings("error::specdec.base.errors.SpecDecWarning")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    learn_soon(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def target() -> Target:
    """Of the native runtime, where there is one: it is several times as fast."""
    return target_of(QUICK)


def same(one: M2R2Learner, other: M2R2Learner) -> bool:
    projections = zip(one.fits.network.projections, other.fits.network.projections, strict=True)
    return all(torch.equal(a.weight.bfloat16(), b.weight.bfloat16()) for a, b in projections)


def test_another_process_goes_on_where_this_one_ended(target: Target, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    learner = ended(target)
    monkeypatch.setattr(learning, "EVERY", 10**6)  # a fit would scale the sums
    other = M2R2Learner(target)
    assert same(learner, other) and other.fits.progress == learner.fits.progress
    read(other, [NEW])
    assert other.fits.progress.tokens == learner.fits.progress.tokens + 33
    for before, after in zip(learner.fits.sums, other.fits.sums, strict=True):
        assert after.rows == pytest.approx(before.rows + 33, abs=1e-3)  # the rows of the new text
        pairs = list(zip(before.panels, after.panels, strict=True))
        assert all(a.shape == b.shape and not torch.equal(a, b) for a, b in pairs)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
        return
    with learned.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    if how == "another version":
        metadata["progress"] = json.dumps(json.loads(metadata["progress"]) | {"version": 99})
    elif how == "another shape":
        tensors["fit.1"] = tensors["fit.1"][:-1].contiguous()
    else:
        del tensors["sums.1.0"]
    save_file(tensors, path, metadata)


def with_adapter(target: Target) -> Target:
    adapted, random = copy.deepcopy(target.model), torch.Generator().manual_seed(3)
    rows, columns = adapted.model.layers[2].self_attn.q_proj.weight.shape
    down, up = (torch.randn(shape, generator=random) * 0.1 for shape in ((4, columns), (rows, 4)))
    maps = {"model.layers.2.self_attn.q_proj": LowRank(down, up, 1.0)}
    adapters.merge(adapted, adapters.Adapter("org/adapter", adapters.fingerprint(maps), maps))
    return type(target)(adapted)  # type: ignore[call-arg]


def test_a_model_with_an_adapter_starts_with_what_was_learned_without_it(target: Target, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    adapted = with_adapter(target)
    assert M2R2Learner(adapted).fits.version == 0
    learner = ended(target)
    before, tokens = learner.fits.store.path.read_bytes(), learner.fits.progress.tokens
    monkeypatch.setattr(learned, "PRIOR", tokens // 2)
    monkeypatch.setattr(learning, "EVERY", 10**6)  # a fit would scale the sums
    started = M2R2Learner(adapted)
    assert same(learner, started) and started.fits.version == learner.fits.version > 0
    read(started, [NEW])
    progress = started.fits.progress
    assert (progress.tokens, progress.adapter) == (tokens // 2 + 33, "org/adapter")
    factor = (tokens // 2) / tokens
    for own, of_base in zip(started.fits.sums, learner.fits.sums, strict=True):
        assert own.rows == pytest.approx(factor * of_base.rows + 33, abs=1e-3)
    started.save()
    started.fits.store.release()
    assert learner.fits.store.path.read_bytes() == before
    assert M2R2Learner(adapted).fits.progress == progress and M2R2Learner(target).fits.progress == learner.fits.progress
    learned.forget({started.fits.store.path.stem})
    damage(learner.fits.store.path, "truncated")
    damaged = learner.fits.store.path.read_bytes()
    with pytest.warns(SpecDecWarning, match="is damaged .*; learning starts anew"):
        assert M2R2Learner(adapted).fits.version == 0
    assert learner.fits.store.path.read_bytes() == damaged


@pytest.mark.parametrize("how", ["truncated", "another shape", "missing sums"])
def test_a_file_that_cannot_be_used_makes_learning_start_anew(target: Target, monkeypatch, how: str) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(fits, "VOCABULARY", 64)
    learner = ended(target)
    damage(learner.fits.store.path, how)
    with pytest.warns(SpecDecWarning, match="learning starts anew") as warned:
        other = M2R2Learner(target)
        read(other, [NEW, NEW])
    assert len(warned) == 1 and other.fits.progress.tokens == 66 and other.fits.sums[0].rows == pytest.approx(66)
    other.save()
    assert learned.read_progress(other.fits.store.path) == other.fits.progress


@pytest.mark.parametrize("why", ["another version", "Too many open files"])
def test_a_file_that_cannot_be_read_here_is_not_written_over(target: Target, monkeypatch, why: str) -> None:  # type: ignore[no-untyped-def]
    path, opened = ended(target).fits.store.path, Path.open
    if why == "another version":
        damage(path, why)
    kept = path.read_bytes()

    def refuse(self: Path, *args: object, **how: object) -> object:
        if self == path and why != "another version":
            raise OSError(24, why)
        return opened(self, *args, **how)  # type: ignore[call-overload]

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        with pytest.warns(SpecDecWarning, match=f"{why}.* what this process learns is not kept"):
            other = M2R2Learner(target)
    read(other, [NEW])
    other.save()
    assert path.read_bytes() == kept and not other.fits.store.writes


@pytest.mark.parametrize("before", [True, False])
def test_a_process_that_learns_notices_that_all_was_deleted(target: Target, monkeypatch, before: bool) -> None:  # type: ignore[no-untyped-def]
    with monkeypatch.context() as patched:
        if not before:  # it has kept nothing yet
            patched.setattr(fits.Fits, "keep", lambda self: setattr(self, "kept", self.progress.texts))
        learner = taught(target, 24)
    assert bool(learned.all_progress()) == before and learner.fits.version
    assert learned.forget() is True
    learner.fits.kept = 0
    learner.save()
    assert not learned.all_progress() and learner.fits.forgotten
    with pytest.warns(SpecDecWarning, match="deleted what was learned") as warned:
        read(learner, [NEW])
    assert len(warned) == 1 and not learner.fits.progress.tokens and not learner.latest and not learner.fits.version
    read(learner, [NEW])
    learner.save()
    [(_, progress)] = learned.all_progress()
    assert progress is not None and progress.tokens == 33
    learner.fits.store.release()
    assert learned.forget() is False and [each.name for each in learned.folder().iterdir()] == [".lock"]


def test_a_file_that_is_deleted_while_it_is_written_stays_deleted(target: Target, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    learner = taught(target, 24)
    learner.save()
    learner.fits.kept, wrote = 0, learned.save_file

    def deleted_meanwhile(*args: object) -> None:
        wrote(*args)  # type: ignore[arg-type]
        learned.forget()

    monkeypatch.setattr(learned, "save_file", deleted_meanwhile)
    learner.save()
    assert not learned.all_progress()


def test_one_process_at_a_time_writes(target: Target) -> None:
    first = taught(target, 12)
    kept = first.fits.store.path.read_bytes()
    assert first.fits.store.writes
    with pytest.warns(SpecDecWarning, match="another process learns for this model") as warned:
        second = taught(target, 12, seed=1)
    assert not second.fits.store.writes and second.fits.progress.tokens and len(warned) == 1
    second.save()
    assert first.fits.store.path.read_bytes() == kept


def test_a_process_goes_on_from_what_another_one_has_learned_since_it_began(target: Target) -> None:
    first = taught(target, 12)
    first.save()
    second, before = M2R2Learner(target), first.fits.progress.based
    read(first, texts(target, 14, seed=7))
    first.save()
    first.fits.store.release()
    assert first.fits.progress.based > before
    second.add(list(range(3, 40)), 4)
    while not second.fits.sums:
        second.work()
    assert second.fits.progress == first.fits.progress and same(first, second)
    assert second.baseline is second.fits.network
    for one, other in zip(first.fits.sums, second.fits.sums, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.panels, other.panels, strict=True))


@pytest.mark.parametrize("how", ["no folder", "no locks"])
def test_where_nothing_can_be_written_it_learns_for_itself(target: Target, tmp_path, monkeypatch, how: str) -> None:  # type: ignore[no-untyped-def]
    if how == "no folder":
        (tmp_path / "file").touch()
        monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "file"))
    else:

        def refuse(*args: object, **how: object) -> None:
            raise NotImplementedError("the file system has no locks")

        monkeypatch.setattr(learned.FileLock, "acquire", refuse)
    with pytest.warns(SpecDecWarning, match="learned' cannot be written") as warned:
        learner = taught(target, 12)
    learner.save()
    assert len(warned) == 1 and learner.fits.progress.fits and not list(tmp_path.rglob("*.safetensors"))


def test_what_a_killed_process_left_is_removed(target: Target) -> None:
    store = ended(target).fits.store
    left = store.path.with_name(f".{store.path.name}.part")
    left.touch()
    assert learned.forget() is False and not left.exists()


@pytest.mark.parametrize("step", ["save_file", "os.replace"])
def test_a_full_disk_ends_keeping_not_learning(target: Target, monkeypatch, step: str) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(f"specdec.drafters.m2r2.learned.{step}", Mock(side_effect=OSError("No space left on device")))
    with pytest.warns(SpecDecWarning, match="cannot be kept: No space left") as warned:
        learner = taught(target, 24)
        learner.save()
    assert len(warned) == 1 and learner.fits.progress.fits
    assert not [path for path in learner.fits.store.path.parent.iterdir() if not path.name.endswith(".lock")]


def test_sums_are_always_those_of_all_texts(target: Target) -> None:
    """A process may end at any time, also while texts run again for a new first projection."""
    learner, seen = M2R2Learner(target), set[str]()
    for text in texts(target, 16):
        learner.add(text.ids, text.start)
        while learner.work():
            fits, code = learner.fits, getattr(learner._work, "gi_code", None)
            if fits.progress.based:
                seen.add(code.co_name if code else "")
                assert fits.sums[1].rows > fits.progress.tokens - 1
    assert {"_read", "_rebase", "_fit"} <= seen


def test_what_a_process_writes_at_its_end_can_be_solved_whenever_it_ends(target: Target, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(ridge, "PANEL", 8)
    monkeypatch.setattr(ridge, "CHUNK_WORK", 1)  # additions are interrupted at every panel
    learner, ends = taught(target, 12), 0
    for text in texts(target, 2, seed=3):
        learner.add(text.ids, text.start)
        while learner.work():
            ends += 1
            if ends % 7 == 0:
                learner.fits.kept = 0
                learner.save()
                kept = load_file(learner.fits.store.path)
                for n in (0, 1):
                    written = learner.fits._new_sums()[n]
                    written.panels = [kept[f"sums.{n}.{number}"] for number in range(len(written.panels))]
                    assert result(written.solve(ridge.RIDGE)).isfinite().all()
    assert ends > 50
    learner.fits.store.release()


def test_sums_without_a_solution_are_begun_anew(target: Target) -> None:
    learner = taught(target, 12)
    for sums in learner.fits.sums:
        sums.panels[0] = -sums.panels[0]
    with pytest.warns(SpecDecWarning, match="learning starts anew"):
        read(learner, texts(target, 24, seed=3))
    assert learner.on and learner.fits.progress.fits > 1


def test_nothing_of_a_text_is_kept_but_counts(target: Target) -> None:
    learner = taught(target, 24)
    learner.save()
    kept = load_file(learner.fits.store.path)
    assert not learner.fits.store.path.stat().st_mode & 0o077  # nobody else reads it
    kinds = {name.split(".")[0] for name in kept}
    assert kinds <= {"sums", "fit", "basis", "counts", "vocabulary"}
    assert int(kept["counts"].sum()) == learner.fits.progress.tokens
    learner.fits.store.release()


def test_old_files_make_room(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(learned, "MOST_BYTES", 3000)
    for number in range(4):
        store = learned.Store(f"weights {number}", "path")
        assert store.claim()
        store.save(learned.Progress(), {"counts": torch.zeros(200)})
        store.release()
        time.sleep(0.02)
    left = {path for path, _ in learned.all_progress()}
    assert left == {learned.Store(f"weights {n}", "path").path for n in (2, 3)}
