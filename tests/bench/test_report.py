"""specdec report: one page that needs nothing else and is looked at in a browser; tables and data for the rest."""

import base64
import csv
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest
from measured import estimate, method, result
from typer.testing import CliRunner

from specdec import cli
from specdec.bench.cell import Cell, axes
from specdec.bench.plan import Plan, Resources
from specdec.bench.results import Results, acceptance, labels, load_results
from specdec.bench.store import Store

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
matplotlib = import_module("matplotlib")
PAGE, STYLE, draw_all, varying = (
    getattr(import_module("specdec.bench.report"), name) for name in ("PAGE", "STYLE", "draw_all", "varying")
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def fill(folder: Path, records: list[dict], missing: tuple[Cell, ...] = (), name: str = "mine <&>") -> Path:
    """The folder of a sweep that has these records."""
    cells = (*(Cell(**record["cell"]) for record in records), *missing)
    store = Store(folder)
    plan = Plan(name, "What it is for.", cells, Resources(), "model: [a, b]\n")
    chat = {"id": "q1", "category": "writing", "turns": ["Why is it so?"]}
    with store.opened(plan, "specdec sweep mine.yaml", prompts={"own": [chat]}):
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


def test_quality_joins_only_cells_of_the_same_settings(tmp_path: Path) -> None:
    records = []
    for model in ("a", "b"):
        for temperature in (0.0, 0.7):
            for threshold in (0.5, 0.9):
                quality = {key: estimate(threshold) for key in ("agreement", "nll", "rouge_l")}
                options = {"exit_threshold": threshold}
                how = {"drafter": "m2r2", "verifier": "confident", "verifier_options": options}
                cell = Cell(model=model, temperature=temperature, **how)
                records.append(result(cell, 2.5 - threshold, lossless=False, quality=quality))
    with matplotlib.rc_context(STYLE):
        (picture,) = draw_all(Results("", "", [], records))["Quality against speed"]
    lines = picture.figure.axes[0].containers
    assert [len(line.lines[0].get_xdata()) for line in lines] == [2] * 4
    assert {line.get_label() for line in lines} == {f"m2r2 confident model={m} T={t}" for m in "ab" for t in (0.0, 0.7)}


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
    _, ran, versions, *_ = Results("", "", [""], [record], 0).notes()
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
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.fetched) and "url(" not in text
    assert "script" not in page.tags and "mine &lt;&amp;&gt;" in text  # names are text, whatever is in them
    shown = " ".join(page.texts)
    assert "12 of 14 cells, 1 failed, 1 not run yet" in shown and "What it is for." in shown
    assert "2.20 [1.98–2.42]" in shown and "4 of 4" in shown
    assert "a CPU" in shown and "commit abc" in shown and "sha256 0123456789ab" in shown
    assert "there is no folder 'no/such/folder'; train one" in shown
    assert "specdec sweep mine.yaml" in shown and "model: [a, b]" in shown and "load average" in shown
    assert "Why is it so?" in shown and "q1 (writing)" in shown and "31.0 (1.03 x)" in shown  # prompts, costs of passes
    assert len(page.images) == 4 and all(image["alt"] for image in page.images)  # speed, lengths, acceptance, quality
    assert all(b"<svg" in base64.b64decode(image["src"].partition(",")[2])[:400] for image in page.images)
    assert outcome.stdout.count("\n") == 1 + 13 and "error" in outcome.stdout.splitlines()[0]


def test_acceptance_ends_where_few_drafts_reach() -> None:
    figures = result(Cell(drafter="m2r2", num_speculative_tokens=6))["method"]
    assert figures["drafts_per_position"] == [100, 70, 49, 34, 24, 17]
    assert [count for _, count in acceptance(figures)] == [100, 70, 49, 34]
    (table,) = [
        t
        for t in Results("", "", [], [result(Cell(drafter="m2r2", num_speculative_tokens=6))]).tables()
        if t.title == "Acceptance by position"
    ]
    assert table.header[1:] == ["1", "2", "3", "4"] and table.rows[0][2] == "0.56 of 70"


def test_tables_and_charts_are_files_on_request(folder: Path) -> None:
    latex = report(folder, "--format", "latex").stdout
    assert latex.count("\\begin{tabular}") == latex.count("\\bottomrule") == 6 and "68\\% &" in latex
    assert "\\_length" not in latex and "lt;script" not in latex and "no/such/folder" in latex
    assert report(folder, "--format", "csv").exit_code == 0
    with (folder / "all-cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13 and rows[0]["x plain"] == "1.40 [1.26–1.54]"
    assert report(folder, "--format", "svg").exit_code == 0
    charts = sorted(path.name for path in folder.glob("*.svg"))
    assert charts == [
        "1-speed.svg",
        "2-speed-by-draft-length.svg",
        "3-acceptance-by-position.svg",
        "4-quality-against-speed.svg",
    ]
    before = (folder / "1-speed.svg").read_bytes()
    report(folder, "--format", "svg")
    assert (folder / "1-speed.svg").read_bytes() == before


def test_each_setting_that_differs_is_a_column_and_the_fastest_is_first(folder: Path) -> None:
    cells = [axes(record["cell"]) for record in load_results(folder).done]
    assert varying(cells)[:3] == ["drafter", "num_speculative_tokens", "drafter.prompt-lookup.continuations"]
    assert "model" not in varying(cells) and "verifier.confident.exit_threshold" in varying(cells)
    with matplotlib.rc_context(STYLE):
        (speed,) = draw_all(load_results(folder))["Speed"]
    shown = [text.get_text() for text in speed.figure.axes[0].texts]
    assert shown[:3] == ["drafter", "length", "continuations"]
    gains = [float(text.partition(" ")[0]) for text in shown if "[" in text]
    assert gains == sorted(gains, reverse=True) and len(gains) == 12


def test_each_group_has_a_bar_of_its_own_baseline(tmp_path: Path) -> None:
    gains = {0.0: 2.0, 0.7: 3.0}  # temperature: x model.generate
    cells = {t: Cell(drafter="m2r2", temperature=t, against=("none", "hf")) for t in gains}
    records = []
    for t, cell in cells.items():
        record = result(cell, 1.5, speedup={"none": estimate(1.5), "hf": estimate(gains[t])})
        record["baselines"]["hf"] = method("hf", 1.0, [], speedup={"none": estimate(1.5 / gains[t])})
        records.append(record)
    with matplotlib.rc_context(STYLE):
        (speed,) = draw_all(load_results(fill(tmp_path / "sweep", records)))["Speed"]
    shown = [text.get_text() for text in speed.figure.axes[0].texts]
    assert shown[:2] == ["drafter", "T"] and shown.count("model.generate") == 2
    assert [text.partition(" ")[0] for text in shown if "[" in text] == ["1.50", "1.50", "0.75", "0.50"]


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
    assert seen["smallest"] >= 12 and {"Speed", "Acceptance by position"} <= set(seen["sections"])
    assert seen["images"] and all(natural and 250 < shown < width for natural, shown in seen["images"])
