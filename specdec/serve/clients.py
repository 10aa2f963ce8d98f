"""Who sends requests: the keys that clients have, and what each may use."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError

from specdec.base.errors import SpecDecError

MAX_FILE = 1 << 20  # bytes
KEY = re.compile(r"[!-~]+")
ASCII = Field(pattern=f"^{KEY.pattern}$")


class Key(BaseModel):
    """An API key, which a client sends with its requests, and what its owner may use.

    name: name of the owner in the log and the metrics, which never show the key.
    key: the secret text.
    priority: requests with a higher number begin first.
    max_rows: maximum number of the owner's requests that are decoded at once; None: no limit of its own.
    learn: whether a drafter that teaches itself may learn from its texts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: Annotated[str, ASCII, Field(max_length=64)]
    key: Annotated[str, ASCII, Field(repr=False)]
    priority: int = 0
    learn: bool = True
    max_rows: PositiveInt | None = None


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read the API keys in the YAML file ``path``: a list of mappings with the fields of ``Key``.

    Raises SpecDecError if the file cannot be read, a key or a name comes twice, or a field is wrong.
    """
    try:
        if path.stat().st_size > MAX_FILE:
            raise SpecDecError(f"'{path}' is larger than {MAX_FILE} bytes; a file of keys is small")
        keys = TypeAdapter(tuple[Key, ...]).validate_python(tuple(yaml.safe_load(path.read_text("utf-8"))))
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise SpecDecError(f"'{path}' is no file of keys: {place}: {first['msg']}") from None
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        what = error.strerror if isinstance(error, OSError) else "it must be a YAML list of keys with names"
        raise SpecDecError(f"'{path}' cannot be read: {what}") from None
    for member in ("name", "key"):
        if len({getattr(key, member) for key in keys}) < len(keys):
            raise SpecDecError(f"'{path}' has the same {member} twice; each key needs its own")
    if not keys:
        raise SpecDecError(f"'{path}' has no keys; add one, or leave --api-keys out")
    return keys


@dataclass(frozen=True)
class Client:
    """The sender of a request.

    key: the key that the sender has given; None: the server has no keys.
    sender: network address, if the server has no keys; the engine's rows are then shared fairly among addresses.
    """

    key: Key | None = None
    sender: str | None = None

    @property
    def scope(self) -> str | None:
        """The name of the client as a tenant of the engine (``Request.scope``): SHA-256 of the key, in hexadecimal.

        Cached prefixes are shared only between requests of one scope. None, the default tenant: the server has no keys.
        """
        return None if self.key is None else hashlib.sha256(self.key.key.encode()).hexdigest()


def find_client(keys: Sequence[Key], given: str, address: str | None = None) -> Client | None:
    """Return the client with the key ``given``; None: it is none of ``keys``. Takes the same time for all of them.

    given: the text that came with the request; "": none. Without any ``keys``, it is ignored and everybody passes.
    address: the sender's address, which identifies the client if the server has no keys.
    """
    if not keys:
        return Client(sender=address)
    offered = given.encode()
    same = [key for key in keys if hmac.compare_digest(key.key.encode(), offered)]
    return Client(same[0]) if same else None
