"""The FastAPI application: endpoints and middleware."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

from anyio.to_thread import run_sync
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response as HTTPResponse

from specdec import __version__
from specdec.api.decoder import SpecDecoder
from specdec.base.terminal import say
from specdec.engine.engine import Engine
from specdec.engine.request import Handle
from specdec.serve.answer import Answer
from specdec.serve.bodies import CLIENT_CLOSED_REQUEST, JsonRoute
from specdec.serve.chat import OpenAIAnswer
from specdec.serve.clients import Client
from specdec.serve.errors import ErrorBody, add_handlers
from specdec.serve.events import EventStream, until_disconnect
from specdec.serve.messages import CountBody, MessagesAnswer, MessagesBody
from specdec.serve.metrics import Metrics
from specdec.serve.middleware import IGNORED, AccessLog, AllowedHosts, ApiKey
from specdec.serve.page import build
from specdec.serve.request import GenerationRequest
from specdec.serve.responses import ResponsesAnswer, ResponsesBody
from specdec.serve.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from specdec.serve.service import Service
from specdec.serve.settings import ServerSettings

DRAFTER = "X-Specdec-Drafter"
MakeAnswer = Callable[[GenerationRequest, list[Handle], Metrics], Answer]
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused."},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer."},
}


def make_app(
    decoder: SpecDecoder, engine: Engine, settings: ServerSettings, write: Callable[[str], None] = say
) -> FastAPI:
    """Return the application that serves ``decoder`` through ``engine``, which must run and which it does not close.

    settings: name, keys and limits. write: prints a line of the log.
    """
    service = Service(decoder, engine, settings)
    app = FastAPI(title="specdec", version=__version__, docs_url=None, redoc_url=None, responses=ERRORS)
    app.state.settings, app.router.route_class = settings, JsonRoute
    add_handlers(app)
    _add_generation(app, service, write)
    _add_tokens(app, service)
    _add_state(app, service)
    app.add_middleware(ApiKey, keys=settings.all_keys)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[DRAFTER, IGNORED, "request-id", "x-request-id"],
        )
    app.add_middleware(AllowedHosts, settings=settings)
    app.add_middleware(AccessLog, write=write if settings.log_access else lambda line: None)  # the outermost
    return app


def _add_generation(app: FastAPI, service: Service, write: Callable[[str], None]) -> None:
    async def answered(request: Request, translate: Callable[[], GenerationRequest], make: MakeAnswer) -> HTTPResponse:
        """Return the response to a request: a stream of events, or JSON once the request has ended.

        If the client disconnects, the request is cancelled. translate: makes the ``GenerationRequest`` from the body.
        make: makes the answer from it, the engine's handles and the server's metrics.
        """
        client: Client = request.state.client
        asked, handles = await run_sync(service.start, translate, client)
        answer = make(asked, handles, service.metrics)
        headers = {DRAFTER: service.drafter_label(asked)}

        def end() -> None:
            request.state.summary.append(answer.summary())
            service.finish(handles, client)
            if service.settings.log_requests:
                for handle, text in zip(handles, answer.texts, strict=True):
                    prompt = service.decode(handle.request.prompt, special=True)
                    line = {"id": request.state.request_id, "prompt": prompt, "answer": text.text}
                    write(json.dumps(line, ensure_ascii=True))

        if asked.stream:
            return EventStream(answer.events(), end, headers, service.settings.client_timeout)
        try:
            found = await until_disconnect(request.receive, answer.json())
            status = CLIENT_CLOSED_REQUEST if found is None else 200
            return HTTPResponse(found, status, headers, media_type="application/json")
        finally:
            end()

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> HTTPResponse:
        return await answered(request, body.request, OpenAIAnswer)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> HTTPResponse:
        return await answered(request, body.request, OpenAIAnswer)

    @app.post("/v1/messages")
    async def messages(body: MessagesBody, request: Request) -> HTTPResponse:
        return await answered(request, body.request, MessagesAnswer)

    @app.post("/v1/responses")
    async def responses(body: ResponsesBody, request: Request) -> HTTPResponse:
        return await answered(request, body.request, partial(ResponsesAnswer, body=body))

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountBody, request: Request) -> HTTPResponse:
        service.check_model(body.model)
        ids = await run_sync(lambda: service.encode_chat(body.chat()))
        return JSONResponse({"input_tokens": len(ids)})


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody, request: Request) -> HTTPResponse:
        service.check_model(body.model)
        ids = await run_sync(service.tokenize, body)
        return JSONResponse({"count": len(ids), "max_model_len": service.context, "tokens": ids})

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody, request: Request) -> HTTPResponse:
        service.check_model(body.model)
        service.check_length("tokens", len(body.tokens), service.context)
        service.check_token_ids("tokens", body.tokens)
        return JSONResponse({"prompt": await run_sync(service.decode, body.tokens, True)})


def _add_state(app: FastAPI, service: Service) -> None:
    page, policy = build()
    model = {
        "id": service.settings.name,
        "object": "model",
        "created": service.started,
        "owned_by": "specdec",
        "type": "model",  # this and the next two are Anthropic's
        "display_name": service.settings.name,
        "created_at": datetime.fromtimestamp(service.started, UTC).isoformat(),
        "max_model_len": service.context,
    }
    if (adapter := service.decoder.adapter) is not None:
        model["adapter"] = adapter

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.head("/v1/models", include_in_schema=False)
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = {"first_id": model["id"], "last_id": model["id"], "has_more": False}
        return {"object": "list", "data": [model]} | names

    @app.head("/v1/models/{name:path}", include_in_schema=False)
    @app.get("/v1/models/{name:path}")
    async def retrieve(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, Any]:
        service.check_engine()
        found: dict[str, Any] = {"status": "ok", "drafter": service.engine.drafting}
        if (outage := service.engine.outage) is not None:
            seconds = round(outage.seconds_left, 1)
            found["drafter_outage"] = {"error": outage.error, "since": int(outage.since), "retry_in_seconds": seconds}
        return found

    @app.get("/metrics")
    async def metrics() -> HTTPResponse:
        return HTTPResponse(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)
