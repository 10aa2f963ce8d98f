"""Clients that people use, with tools: LangChain, LiteLLM, Anthropic's, and OpenAI's agents, against a tiny model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from calls import GIVEN_SUM, thinking
from servers import NAME, Server

KEY, ASK = "secret", "1 + 4?"
pytestmark = pytest.mark.slow  # importing them takes seconds


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with thinking() as running:
        yield running


def is_sum(arguments: dict[str, Any]) -> bool:
    """Whether a call keeps the schema."""
    return set(arguments) == {"a", "b"} and arguments["a"] in (1, 2) and arguments["b"] in (3, 4)


def test_langchain_calls_a_tool_streams_and_goes_on(server: Server) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    from langchain_core.messages import HumanMessage, ToolMessage

    model = langchain.ChatOpenAI(
        model=NAME, base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, temperature=0, max_tokens=200
    )
    forced = model.bind_tools([GIVEN_SUM], tool_choice="required", parallel_tool_calls=False)
    answer = forced.invoke(ASK)
    [call] = answer.tool_calls
    assert call["name"] == "sum" and is_sum(call["args"])
    chunks = list(forced.stream(ASK))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert [each["args"] for each in whole.tool_calls] == [call["args"]]
    after = model.bind(max_tokens=5).invoke([HumanMessage(ASK), answer, ToolMessage("5", tool_call_id=call["id"])])
    assert after.content and after.usage_metadata["output_tokens"] == 5
    schema = {"title": "sum", **GIVEN_SUM["function"]["parameters"]}
    assert is_sum(model.with_structured_output(schema, method="json_schema").invoke(ASK))


def test_litellm_calls_a_tool_and_streams(server: Server) -> None:
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    how: Any = {"model": f"openai/{NAME}", "api_base": f"{server.url}/v1", "api_key": KEY, "max_tokens": 200}
    how |= {"messages": [{"role": "user", "content": ASK}], "temperature": 0, "num_retries": 0}
    forced: Any = {"tools": [GIVEN_SUM], "tool_choice": "required", "parallel_tool_calls": False}
    message = litellm.completion(**how, **forced).choices[0].message
    [call] = message.tool_calls
    assert call.function.name == "sum" and is_sum(json.loads(call.function.arguments))
    back = [*how["messages"], message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "5"}]
    after = litellm.completion(**how | {"messages": back, "max_tokens": 5})
    parts = litellm.completion(**how | {"messages": back, "max_tokens": 5}, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert after.choices[0].message.content == text != "" and after.usage.completion_tokens == 5


@pytest.mark.parametrize("kind", ["OpenAIResponsesModel", "OpenAIChatCompletionsModel"])
def test_openais_agents_call_a_tool(server: Server, kind: str) -> None:
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    called = list[tuple[int, int]]()

    @agents.function_tool
    def add(a: Literal[1, 2], b: Literal[3, 4]) -> str:
        """Add two numbers."""
        called.append((a, b))
        return "sum"

    agents.set_tracing_disabled(True)

    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            model = getattr(agents, kind)(model=NAME, openai_client=client)
            settings = agents.ModelSettings(tool_choice="required", max_tokens=300, parallel_tool_calls=False)
            agent = agents.Agent(
                name="a", model=model, tools=[add], model_settings=settings, tool_use_behavior="stop_on_first_tool"
            )
            return (await agents.Runner.run(agent, ASK)).final_output

    assert asyncio.run(run()) == "sum" and len(called) == 1
