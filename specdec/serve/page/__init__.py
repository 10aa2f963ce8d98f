"""The page for chats: one file that fetches nothing, and the policy that lets a browser run nothing else.

``marked.js`` reads Markdown, and ``purify.js`` (DOMPurify) cleans what it makes. Both are as npm has them.
``highlight.js`` and ``chat.js`` are of this project.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent
SCRIPTS = "marked.js", "purify.js", "highlight.js", "chat.js"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def build() -> tuple[str, str]:
    """Return the page's HTML, and its Content-Security-Policy, which allows only its scripts and styles, by hash."""
    page, style, *scripts = (FOLDER.joinpath(name).read_text("utf-8") for name in ("index.html", "style.css", *SCRIPTS))
    page = page.replace("<style></style>", f"<style>{style}</style>")
    page = page.replace("<script></script>", "".join(f"<script>{script}</script>" for script in scripts))
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(map(_hash, scripts)),
        "style-src": _hash(style),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return page, "; ".join(f"{name} {value}" for name, value in policy.items())
