"""``specdec serve``."""

from __future__ import annotations

import json
import os
import re
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from specdec.base import options, terminal
from specdec.base.errors import SpecDecError, how_to_install
from specdec.base.terminal import say
from specdec.cli import shared
from specdec.cli.shared import panel

MIN_CACHE = 1 << 20  # bytes: the keys and values of a few tokens
KEY_VARIABLE = "SPECDEC_API_KEY"
CONFIG = '{"method": "ngram", "num_speculative_tokens": 5}'
_server, _limits = map(panel, ("Server", "Limits"))


@shared.grouped
def serve(
    loading: shared.DecoderFlags = shared.DecoderFlags(),
    host: Annotated[str, _server("Address to listen on; 0.0.0.0 admits other machines.", "HOST")] = "127.0.0.1",
    port: Annotated[int, _server("Port; 0 takes a free one.", "N", min=0, max=65535)] = 8000,
    name: Annotated[
        str | None,
        _server(
            "Name of the model for clients; default: the name it was loaded by.",
            "NAME",
            names=["--name", "--served-model-name"],
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        _server(
            "Key that clients must send; as an environment variable it is hidden from other users.",
            "KEY",
            envvar=KEY_VARIABLE,
        ),
    ] = None,
    api_keys: Annotated[
        Path | None, _server("YAML file of keys with names and limits; see docs/agents.md.", "FILE")
    ] = None,
    cors: Annotated[
        list[str] | None,
        _server(
            "Allow pages of this origin to call the server; repeatable, or a JSON list.",
            "ORIGIN",
            names=["--cors", "--allowed-origins"],
        ),
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None, _server("Another host name that requests may name; '*' is any; repeatable.", "HOST")
    ] = None,
    quiet: Annotated[bool, _server("Print no line for each request.", names=["--quiet"])] = False,
    log_requests: Annotated[
        bool, _server("Write prompts and answers into the log.", names=["--log-requests", "--enable-log-requests"])
    ] = False,
    num_speculative_tokens: shared.Depth = "auto",
    speculative_config: Annotated[
        str | None, _server(f"vLLM's way to name a drafter and a draft length, such as {CONFIG}.", "JSON")
    ] = None,
    max_rows: Annotated[
        int,
        _limits(
            "Largest number of requests that are decoded at once.", "N", names=["--max-rows", "--max-num-seqs"], min=1
        ),
    ] = 16,
    max_waiting: Annotated[
        int,
        _limits("Requests that wait at most; others get status 429. With several clients, twice as many.", "N", min=1),
    ] = 256,
    kv_memory: Annotated[
        str | None, _limits("Memory for keys and values, such as 2GiB; default: a share of the free memory.", "SIZE")
    ] = None,
    prefix_cache: Annotated[
        str | None, _limits("Keep keys and values of texts in this folder, for later starts.", "DIR")
    ] = None,
    prefix_cache_size: Annotated[str, _limits("Largest size of the folder of --prefix-cache.", "SIZE")] = "10GiB",
    max_tokens: Annotated[
        int | None, _limits("Largest number of new tokens of a choice; default: the model's context.", "N", min=1)
    ] = None,
    max_connections: Annotated[
        int, _limits("Largest number of connections; further requests get 503.", "N", min=1)
    ] = 1024,
) -> None:
    """Serve a model over HTTP: OpenAI's and Anthropic's interfaces, a page, metrics. Needs the extra 'serve'."""
    model = loading.model
    if speculative_config is not None:
        drafter, num_speculative_tokens = _speculative(speculative_config, loading.drafter, num_speculative_tokens)
        loading = replace(loading, drafter=drafter)
    cors = [origin for text in cors or [] for origin in _listed("--cors", text)]
    for origin in cors:
        if not re.fullmatch(r"\*|https?://[^/\s]+", origin):
            raise SpecDecError(f"--cors takes an origin, such as https://a.example, or '*'; got '{origin}'")
    hosts = [part.strip() for text in allowed_hosts or [] for part in text.split(",")]
    for allowed in hosts:
        if not re.fullmatch(r"\*|[A-Za-z0-9._-]+", allowed):
            raise SpecDecError(f"--allowed-hosts takes names, such as a.example, or '*'; got '{allowed}'")
    if name is not None and not (name.strip() and name.isprintable()):
        raise SpecDecError("--name must be printable characters; leave it out for the model's own name")
    if prefix_cache is not None and not prefix_cache.strip():
        raise SpecDecError("--prefix-cache takes a folder; give its name, or leave the option out")
    depth = shared.depth(num_speculative_tokens)
    disk_size = _bytes("--prefix-cache-size", prefix_cache_size)
    memory = None if kv_memory is None else _bytes("--kv-memory", kv_memory)
    with terminal.status("starting"):
        terminal.warn_in_lines()
        terminal.log_in_lines()
        try:
            from specdec.serve.clients import KEY, read_keys
            from specdec.serve.run import address, bind, serve
            from specdec.serve.settings import ServerSettings
        except ModuleNotFoundError as error:
            raise _not_installed(error) from None
        if api_key is not None and not KEY.fullmatch(api_key):
            raise SpecDecError("--api-key must be printable ASCII characters without spaces")
        if api_key is None and KEY_VARIABLE in os.environ:  # which typer takes for unset
            raise SpecDecError(f"{KEY_VARIABLE} is empty; set it to a key, or unset it to serve everybody")
        loading.check()
        from specdec.speculation.drafter import DrafterWarning

        warnings.simplefilter("ignore", DrafterWarning)  # the log has a line for each failure
        settings = ServerSettings(
            name=name or (Path(model).resolve().name if os.path.exists(model) else model),
            api_key=api_key,
            keys=() if api_keys is None else read_keys(api_keys),
            log_requests=log_requests,
            log_access=not quiet,
            cors=tuple(cors),
            allowed_hosts=(host, *hosts),
            max_tokens=max_tokens,
            max_connections=max_connections,
        )
        if "*" in cors and api_key is None and api_keys is None:
            say("note: any web page can use this server; set --api-key, or name origins in --cors")
        listener = bind(host, port)
    engines = ExitStack()

    def load() -> tuple[Any, str]:
        """Load the model and start its engine; return the application, and a line that says where it is served."""
        with terminal.status(f"preparing {model}"):
            from specdec.api.decoder import SpecDecoder

            try:
                from specdec.serve.app import make_app
                from specdec.serve.tools import abilities
            except ModuleNotFoundError as error:
                raise _not_installed(error) from None

            decoder = SpecDecoder.from_pretrained(model, loading.drafter, **loading.keywords)
            engine = decoder.engine(
                max_rows=max_rows,
                max_waiting=max_waiting,
                kv_memory=memory,
                num_speculative_tokens=depth,
                prefix_cache=None if prefix_cache is None else Path(prefix_cache),
                prefix_cache_size=disk_size,
            )
            engines.enter_context(engine)
            app = make_app(decoder, engine, settings, say)
        say(abilities(decoder.tokenizer))
        return app, f"{settings.name} with {decoder.drafter.traits.label} is served at {address(listener)}"

    with engines:
        serve(load, settings, listener)


def _not_installed(error: ModuleNotFoundError) -> SpecDecError:
    return SpecDecError(f"the server needs '{error.name}', which is not installed; {how_to_install('serve')}")


def _listed(flag: str, text: str) -> list[str]:
    """Return the texts in ``text``, the value of the option ``flag``: a JSON list of texts, or one text.

    Raises SpecDecError for a text that begins with "[" and is no such list.
    """
    if not text.startswith("["):
        return [text]
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(part, str) for part in found):
        raise SpecDecError(f"{flag} takes texts or a JSON list of texts; got '{text}'")
    return found


def _speculative(config: str, drafter: str, depth: str) -> tuple[str, str]:
    """Return (drafter, draft length) that vLLM's ``--speculative-config`` names, as texts for this program's options.

    config: a JSON object with the members "method" (a drafter's name), "model" (where it is loaded from) and
        "num_speculative_tokens"; others are named in a note and have no effect. The drafter is "METHOD" or
        "METHOD=MODEL" (without a method "draft-model=MODEL"), the length the number or "auto".
    drafter, depth: the values of ``--drafter`` and ``--num-speculative-tokens``, which must both be "auto".
    Raises SpecDecError if they are not, or for a config of another form.
    """
    if drafter != "auto" or depth != "auto":
        what = "takes the place of --drafter and --num-speculative-tokens"
        raise SpecDecError(f"--speculative-config {what}; give one or the other")
    try:
        given = json.loads(config)
    except ValueError:
        given = None
    method, source = (given.get(key) for key in ("method", "model")) if isinstance(given, dict) else (None, None)
    method = "draft-model" if method is None and source is not None else method
    if not isinstance(method, str) or not isinstance(source, str | None):
        raise SpecDecError(f"--speculative-config takes a JSON object, such as {CONFIG}; got '{config}'")
    for name in given.keys() - {"method", "model", "num_speculative_tokens"}:
        say(f"note: '{name}' of --speculative-config has no effect")
    method = method.replace("_", "-")  # draft_model is vLLM's name
    named = method if source is None else f"{method}={source}"
    return named, str(given.get("num_speculative_tokens", "auto"))


def _bytes(flag: str, text: str) -> int:
    """Return the number of bytes of a size such as "2GiB", which must be at least 1 MiB (``MIN_CACHE``).

    flag: the option whose value ``text`` is, for messages. Raises SpecDecError for other texts.
    """
    size = options.parse_size(flag, text)
    if isinstance(size, float):
        raise SpecDecError(f"{flag} takes a size, such as 300MB; got '{text}'")
    if size < MIN_CACHE:
        raise SpecDecError(f"{flag} must be at least {MIN_CACHE} bytes, or no text fits; got '{text}'")
    return size
