"""The root folder of the repository, and the code blocks of its Markdown pages."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = [page for page in PAGES if re.search("^```(bash|python)", page.read_text("utf-8"), re.M)]


class Block(NamedTuple):
    language: str
    needs: str  # empty: nothing that a test does not have
    file: str  # what a reader saves it as
    text: str


def blocks(page: Path) -> list[Block]:
    found = []
    for language, title, text in re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
        known = re.fullmatch(r'(?: title="(?:needs (.+)|(\S+))")?', title)
        assert known, f"{page.name}: {title}"
        found.append(Block(language, known[1] or "", known[2] or "", text))
    return found
