"""Requests made from the server's own OpenAPI document, valid and not: none is answered with 5xx."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from servers import NAME, tiny_decoder

from specdec.serve.app import make_app
from specdec.serve.settings import ServerSettings

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


@pytest.mark.slow
def test_no_request_makes_the_server_fail(tmp_path: Path) -> None:
    """Every second one names the model and asks for few tokens, so that the rest of it is looked at, too."""
    engine = (decoder := tiny_decoder(tmp_path)).engine(num_speculative_tokens=2)
    app = make_app(decoder, engine, ServerSettings(name=NAME, max_tokens=4, allowed_hosts=("*",)), lambda line: None)
    for operation in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():

        @given(operation.ok().as_strategy())
        @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def check(case: Any) -> None:
            if isinstance(case.body, dict) and len(case.body) % 2:
                limits = dict.fromkeys(case.body.keys() & {"max_tokens", "max_completion_tokens"}, 3)
                case.body |= {"model": NAME} | limits
            case.call_and_validate(checks=[schemathesis.checks.not_a_server_error])

        check()
    engine.close(drain=False)
