"""The page: it needs no other host, says what it is to screen readers, and works in a browser, also a narrow one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from servers import Server, serving, tiny_decoder

from specdec.serve.app import PAGE

browser = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect, sync_playwright = browser.expect, browser.sync_playwright
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT = 600_000  # milliseconds
GONE = "The server does not answer, or the connection was lost; check that the server runs."
POLICY = "Content Security Policy"  # what the console's errors about it have in them
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


@contextmanager
def opened(url: str) -> Iterator[Any]:
    """The page at ``url``, of which the browser must have nothing to complain."""
    with sync_playwright() as p:
        browser, problems = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=TIMEOUT), []
        page = browser.new_page(viewport={"width": 400, "height": 800})
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: POLICY in message.text and problems.append(message.text))
        page.on("request", lambda r: r.url.startswith((url, "data:")) or problems.append(r.url))
        page.set_default_timeout(TIMEOUT)
        page.goto(url)
        yield page
        assert problems == []
        browser.close()


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    with opened(server.url) as found:
        yield found


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


@no_browser
@pytest.mark.slow
def test_the_pages_own_policy_allows_its_icon(page: Any) -> None:
    """The icon itself may be fetched out of a page's sight."""
    shown = "link => new Promise(end => Object.assign(new Image(), {onload: end, onerror: end, src: link.href}))"
    page.locator("link[rel=icon]").evaluate(shown)  # what the policy forbids is a problem in the console


@no_browser
@pytest.mark.slow
def test_a_server_that_is_gone_is_said_so_in_one_sentence(tmp_path: Path) -> None:
    with ExitStack() as browser:
        with serving(tiny_decoder(tmp_path)) as server:
            page = browser.enter_context(opened(server.url))
            expect(page.locator("#model")).to_have_text("tiny", timeout=TIMEOUT)
        page.get_by_label("Prompt", exact=True).fill("Go on.")
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_role("alert")).to_have_text(GONE, timeout=TIMEOUT)
