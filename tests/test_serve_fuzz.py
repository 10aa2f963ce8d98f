"""Requests made from the server's own OpenAPI document, valid and not: none is answered with 5xx."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from serving import Replay, byte_tokenizer, stand_in

from specdec.engine.request import Event
from specdec.serve.app import make_app
from specdec.serve.settings import Settings

ENGINE = Replay(lambda request: [Event([65], depths=[0]), Event([66, 67], "length", depths=[1, 0])])
APP = make_app(stand_in(byte_tokenizer()), ENGINE, Settings("tiny", max_body=100_000), lambda line: None)  # type: ignore[arg-type]
schema = schemathesis.openapi.from_asgi("/openapi.json", APP)


@schema.parametrize()
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_makes_the_server_fail(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=[not_a_server_error])
