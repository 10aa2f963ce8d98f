"""GGUF files in several parts, of tiny files that the tests write and split."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
from fake_hub import FakeHub
from refusals import refused
from tiny_gguf import finish, split_gguf, write_gguf, write_model
from typer.testing import CliRunner

from specdec import SpecDecError, SpecDecoder
from specdec.cli import app
from specdec.models import identity, loading, source
from specdec.models.cached import cached_models, remove
from specdec.models.gguf.file import read_header
from specdec.models.names import check_model
from specdec.runtimes.native import library


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """The parts of tiny.gguf, which is beside their folder."""
    write_model(tmp_path / "tiny.gguf", "llama", "Q4_0", 128)
    (tmp_path / "parts").mkdir()
    path = Path(shutil.copy(tmp_path / "tiny.gguf", tmp_path / "parts"))
    found = split_gguf(path, [5, 9, len(read_header(path).tensors) - 14])
    path.unlink()
    return found


def test_a_file_that_llama_cpp_has_merged_is_one_file(tmp_path: Path) -> None:
    write_model(tmp_path / "tiny.gguf", "llama", "Q4_0", 128)
    found = read_header(tmp_path / "tiny.gguf")
    reader, writer = gguf.GGUFReader(tmp_path / "tiny.gguf"), gguf.GGUFWriter(tmp_path / "merged.gguf", "llama")
    for key, part in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, part.contents(), part.types[0], part.types[-1] if len(part.types) > 1 else None)
    writer.add_uint16("split.count", 0)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)
    assert text(tmp_path / "merged.gguf") == text(tmp_path / "tiny.gguf")
    assert read_header(tmp_path / "merged.gguf").tensors.keys() == found.tensors.keys()


def text(model: Any) -> list[int]:
    decoder = SpecDecoder.from_pretrained(model, "none", device="cpu")
    return decoder.generate([3, 5, 7], max_new_tokens=12, ignore_eos=True).token_ids


def test_any_part_and_the_folder_are_the_unsplit_file(cache: SimpleNamespace, parts: list[Path], tmp_path) -> None:
    whole = loading.load(tmp_path / "tiny.gguf")[0]
    wanted = text(tmp_path / "tiny.gguf")
    for given in (*parts, parts[0].parent):
        assert identity.fingerprint(loading.load(given)[0]) == identity.fingerprint(whole)
        assert text(given) == wanted
    assert len(list((cache.root / "models").iterdir())) == 2  # all parts have one entry


@pytest.mark.parametrize("numbers", ["00000-of-00000", "00000-of-00003", "00004-of-00003"])
def test_a_name_that_no_part_has_is_refused(cache: SimpleNamespace, parts: list[Path], numbers: str) -> None:
    path = parts[0].rename(parts[0].with_name(f"X-{numbers}.gguf"))
    with pytest.raises(SpecDecError, match="and there is no such part; rename it"):
        SpecDecoder.from_pretrained(path)


def test_packed_weights_are_those_of_all_parts(cache: SimpleNamespace, parts: list[Path], tmp_path: Path) -> None:
    library.load()  # or skips
    wanted = text(tmp_path / "tiny.gguf")
    assert text(parts[1]) == wanted
    (packed,) = (path for path in (cache.root / "models").glob("*/weights.packed") if "00001-of" in str(path))
    before = packed.stat().st_mtime_ns
    assert text(parts[2]) == wanted and packed.stat().st_mtime_ns == before
    os.utime(parts[2])  # one part has changed
    assert text(parts[0]) == wanted and packed.stat().st_mtime_ns != before


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_part_is_named(cache: SimpleNamespace, parts: list[Path], number: int) -> None:
    parts[number].unlink()
    for given in (parts[number - 1], parts[0].parent):
        with refused(rf"part {number + 1} of 3 is missing \('{parts[number]}'\)"):
            loading.load(given)


def test_parts_that_do_not_belong_together_are_refused(cache: SimpleNamespace, parts: list[Path], tmp_path) -> None:
    kept = parts[1].read_bytes()
    shutil.copy(parts[2], parts[1])
    with pytest.raises(SpecDecError, match=r"'tiny-00002-of-00003.gguf' says that it is part 2 of 3, counted from 0"):
        loading.load(parts[0])
    parts[1].write_bytes(kept.replace(b"blk.0.", b"blk.1.", 1))
    with pytest.raises(SpecDecError, match=r"tensor 'blk\.1\.\S+' is (in two parts|there twice)"):
        loading.load(parts[0])
    parts[1].write_bytes(kept[:-64])
    with pytest.raises(SpecDecError, match=r"'.*00002-of-00003.gguf': the GGUF file is truncated or broken"):
        loading.load(parts[0])
    parts[1].write_bytes(kept)
    with pytest.raises(SpecDecError, match="one of the 3 parts of a split GGUF file, and its name does not say which"):
        loading.load(shutil.copy(parts[0], tmp_path / "renamed.gguf"))


def test_a_folder_of_several_models_names_them(tmp_path: Path, parts: list[Path]) -> None:
    check_model(str(parts[0].parent))
    write_gguf(parts[0].parent / "other.gguf")
    with pytest.raises(SpecDecError, match=r"holds 2 GGUF models; give one of them: .*other.gguf, .*00001-of-00003"):
        check_model(str(parts[0].parent))


REPOSITORY = "org/tiny-GGUF"


@pytest.fixture
def repository(fake: type[FakeHub], parts: list[Path], tmp_path: Path) -> type[FakeHub]:
    files = {f"tiny-Q4_0{path.name.removeprefix('tiny')}": path.read_bytes() for path in parts}
    files |= {"tiny-Q8_0.gguf": b"GGUF", "UD-tiny-Q8_0.gguf": b"GGUF", "README.md": b"text"}
    fake.repositories[REPOSITORY] = files
    return fake


@pytest.mark.parametrize("member", ["tiny-Q4_0-00002-of-00003.gguf", "tiny-Q4_0", "q4_0", "Tiny-Q4_0"])
def test_all_parts_of_a_repositorys_file_are_downloaded(cache, repository, tmp_path, member) -> None:
    assert text(f"{REPOSITORY}:{member}") == text(tmp_path / "tiny.gguf")
    assert set(repository.fetched) == {f"tiny-Q4_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)}
    fetched = len(repository.fetched)
    text(f"{REPOSITORY}:{member}")
    assert len([name for name in repository.fetched[fetched:] if name.endswith(".gguf")]) == 0


def test_a_companion_file_is_no_file_of_the_model() -> None:
    files = ["X-Q4_0.gguf", "mtp-X-Q4_0.gguf", "MTP/mtp-X-Q8_0.gguf"]
    assert source._named(REPOSITORY, "Q4_0", files) == files[0]
    assert source._named(REPOSITORY, "mtp-x-q4_0", files) == files[1]
    with pytest.raises(SpecDecError, match=r"it has X-Q4_0\.gguf$"):
        source._named(REPOSITORY, "Q8_0", files)


def test_it_is_pulled_and_removed_with_all_parts(cache: SimpleNamespace, repository: type[FakeHub]) -> None:
    done = CliRunner().invoke(app, ["models", "pull", f"{REPOSITORY}:Q4_0"])
    assert done.exit_code == 0, done.output
    (model,) = cached_models()
    assert model.name == f"{REPOSITORY}:tiny-Q4_0-00001-of-00003.gguf"
    sizes = [len(data) for name, data in repository.repositories[REPOSITORY].items() if "-of-" in name]
    size = model.bytes
    assert size > sum(sizes) and remove(model.name) == size and not cached_models()


def test_a_name_that_fits_several_files_or_none_is_one_line(cache: SimpleNamespace, repository: type[FakeHub]) -> None:
    with pytest.raises(SpecDecError, match=r"has several GGUF files 'Q8_0'; give one of them: UD-tiny-Q8_0.gguf, tiny"):
        loading.load(f"{REPOSITORY}:Q8_0")
    with pytest.raises(SpecDecError, match=r"has no GGUF file 'Q2_K' on Hugging Face; it has .*00001-of-00003.gguf"):
        loading.load(f"{REPOSITORY}:Q2_K")
    with pytest.raises(SpecDecError, match="unknown model 'org/none'"):
        loading.load("org/none:Q4_0")
    del repository.repositories[REPOSITORY]["tiny-Q4_0-00002-of-00003.gguf"]
    with pytest.raises(SpecDecError, match="part 2 of 3 is missing"):
        loading.load(f"{REPOSITORY}:Q4_0")
