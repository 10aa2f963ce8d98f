"""Runs coding agents against ``specdec serve``: each does a task of two steps, with a tool or an edit.

    for name in llm pydantic-ai mini-swe-agent aider-chat; do
        python -m venv clients/$name && clients/$name/bin/pip install $name
    done
    python examples/agent_clients.py clients --model qwen2.5-coder-1.5b-instruct

Each client has a virtual environment of its own, in the folder that is given; one that is not there is left out. A task
is right if its client ends without an error, has done what it should, and the server has refused nothing. The exit code
is 1 if any is wrong. ``--keep FOLDER`` keeps what the clients print and the server's log, with all prompts.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NAME = "local"
PATIENCE = 240  # seconds for a client
PYDANTIC = """
import sys
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

url, kind = sys.argv[1:]
if kind == "messages":
    model = AnthropicModel("local", provider=AnthropicProvider(base_url=url, api_key="none"))
else:
    made = OpenAIChatModel if kind == "chat" else OpenAIResponsesModel
    model = made("local", provider=OpenAIProvider(base_url=url + "/v1", api_key="none"))
agent = Agent(model, model_settings={"temperature": 0, "max_tokens": 128})
called = []

@agent.tool_plain
def population(city: str) -> int:
    "The number of people who live in a city."
    called.append(city)
    return 712345

first = agent.run_sync("How many people live in Oslo? Use the tool.")
second = agent.run_sync("Repeat that number.", message_history=first.all_messages())
print("called:", called, "answers:", first.output, "|", second.output)
assert called
"""
FUNCTIONS = """
def population(city: str) -> int:
    "The number of people who live in a city."
    return 712345
"""
MINI = """
agent:
  step_limit: 8
  instance_template: |
    {{task}} Call the tool bash with one command. When you see its result and the task is done, call bash with the
    command `echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT`, alone.
model:
  model_kwargs: {temperature: 0, max_tokens: 400, tool_choice: required, parallel_tool_calls: false}
"""


@dataclass
class Job:
    """A task of a client. bin: of its environment. folder: an empty one, in which it works. url: of the server."""

    bin: Path
    folder: Path
    url: str

    def run(self, *command: str, **environment: str) -> str:
        """Run a program of the environment in the folder; return what it prints. Raises RuntimeError if it fails."""
        known = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        known |= {"HOME": str(self.folder), "TERM": "dumb", "COLUMNS": "200", "OPENAI_API_KEY": "none"}
        done = subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.folder,
            env=known | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        with (self.folder / "printed.txt").open("a") as file:
            file.write(done.stdout)
        if done.returncode:
            raise RuntimeError(f"{command[0]} ends with {done.returncode}: {done.stdout.strip()[-400:]}")
        return done.stdout


def check(holds: object, what: str) -> None:
    if not holds:
        raise RuntimeError(what)


def use_llm(job: Job, responses: bool) -> None:
    model = f"- {{model_id: {NAME}, model_name: {NAME}, api_base: {job.url}/v1, supports_tools: true"
    model += ", responses: true}" if responses else "}"
    (job.folder / "extra-openai-models.yaml").write_text(model + "\n")
    greedy = ["llm", "-m", NAME, "-o", "temperature", "0"]
    ask = [*greedy, "--td", "--functions", FUNCTIONS, "How many people live in Oslo? Use the tool."]
    printed = job.run(*ask, LLM_USER_PATH=str(job.folder))
    check("Tool call: population" in printed, "the tool was not called")
    check(job.run(*greedy, "-c", "Repeat that number.", LLM_USER_PATH=str(job.folder)).strip(), "no answer")


def use_pydantic_ai(job: Job, kind: str) -> None:
    check("called: ['Oslo'" in job.run("python", "-c", PYDANTIC, job.url, kind), "the tool was not called")


def use_mini(job: Job) -> None:
    """With a short prompt, and calls that are forced: a small model copies the example of the client's own prompt."""
    task = "Write the word hello into the file greeting.txt."
    (job.folder / "short.yaml").write_text(MINI)
    how = ["-c", "mini.yaml", "-c", "short.yaml", "-c", f"model.model_kwargs.api_base={job.url}/v1"]
    job.run(
        "mini", "-y", "--exit-immediately", "-m", f"openai/{NAME}", "-t", task, "-o", "trajectory.json", *how,
        MSWEA_CONFIGURED="true", MSWEA_COST_TRACKING="ignore_errors",
    )  # fmt: skip
    check("hello" in (job.folder / "greeting.txt").read_text().lower(), "the file is not there")


def use_aider(job: Job) -> None:
    """With whole files: a small model does not keep to the marks of passages."""
    file = job.folder / "area.py"
    file.write_text('def square(side):\n    """The area of a square."""\n    return side + side\n')
    how = ["aider", "--model", f"openai/{NAME}", "--openai-api-base", f"{job.url}/v1", "--edit-format", "whole"]
    how += ["--yes-always", "--no-git", "--no-show-model-warnings", "--no-check-update", "--analytics-disable"]
    how += ["--no-pretty", "--no-show-release-notes", "--map-tokens", "0", "--restore-chat-history"]
    for task in ("square adds where it must multiply. Correct it.", "Add a function cube(side): the volume of a cube."):
        job.run(*how, "--message", task, file.name)
    space: dict[str, Callable[[int], int]] = {}
    exec(file.read_text(), space)
    check(space["square"](3) == 9 and space["cube"](3) == 27, "the edits are wrong")


TASKS: dict[str, tuple[str, Callable[[Job], None]]] = {
    "llm, chat": ("llm", lambda job: use_llm(job, False)),
    "llm, responses": ("llm", lambda job: use_llm(job, True)),
    "pydantic-ai, chat": ("pydantic-ai", lambda job: use_pydantic_ai(job, "chat")),
    "pydantic-ai, messages": ("pydantic-ai", lambda job: use_pydantic_ai(job, "messages")),
    "pydantic-ai, responses": ("pydantic-ai", lambda job: use_pydantic_ai(job, "responses")),
    "mini-swe-agent": ("mini-swe-agent", use_mini),
    "aider": ("aider-chat", use_aider),
}


@contextmanager
def server(args: argparse.Namespace, log: list[str]) -> Iterator[str]:
    """The address of a server. log: gets its lines."""
    command = [sys.executable, "-m", "specdec", "serve", "--model", args.model, "--drafter", args.drafter]
    command += ["--port", "0", "--name", NAME, "--log-requests"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    try:
        for line in child.stderr:
            log.append(line)
            if found := re.search(r"is served at (http://\S+)", line):
                break
        else:
            sys.exit("the server does not start: " + "".join(log))
        threading.Thread(target=log.extend, args=(child.stderr,), daemon=True).start()
        yield found[1]
    finally:
        child.terminate()
        child.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", type=Path, help="folder of virtual environments")
    parser.add_argument("--model", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--drafter", default="ngram+m2r2")
    parser.add_argument("--only", default="", help="a part of the names of the tasks to run")
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    log, wrong = list[str](), 0
    with tempfile.TemporaryDirectory() as folder, server(args, log) as url:
        for name, (client, task) in TASKS.items():
            own = (args.keep or Path(folder)).absolute() / name.replace(", ", "-").replace(" ", "-")
            bin = args.clients.absolute() / client / "bin"
            if args.only not in name or not bin.exists():
                continue
            own.mkdir(parents=True)
            before, began = len(log), time.perf_counter()
            try:
                task(Job(bin, own, url))
                refused = [line for line in log[before:] if re.search(r"(GET|POST) \S+ [45]\d\d", line)]
                check(not refused, f"the server refuses: {refused}")
                said = "right"
            except (RuntimeError, KeyError, SyntaxError, OSError, subprocess.TimeoutExpired) as error:
                said, wrong = f"WRONG: {error}", wrong + 1
            requests = sum(bool(re.search(r" POST /v1/\S+ 200", line)) for line in log[before:])
            print(f"{name}: {said}; {requests} requests, {time.perf_counter() - began:.0f} s", flush=True)
            (own / "server.log").write_text("".join(log[before:]))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
