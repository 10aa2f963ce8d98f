"""Drafters on a hub are drafted with from there: a server on this machine with the hub's endpoint."""

from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub
from refusals import refused
from safetensors.torch import save
from tiny import save_native, tiny_model
from tiny_gguf import write_gguf
from zoo import save_medusa

from specdec import SpecDecError, SpecDecoder
from specdec.models import identity, loading
from specdec.speculation.drafter_spec import DrafterSpec

REPOSITORY = "org/my-drafter"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_medusa(tmp_path / "it", tiny_model())
    (tmp_path / "it/other.py").write_text("raise SystemExit\n")
    return tmp_path / "it"


def put(fake: type[FakeHub], folder: Path) -> None:
    fake.repositories[REPOSITORY] = {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_drafter_on_the_hub_drafts_and_no_code_is_downloaded(fake: type[FakeHub], folder: Path) -> None:
    put(fake, folder)
    decoder = SpecDecoder(tiny_model(), None, f"{REPOSITORY}@v1")
    assert decoder.drafter.name == "medusa"
    assert set(fake.fetched) == {"config.json", "model.safetensors"}
    plain = SpecDecoder(tiny_model(), None, "none").generate([5, 6, 7], max_new_tokens=12).token_ids
    assert decoder.generate([5, 6, 7], max_new_tokens=12, num_speculative_tokens=2).token_ids == plain


@pytest.mark.parametrize(
    ("files", "asked", "text"),
    [
        ({}, "org/other", "unknown drafter 'org/other': there is no such folder or Hugging Face repository"),
        ({}, "org/my-drafter@v9", "'org/my-drafter' has no revision 'v9'"),
        ({}, REPOSITORY, "is no drafter: config.json is missing"),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, REPOSITORY, "is no drafter: model.safetensors is missing"),
        ({"config.json": b"x" * 5_000_000, "model.safetensors": b""}, REPOSITORY, "larger than 4 MB"),
        ({"config.json": b"{}", "model.safetensors": save({})}, REPOSITORY, "does not describe a specdec drafter"),
    ],
)
def test_what_is_no_drafter_is_one_line(fake: type[FakeHub], files: dict[str, bytes], asked: str, text: str) -> None:
    fake.repositories[REPOSITORY] = files
    with refused(text):
        DrafterSpec.parse(asked).resolved()


def test_a_hub_that_cannot_list_files_is_not_one_without_them(fake, cache, tmp_path, monkeypatch) -> None:
    """Also where the configuration is in the cache."""
    folder, get = save_native(tmp_path / "native"), fake.do_GET
    fake.repositories["some/one"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    loading.load("some/one")

    def busy(self: FakeHub) -> None:
        self.answer({"error": "busy"}, 503) if self.path.startswith("/api/") else get(self)

    monkeypatch.setattr(fake, "do_GET", busy)
    with pytest.raises(SpecDecError, match="cannot list the files of model 'some/one' on Hugging Face; try again"):
        loading.load("some/one:Q4_0")


def test_a_model_that_is_there_asks_the_hub_once(fake: type[FakeHub], cache: Any, tmp_path: Path) -> None:
    folder, file = save_native(tmp_path / "native"), tmp_path / "it-Q4_0.gguf"
    write_gguf(file)
    fake.repositories["some/one"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    fake.repositories["some/files"] = {f"here/{file.name}": file.read_bytes()}
    for name, path in (("some/one", folder), ("some/files:Q4_0", file), (f"some/files:here/{file.name}", file)):
        loading.load(name)
        fake.asked.clear()
        assert identity.fingerprint(loading.load(name)[0]) == identity.fingerprint(loading.load(path)[0])
        assert len(fake.asked) == 1, fake.asked
