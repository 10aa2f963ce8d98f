"""JSON schemas: are outputs valid and equal to plain constrained decoding, and how fast is it?

    python benchmarks/structured.py [--model MODEL] [--drafter prompt-lookup+m2r2] [--count 0] [--part 1/1]

The schemas are made of each pair of leaves in each shape. Each is decoded greedily with the drafter, plainly under the
same constraint, and plainly without one. Outputs that the token limit cuts are counted and compared, but not validated.
Speeds need a quiet machine. Needs jsonschema.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from typing import Any

import jsonschema

from specdec import Json, SpecDecoder
from specdec.speculation.constraints import ConstraintState

Schema = dict[str, Any]
LEAVES: dict[str, Schema] = {
    "enum": {"enum": ["draft", "in review", "published", "withdrawn"]},
    "whole": {"type": "integer", "minimum": 1, "maximum": 500},
    "number": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "text": {"type": "string", "minLength": 1, "maxLength": 24},
    "date": {"type": "string", "format": "date"},
    "flag": {"type": "boolean"},
    "maybe": {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 9}]},
    "constant": {"const": {"kind": "record", "version": [1, 0]}},
}


def record(required: list[str], **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def shapes(a: Schema, b: Schema) -> dict[str, Schema]:
    ref = {"$ref": "#/$defs/thing"}
    array = {"type": "array", "items": a, "minItems": 1, "maxItems": 3}
    return {
        "flat": record(["first", "second"], first=a, second=b),
        "nested": record(["outer", "last"], outer=record(["inner", "more"], inner=record(["x"], x=a), more=b), last=a),
        "array": record(["items", "second"], items=array, second=b),
        "refs": record(["one", "two"], one=ref, two=ref) | {"$defs": {"thing": record(["a", "b"], a=a, b=b)}},
        "optional": record(["first"], first=a, second=b),
        "either": record(["either"], either={"anyOf": [record(["left"], left=a), record(["right"], right=b)]}),
    }


def schemas() -> list[tuple[str, Schema]]:
    """All of them: 72 pairs of two leaves in 6 shapes."""
    found = []
    for (n, a), (m, b) in itertools.product(LEAVES.items(), repeat=2):
        if n != m:
            found += [(f"{shape} of {n} and {m}", schema) for shape, schema in shapes(a, b).items()]
    return found


class Timer:
    """Seconds of each mask that is computed."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        compute = ConstraintState._mask

        def timed(state: ConstraintState, new: Any) -> Any:
            began = time.perf_counter()
            found = compute(state, new)
            self.seconds.append(time.perf_counter() - began)
            return found

        ConstraintState._mask = timed  # type: ignore[method-assign]

    def percentile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return 1e3 * ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def fault(output: Any, plain: Any, schema: Schema) -> str | None:
    """The error of an output, or None."""
    if output.token_ids != plain.token_ids:
        return "it differs from plain constrained decoding"
    if output.finish_reason == "length":
        return None
    try:
        jsonschema.validate(json.loads(output.text), schema, format_checker=jsonschema.FormatChecker())
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--drafter", default="prompt-lookup+m2r2")
    parser.add_argument("--count", type=int, default=0, help="schemas, evenly chosen from all; 0: all of them")
    parser.add_argument("--part", default="1/1", help="K/N: the K-th of N parts of these")
    parser.add_argument("--tokens", type=int, default=384, help="most new tokens")
    given = parser.parse_args()
    every = schemas()
    chosen = every[:: max(len(every) // given.count, 1)][: given.count] if given.count else every
    part, parts = map(int, given.part.split("/"))
    chosen = chosen[part - 1 :: parts]
    decoder = SpecDecoder.from_pretrained(given.model, given.drafter)
    plain, timer = decoder.with_drafter("none"), Timer()
    for each in (decoder, plain):  # one-time work happens here
        each.generate("Count.", max_new_tokens=16)
        each.generate("Count.", constraint=Json({"type": "string", "maxLength": 40}), max_new_tokens=16)
    names = ("drafted", "plain constrained", "plain")
    tokens, seconds = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
    faults, cut, steps, accepted = 0, 0, 0, 0
    for name, schema in chosen:
        prompt = f"Write a record as JSON with this schema: {json.dumps(schema)}"
        how: dict[str, Any] = {"max_new_tokens": given.tokens}
        outputs = {
            "drafted": decoder.generate(prompt, constraint=Json(schema), **how),
            "plain constrained": plain.generate(prompt, constraint=Json(schema), **how),
        }
        outputs["plain"] = plain.generate(prompt, max_new_tokens=max(len(outputs["drafted"].token_ids), 2))
        for method, output in outputs.items():
            spent = sum(value for phase, value in output.metrics.ledger.items() if phase != "prefill")
            tokens[method] += len(output.token_ids) - 1
            seconds[method] += spent
        output = outputs["drafted"]
        cut += output.finish_reason == "length"
        steps, accepted = steps + output.metrics.num_spec_steps, accepted + output.metrics.num_accepted_draft_tokens
        if why := fault(output, outputs["plain constrained"], schema):
            faults += 1
            print(f"{name}: {why}: {output.text[:200]}")
    rates = {method: tokens[method] / seconds[method] for method in names}
    print(f"{len(chosen)} schemas of {len(every)}: {faults} faults, {cut} cut at {given.tokens} tokens")
    print(f"mean acceptance length {1 + accepted / max(steps, 1):.2f}")
    for method in names:
        print(f"{method:18} {rates[method]:8.1f} tokens/s   {rates[method] / rates['plain']:.2f} x plain")
    print(f"mask: P50 {timer.percentile(0.5):.3f} ms, P99 {timer.percentile(0.99):.3f} ms of {len(timer.seconds)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
