"""A hook of MkDocs: adds the Markdown files of the repository's root to the site, and adapts links."""

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
    """Return the Markdown of a page with links to sources replaced by their text: the site has no sources."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[\w/]+(?:\.py)?\)", r"\1", markdown)


def moved(text: str) -> str:
    """Return the Markdown of a page of the repository's root with links that work in the folder of documents."""
    for page, source in BESIDE.items():
        text = text.replace(f"]({source}", f"]({page}")
    return re.sub(r"\[([^\]]+)\]\([\w/]+\.py\)", r"\1", text).replace("](docs/", "](")
