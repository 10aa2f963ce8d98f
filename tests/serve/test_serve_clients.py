"""The official client against a real server, whole and as a stream, blocking and asynchronous.

(Parameters, refusals and their forms: test_serve_conformance.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from servers import NAME, USER, Server, serving, tiny_decoder

SAMPLED = {"temperature": 0.8, "seed": 3, "max_tokens": 20}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tiny_decoder(tmp_path_factory.mktemp("tiny")), api_key="secret") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as made:
        yield made


def test_asynchronous_requests_run_at_once(server: Server, client: openai.OpenAI) -> None:
    def body(seed: int) -> dict[str, object]:
        return {"model": NAME, "messages": USER, **SAMPLED, "seed": seed}

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:

            async def streamed(seed: int) -> str:
                stream = await client.chat.completions.create(**body(seed), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            async def whole(seed: int) -> str:
                return (await client.chat.completions.create(**body(seed))).choices[0].message.content

            assert [model.id async for model in client.models.list()] == [NAME]
            assert (await client.models.retrieve(NAME)).owned_by == "specdec"
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("other")
            completion = await client.completions.create(model=NAME, prompt="Name", **SAMPLED)
            stream = await client.completions.create(model=NAME, prompt="Name", stream=True, **SAMPLED)
            assert completion.choices[0].text == "".join([chunk.choices[0].text async for chunk in stream]) != ""
            with pytest.raises(openai.BadRequestError, match="suffix"):
                await client.completions.create(model=NAME, prompt="Name", stream=True, extra_body={"suffix": "x"})
            return await asyncio.gather(*map(streamed, range(4)), *map(whole, range(4)))

    texts = asyncio.run(run())
    assert texts[:4] == texts[4:] and len(set(texts)) == 4
    assert texts[2] == client.chat.completions.create(**body(2)).choices[0].message.content
