"""The settings of a server."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt, model_validator

from specdec.base.errors import SpecDecError
from specdec.serve.clients import ASCII, Key


def _split(given: Any) -> Any:
    """Split a string at its commas; return other values unchanged."""
    return tuple(part.strip() for part in given.split(",")) if isinstance(given, str) else given


class ServerSettings(BaseModel):
    """The server's name, its keys, and its limits for clients.

    name: the model's name for clients; a request that names another model gets status 404.
    api_key: a key without a name and limits; None: there is none.
    keys: keys with names and limits. Without any key, everybody is served.
    log_requests: whether to write prompts and answers into the log.
    log_access: whether to write a line for each request.
    cors: origins that CORS allows.
    allowed_hosts: Host headers besides localhost, this machine's names and IP addresses; "*" allows all.
    max_tokens: maximum number of new tokens of a choice; None: as many as the model's context holds.
    max_connections: maximum number of connections; requests of further ones get status 503.
    client_timeout: seconds that a connection may be idle, and that a client has to send the body of a request, and to
        read each event of a stream.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    api_key: Annotated[str, ASCII] | None = None
    keys: tuple[Key, ...] = ()
    log_requests: bool = False
    log_access: bool = True
    cors: Annotated[tuple[str, ...], BeforeValidator(_split)] = ()
    allowed_hosts: Annotated[tuple[str, ...], BeforeValidator(_split)] = ()
    max_tokens: PositiveInt | None = None
    max_connections: PositiveInt = 1024
    client_timeout: float = 30.0

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        for field in ("key", "name"):
            if len({getattr(own, field) for own in self.all_keys}) < len(self.all_keys):
                raise SpecDecError(f"the API key has the {field} of one in the file of keys; give it only once")
        return self

    @property
    def all_keys(self) -> tuple[Key, ...]:
        return self.keys if self.api_key is None else (Key(name="default", key=self.api_key), *self.keys)
