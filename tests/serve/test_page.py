"""The page: it needs no other host, says what it is to screen readers, and works in a browser, also a narrow one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from playwright.sync_api import expect, sync_playwright
from servers import Server, serving, tiny_decoder

from specdec.serve.app import PAGE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT = 600_000  # milliseconds
no_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, {key: value or "" for key, value in attrs}))


def test_the_page_names_what_it_has_and_fetches_nothing_from_elsewhere() -> None:
    text = PAGE.read_text("utf-8")
    page = Elements()
    page.feed(text)
    assert "http://" not in text and "https://" not in text and "innerHTML" not in text
    assert all(a.get("src") is None and a.get("href", "data:,") == "data:," for _, a in page.found)
    labels = {a["for"] for tag, a in page.found if tag == "label" and "for" in a}
    fields = {a["id"] for tag, a in page.found if tag in ("input", "textarea") and a.get("type") != "checkbox"}
    assert fields == labels
    ids = {a["id"] for _, a in page.found if "id" in a}
    for _, a in page.found:
        assert all(name in ids for key in ("aria-labelledby", "aria-describedby") for name in a.get(key, "").split())
    assert ("html", {"lang": "en"}) in page.found and {"status", "alert"} <= {a.get("role") for _, a in page.found}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tiny_decoder(tmp_path_factory.mktemp("tiny"))) as running:
        yield running


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=TIMEOUT)
        opened = browser.new_page(viewport={"width": 400, "height": 800})
        opened.problems = []
        opened.on("pageerror", lambda error: opened.problems.append(str(error)))
        opened.on("request", lambda r: r.url.startswith((server.url, "data:")) or opened.problems.append(r.url))
        opened.set_default_timeout(TIMEOUT)
        opened.goto(server.url)
        yield opened
        assert opened.problems == []
        browser.close()


@no_browser
@pytest.mark.slow
def test_the_page_streams_text_with_its_drafts_and_compares(server: Server, page: Any) -> None:
    page.get_by_label("Prompt", exact=True).fill("ab ab ab ab ab ab")
    page.get_by_label("Most new tokens").fill("60")
    page.get_by_label("Decode plainly").check()
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_have_text(re.compile("^Done"), timeout=TIMEOUT)
    assert len(page.inner_text("#text").replace("\n", "")) > 30
    assert page.text_content("#text") == page.text_content("#plain-text")
    assert page.inner_text("#same") == "yes" and page.inner_text("#drafter") == "prompt-lookup"
    assert float(page.inner_text("#length")) >= 1 and page.inner_text("#count") == "60"
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.locator("#plain-text span[class^=d]").count() == 0


@no_browser
@pytest.mark.slow
def test_the_page_stops_and_says_what_is_wrong(server: Server, page: Any) -> None:
    page.get_by_label("Prompt", exact=True).fill("Go on.")
    page.get_by_label("Most new tokens").fill("3900")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#text")).to_have_text(re.compile(r"\S{3}"), timeout=TIMEOUT)
    page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_have_text("Stopped.", timeout=TIMEOUT)
    page.get_by_label("Prompt", exact=True).fill("x" * 5000)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("tokens", timeout=TIMEOUT)
