"""A server on this machine with the Hugging Face Hub's interface. The fixture ``fake`` (conftest.py) runs it."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from specdec.models import hub

COMMIT = "a" * 40


class FakeHub(BaseHTTPRequestHandler):
    """A handler of HTTP requests with the part of the Hub's interface that loading needs: one commit per repository.

    repositories: name -> {path: content}. fetched: files that were downloaded. asked: paths of all requests.
    """

    repositories: dict[str, dict[str, bytes]]
    fetched: list[str]
    asked: list[str]  # paths of all requests

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            name, revision = found.groups()
            if name not in self.repositories:
                return self.answer({"error": "none"}, 404, X_Error_Code="RepoNotFound")
            if revision not in (None, "main", COMMIT, "v1"):
                return self.answer({"error": "none"}, 404, X_Error_Code="RevisionNotFound")
            files = [{"rfilename": n, "size": len(data)} for n, data in self.repositories[name].items()]
            return self.answer({"id": name, "sha": COMMIT, "siblings": files})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/.+", path):
            held = self.repositories[found[1]]
            return self.answer([{"type": "file", "path": n, "size": len(held[n]), "oid": "0" * 40} for n in held])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            data = self.repositories.get(found[1], {}).get(found[2])
            if data is None:  # without an answer, the client would ask for half a minute
                return self.answer({"error": "none"}, 404, X_Error_Code="EntryNotFound")
            self.fetched.append(found[2])
            return self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)
        return self.answer({"error": "none"}, 404)


@contextmanager
def running(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    """Run a hub without repositories for ``huggingface_hub``, whose cache is the folder ``cache``."""

    class Handler(FakeHub):
        pass

    Handler.repositories, Handler.fetched, Handler.asked = {}, [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    hub.fetch_drafter.cache_clear()
    yield Handler
    server.shutdown()
    server.server_close()
    hub.fetch_drafter.cache_clear()
