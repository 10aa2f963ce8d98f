"""Pages of the site from other places: Markdown files in the repository's root."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BESIDE = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}


def on_files(files: Files, config: Any) -> Files:
    for page, source in BESIDE.items():
        files.append(File.generated(config, page, content=moved((ROOT / source).read_text("utf-8"))))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to sources lead somewhere in the repository, not on the site."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[\w/]+(?:\.py)?\)", r"\1", markdown)


def moved(text: str) -> str:
    """A page of the repository's root with links that work in the folder of documents."""
    for page, source in BESIDE.items():
        text = text.replace(f"]({source}", f"]({page}")
    return re.sub(r"\[([^\]]+)\]\([\w/]+\.py\)", r"\1", text).replace("](docs/", "](")
