"""What works with each family of models: what the table in docs/models.md says, found on a tiny model of it."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import torch
from learners import learn_soon, read
from passes import IN_BLOCKS
from rich.console import Console
from tiny import greedy_reference, rough_model, save_granite4, save_model, save_native, tiny_model
from tiny_gguf import ARCHITECTURES, TYPES, file_sizes, write_family
from training import Tokens
from transformers import PreTrainedModel

from specdec import SpecDecoder
from specdec.base.errors import SpecDecError
from specdec.drafters.m2r2.replay import Text
from specdec.models import families, loading
from specdec.runtimes.native import library
from specdec.runtimes.select import make_target
from specdec.train.m2r2 import M2R2Settings
from specdec.train.settings import load_settings
from specdec.train.trainer import train

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text("utf-8")
DENSE = "granitemoehybrid"  # of which dense models are read as another family
OTHER_FILES = {DENSE: "granite", "mistral": "llama"}  # families whose files have the architecture of another
NAME = "tiny"  # of the model to train for
PROMPT, COUNT = [5, 6, 7, 8, 5, 6, 7, 8, 5, 6], 10


@functools.cache
def table() -> dict[str, dict[str, str]]:
    """Return the cells of the table by family and heading."""
    lines = re.search(r"^\| family .*?\n\n", PAGE, re.M | re.S)[0].splitlines()  # type: ignore[index]
    headings, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found = dict[str, dict[str, str]]()
    for names, *cells in rows:
        for name in re.findall(r"`(\w+)`(?! files)", re.sub(r"\(.*?\)", "", names)):
            assert name not in found
            found[name] = dict(zip(headings[1:], cells, strict=True))
    return found


def test_every_family_has_a_row_that_names_its_files_and_its_tests() -> None:
    """From the lists that the tests named there run through."""
    rows = table()
    assert rows.keys() == families.FAMILIES.keys() | tiny.FAMILIES.keys() | tiny.HYBRIDS.keys()
    lists = {"native": families.FAMILIES, "blocks": [row[0] for row in IN_BLOCKS], "files": ARCHITECTURES}
    for family, cells in rows.items():
        assert cells["further tests"] == ", ".join(["generate", *(name for name in lists if family in lists[name])])
        file = ARCHITECTURES.get(family, [family])[0]
        assert file == family or f"`{family}` (`{file}`)" in PAGE
    assert f"all types of blocks: {', '.join(TYPES)}." in " ".join(PAGE.split())


@functools.cache
def model_of(family: str) -> PreTrainedModel:
    return tiny_model(family, eos_token_id=None)


@functools.cache
def plain(family: str) -> list[int]:
    """Return the greedy tokens after ``PROMPT`` of the family's tiny model."""
    return SpecDecoder(model_of(family), None, "none").generate(PROMPT, max_new_tokens=COUNT).token_ids


def drafts(family: str, decoder: SpecDecoder) -> None:
    """Check that tokens are drafted, and the text is that without drafts."""
    out = decoder.generate(PROMPT, max_new_tokens=COUNT, num_speculative_tokens=3)
    assert out.token_ids == plain(family) and out.metrics.num_draft_tokens > 0


def loads(family: str, folder: Path) -> None:
    model = loading.load(save_model(folder, family))[0]
    decoder = SpecDecoder(model, None, "none")
    out = decoder.generate(PROMPT, max_new_tokens=3)
    assert out.token_ids == greedy_reference(model, PROMPT, 3)


def runs_natively(family: str, folder: Path) -> None:
    model = model_of(family)
    if family == DENSE:
        model = loading.load(save_granite4(folder))[0]
    elif family in families.FAMILIES:
        model = loading.load(save_native(folder, family))[0]
    make_target(model, "native")


def drafts_early(family: str, folder: Path) -> None:
    drafts(family, SpecDecoder(model_of(family), None, "early-exit"))


def trains(family: str, folder: Path) -> None:
    """With the preset of ``specdec train m2r2``."""
    answers = [{"prompt_ids": [n, *PROMPT], "response_ids": plain(family)} for n in range(3, 11)]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    place = {"model": NAME, "prompts": [str(folder / "answers.jsonl")], "output": str(folder / "out")}
    small = {"minutes": None, "steps": 2, "rows": 2, "window": 4, "rank": 2, "eval_fraction": 0.5, "dtype": "float32"}
    train(load_settings(M2R2Settings, "m2r2", "m2r2", place | small), console=Console(quiet=True))
    drafts(family, SpecDecoder(model_of(family), None, str(folder / "out")))


def teaches_itself(family: str, folder: Path) -> None:
    decoder = SpecDecoder(model_of(family), None, "m2r2")
    learner: Any = decoder.drafter.learner
    read(learner, [Text([n, *PROMPT[1:4], *plain(family)], 4) for n in range(3, 11)])
    assert learner.version > 0
    drafts(family, decoder)


def reads_gguf(family: str, folder: Path) -> None:
    file, kind = folder / "it.gguf", OTHER_FILES.get(family, family)
    if kind in ARCHITECTURES:
        model = rough_model("granite" if family == DENSE else family, **file_sizes(kind))
        model.config.model_type = kind
        write_family(file, model)
    else:
        writer = gguf.GGUFWriter(file, family)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    assert loading.load(file)[0].config.model_type == kind


CELLS: dict[str, Callable[[str, Path], None]] = {
    "loads": loads,
    "native": runs_natively,
    "drafts": drafts_early,
    "trains": trains,
    "teaches itself": teaches_itself,
    "GGUF": reads_gguf,
}


@pytest.mark.parametrize("family", [*dict.fromkeys([*tiny.FAMILIES, *tiny.HYBRIDS])])
def test_the_table_says_what_works(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something does not work, the message has the words of the table."""
    learn_soon(monkeypatch, tmp_path)
    monkeypatch.setattr(loading, "load", functools.partial(load, family, loading.load))
    torch.manual_seed(0)
    for heading, check in CELLS.items():
        if heading == "native" and not library.runs():
            continue
        folder = tmp_path / heading.replace(" ", "-")
        folder.mkdir()
        yes, _, reason = table()[family][heading].partition(": ")
        if yes == "yes":
            check(family, folder)
            continue
        assert yes == "no", f"{heading} of {family}: {yes}"
        with pytest.raises(SpecDecError, match=reason):
            check(family, folder)


def load(family: str, own: Any, name: object, **options: Any) -> Any:
    """Return what ``own`` loads; for training, the tiny model of ``family``."""
    return (model_of(family), Tokens()) if name == NAME else own(name, **options)
