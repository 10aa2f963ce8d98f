"""What README and docs print is true: commands parse, examples run, links lead somewhere, pages are short."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from conftest import tiny_model

import specdec
from specdec import SpecDecoder, cli
from specdec.models import catalogue
from specdec.speculation import registry

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("drafters/**/README.md"))]
PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]


def words(path: Path) -> int:
    return len(re.findall(r"\w[\w'.-]*", path.read_text("utf-8")))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(path: Path) -> Iterator[list[str]]:
    """The arguments of each ``specdec ...`` in the page's shell blocks."""
    for line in "".join(blocks(path, "bash")).replace("\\\n", " ").splitlines():
        parts = shlex.shlex(line, posix=True, punctuation_chars="|;&")
        parts.whitespace_split = True
        arguments: list[str] | None = None
        before = ""
        for part in [*parts, ";"]:
            if set(part) <= set("|;&"):
                if arguments is not None:
                    yield arguments
                arguments = None
            elif arguments is not None:
                arguments.append(part)
            elif part == "specdec" and not before.startswith("--"):
                arguments = []
            before = part


def test_the_readme_has_at_most_900_words() -> None:
    assert words(ROOT / "README.md") <= 900


@pytest.mark.parametrize("page", [*ROOT.glob("docs/*.md")], ids=lambda p: p.stem)
def test_how_to_pages_have_at_most_1200_words(page: Path) -> None:
    assert words(page) <= 1200


def test_the_glossary_has_at_most_thirty_terms_in_order() -> None:
    terms = re.findall(r"^\*\*(.+)\*\*$", (ROOT / "docs/glossary.md").read_text("utf-8"), re.MULTILINE)
    assert 0 < len(terms) <= 30 and terms == sorted(terms, key=str.lower)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_have_the_options_that_pages_print(page: Path) -> None:
    for arguments in commands(page):
        command: Any = typer.main.get_command(cli.app)
        while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
            assert arguments[0] in command.commands, f"there is no command {arguments[0]}"
            command, arguments = command.commands[arguments[0]], arguments[1:]
        known = {"--help", "-h"} | {name for parameter in command.params for name in parameter.opts}
        given = {part.partition("=")[0] for part in arguments if part.startswith("--")}
        assert given <= known, f"{command.name} has no {', '.join(given - known)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert (page.parent / link).exists(), link


def example(name: str) -> Any:
    """The class of that name in docs/extend.md."""
    [code] = [block for block in blocks(ROOT / "docs/extend.md", "python") if f"class {name}" in block]
    namespace: dict[str, Any] = {}
    exec(compile(code, f"<{name} in docs/extend.md>", "exec"), namespace)
    return namespace[name]


def test_the_drafter_of_the_docs_drafts_and_changes_nothing() -> None:
    model = tiny_model("llama")
    drafter = example("BigramDrafter").load(None)
    ours = SpecDecoder(model, drafter=drafter).generate(
        PROMPT, max_new_tokens=24, num_speculative_tokens=3, ignore_eos=True
    )
    plain = SpecDecoder(model, drafter="none").generate(PROMPT, max_new_tokens=24, ignore_eos=True)
    assert ours.token_ids == plain.token_ids and ours.metrics.num_draft_tokens > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_verifier_of_the_docs_accepts(temperature: float) -> None:
    rule, bigrams = example("LikelyVerifier")(least=0.0), example("BigramDrafter").load(None)
    every_token = list(range(97))  # so that a bigram begins with whatever is sampled
    out = SpecDecoder(tiny_model("llama"), drafter=bigrams, verifier=rule).generate(
        every_token, max_new_tokens=12, num_speculative_tokens=3, temperature=temperature, ignore_eos=True
    )
    assert len(out.token_ids) == 12 and out.metrics.num_draft_tokens > 0
    if temperature:  # every drafted token is likely enough
        assert out.metrics.draft_acceptance_rate > 0.7


def test_every_shipped_drafter_has_a_model_card() -> None:
    shipped = list(ROOT.glob("drafters/pretrained/*/*/config.json"))
    assert shipped
    package = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    for config in shipped:
        method, model = config.parent.parts[-2:]
        assert method in registry.DRAFTERS and model in catalogue.EMBEDDED
        for file in config.parent.iterdir():
            place = file.relative_to(ROOT / "drafters").as_posix()
            assert any(fnmatch(place, pattern) for pattern in package["specdec.drafters"]), place
        card = config.with_name("README.md").read_text("utf-8")
        assert "licence" in card and "## Data" in card and "specdec train" in card


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == specdec.__version__
