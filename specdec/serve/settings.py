"""What a server allows: its name for the model, its key, and limits on what one client may ask for."""

from __future__ import annotations

from dataclasses import dataclass

SECONDS = 30.0  # that a client may take to send its body, or to read what waits for it


@dataclass(frozen=True)
class Settings:
    """name: of the model, as clients call it. api_key: None lets everybody in. origins: allowed by CORS. hosts:
    names by which clients may call the server, beside "localhost", this machine's and addresses; "*": any.

    Limits: max_body (bytes of a request), max_prompt_tokens and max_tokens (None: the model's context), max_choices (of
    one request: its prompts times ``n``), max_connections. patience: seconds for a client that sends or reads slowly.
    """

    name: str
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_body: int = 4 * 2**20
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_choices: int = 64
    max_connections: int = 1024
    patience: float = SECONDS
