"""Every example of README and docs runs, page by page and in order, as a reader would paste it.

Names such as MODEL are folders of tiny models in the folder where a page runs. A block that needs what a test does not
have says so in its title (``NEEDS``); its commands are parsed.
"""

import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from pages import PAGES, ROOT, Block, blocks
from servers import NAME, Replay, byte_tokenizer, serving, stand_in
from tiny import save_tiny, save_tiny_moe
from tiny_gguf import write_gguf
from transformers import AutoTokenizer
from typer.testing import CliRunner

from specdec import __version__, cli
from specdec.engine.request import Event, Request

PARSED = [*PAGES, *sorted(ROOT.glob("docs/lab/*.md")), *sorted(ROOT.glob("drafters/**/README.md"))]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
# What a title may say: "needs ...".
NEEDS = (
    *("a network", "a wheel", "a trained head", "Ray", "a GPU", "other engines", "gigabytes", "minutes", "the owner"),
)
ELSEWHERE = {"serve", "chat"}  # commands that do not end: their own tests run them
# What a page's own words are cut to: the last of an option counts.
SHORT = {
    "generate": ["--max-new-tokens", "4"],
    "bench": ["--limit", "1", "--max-new-tokens", "4"],
    "verify": ["--limit", "1", "--max-new-tokens", "4", "--min-drafted", "0"],
    "sweep": ["limit=1", "max_new_tokens=4"],
    "train": ["--set", "max_new_tokens=8", "--set", "eval_fraction=0.3", "--set", "rows=2"],
}


def lines(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block, as words; ``|``, ``&&`` and ``;`` are words of their own."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="|;&")
        words.whitespace_split = True
        if found := list(words):
            yield found


def commands(words: list[str]) -> Iterator[tuple[list[str], str]]:
    """The arguments of each ``specdec`` in a line, and what is piped into it."""
    piped, part = "", list[str]()
    for word in [*words, ";"]:
        if not set(word) <= set("|;&"):
            part.append(word)
            continue
        for at, found in enumerate(part):
            if found == "specdec" and (at == 0 or "=" in part[at - 1] or part[at - 1] == "-m"):
                yield part[at + 1 :], piped
        piped, part = " ".join(part[1:]) if word == "|" else "", []


def parse(arguments: list[str]) -> str:
    """By the real command line, which refuses what it does not know; returns the command's first word."""
    command: Any = typer.main.get_command(cli.app)
    first, rest = arguments[0], list(arguments)
    while hasattr(command, "commands") and (rest or not command.invoke_without_command):  # models, and models pull
        if first == "learn" and rest[0] not in command.commands:  # learn MODEL
            rest.insert(0, "ahead")
        assert rest and rest[0] in command.commands, f"there is no command {' '.join(arguments)}"
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(first, rest)
    return first


def prompts(path: Path, count: int = 8) -> None:
    path.write_text("".join(json.dumps({"turns": [f"question {n}"]}) + "\n" for n in range(count)), "utf-8")


def run(arguments: list[str], piped: str = "") -> None:
    """A command, shortened: a step of training for each hour."""
    more = SHORT.get(arguments[0]) or SHORT.get(" ".join(arguments[:2]), [])
    if arguments[0] == "train":
        hours = int(arguments[arguments.index("--minutes") + 1]) // 60 if "--minutes" in arguments else 1
        more = [*more, "--steps", str(hours)]
        arguments = shlex.split(re.sub(r" --minutes \d+", "", shlex.join(arguments)))
    result = CliRunner().invoke(cli.app, [*arguments, *more], input=piped)
    assert result.exit_code == 0, f"specdec {shlex.join(arguments)}: {result.output}"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages call by a name of the reader's own: models, a drafter, files of prompts."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("MODEL", "path/or/hub-id", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        save_tiny(folder / name)
    padded = AutoTokenizer.from_pretrained(folder / "HuggingFaceTB/SmolLM2-135M-Instruct")
    padded.pad_token = "\f"  # SmolLM2 has one, too
    padded.save_pretrained(folder / "HuggingFaceTB/SmolLM2-135M-Instruct")
    save_tiny_moe(folder / "MIXTRAL")
    write_gguf(folder / "model.gguf")
    for name in ("repository", "documents"):
        (folder / "path/to" / name).mkdir(parents=True)
        (folder / "path/to" / name / "text.md").write_text("A text to draft from.\n" * 9)
    for name in ("prompts.jsonl", "eval.jsonl", "mt-bench.jsonl"):
        prompts(folder / name)
    given = ["--model", f"{folder}/MODEL", "--prompts", f"{folder}/prompts.jsonl", "--output", f"{folder}/my-drafter"]
    run(["train", "m2r2", *given])
    return folder


@pytest.fixture
def here(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where a page runs, with what is on the shelf."""
    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPECDEC_DATA", str(tmp_path))
    return tmp_path


def install(words: list[str]) -> None:
    """What pip is told to install: this clone with extras that there are, and packages that are published."""
    for word in itertools.takewhile(lambda word: not set(word) <= set("|;&"), words):
        own = re.fullmatch(r"\.(?:\[(.+)\])?", word)
        wheel = f"dist/specdec_m2r2-{__version__}-py3-none-any.whl"
        assert own or word in ("-e", wheel, "llama-cpp-python"), f"pip install {word}"
        assert not (own and own[1]) or set(own[1].split(",")) <= set(EXTRAS), word


def script(words: list[str]) -> None:
    """A script of the repository has the options that a page gives it."""
    if words[0] == "benchmarks/other_engines.py":  # the command line with more methods
        parse(words[1:])
        return
    source = (ROOT / words[0]).read_text("utf-8")
    assert all(f'"{word}"' in source for word in words[1:] if word.startswith("--") and word != "--help"), words


def shell(block: Block, execute: bool) -> None:
    for words in lines(block):
        if words[:2] == ["pip", "install"]:
            install(words[2:])
        if words[0] == "python" and words[1] != "-m":
            script(words[1:])
        for arguments, piped in commands(words):
            first = parse(arguments)
            if execute and not block.needs and words[0] in ("specdec", "echo") and first not in ELSEWHERE:
                run(arguments, piped)


@contextmanager
def served() -> Iterator[str]:
    """A server that the examples with a client reach: the answer, and a call of the example's tool."""
    call = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
    tokenizer = byte_tokenizer()
    tokenizer.chat_template += "{% if tools %}<tool_call>{% endif %}"

    def script(request: Request) -> list[Event]:
        text = call if "<tool_call>" in tokenizer.decode(request.prompt) else "It scatters."
        ids = tokenizer(text).input_ids
        return [Event(ids, "eos", depths=[0] * len(ids))]

    decoder = stand_in(tokenizer)
    decoder.compile_constraint = lambda *given: None
    with serving(decoder, Replay(script)) as server:
        yield server.url


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run_in_order(page: Path, here: Path) -> None:
    text, namespace = page.read_text("utf-8"), dict[str, Any]()
    for made in re.findall(r"--output (\S+)", text):  # by the page itself
        (here / made).unlink(missing_ok=True)
    with served() as url:
        for block in blocks(page):
            assert not block.needs or block.needs in NEEDS, block.needs
            if block.language == "bash":
                shell(block, execute=True)
            elif block.language == "yaml":
                (here / block.file).write_text(block.text, "utf-8")
            elif block.language == "python" and not block.needs:
                code = block.text.replace("http://127.0.0.1:8000", url)
                code = re.sub(r'model="(smollm2|qwen)[^"]*",', f'model="{NAME}",', code)
                exec(compile(code, f"<{page.name}>", "exec"), namespace)


@pytest.mark.parametrize("page", PARSED, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_those_of_the_command_line(page: Path) -> None:
    for block in blocks(page):
        if block.language == "bash":
            shell(block, execute=False)
