"""Where the native kernels are not built, one notice says so, if the CPU could run them; the other runtimes serve."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from refusals import refused
from targets import needs_native
from tiny import tiny_model

from specdec.base.errors import SpecDecError
from specdec.runtimes.native import library
from specdec.runtimes.select import make_target
from specdec.speculation import library as of_speculation

FLAGS = "flags : fpu fma f16c avx2 avx512f\n"


@pytest.fixture
def missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "_native.so")
    cached = library.load, library._notice, library.runs
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@needs_native
@pytest.mark.parametrize("name", ["LinearPart", "TreeDraft"])
def test_a_library_of_other_structures_is_refused(name: str, missing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "LIBRARY", Path(library.__file__).with_name("_native.so"))
    longer = type("Longer", (getattr(library, name),), {"_fields_": (("more", library.LONG),)})
    monkeypatch.setattr(library, name, longer)
    with pytest.raises(SpecDecError, match="built from older sources"):
        library.load()
    monkeypatch.undo()
    library.load.cache_clear()
    assert library.load().level


@pytest.mark.parametrize("able", [True, False])
def test_missing_kernels_give_one_notice_where_they_could_run(missing: None, able: bool, monkeypatch, caplog) -> None:
    monkeypatch.setattr(library, "could_run", lambda: able)
    for _ in range(2):
        with pytest.raises(SpecDecError, match="kernels are not built"):
            library.load()
        assert not library.runs()
    model = tiny_model("llama", hidden_size=64, intermediate_size=96, head_dim=32).bfloat16()
    assert make_target(model)[0].runtime == "torch"
    assert [r.message.partition(",")[0] for r in caplog.records] == ["The native kernels are not built"] * able


def test_what_this_cpu_can_run_is_read_from_its_flags(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    assert not library.could_run(info)
    info.write_text(FLAGS)
    assert library.could_run(info)
    info.write_text(FLAGS.replace(" f16c", ""))
    assert not library.could_run(info)
    info.write_text("Features : fp asimd asimdhp asimddp\n")
    assert library.could_run(info)
    info.write_text("Features : fp asimd asimdhp\n")
    assert not library.could_run(info)


def test_an_empty_variable_sets_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.LEVEL, "")
    assert library._most() == len(library.LEVELS) - 1


def test_an_unknown_instruction_set_is_an_error(missing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where another runtime would do."""
    monkeypatch.setenv(library.LEVEL, "sse2")
    model = tiny_model("llama").bfloat16()
    for function in (library.load, library.runs, lambda: make_target(model)):
        with refused(f"SPECDEC_NATIVE='sse2' is unknown; it is {library.LEVELS[1]}.* or {library.LEVELS[-1]}"):
            function()


@pytest.mark.parametrize("built", [library.LIBRARY, of_speculation.LIBRARY], ids=lambda path: path.stem)
def test_a_library_is_not_older_than_its_sources(built: Path) -> None:
    """A build that fails leaves the old one where it is, and pip does not say so: libraries are optional."""
    if not built.exists():
        pytest.skip("there are no native kernels here")
    sources = [path for end in "ch" for path in built.parent.rglob(f"*.{end}")]
    late = [path.name for path in sources if path.stat().st_mtime > built.stat().st_mtime]
    assert not late, f"{built.name} is older than {late[0]}; build it: python setup.py build_ext --inplace"
