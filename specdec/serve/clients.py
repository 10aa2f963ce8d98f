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
    """A key, and what the scheduler does for who has it.

    name: in the log and the metrics, which never have the key.
    priority: requests of a higher one are started first.
    max_rows: requests that are decoded at once; None: no limit of its own.
    learn: whether a drafter that teaches itself may learn from its texts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: Annotated[str, ASCII, Field(max_length=64)]
    key: Annotated[str, ASCII, Field(repr=False)]
    priority: int = 0
    learn: bool = True
    max_rows: PositiveInt | None = None


def read_keys(path: Path) -> tuple[Key, ...]:
    """Return the keys in a YAML file, a list of mappings. Raises SpecDecError for anything else."""
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


@dataclass(frozen=True)
class Client:
    """Who sends a request. sender: the address where there are no keys; rows are then fair among addresses."""

    key: Key | None = None
    sender: str | None = None

    @property
    def scope(self) -> str | None:
        """Keeps apart what is stored; None without keys."""
        return None if self.key is None else hashlib.sha256(self.key.key.encode()).hexdigest()


def find_client(keys: Sequence[Key], given: str, address: str | None = None) -> Client | None:
    """Return the client with the key ``given``, in a time that does not depend on it; None if no client has it.

    address: the sender's address, which identifies the client if the server has no keys.
    """
    if not keys:
        return Client(sender=address)
    offered = given.encode()
    same = [key for key in keys if hmac.compare_digest(key.key.encode(), offered)]
    return Client(same[0]) if same else None
