"""Who sends requests: the keys that clients have, and what each may use."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
import threading
import time
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError

from specdec.base.errors import SpecDecError
from specdec.serve.errors import ApiError

MAX_FILE = 1 << 20  # bytes
KEY = re.compile(r"[!-~]+")
ASCII = Field(pattern=f"^{KEY.pattern}$")


class Key(BaseModel):
    """A key and the limits of who has it; None is no limit of its own.

    name: in the log and the metrics, which never have the key.
    priority: requests of a higher one are started first.
    max_rows: requests that are decoded at once. max_requests: these and those that wait.
    learn: whether a drafter that teaches itself may learn from its texts.
    tokens_per_minute: tokens of prompts and answers; a request that exceeds what is left delays the next ones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: Annotated[str, ASCII, Field(max_length=64)]
    key: Annotated[str, ASCII, Field(repr=False)]
    priority: int = 0
    learn: bool = True
    max_rows: PositiveInt | None = None
    max_requests: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys in a YAML file, a list of mappings. Raises SpecDecError for anything else."""
    try:
        if path.stat().st_size > MAX_FILE:
            raise SpecDecError(f"'{path}' is larger than {MAX_FILE} bytes; a file of keys is small")
        keys = TypeAdapter(tuple[Key, ...]).validate_python(tuple(yaml.safe_load(path.read_text("utf-8"))))
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise SpecDecError(f"'{path}' is no file of keys: {place}: {first['msg']}") from None
    except (OSError, UnicodeDecodeError, TypeError, yaml.YAMLError) as error:
        what = error.strerror if isinstance(error, OSError) else "it must be a YAML list of keys with names"
        raise SpecDecError(f"'{path}' cannot be read: {what}") from None
    for member in ("name", "key"):
        if len({getattr(key, member) for key in keys}) < len(keys):
            raise SpecDecError(f"'{path}' has the same {member} twice; each key needs its own")
    if not keys:
        raise SpecDecError(f"'{path}' has no keys; add one, or leave --api-keys out")
    return keys


class Client:
    """Who has a key, and what is used now.

    scope: keeps apart what is stored; None without keys. sender: then the address, among which rows are fair.
    requests: choices that wait or run. left: tokens of this minute.
    """

    def __init__(self, key: Key | None = None, sender: str | None = None) -> None:
        self.sender = sender
        self.key, self.requests, self.lock = key, 0, threading.Lock()
        self.scope = None if key is None else hashlib.sha256(key.key.encode()).hexdigest()
        self.rate = 0 if key is None else key.tokens_per_minute or 0
        self.left, self.at = float(self.rate), time.monotonic()

    @property
    def name(self) -> str:
        return "-" if self.key is None else self.key.name

    def begin(self, choices: int) -> None:
        """Count choices that are asked for. Raises ApiError if there are too many, or too many tokens were used."""
        most = None if self.key is None else self.key.max_requests
        with self.lock:
            if most is not None and self.requests + choices > most:
                message = f"this key has {self.requests} of at most {most} requests already; try again later"
                raise ApiError(429, message, code="rate_limit_exceeded")
            if self.rate and self._refill() <= 0:
                seconds = int(60 * -self.left / self.rate) + 1
                message = f"this key has used its {self.rate} tokens a minute; try again in {seconds} s"
                raise ApiError(429, message, code="rate_limit_exceeded", retry_after=seconds)
            self.requests += choices

    def end(self, choices: int, tokens: int) -> None:
        """Count choices that have ended, and what they used."""
        with self.lock:
            self.requests -= choices
            if self.rate:
                self.left = self._refill() - tokens

    def _refill(self) -> float:
        now = time.monotonic()
        self.left, self.at = min(self.rate, self.left + self.rate * (now - self.at) / 60), now
        return self.left


class Clients:
    """All that may use a server. keys: none admits everybody."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self.known = [Client(key) for key in keys]

    def find(self, given: str, address: str | None = None) -> Client | None:
        """Who has the key ``given``, in a time that does not depend on it; None if nobody has.

        address: of the sender, who is told apart by it where there are no keys.
        """
        if not self.known:
            return Client(sender=None if address is None else _network(address))
        offered = given.encode()
        same = [client for client in self.known if hmac.compare_digest(client.key.key.encode(), offered)]  # type: ignore[union-attr]
        return same[0] if same else None


def _network(address: str) -> str:
    """What tells one user's addresses from those of others: of IPv6, the first half."""
    with contextlib.suppress(ValueError):
        if (found := ip_address(address)).version == 6:
            return found.exploded[:19]
    return address
