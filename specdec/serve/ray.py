"""Several replicas on one machine or more: ``serve run specdec.serve.ray:app model=NAME replicas=2`` (extra ``ray``).

Requests with one ``x-session-id`` header go to one replica, where the conversation so far is in its prefix cache.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from specdec.models.catalogue import DEFAULT_MODEL
from specdec.serve.settings import Settings

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"  # by the session


def _parts(given: Any) -> Any:
    """Of a list with commas."""
    return tuple(part.strip() for part in given.split(",")) if isinstance(given, str) else given


Names = Annotated[tuple[str, ...], BeforeValidator(_parts)]


class Options(BaseModel):
    """What ``serve run`` takes as KEY=VALUE, for each of the ``replicas``. cors, allowed_hosts: with commas between."""

    model_config = ConfigDict(extra="forbid")

    model: str = DEFAULT_MODEL
    drafter: str = "auto"
    name: str | None = None
    api_key: str | None = None
    runtime: str = "auto"
    weights: str = "auto"
    device: str = "auto"
    max_rows: PositiveInt = 16
    max_waiting: PositiveInt = 256
    kv_memory: PositiveInt | None = None
    cors: Names = ()
    allowed_hosts: Names = ()
    max_body: PositiveInt = Settings.max_body
    max_prompt_tokens: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    max_choices: PositiveInt = Settings.max_choices
    replicas: PositiveInt = 1
    cpus: float = 1
    gpus: float = 0

    def settings(self) -> Settings:
        return Settings(
            name=self.name or self.model,
            api_key=self.api_key,
            origins=self.cors,
            hosts=tuple(map(str.lower, self.allowed_hosts)),
            **{name: getattr(self, name) for name in ("max_body", "max_prompt_tokens", "max_tokens", "max_choices")},
        )


@serve.ingress()
class Replica:
    """A decoder with its engine and its server."""

    def __init__(self, options: Options) -> None:
        from specdec.api.decoder import SpecDecoder

        self.options = options
        self.decoder = SpecDecoder.from_pretrained(
            options.model,
            options.drafter,
            device=options.device,
            runtime=options.runtime,
            weights=options.weights,
        )
        self.engine = self.decoder.engine(
            max_rows=options.max_rows, max_waiting=options.max_waiting, kv_memory=options.kv_memory
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        from specdec.serve.app import make_app

        return make_app(self.decoder, self.engine, self.options.settings())

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close(drain=False)


def app(options: Options) -> Application:
    """The application, as ``serve run`` builds it."""
    router: Any = ROUTER  # a name is taken, too
    deployment: Any = serve.deployment(
        Replica,
        name="specdec",
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        max_ongoing_requests=options.max_rows + options.max_waiting,
        request_router_config=RequestRouterConfig(request_router_class=router),
    )
    return deployment.bind(options)
