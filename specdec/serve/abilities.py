"""What clients can ask of a served model."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from specdec.serve.tools import PLAIN, find_format, find_thoughts


def abilities(tokenizer: Any) -> str:
    """One line: chats, tools, reasoning and structured output, each with yes or no.

    The chat template decides, as it does for requests.
    """
    chats = bool(getattr(tokenizer, "chat_template", None))
    plain = str(tokenizer.get_chat_template()) if chats else ""
    with_tools = str(tokenizer.get_chat_template(tools=[{}])) if chats else ""
    found = {
        "chat": chats,
        "tools": find_format(with_tools) is not PLAIN,
        "reasoning": find_thoughts(plain) is not None,
        "structured output": find_spec("llguidance") is not None,
    }
    return ", ".join(f"{name}: {'yes' if has else 'no'}" for name, has in found.items())
