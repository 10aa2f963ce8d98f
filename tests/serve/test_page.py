"""The page in a browser: a chat, also on a narrow screen and with the keyboard alone."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from servers import Replay, Server, byte_tokenizer, serving, stand_in, tiny_decoder

from specdec.engine.request import Event, Request

browser = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = browser.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT = 600_000  # milliseconds
GONE = "The server does not answer, or the connection was lost; check that the server runs."
POLICY = "Content Security Policy"  # what the console's errors about it have in them
MARKDOWN = """A *list*:

1. **one** `two`
2. <img src="http://elsewhere/x" onerror="alert(1)"> [link](javascript:alert(1)) ![picture](http://elsewhere/y)

```python
if a < b:
    print("a & b")
```

| a | b |
|---|---|
| 1 | 2 |
"""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tiny_decoder(tmp_path_factory.mktemp("tiny"))) as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.sync_playwright() as p:
        launched = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=TIMEOUT)
        yield launched
        launched.close()


@contextmanager
def opened(chromium: Any, url: str) -> Iterator[Any]:
    """The page at ``url``, of which the browser must have nothing to complain."""
    problems = list[str]()
    with chromium.new_context(viewport={"width": 400, "height": 800}) as context:
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: POLICY in message.text and problems.append(message.text))
        page.on("request", lambda r: r.url.startswith((url, "data:")) or problems.append(r.url))
        page.set_default_timeout(TIMEOUT)
        page.goto(url)
        yield page
        assert problems == []


@pytest.fixture
def page(chromium: Any, server: Server) -> Iterator[Any]:
    with opened(chromium, server.url) as found:
        yield found


@pytest.fixture
def scripted(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page of a server that answers with the given text, every second byte drafted."""
    with ExitStack() as stack:

        def made(text: Callable[[str], str]) -> Any:
            tokenizer = byte_tokenizer()

            def events(request: Request) -> list[Event]:
                ids = tokenizer(text(tokenizer.decode(request.prompt))).input_ids
                return [Event(ids, "eos", depths=[number % 2 for number in range(len(ids))])]

            served = stack.enter_context(serving(stand_in(tokenizer, context=50_000), Replay(events)))
            return stack.enter_context(opened(chromium, served.url))

        yield made


def say(page: Any, text: str) -> None:
    """Send a message with the keyboard, and wait for the answer."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    done(page)


def done(page: Any) -> None:
    expect(page.get_by_role("status")).to_have_text(re.compile("^Done"), timeout=TIMEOUT)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def set_up(page: Any, **fields: str) -> None:
    """Fill in fields of the settings by a part of their label."""
    page.get_by_text("Settings").click()
    for label, text in fields.items():
        page.get_by_label(label.replace("_", " ")).fill(text)


def turns(page: Any) -> list[str]:
    return [text.strip() for text in page.locator("article .text").all_text_contents()]


def test_the_page_streams_text_with_its_drafts_and_compares(page: Any) -> None:
    set_up(page, Most_new_tokens="60")
    page.get_by_label("Decode each answer plainly").check()
    say(page, "ab ab ab ab ab ab")
    drafted, plain = page.locator("article .drafted"), page.locator("article .plain")
    assert len(drafted.locator(".text").inner_text().replace("\n", "")) > 30
    assert drafted.locator(".text").text_content() == plain.locator(".text").text_content()
    assert "Same text yes" in plain.inner_text() and "Drafter: prompt-lookup" in drafted.inner_text()
    assert float(re.findall(r"Mean acceptance length ([\d.]+)", drafted.inner_text())[0]) >= 1
    assert "Tokens 60" in drafted.inner_text()
    assert drafted.locator(".text span[class^=d]").count() > 0 == plain.locator(".text span[class^=d]").count()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_markdown_is_shown_and_what_could_run_is_not(scripted: Any) -> None:
    page = scripted(lambda prompt: MARKDOWN)
    say(page, "<b>Go on.</b>")
    assert turns(page)[0] == "<b>Go on.</b>"
    text = page.locator("article .markdown")
    assert text.locator("ol > li").count() == 2 and text.locator("strong").inner_text() == "one"
    assert text.locator("td").all_text_contents() == ["1", "2"]  # no colour stands between cells
    assert text.locator("img, script").count() == 0 and 'onerror="alert(1)"' in text.inner_text()
    assert "javascript" not in (text.locator("a").first.get_attribute("href") or "")
    assert text.locator("pre").inner_text().strip() == 'if a < b:\n    print("a & b")'
    for kind, part in (("keyword", "if"), ("called", "print"), ("string", '"a & b"')):
        assert text.locator(f"pre .{kind}").all_text_contents() == [part]
    parts = [text.locator(f"pre .{kind}") for kind in ("keyword", "string")]
    colours = {part.evaluate("e => getComputedStyle(e).color") for part in parts}
    assert len(colours) == 2 and text.locator("pre .string .d1").count() > 0  # with those of drafts
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    text.get_by_role("button", name="Copy code").click()
    expect(text.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == 'if a < b:\n    print("a & b")\n'


def test_a_conversation_has_turns_a_system_prompt_and_stays_in_the_browser(scripted: Any) -> None:
    prompts: list[str] = []
    page = scripted(lambda prompt: prompts.append(prompt) or f"answer {len(prompts)}")
    set_up(page, System_prompt="Be brief.")
    say(page, "first")
    say(page, "second")
    assert prompts == ["Be brief.first", "Be brief.firstanswer 1second"]
    assert turns(page) == ["first", "answer 1", "second", "answer 2"]
    page.reload()
    assert turns(page) == ["first", "answer 1", "second", "answer 2"]
    page.get_by_role("button", name="Retry").last.click()
    done(page)
    assert prompts[2] == prompts[1] and turns(page)[3] == "answer 3"
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit message").fill("other")
    page.keyboard.press("Enter")
    done(page)
    assert turns(page) == ["other", "answer 4"] and prompts[3] == "Be brief.other"
    page.get_by_role("button", name="New chat").click()
    assert turns(page) == []
    page.reload()
    assert turns(page) == []


def test_the_page_is_used_with_the_keyboard(scripted: Any) -> None:
    page = scripted(lambda prompt: "yes")
    page.keyboard.type("one")  # the field has the focus
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    done(page)
    assert turns(page) == ["one\ntwo", "yes"]
    assert page.get_by_role("button", name="Continue").count() == 0  # the answer has ended
    page.keyboard.press("Shift+Tab")  # from the field back: Retry, Copy, Edit
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("button", name="Edit")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Edit message")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Edit")).to_be_focused()
    assert turns(page) == ["one\ntwo", "yes"]


def test_the_page_stops_and_says_what_is_wrong(page: Any) -> None:
    set_up(page, Most_new_tokens="3900")
    page.get_by_label("Message", exact=True).fill("Go on.")
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator("article .markdown")).to_have_text(re.compile(r"\S{3}"), timeout=TIMEOUT)
    page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_have_text("Stopped.", timeout=TIMEOUT)
    figures = page.locator("article .figures").inner_text()
    assert "stopped" in figures and int(re.findall(r"Tokens (\d+)", figures)[0]) > 0
    assert float(re.findall(r"Mean acceptance length ([\d.]+)", figures)[0]) >= 1 and "–" not in figures
    page.get_by_label("Message", exact=True).fill("x" * 5000)
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("tokens", timeout=TIMEOUT)
    assert page.get_by_role("button", name="Retry").last.is_visible()


@pytest.mark.parametrize("mark", ["> ", "- "])
def test_what_cannot_be_read_as_markdown_is_shown_as_it_is(scripted: Any, mark: str) -> None:
    nested = mark * 6000 + "deep"
    page = scripted(lambda prompt: "fine" if prompt.endswith("again") else nested)
    say(page, "Go on.")
    assert turns(page) == ["Go on.", nested]
    page.reload()
    say(page, "again")
    assert turns(page) == ["Go on.", nested, "again", "fine"]


def test_a_conversation_opens_at_its_end(scripted: Any) -> None:
    page = scripted(lambda prompt: "line\n\n" * 100)
    say(page, "Go on.")
    page.evaluate("scrollTo(0, 0)")
    page.reload()
    expect(page.locator("#model")).to_have_text("tiny", timeout=TIMEOUT)
    assert page.evaluate("innerHeight + scrollY - document.documentElement.scrollHeight") > -2


def test_an_answer_that_ended_at_the_limit_goes_on(server: Server, page: Any) -> None:
    """The text is that of an answer with both limits."""
    set_up(page, Most_new_tokens="40")
    page.get_by_label("Decode each answer plainly").check()
    say(page, "ab ab ab ab ab ab")
    whole = page.locator("article .drafted .text").text_content()
    page.get_by_label("Most new tokens").fill("20")
    page.get_by_role("button", name="Retry").last.click()
    expect(page.locator("article .drafted")).to_contain_text("Tokens 20", timeout=TIMEOUT)
    done(page)
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("article .drafted")).to_contain_text("Tokens 40", timeout=TIMEOUT)
    done(page)
    assert page.locator("article .drafted .text").text_content() == whole
    assert page.locator("article .assistant, article.assistant").count() == 1
    assert "Same text yes" in page.locator("article .plain").inner_text()


@pytest.mark.parametrize(
    ("field", "wrong"), [("Most new tokens", "0"), ("Most new tokens", "-3"), ("Temperature", "3")]
)
def test_numbers_that_cannot_be_are_refused_by_the_form(scripted: Any, field: str, wrong: str) -> None:
    page = scripted(lambda prompt: "yes")
    set_up(page, **{field.replace(" ", "_"): wrong})
    page.get_by_text("Settings").click()
    page.get_by_label("Message", exact=True).fill("Go on.")
    page.keyboard.press("Enter")
    expect(page.get_by_label(field)).to_be_focused()  # the settings are open
    assert turns(page) == [] and page.get_by_label("Message", exact=True).input_value() == "Go on."
    page.get_by_label(field).fill("1")
    say(page, "Go on.")
    assert turns(page) == ["Go on.", "yes"]


def test_a_stored_conversation_that_cannot_be_shown_is_set_aside(scripted: Any) -> None:
    page = scripted(lambda prompt: "yes")
    odd = {"role": "assistant", "text": "It is.", "runs": [], "plain": {"text": "", "figures": {"finish": "stop"}}}
    stored = json.dumps({"turns": [odd], "fields": {}})
    page.evaluate("text => localStorage.setItem('specdec.chat', text)", stored)
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("cannot be shown")
    expect(page.locator("#model")).to_have_text("tiny", timeout=TIMEOUT)
    assert page.evaluate("localStorage.getItem('specdec.chat.aside')") == stored
    say(page, "Go on.")
    page.reload()
    assert turns(page) == ["Go on.", "yes"] and page.get_by_role("alert").inner_text() == ""


def test_what_the_browser_keeps_may_be_of_any_kind(server: Server, page: Any) -> None:
    turn = {"role": "assistant", "text": "It is."}
    for stored in ("{", "null", json.dumps({"turns": 3}), json.dumps({"turns": [turn], "fields": {}})):
        page.evaluate("text => localStorage.setItem('specdec.chat', text)", stored)
        page.reload()
        expect(page.locator("#model")).to_have_text("tiny", timeout=TIMEOUT)
        assert turns(page) == []


def test_a_server_that_is_gone_is_said_so_in_one_sentence(chromium: Any) -> None:
    with ExitStack() as stack:
        with serving(stand_in(byte_tokenizer()), Replay(lambda request: [])) as server:
            page = stack.enter_context(opened(chromium, server.url))
            expect(page.locator("#model")).to_have_text("tiny", timeout=TIMEOUT)
        page.get_by_label("Message", exact=True).fill("Go on.")
        page.get_by_role("button", name="Send", exact=True).click()
        expect(page.get_by_role("alert")).to_have_text(GONE, timeout=TIMEOUT)
