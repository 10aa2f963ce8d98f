"""What README and docs print is true: links lead somewhere, lists are whole, pages are short."""

import ast
import html
import inspect
import re
import runpy
import shlex
import tomllib
from dataclasses import MISSING, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pages import ROOT, blocks
from tiny import tiny_model

import specdec
from specdec import SpecDecoder
from specdec.cli import app
from specdec.models import catalogue
from specdec.runtimes.target import Target
from specdec.speculation import registry
from specdec.speculation.drafter import Drafter, Traits
from specdec.speculation.verifier import Verifier

PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("drafters/**/README.md"))]
WRITTEN = ROOT / ".ci/reference.py"  # writes two pages from the code
GENERATED = {"cli.md", "api.md"}
PROSE = [page for page in ROOT.glob("docs/*.md") if page.name not in GENERATED]


def words(path: Path) -> int:
    """Words of the text. Code is read by other rules."""
    return len(re.findall(r"\w[\w'.-]*", re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S)))


def test_pages_are_short() -> None:
    """The readme with its code, each page that tells how to do something, and the lab."""
    assert len(re.findall(r"\w[\w'.-]*", (ROOT / "README.md").read_text("utf-8"))) <= 900
    assert not [page.name for page in PROSE if words(page) > 1400]
    assert sum(map(words, ROOT.glob("docs/lab/*.md"))) <= 7000


def test_the_glossary_has_at_most_thirty_terms_in_order() -> None:
    terms = re.findall(r"^\*\*(.+)\*\*$", (ROOT / "docs/glossary.md").read_text("utf-8"), re.MULTILINE)
    assert 0 < len(terms) <= 30 and terms == sorted(terms, key=str.lower)


def anchors(text: str) -> set[str]:
    """What links may point to in a page: its headings as slugs, those of the site and of GitHub alike."""
    return {
        re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())
        for heading in re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.MULTILINE)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for link, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text("utf-8")), f"{link}#{anchor}"


def test_links_to_sources_name_what_is_there() -> None:
    texts = [page.read_text("utf-8") for page in PAGES]
    found = [each for text in texts for each in re.findall(r"\[`(\w+)`\]\(\.\./([\w/]+\.py)\)", text)]
    assert ("decode", "specdec/reference.py") in found
    for name, file in found:
        assert re.search(rf"^ *(def|class) {name}\b", (ROOT / file).read_text("utf-8"), re.M), f"{name} in {file}"


@pytest.mark.parametrize("page", [*ROOT.glob("docs/*.md")], ids=lambda p: p.stem)
def test_pages_beside_the_lab_hold_no_tables_of_measurements(page: Path) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", page.read_text("utf-8"), re.MULTILINE):
        measured = re.findall(r"\| *\d+\.\d+(?: x| ms| GB)? *(?=\|)", table)
        assert len(measured) < 3, table


def test_the_page_on_installation_lists_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    listed = re.findall(r"^\| `([\w-]+)` \| [^|]+ \|$", (ROOT / "docs/install.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(extras)


def test_nothing_tells_to_install_our_name_from_an_index() -> None:
    """It is not ours there: whoever claims it would be installed."""
    folders = ("specdec", "drafters", "verifiers", "benchmarks", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    for path in [*files, *ROOT.glob("*.md")]:
        assert not re.search(r"pip install (?:-\S+ )*['\"]?specdec\b", path.read_text("utf-8")), path
        assert "pypi.org/project/specdec" not in path.read_text("utf-8"), path


def test_the_page_on_configuration_lists_every_variable() -> None:
    sources = [path for folder in ("specdec", "drafters") for path in ROOT.glob(f"{folder}/**/*.py")]
    read = {name for path in sources for name in re.findall(r'"(SPECDEC_[A-Z_]+)"', path.read_text("utf-8"))}
    page = (ROOT / "docs/configuration.md").read_text("utf-8")
    assert read == set(re.findall(r"^\| `(SPECDEC_[A-Z_]+)`", page, re.MULTILINE))


def test_the_page_on_configuration_lists_every_instruction_set() -> None:
    """Those of both processors, whichever runs the test."""
    source = (ROOT / "specdec/runtimes/native/library.py").read_text("utf-8")
    [line] = re.findall(r"^LEVELS = (.+)$", source, re.M)
    [told] = re.findall(r"^\| `SPECDEC_NATIVE` \| (.+) \|$", (ROOT / "docs/configuration.md").read_text("utf-8"), re.M)
    assert set(re.findall(r'"(\w+)"', line)) - {"aarch64", "arm64"} == set(re.findall(r"`(\w+)`", told))


def test_the_page_on_installation_lists_every_embedded_model() -> None:
    page = (ROOT / "docs/install.md").read_text("utf-8")
    listed = re.findall(r"^\| `([\w.-]+)` \| [^|]+ \| [\d.]+ [MG]B \|$", page, re.M)
    assert listed == list(catalogue.EMBEDDED)


def test_the_page_on_extending_names_what_a_runtime_must_have() -> None:
    table = (ROOT / "docs/extend.md").read_text("utf-8").partition("| what must be given |")[2].partition("\n\n")[0]
    named = re.findall(r"^\| `(\w+)\(", table, re.MULTILINE)
    assert sorted(named) == sorted(Target.__abstractmethods__)


@pytest.mark.parametrize(("kind", "title"), [(Drafter, "drafter"), (Verifier, "verifier"), (Target, "runtime")])
def test_the_page_on_extending_lists_what_a_plug_in_may_have(
    kind: type[Drafter | Verifier | Target], title: str
) -> None:
    """Each method with its arguments, each attribute, and each field of ``Traits`` with its default."""
    page = (ROOT / "docs/extend.md").read_text("utf-8")
    section = page.partition(f"\n## A {title}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \|(?: [^|]* \| (?:`(.*)`)? ?\|$)?", section, re.M)
    found = {each for row, _ in rows for each in re.findall(r"`([^`]+)`", row)}
    methods, others = set(), {*kind.__annotations__}
    for name, value in vars(kind).items():
        if isinstance(value, property):
            others.add(name)
        elif not name.startswith("_") and callable(getattr(kind, name)):
            arguments = inspect.signature(getattr(kind, name)).parameters.values()
            names = [str(each).partition(":")[0] for each in arguments if each.name != "self"]
            methods.add(f"{name}({', '.join(names)})")
    assert kind is not Drafter or len(methods) <= 9
    traits = {each.name: each.default for each in fields(Traits)} if kind is Drafter else {}
    assert found == methods | others | {*traits}
    given = {row.strip("`"): default for row, default in rows if row.strip("`") in traits}
    assert given == {name: "" if each is MISSING else repr(each).replace("''", '""') for name, each in traits.items()}


def test_the_picture_of_a_terminal_shows_the_command_beside_it() -> None:
    drawn = "".join(html.unescape(re.sub("<[^>]+>", "", (ROOT / "docs/generate.svg").read_text("utf-8"))).split())
    for page in ("README.md", "docs/index.md"):
        shown = re.findall(r"^specdec generate .*qwen.*--compare$", (ROOT / page).read_text("utf-8"), re.M)
        assert [shlex.join(shlex.split(line)).replace(" ", "") in drawn for line in shown] == [True], page


def test_every_public_name_exists_and_is_documented() -> None:
    documented = set(re.findall(r"^### (\w+)$", (ROOT / "docs/api.md").read_text("utf-8"), re.MULTILINE))
    assert documented == set(specdec.__all__)
    for name in specdec.__all__:
        assert getattr(specdec, name).__name__ == name
    everything: dict[str, Any] = {}
    exec("from specdec import *", everything)
    assert documented <= everything.keys()


@pytest.mark.parametrize("page", sorted(GENERATED))
def test_the_reference_is_that_of_the_code(page: str) -> None:
    """If it is not: python .ci/reference.py."""
    written = runpy.run_path(str(WRITTEN))["PAGES"][page]()
    assert (ROOT / "docs" / page).read_text("utf-8") == written.rstrip() + "\n"


def test_the_reference_has_every_command_and_option() -> None:
    text = (ROOT / "docs/cli.md").read_text("utf-8")
    for path, command in runpy.run_path(str(WRITTEN))["commands"]("specdec", typer.main.get_command(app)):
        assert f"## {path}\n" in text
        for option in [name for each in command.params if not getattr(each, "hidden", False) for name in each.opts]:
            assert not option.startswith("-") or option in text, option


def example(name: str) -> Any:
    """The class of that name in docs/extend.md."""
    [code] = [block.text for block in blocks(ROOT / "docs/extend.md") if f"class {name}" in block.text]
    namespace: dict[str, Any] = {}
    exec(compile(code, f"<{name} in docs/extend.md>", "exec"), namespace)
    return namespace[name]


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


STOP = re.compile(r"\[`([^`]+\.py)`\]\(\.\./([^)]+)\)|`([A-Za-z_.]+)`")


def test_the_walk_of_a_prompt_enters_nine_files_and_its_functions_are_there() -> None:
    """Each name in backticks after a link is defined in the file of the link, a method in its class."""
    page, file, names, missing = ROOT / "docs/one-prompt.md", "", dict[str, set[str]](), list[str]()
    walk = page.read_text("utf-8").partition("\n## ")[2]
    for shown, link, name in STOP.findall(walk):
        if link:
            assert shown == link
            file, tree = link, ast.parse((ROOT / link).read_text("utf-8"))
            tops = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
            inner = {
                f"{top.name}.{each.name}" for top in tops for each in top.body if isinstance(each, ast.FunctionDef)
            }
            names[file] = {top.name for top in tops} | inner
        elif "." in name or name in ("encode", "score"):
            missing += [name] if name not in names[file] else []
    assert not missing and len(names) <= 9 and len(STOP.findall(walk)) > 20
    assert words(page) <= 600
