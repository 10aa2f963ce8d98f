"""A trained M2R2 that goes on learning: when a copy serves, when training stands still, and what ends it."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import save_tiny
from training import PATHS, shaken

from specdec import SpecDecError, SpecDecoder
from specdec.base.errors import SpecDecWarning
from specdec.drafters import m2r2_refining
from specdec.drafters.m2r2_refining import Refiner
from specdec.models import drafter_folder

pytestmark = [
    pytest.mark.filterwarnings("error::specdec.base.errors.SpecDecWarning"),
    pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped here"),
]
WAITS = "import os, shutil, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
COPIES = WAITS + "shutil.copytree(sys.argv[2], 'out')"
FAILS = "import sys; print('loading'); sys.exit('Error: the disk is full')"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for name, value in {"QUIET": 0.0, "LEAST": 10, "SPARE": 0, "DAY": 1e9}.items():
        monkeypatch.setattr(m2r2_refining, name, value)


class Trained:
    """A decoder with a drafter that is refined by a script in place of ``specdec train``.

    go: the file that lets the script end.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, updates: int = 1) -> None:
        self.go, model, given, better = folder / "go", save_tiny(folder / "tiny"), folder / "given", folder / "better"
        self.plain = SpecDecoder.from_pretrained(model, "none", runtime="reference")
        target = self.plain.target
        network = shaken(PATHS["projected"], target, torch.arange(0, target.vocab_size, 2, dtype=torch.int32))
        config = {"drafter": "m2r2", "path": network.path.to_json()}
        config["base"] = drafter_folder.describe_base(target, "tiny")
        drafter_folder.write(given, config, dict(network.state_dict()))
        self.halves = {name: x / 2 if x.is_floating_point() else x for name, x in network.state_dict().items()}
        drafter_folder.write(better, config | {"training": {"updates": updates}}, self.halves)
        command = [sys.executable, "-c", script, str(self.go), str(better)]
        monkeypatch.setattr(Refiner, "_command", lambda self: command)
        self.decoder = self.plain.with_drafter("m2r2=" + str(given), refine=1)
        self.drafter = self.decoder.drafter
        self.refiner: Refiner = self.drafter.learner  # type: ignore[attr-defined]

    def generate(self, prompt: list[int]) -> None:
        """Decode, and compare with plain decoding."""
        how = {"max_new_tokens": 12, "num_speculative_tokens": 3}
        out = self.decoder.generate(prompt, **how)  # type: ignore[arg-type]
        assert out.token_ids == self.plain.generate(prompt, max_new_tokens=12).token_ids

    def state(self) -> str:
        """As in ``ps``: T is stopped."""
        assert self.refiner.run is not None
        return Path(f"/proc/{self.refiner.run.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]

    def stands(self) -> bool:
        """Whether it is stopped, or is soon: a signal takes a moment."""
        end = time.monotonic() + 10
        while self.state() != "T" and time.monotonic() < end:
            time.sleep(0.001)
        return self.state() == "T"

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            self.drafter.learn()
            time.sleep(0.01)


def test_a_copy_that_accepts_more_serves_with_the_old_vocabulary_and_no_text_is_left(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    made = Trained(tmp_path, monkeypatch, COPIES)
    made.generate([5, 6, 7])
    before, old = made.drafter.network, made.drafter.network.draft_vocab  # type: ignore[attr-defined]
    made.until(lambda: made.refiner.run)
    folder = made.refiner.run.folder  # type: ignore[union-attr]
    assert (folder / "answers.jsonl").exists() and folder.stat().st_mode & 0o77 == 0
    made.go.touch()
    made.until(lambda: made.drafter.version == 2)
    network = made.drafter.network  # type: ignore[attr-defined]
    assert network is not before and network.draft_vocab is old and not folder.exists()
    assert torch.allclose(network.projections[0].weight, made.halves["projections.0.weight"])
    assert {path.name for path in made.refiner.folder.iterdir()} == {"config.json", "model.safetensors"}
    made.generate([5, 6, 8])
    assert not made.drafter.learn() and made.refiner.run is None  # one run a day


def test_a_copy_that_accepts_no_more_does_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Trained(tmp_path, monkeypatch, COPIES, updates=0)
    made.go.touch()
    before = made.drafter.network  # type: ignore[attr-defined]
    made.generate([5, 6, 7])
    made.until(lambda: made.refiner.run)
    made.until(lambda: made.refiner.run is None)
    assert made.drafter.network is before and made.drafter.version == 1  # type: ignore[attr-defined]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_training_stands_still_while_a_request_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Trained(tmp_path, monkeypatch, WAITS)
    made.generate([5, 6, 7])
    made.until(lambda: made.refiner.run)
    assert made.state() in "RSD"
    with made.decoder.open([[5, 6, 8]], max_new_tokens=12, num_speculative_tokens=2) as generation:
        for _ in generation.steps():
            assert made.stands()
    monkeypatch.setattr(m2r2_refining, "QUIET", 1e9)
    made.drafter.learn()
    assert made.stands()
    monkeypatch.setattr(m2r2_refining, "QUIET", 0.0)
    made.until(lambda: made.state() in "RSD")


def test_a_failure_is_one_warning_and_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m2r2_refining, "DAY", 0.0)
    made = Trained(tmp_path, monkeypatch, FAILS)
    made.generate([5, 6, 7])
    with pytest.warns(SpecDecWarning, match="is not trained further: Error: the disk is full") as warned:
        made.until(lambda: made.refiner.run)
        made.until(lambda: made.refiner.run is None)
        for number in range(3):
            made.generate([5, 6, 8 + number])
            made.drafter.learn()
    assert len(warned) == 1 and made.refiner.run is None and made.drafter.version == 1


def test_a_run_ends_with_its_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Trained(tmp_path, monkeypatch, WAITS)
    made.generate([5, 6, 7])
    made.until(lambda: made.refiner.run)
    run = made.refiner.run
    assert run is not None
    made.decoder.drafter.save()
    assert run.process.returncode is not None and not run.folder.exists()


def test_too_little_memory_and_self_taught_drafters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    made = Trained(tmp_path, monkeypatch, WAITS)
    with SpecDecoder(
        made.plain.model, None, f"m2r2={tmp_path / 'given'}", drafter_options={"refine": 1}, learn=True
    ) as two:
        assert two.drafter.learns and "turns this off" not in capsys.readouterr().err  # nothing is kept
    monkeypatch.setattr(m2r2_refining, "free_memory", lambda device: 1000)
    made.generate([5, 6, 7])
    made.drafter.learn()
    assert made.refiner.run is None
    with pytest.raises(SpecDecError, match="no m2r2 drafter is shipped"):
        made.plain.with_drafter("m2r2", refine=1)


@pytest.mark.slow
def test_specdec_train_refines_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = Refiner._command
    made = Trained(tmp_path, monkeypatch, WAITS)
    monkeypatch.setattr(Refiner, "_command", command)
    monkeypatch.setattr(m2r2_refining, "SHARE", 0.02)
    hurried = m2r2_refining.CHILD.replace("os.nice(19)", "")  # beside other tests it would take minutes
    monkeypatch.setattr(m2r2_refining, "CHILD", hurried)
    for number in range(16):
        made.generate([5, 6, 7 + number])
    made.until(lambda: made.refiner.run)
    run = made.refiner.run
    assert run is not None
    run.process.wait(300)
    assert run.failure() == "" and run.process.returncode == 0, (run.folder / "log").read_text()
    shutil.copytree(run.folder / "out", tmp_path / "out")
    assert drafter_folder.read_config(tmp_path / "out")["training"]["tokens_in_answers"] > 0
    made.until(lambda: made.refiner.run is None)
    made.generate([5, 6, 7])
