"""``specdec chat``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from specdec.base import terminal
from specdec.base.errors import SpecDecError, did_you_mean, errors_as, how_to_install
from specdec.base.interrupts import interrupting
from specdec.base.options import SamplingParams
from specdec.base.terminal import as_text, note, say
from specdec.cli import shared
from specdec.cli.shared import panel

if TYPE_CHECKING:
    from specdec.api.decoder import SpecDecoder
    from specdec.engine.engine import Engine

COMMANDS = {
    "/system": "TEXT: start a new conversation with the system message TEXT, or without one",
    "/save": "FILE: write the conversation as JSON",
    "/drafter": "on or off: turn drafting on or off",
    "/new": "start a new conversation",
    "/help": "print this",
    "/exit": "end the chat, like Ctrl-D",
}
SHADES = ("", "green", "cyan", "magenta")  # by depth in the draft; the last also for deeper tokens
_text, _output = map(panel, ("Text", "Output"))


@shared.grouped
def chat(
    loading: shared.DecoderFlags = shared.DecoderFlags(),
    sampling: shared.SamplingFlags = shared.SamplingFlags(seed=None),
    system: Annotated[str | None, _text("System message.", "TEXT")] = None,
    max_new_tokens: Annotated[int, _text("Largest number of new tokens of an answer.", "N", min=1)] = 1024,
    quiet: Annotated[bool, _output("Print no figures after an answer and no colours.", names=["--quiet"])] = False,
) -> None:
    """Chat with a model in the terminal. Colours show the depth in the draft, Ctrl-C stops an answer."""
    loading.check()
    params = SamplingParams(**sampling.keywords)
    with terminal.status("starting"):
        terminal.warn_in_lines()
        from specdec.api.decoder import SpecDecoder

        ask = _asker()
    with terminal.status(f"preparing {loading.model}"):
        decoder = SpecDecoder.from_pretrained(loading.model, loading.drafter, **loading.keywords)
        engine = decoder.engine(max_rows=1)
    with engine:
        note(f"{loading.model} with {decoder.drafter.traits.label}; /help lists commands")
        failed = ChatSession(decoder, engine, params, max_new_tokens, system, quiet).run(ask)
    if failed and ask is _piped:
        raise typer.Exit(2)


class ChatSession:
    """A chat in the terminal: its messages, and the commands of the user.

    decoder, engine: the decoder and a running engine of it, which the caller closes.
    params, max_new_tokens: sampling parameters and token limit of each answer.
    system: the system message; None: no message.
    quiet: whether to print no figures and no colors.
    draft: whether answers are decoded with drafts.
    messages: the conversation so far, {"role", "content"} each, the system message first.
    """

    def __init__(
        self,
        decoder: SpecDecoder,
        engine: Engine,
        params: SamplingParams,
        max_new_tokens: int,
        system: str | None = None,
        quiet: bool = False,
    ) -> None:
        self.decoder = decoder
        self.engine = engine
        self.params = params
        self.quiet = quiet
        self.max_new_tokens = max_new_tokens
        self.draft = True
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Start a new conversation. system: its system message; None: it has none."""
        self.system = system
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []

    def run(self, ask: Callable[[], str]) -> bool:
        """Read lines with ``ask`` and answer them until the user enters "/exit" or ends the input (Ctrl-D).

        Ctrl-C stops the answer that is being decoded; at the prompt it drops the line. It does not end the chat. A
        SpecDecError is printed, and the chat goes on. Returns whether one was printed.

        ask: returns the next line; raises EOFError at the end of the input, and KeyboardInterrupt after Ctrl-C.
        """
        failed = False
        while True:
            try:
                line = ask().strip()
                if line == "/exit":
                    return failed
                if line:
                    self.take(line)
            except EOFError:
                return failed
            except KeyboardInterrupt:  # at the prompt: drop the line
                continue
            except SpecDecError as error:
                failed = True
                terminal.error(str(error))

    def take(self, line: str) -> None:
        """Run the command in ``line``, which begins with "/", or answer the message.

        Raises SpecDecError for an unknown command or a wrong argument.
        """
        if not line.startswith("/"):
            return self.answer(line)
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command == "/system":
            self.begin(rest or None)
            say("started again with this system message" if rest else "started again without a system message")
        elif command == "/new":
            self.begin(self.system)
            say(f"started again with{'' if self.system else 'out'} a system message")
        elif command == "/save":
            self.save(rest)
        elif command == "/drafter" and rest in ("on", "off"):
            self.draft = rest == "on"
            say(f"{self.decoder.drafter.traits.label} drafts" if self.draft else "decoding plainly")
        elif command == "/help":
            for name, what in COMMANDS.items():
                say(f"{name} {what}")
        elif command in COMMANDS:
            raise SpecDecError(f"{command} takes {COMMANDS[command].partition(':')[0]}")
        else:
            raise SpecDecError(f"there is no {command}{did_you_mean(command, COMMANDS)}; /help lists commands")

    def save(self, name: str) -> None:
        """Write the conversation as JSON to the new file ``name``. Raises SpecDecError if that is not possible."""
        if not name:
            raise SpecDecError("/save takes the name of a file, such as /save chat.json")
        with errors_as(f"cannot write '{name}'", OSError, RuntimeError, ValueError):  # a home or a name that cannot be
            path = Path(name).expanduser()
            if path.exists():
                raise SpecDecError(f"'{path}' exists already; choose another name")
            shared.write_json(path, {"drafter": self.decoder.drafter.traits.label, "messages": self.messages})
        say(f"saved in '{path}'")

    def answer(self, text: str) -> None:
        """Answer the user's message ``text``, print the answer as it is decoded, and add both to ``messages``.

        After Ctrl-C the text so far is the answer. Raises SpecDecError if the conversation exceeds the context or
        decoding fails; the message is then dropped.
        """
        from specdec.api.prompts import encode
        from specdec.api.text import text_of

        messages = [*self.messages, {"role": "user", "content": text}]
        context = self.decoder.target.context
        ids = encode(self.decoder.tokenizer, messages, context=context)
        if len(ids) >= context:
            raise SpecDecError(
                f"the conversation has {len(ids)} tokens, the model's context {context}; /new starts again"
            )
        most = None if self.draft else 0
        request = self.decoder.request(
            ids, num_speculative_tokens=most, max_new_tokens=self.max_new_tokens, **vars(self.params)
        )
        handle = self.engine.submit(request)
        answer, write = text_of(request), _writer(self.quiet)
        failed: BaseException | None = None
        with interrupting(handle.cancel, every=True):
            for event in handle:
                failed = event.error
                for piece in answer.read(event, per_token=True):
                    write(piece.text, piece.depth)
            terminal.write("\n")
            if failed is not None:
                raise SpecDecError(f"decoding failed, and the answer is no part of the conversation: {failed}")
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        if not self.quiet:
            m, ended = handle.metrics, {"cancelled": "stopped", "length": "cut at --max-new-tokens"}
            why = ended.get(answer.finish_reason or "", "")
            figures = (
                f"{answer.num_read} tokens, {m.mean_acceptance_length:.2f} a step, {m.tokens_per_second:.1f} tokens/s"
            )
            note(", ".join(filter(None, [figures, why, "" if self.draft else "plain decoding"])))


def _asker() -> Callable[[], str]:
    """Return a function that reads a line from stdin, with editing and history if stdin and stdout are a terminal.

    It raises EOFError at the end of the input. Raises SpecDecError if prompt_toolkit is needed and not installed.
    """
    if sys.stdin is None:
        raise SpecDecError("there is no input; give specdec chat a terminal or a pipe")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _piped
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
    except ModuleNotFoundError:
        raise SpecDecError(
            f"specdec chat needs 'prompt_toolkit', which is not installed; {how_to_install('serve')}"
        ) from None
    session: PromptSession[str] = PromptSession(
        history=_history(), completer=WordCompleter(list(COMMANDS), sentence=True), complete_while_typing=False
    )
    return lambda: session.prompt("> ")


def _piped() -> str:
    with errors_as("the input is not text in this terminal's encoding", UnicodeError):
        line = input()
        line.encode()  # bytes that are no text come as lone surrogates
        return line


def _history() -> Any:
    """Return prompt_toolkit's history of earlier input, in a file of the data folder that only its owner can read.

    If the file cannot be made, the history is in memory and ends with the process.
    """
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    from specdec.base.files import make_data_folder

    try:
        path = make_data_folder() / "chat_history"
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def _writer(quiet: bool) -> Callable[[str, int], None]:
    """Return a function that writes (text, depth in the draft) to stdout; on a terminal the depth sets the color.

    The depth is 0 for a token that the model chose. quiet: whether to use no colors.
    """
    console = Console(highlight=False, soft_wrap=True)
    if quiet or not console.is_terminal:
        return lambda text, depth: terminal.write(text)

    def write(text: str, depth: int) -> None:
        console.print(as_text(console, text, SHADES[min(depth, len(SHADES) - 1)]), end="")

    return write
