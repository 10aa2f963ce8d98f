"""Requests made from the server's own OpenAPI document, valid and not: none is answered with 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, settings
from servers import NAME, Replay, byte_tokenizer, stand_in, tiny_decoder

from specdec.serve.app import make_app
from specdec.serve.settings import ServerSettings

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
ANY_HOST = ServerSettings(name=NAME, allowed_hosts=("*",))
DESCRIBED = make_app(stand_in(byte_tokenizer()), Replay(lambda request: []), ANY_HOST)  # type: ignore[arg-type]
schema = schemathesis.openapi.from_asgi("/openapi.json", DESCRIBED)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    """A server that decodes."""
    engine = (decoder := tiny_decoder(tmp_path_factory.mktemp("tiny"))).engine(num_speculative_tokens=2)
    limits = ServerSettings(name=NAME, max_tokens=4, allowed_hosts=("*",))
    yield make_app(decoder, engine, limits, lambda line: None)
    engine.close(drain=False)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_makes_the_server_fail(case: Any, served: FastAPI) -> None:
    """Every second one names the model and asks for few tokens, so that the rest of it is looked at, too."""
    if isinstance(case.body, dict) and len(case.body) % 2:
        case.body |= {"model": NAME} | dict.fromkeys(case.body.keys() & {"max_tokens", "max_completion_tokens"}, 3)
    case.call_and_validate(checks=[schemathesis.checks.not_a_server_error], app=served)
