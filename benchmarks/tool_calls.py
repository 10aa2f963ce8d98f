"""Tool calls over HTTP with the official client: are they the right ones, and are their arguments valid?

    python benchmarks/tool_calls.py [--model MODEL] [--drafter prompt-lookup+m2r2] [--count 100] [--clients 4]

There are two tools, one for the weather and one that calculates. ``--count`` requests force a call, half of them by
``tool_choice: required`` and half by a name; half as many again leave it to the model (``auto``). A call is right if it
is of the tool that was asked for, and its arguments name what was asked about. Each call is answered with a result, and
the model continues. Exits with 1 if arguments of a forced call are not valid. Needs openai and jsonschema; sampled with
one seed per request.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
from serving import server

CITIES = ("Oslo", "Rome", "Lima", "Cairo", "Tokyo", "Quito", "Paris", "Delhi", "Perth", "Accra")
OPERATORS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
PARAMETERS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "minLength": 1, "maxLength": 40},
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
        },
        "required": ["city", "unit", "days"],
        "additionalProperties": False,
    },
    "calculate": {
        "type": "object",
        "properties": {
            "operation": {"enum": list(OPERATORS)},
            "a": {"type": "integer", "minimum": -9999, "maximum": 9999},
            "b": {"type": "integer", "minimum": -9999, "maximum": 9999},
        },
        "required": ["operation", "a", "b"],
        "additionalProperties": False,
    },
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "description": what, "parameters": PARAMETERS[name]}}
    for name, what in (("get_weather", "The weather of the next days."), ("calculate", "Calculates with two numbers."))
]


def task(number: int) -> tuple[str, str, dict[str, Any]]:
    """A question, the tool that answers it, and the arguments that it should be called with."""
    if number % 2:
        operation = list(OPERATORS)[number // 2 % 4]
        a, b = 7 * number + 12, 3 * number % 17 + 2
        return f"What is {a} {OPERATORS[operation]} {b}?", "calculate", {"operation": operation, "a": a, "b": b}
    city, unit = CITIES[number // 2 % 10], ("celsius", "fahrenheit")[number // 20 % 2]
    days = number % 7 + 1
    arguments = {"city": city, "unit": unit, "days": days}
    return f"How is the weather in {city} for the next {days} days, in {unit}?", "get_weather", arguments


def ask(client: openai.OpenAI, model: str, number: int, how: str) -> Counter[str]:
    """One round: the call, and an answer to its result. Counts what became of it."""
    question, name, wanted = task(number)
    messages: list[Any] = [{"role": "user", "content": question}]
    choice: Any = {"type": "function", "function": {"name": name}} if how == "named" else how
    more: dict[str, Any] = {"model": model, "tools": TOOLS, "seed": number, "temperature": 0.7}
    answer = client.chat.completions.create(
        messages=messages, tool_choice=choice, parallel_tool_calls=False, max_tokens=96, **more
    )
    message, found = answer.choices[0].message, Counter({f"{how} asked": 1})
    if not message.tool_calls:
        print(f"{how}, without a call: {message.content!r}")
        return found + Counter({f"{how} without a call": 1})
    [call] = message.tool_calls
    try:
        arguments = json.loads(call.function.arguments)
        jsonschema.validate(arguments, PARAMETERS[call.function.name])
    except (ValueError, jsonschema.ValidationError) as error:
        print(f"{how}: {str(error).splitlines()[0]}: {call.function.arguments}")
    else:
        found[f"{how} valid"] = 1
        right = call.function.name == name and all(
            str(arguments[key]).lower() == str(value).lower() for key, value in wanted.items()
        )
        found[f"{how} right"] = int(right)
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "12"}]
    again = client.chat.completions.create(messages=messages, tool_choice="none", max_tokens=4, **more)
    found[f"{how} answered"] = int(bool(again.choices[0].message.content))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--drafter", default="prompt-lookup+m2r2")
    parser.add_argument("--count", type=int, default=100, help="forced calls")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--url", help="of a server that runs; otherwise one is started")
    given = parser.parse_args()
    jobs = [(n, ("required", "named")[n // 2 % 2]) for n in range(given.count)]
    jobs += [(n, "auto") for n in range(given.count // 2)]
    found, began = Counter[str](), time.perf_counter()
    clients, given.clients = given.clients, [given.clients]
    with server(given) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600) as client:
        model = client.models.list().data[0].id
        with ThreadPoolExecutor(clients) as pool:
            for each in pool.map(lambda job: ask(client, model, *job), jobs):
                found += each
    for how in ("required", "named", "auto"):
        parts = [f"{found[f'{how} {what}']} {what}" for what in ("valid", "right", "answered", "without a call")]
        print(f"{how:9} {found[f'{how} asked']} asked: {', '.join(parts)}")
    print(f"{time.perf_counter() - began:.0f} s")
    return int(found["required valid"] + found["named valid"] < given.count)


if __name__ == "__main__":
    sys.exit(main())
