"""``specdec chat``: a conversation, its commands, and Ctrl-C that stops an answer and nothing else."""

import json
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from servers import Replay, tiny_decoder
from tiny import save_tiny
from typer.testing import CliRunner

from specdec import SpecDecoder, cli
from specdec.base import terminal
from specdec.base.errors import SpecDecError
from specdec.cli.chat import ChatSession, _asker
from specdec.engine.request import Event
from specdec.speculation.sampling import SamplingParams


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> SpecDecoder:
    return tiny_decoder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def conversation(decoder: SpecDecoder) -> Iterator[ChatSession]:
    engine = decoder.engine(max_rows=1)
    yield ChatSession(decoder, engine, SamplingParams(), max_new_tokens=20)
    engine.close()


def test_a_conversation_goes_on_with_what_was_said(conversation: ChatSession, decoder: SpecDecoder, capsys) -> None:
    conversation.take("Name three colours.")
    conversation.take("Three more.")
    said = conversation.messages
    assert [m["role"] for m in said] == ["user", "assistant"] * 2 and said[2]["content"] == "Three more."
    plain = decoder.with_drafter("none")
    assert said[1]["content"] == plain.generate(said[:1], max_new_tokens=20).text
    assert said[3]["content"] == plain.generate(said[:3], max_new_tokens=20).text
    assert capsys.readouterr().out == f"{said[1]['content']}\n{said[3]['content']}\n"


def test_commands_change_the_conversation(conversation: ChatSession, tmp_path, capsys) -> None:
    conversation.take("/system Be brief.")
    assert capsys.readouterr().err == "started again with this system message\n"
    conversation.take("Hello")
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant"]
    file = tmp_path / "chat.json"
    conversation.take(f"/save {file}")
    saved = json.loads(file.read_text())
    assert saved == {"drafter": "prompt-lookup", "messages": conversation.messages}
    with pytest.raises(SpecDecError, match="already"):
        conversation.take(f"/save {file}")
    capsys.readouterr()
    conversation.take("/new")
    conversation.take("/drafter off")
    conversation.take("/drafter on")
    said = ["started again with a system message", "decoding plainly", "prompt-lookup drafts"]
    assert capsys.readouterr().err.splitlines() == said
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    conversation.take("/drafter off")
    conversation.take("Hello")
    assert conversation.messages[2] == saved["messages"][2]  # drafting changes no text
    conversation.take("/system")
    assert conversation.messages == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/sysem x", "did you mean '/system'"),
        ("/save", "takes the name of a file"),
        ("/save no/such/folder/x.json", "cannot write"),
        ("/save " + "x" * 300, "cannot write"),
        ("/save ~nobody-of-this-name/x.json", "cannot write"),
        ("/drafter perhaps", "on or off"),
        ("x" * 5000, "/new starts again"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(conversation: ChatSession, line: str, says: str) -> None:
    with pytest.raises(SpecDecError, match=says):
        conversation.take(line)
    assert conversation.messages == []


@pytest.mark.parametrize("tokens", [[], [5, 6]])
def test_an_error_while_decoding_is_said(decoder: SpecDecoder, tokens: list[int]) -> None:
    error = SpecDecError("the logits are not finite")
    script = [Event(tokens, depths=[0] * len(tokens)), Event([], "error", error=error)]
    conversation = ChatSession(decoder, Replay(lambda request: script), SamplingParams(), max_new_tokens=20)  # type: ignore[arg-type]
    with pytest.raises(SpecDecError, match="the logits are not finite"):
        conversation.take("Hello")
    assert conversation.messages == []


@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_stops_the_answer_and_not_the_chat(conversation: ChatSession, monkeypatch, presses: int) -> None:
    conversation.max_new_tokens = 3500
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        for _ in range(presses if len(written) == 1 or text == "\n" else 0):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(terminal, "write", write)
    conversation.take("Go on.")
    answer = conversation.messages[-1]
    assert 0 < len(answer["content"]) < 3500 and "".join(written) == answer["content"] + "\n"
    assert signal.getsignal(signal.SIGINT) is before
    conversation.max_new_tokens = 4
    conversation.take("And then?")
    assert len(conversation.messages) == 4


def test_the_command_reads_lines_from_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    model, file = save_tiny(tmp_path / "tiny"), tmp_path / "chat.json"
    lines = f"Hello\n/sysem\n\n/save {file}\n/exit\nnot read\n"
    command = ["chat", "--model", str(model), "--drafter", "prompt-lookup", "--max-new-tokens", "6"]
    outcome = CliRunner().invoke(cli.app, command, input=lines)
    assert outcome.exit_code == 2 and "there is no /sysem" in outcome.stderr
    user, answer = json.loads(file.read_text())["messages"]
    assert user == {"role": "user", "content": "Hello"} and answer["content"] in outcome.stdout
    assert CliRunner().invoke(cli.app, command, input="Hello\n").exit_code == 0  # the end of the input ends it
    outcome = CliRunner().invoke(cli.app, command, input="Hel\udcfflo\n".encode(errors="surrogateescape"))
    assert outcome.exit_code == 2 and "not text in this terminal's encoding" in outcome.stderr


def test_a_terminal_has_a_history_that_only_its_owner_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_DATA", str(tmp_path))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        typed.send_text("Hello\r")
        assert _asker()() == "Hello"
        typed.send_text("\x1b[A\r")  # arrow up
        assert _asker()() == "Hello"
    [file] = tmp_path.iterdir()
    assert "Hello" in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600
