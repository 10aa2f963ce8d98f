"""specdec report: one page that needs nothing else and is looked at in a browser; tables and data for the rest."""

import base64
import html
import json
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest
from measured import estimate, result
from typer.testing import CliRunner

from specdec import cli
from specdec.bench.cell import Cell
from specdec.bench.plan import Plan, Resources
from specdec.bench.results import Results, labels
from specdec.bench.store import Store

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
PAGE = import_module("specdec.bench.report").PAGE
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def fill(folder: Path, records: list[dict], missing: tuple[Cell, ...] = (), name: str = "mine <&>") -> Path:
    """The folder of a sweep that has these records."""
    cells = (*(Cell(**record["cell"]) for record in records), *missing)
    store = Store(folder)
    with store.opened(Plan(name, "What it is for.", cells, Resources()), "specdec sweep mine.yaml"):
        for record in records:
            store.append(record)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sweep with everything in it: two axes, a lossy rule, a second baseline, failures, a cell that has not run."""
    records = []
    for depth in (2, 4, 6):
        for continuations in (1, 3):
            how = {"drafter_options": {"continuations": continuations}, "num_speculative_tokens": depth}
            cell = Cell(drafter="prompt-lookup", against=("none", "hf"), **how)
            speed = 1 + depth / 10 + continuations / 5
            records.append(result(cell, speed, speedup={"none": estimate(speed), "hf": estimate(2 * speed)}))
        for threshold in (0.5, 0.9):
            options = {"exit_threshold": threshold}
            cell = Cell(drafter="m2r2", verifier="confident", verifier_options=options, num_speculative_tokens=depth)
            quality = {"agreement": estimate(threshold), "nll": estimate(2 - threshold), "rouge_l": estimate(threshold)}
            records.append(result(cell, 2.5 - threshold, lossless=False, quality=quality))
    broken = Cell(drafter="medusa=no/such/folder <script>alert(1)</script>")
    error = "there is no folder 'no/such/folder'; train one"
    records.append({"key": broken.key(), "cell": broken.as_dict(), "error": error, "seconds": 0.1})
    return fill(tmp_path / "sweep", records, (Cell(drafter="none"),))


def report(folder: Path, *args: str):
    return CliRunner().invoke(cli.app, ["report", str(folder), *args])


class Page(HTMLParser):
    """What a page shows, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.images: list[dict[str, str]] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        self.fetched += [value for key, value in given.items() if key in ("src", "href", "data") and value[0] != "#"]
        if tag == "img":
            self.images.append(given)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize(("device", "name"), [("cpu", "a CPU"), ("cuda:0", "a GPU")])
def test_notes_name_what_ran_and_leave_out_what_is_unknown(device: str, name: str) -> None:
    record = result(Cell(drafter="none"))
    record["environment"] |= {"device": device, "gpu": "a GPU", "commit": None}
    _, ran, versions, *_ = Results("", "", "", [record], 0).notes()
    assert ran.endswith(f" on {device}, 2 threads, {name}")
    assert versions == "specdec 0.1.0, torch 2.9, transformers 5.24, python 3.11, system Linux"


def test_labels_tell_what_ran() -> None:
    def named(*cells: Cell) -> list[str]:
        return labels([cell.as_dict() for cell in cells])

    assert named(Cell(drafter="m2r2", num_speculative_tokens=2)) == ["m2r2@2"]  # also where no other cell differs
    depths = [Cell(drafter="m2r2", num_speculative_tokens=k) for k in (2, 4, "auto")]
    assert named(*depths) == ["m2r2@2", "m2r2@4", "m2r2"]
    lossy = {"verifier": "confident", "verifier_options": {"exit_threshold": 0.8}}
    assert named(Cell(drafter="none"), Cell(drafter="m2r2", **lossy)) == ["none", "m2r2 confident exit_threshold=0.8"]
    joined = Cell(drafter="a+m2r2", drafter_options={"a": {"continuations": 2}}, num_speculative_tokens=3)
    assert named(joined) == ["a+m2r2@3 continuations=2"]
    assert named(*(Cell(drafter="m2r2", max_new_tokens=n) for n in (8, 9))) == ["m2r2 tokens=8", "m2r2 tokens=9"]


def test_the_page_needs_nothing_else_and_says_everything(folder: Path) -> None:
    outcome = report(folder)
    assert outcome.exit_code == 0, outcome.output
    text = (folder / PAGE).read_text()
    page = Page(text)
    assert all(source.startswith("data:image/png;base64,") for source in page.fetched) and "url(" not in text
    assert "script" not in page.tags and "mine &lt;&amp;&gt;" in text  # names are text, whatever is in them
    shown = " ".join(page.texts)
    assert "12 of 14 cells, 1 failed, 1 not run yet" in shown and "What it is for." in shown
    assert "2.20 [1.98–2.42]" in shown and "4 of 4" in shown
    assert "a CPU" in shown and "commit abc" in shown and "sha256 0123456789ab" in shown
    assert "there is no folder 'no/such/folder'; train one" in shown
    assert "specdec sweep mine.yaml" in shown
    assert len(page.images) == 4 and all(image["alt"] for image in page.images)  # two baselines, acceptance, quality
    for image in page.images:
        width, _ = struct.unpack(">II", base64.b64decode(image["src"].partition(",")[2])[16:24])
        assert width >= 900  # two device pixels for each of a telephone's
    assert outcome.stdout.count("\n") == 1 + 13 and "error" in outcome.stdout.splitlines()[0]


def test_a_report_is_also_markdown(folder: Path) -> None:
    text = report(folder, "--format", "markdown").stdout
    head = "# mine <&>\n\nWhat it is for.\n\n- 12 of 14 cells, 1 failed, 1 not run yet\n- smollm2-135m-inst"
    assert text.startswith(head)
    lines = text[text.index("| cell") :].split("\n\n")[0].splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + 13 and "1.40 [1.26–1.54]" in lines[2]
    assert "| x plain (the worst prompt) | all |" in text and "| 1.40 (1.26) |" in text  # more tables follow
    assert not (folder / PAGE).exists()  # nothing is drawn


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "there are no results in"),
        (lambda path: path.mkdir(), "there are no results in"),
        (lambda path: fill(path, [], (Cell(drafter="none"),)), "holds no results yet"),
        (lambda path: (path.mkdir(), (path / "sweep.json").write_text("{}")), "is broken"),
    ],
)
def test_bad_folders_are_one_line(tmp_path: Path, make, words: str) -> None:
    make(tmp_path / "folder")
    outcome = report(tmp_path / "folder")
    (line,) = outcome.stderr.splitlines()
    assert outcome.exit_code == 2 and words in line


def test_a_page_without_matplotlib_is_one_line(folder: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "specdec.bench.report", None)
    outcome = report(folder)
    assert outcome.exit_code == 2 and "pip install -e '.[plot]'" in outcome.stderr
    assert report(folder, "--format", "markdown").exit_code == 0


PROBE = """<script>addEventListener("load", () => {
  const size = (e) => parseFloat(getComputedStyle(e).fontSize);
  const right = (e) => e.getBoundingClientRect().right;
  const inside = (e) => e.closest(".wide, pre, script");  // these scroll by themselves
  const all = [...document.querySelectorAll("body *")].filter((e) => e.offsetParent && !inside(e));
  document.title = JSON.stringify({
    inner: innerWidth, scroll: document.documentElement.scrollWidth,
    images: [...document.images].map((i) => [i.complete && i.naturalWidth, i.getBoundingClientRect().width]),
    smallest: Math.min(...all.filter((e) => e.innerText).map(size)),
    outside: all.filter((e) => right(e) > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80)),
    sections: [...document.querySelectorAll("section h2")].map((e) => e.innerText)})})</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_in_a_browser(folder: Path, tmp_path: Path, width: int) -> None:
    """It fits the width, its text can be read, and its pictures are there."""
    report(folder)
    probed = tmp_path / "probed.html"
    probed.write_text((folder / PAGE).read_text().replace("</body>", PROBE + "</body>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [str(CHROMIUM), *flags.split(), "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2600", "--virtual-time-budget=5000"]
    command += ["--dump-dom", probed.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    (title,) = re.findall(r"<title>(.*?)</title>", shown, re.S)
    seen = json.loads(html.unescape(title))
    assert seen["inner"] == width and seen["scroll"] <= width and not seen["outside"], seen
    assert seen["smallest"] >= 12 and {"Acceptance by position", "All cells", "Command"} <= set(seen["sections"])
    assert seen["images"] and all(natural > 800 and 250 < shown < width for natural, shown in seen["images"])
