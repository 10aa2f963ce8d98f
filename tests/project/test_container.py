"""The Dockerfile and the lines for docker compose: their commands are those of the command line."""

import json
import re
import socket
import subprocess
import sys

import typer
import yaml
from pages import ROOT, blocks
from servers import Replay, byte_tokenizer, serving, stand_in

from specdec import cli
from specdec.engine.request import Event

TEXT = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")


def instruction(name: str) -> list[str]:
    """The words of an instruction in JSON."""
    [found] = re.findall(rf"^{name} .*?(\[.*\])$", TEXT, re.M)
    return list(json.loads(found))


def test_the_container_serves_as_docker_compose_tells_it() -> None:
    [compose] = [yaml.safe_load(block.text) for block in blocks(ROOT / "docs/serve.md") if block.file == "compose.yaml"]
    service, scrape = compose["services"]["specdec"], yaml.safe_load(compose["configs"]["scrape"]["content"])
    program, command, *options = instruction("ENTRYPOINT") + service["command"]
    assert (program, command) == ("specdec", "serve")
    given = typer.main.get_command(cli.app).commands["serve"].make_context("serve", options).params  # type: ignore[attr-defined]
    assert given["host"] == "0.0.0.0" and f"EXPOSE {given['port']}\n" in TEXT
    assert scrape["scrape_configs"][0]["static_configs"] == [{"targets": [f"{service['hostname']}:{given['port']}"]}]
    assert service["volumes"] == ["models:/cache"] and "VOLUME /cache\n" in TEXT and "ENV SPECDEC_CACHE=/cache" in TEXT
    assert TEXT.index("USER specdec") < TEXT.index("ENTRYPOINT")


def test_the_health_check_is_that_of_the_server() -> None:
    program, *words = instruction("HEALTHCHECK")
    assert program == "python"
    with serving(stand_in(byte_tokenizer()), Replay(lambda request: [Event([65], "length", depths=[0])])) as server:
        here = [word.replace("http://127.0.0.1:8000", server.url) for word in words]
        assert here != words and subprocess.run([sys.executable, *here]).returncode == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    gone = [word.replace(":8000", f":{port}") for word in words]
    assert subprocess.run([sys.executable, *gone], capture_output=True).returncode != 0
