"""The files of the page: they need no other host, and say what they are to screen readers."""

from html.parser import HTMLParser
from typing import Any

from specdec.serve.page import FOLDER, build


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, {key: value or "" for key, value in attrs}))


def test_the_page_names_what_it_has_and_fetches_nothing_from_elsewhere() -> None:
    ours = "".join(read(name) for name in ("index.html", "style.css", "highlight.js", "chat.js"))
    assert "http://" not in ours and "https://" not in ours and "innerHTML" not in ours and "style=" not in ours
    whole, policy = build()
    assert ours.count("<script></script>") == 1 and "<script></script>" not in whole and "unsafe" not in policy
    page = Elements()
    page.feed(read("index.html"))
    assert all(a.get("src") is None and a.get("href", "data:,") == "data:," for _, a in page.found)
    labels = {a["for"] for tag, a in page.found if tag == "label" and "for" in a}
    fields = {a["id"] for tag, a in page.found if tag in ("input", "textarea") and a.get("type") != "checkbox"}
    assert fields == labels
    ids = {a["id"] for _, a in page.found if "id" in a}
    for _, a in page.found:
        assert all(name in ids for key in ("aria-labelledby", "aria-describedby") for name in a.get(key, "").split())
    assert ("html", {"lang": "en"}) in page.found and {"status", "alert"} <= {a.get("role") for _, a in page.found}


def read(name: str) -> str:
    return FOLDER.joinpath(name).read_text("utf-8")


def test_what_others_wrote_comes_with_its_licence() -> None:
    assert "MIT" in read("marked.LICENSE.txt") and "MIT" in read("marked.js")[:500]
    assert "Apache License" in read("purify.LICENSE.txt") and "Apache" in read("purify.js")[:500]
