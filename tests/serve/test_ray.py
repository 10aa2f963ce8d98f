"""A replica under Ray Serve on this machine, and what several share."""

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from servers import until
from tiny import save_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),  # importing it takes seconds
]


def healthy(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(url + "/-/healthz", timeout=60).status_code == 200
    return False


def test_a_replica_answers_streams_and_refuses(tmp_path: Path) -> None:
    import ray
    from ray import serve

    from specdec.serve.ray import Options, app
    from specdec.serve.run import bind

    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as env:
        env.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # its processes start slowly beside other tests
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)  # a worker process starts for each
    try:
        with suppress(TimeoutError):  # beside other tests, its proxy may need longer than the minute that is waited
            serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = Options(model=str(save_tiny(tmp_path / "tiny")), drafter="prompt-lookup", name="tiny", cpus=0.5)
        serve.run(app(options))
        url = f"http://127.0.0.1:{port}"
        until(lambda: healthy(url))
        body = {"model": "tiny", "prompt": "Name three colours.", "max_tokens": 12, "seed": 1}
        with httpx.Client(base_url=url, headers={"x-session-id": "s0"}, timeout=600) as client:
            assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 12
            streamed = client.post("/v1/completions", json=body | {"stream": True}).text
            assert streamed.count("data: ") > 3 and streamed.endswith("data: [DONE]\n\n")
            refused = client.post("/v1/completions", json=body | {"model": "other"})
            assert refused.json()["error"]["param"] == "model"
    finally:
        serve.shutdown()
        ray.shutdown()


def test_sessions_keep_their_replica() -> None:
    """Ray's router does so; the deployment has it, and as many replicas as are asked for."""
    from specdec.serve.ray import ROUTER, Options, app

    deployment = app(Options(replicas=2))._bound_deployment
    assert deployment.num_replicas == 2
    assert deployment._deployment_config.request_router_config.request_router_class == ROUTER


def test_a_path_is_not_an_option() -> None:
    from pydantic import ValidationError

    from specdec.serve.ray import Options

    with pytest.raises(ValidationError, match="replica"):
        Options(replica=Path())  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="Ray Serve accepts the connections"):
        Options(max_connections=8)  # type: ignore[call-arg]


def test_options_of_the_server_reach_its_replicas() -> None:
    from specdec.serve.ray import Options

    given = {"allowed_hosts": "a.example, B.example", "cors": "https://a.example", "max_tokens": "8"}
    settings = Options(**given, name="tiny")  # type: ignore[arg-type]
    assert settings.allowed_hosts == ("a.example", "B.example") and settings.cors == ("https://a.example",)
    assert settings.max_tokens == 8
