"""Several replicas with Ray Serve: ``serve run specdec.serve.ray:app model=NAME replicas=2`` (extra ``ray``).

Requests with the same ``x-session-id`` header go to the same replica, whose prefix cache holds the conversation so far.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import PositiveInt, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from specdec.models.catalogue import DEFAULT_MODEL
from specdec.serve.settings import ServerSettings

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class Options(ServerSettings):
    """The options of Ray's ``serve run`` (KEY=VALUE), each as the option of that name of ``specdec serve``.

    replicas: number of replicas, each with a model of its own. cpus, gpus: what Ray reserves for each replica.
    """

    model: str = DEFAULT_MODEL
    drafter: str = "auto"
    runtime: str = "auto"
    weights: str = "auto"
    device: str = "auto"
    max_rows: PositiveInt = 16
    max_waiting: PositiveInt = 256
    kv_memory: PositiveInt | None = None
    learn: bool | None = None
    adapter: str | None = None
    replicas: PositiveInt = 1
    cpus: float = 1
    gpus: float = 0

    @model_validator(mode="before")
    @classmethod
    def _named_as_its_model(cls, given: Any) -> Any:
        if "max_connections" in given:
            raise ValueError("max_connections has no effect here: Ray Serve accepts the connections; leave it out")
        return {"name": given.get("model", DEFAULT_MODEL)} | given


@serve.ingress()
class Replica:
    """A Ray Serve replica: a decoder with its engine and its HTTP application. The constructor loads the model.

    options: those of the deployment. Ray calls ``__serve_build_asgi_app__`` for the application; deleting the replica
    closes the engine.
    """

    def __init__(self, options: Options) -> None:
        from specdec.api.decoder import SpecDecoder

        self.options = options
        self.decoder = SpecDecoder.from_pretrained(
            options.model,
            options.drafter,
            device=options.device,
            runtime=options.runtime,
            weights=options.weights,
            learn=options.learn,
            adapter=options.adapter,
        )
        self.engine = self.decoder.engine(
            max_rows=options.max_rows, max_waiting=options.max_waiting, kv_memory=options.kv_memory
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        from specdec.serve.app import make_app

        return make_app(self.decoder, self.engine, self.options)

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close(drain=False)


def app(options: Options) -> Application:
    """Return the Ray Serve application of ``serve run specdec.serve.ray:app`` with these options."""
    router: Any = ROUTER  # Ray imports a class by its name
    deployment: Any = serve.deployment(
        Replica,
        name="specdec",
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        max_ongoing_requests=options.max_rows + options.max_waiting,
        request_router_config=RequestRouterConfig(request_router_class=router),
    )
    return deployment.bind(options)
