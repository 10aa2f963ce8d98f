"""How a drafter that teaches itself improves with the text it has seen, beside plain decoding and n-grams.

    python benchmarks/learning.py MODEL --texts answers.jsonl --prompts mt-bench --output DIR

``--texts`` are requests of the past: JSONL with ``prompt_ids`` and ``response_ids``, as ``specdec train`` writes them.
At each of ``--tokens``, all drafters decode the prompts in turns. Learning begins empty, and nothing of it is kept.
``curve.json`` and ``curve.svg`` have tokens a step and the speed over plain decoding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from matplotlib.figure import Figure

from specdec.api.decoder import SpecDecoder
from specdec.base import inputs
from specdec.bench.prompts import evenly_spaced, load_prompts
from specdec.drafters import learned

DRAFTERS = "none", "ngram", "ngram+m2r2"


Figures = dict[str, dict[str, float]]


def measured(decoders: dict[str, SpecDecoder], prompts: list[str], limit: int, scope: str) -> Figures:
    """Of each drafter: pooled tokens a step, the median speed over plain decoding and the least of all prompts."""
    speeds: dict[str, list[float]] = {name: [] for name in decoders}
    steps, tokens, text = dict.fromkeys(decoders, 0), dict.fromkeys(decoders, 0), list[int]()
    for prompt in prompts:
        for name, decoder in decoders.items():
            with decoder.open([prompt], max_new_tokens=limit, scope=scope) as generation:  # n-grams forget each stage
                for _ in generation.steps():
                    pass
            [out] = generation.outputs()
            text = out.token_ids if name == "none" else text
            if out.token_ids != text:
                raise SystemExit(f"{name} decodes another text than plain decoding: {prompt[:60]!r}")
            m = out.metrics
            speeds[name].append((len(out.token_ids) - 1) / m.decode_seconds)
            steps[name] += m.num_spec_steps
            tokens[name] += m.num_spec_steps + m.num_accepted_draft_tokens
    over = {name: [a / b for a, b in zip(own, speeds["none"], strict=True)] for name, own in speeds.items()}
    return {
        name: {"tokens a step": tokens[name] / steps[name], "over plain": statistics.median(own), "least": min(own)}
        for name, own in over.items()
    }


def draw(curve: list[dict[str, Any]], path: Path) -> None:
    """The speed over plain decoding by the tokens learned from."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in DRAFTERS[1:]:
        axes.plot(
            [stage["tokens"] for stage in curve], [stage[name]["over plain"] for stage in curve], "o-", label=name
        )
    axes.set_xscale("symlog", linthresh=1000)
    axes.set_xlabel("tokens learned from")
    axes.set_ylabel("x plain decoding, median of prompts")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--prompts", default="mt-bench")
    parser.add_argument("--limit", type=int, default=10, help="number of prompts")
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--tokens", default="0,1000,2000,4000,8000,16000,32000,64000,100000")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    stages, curve = [int(n) for n in args.tokens.split(",")], list[dict[str, Any]]()
    conversations = evenly_spaced(load_prompts(args.prompts).conversations, args.limit)
    prompts = [conversation.turns[0] for conversation in conversations]
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(learned, "folder", lambda: Path(folder)):
        plain = SpecDecoder.from_pretrained(args.model, drafter="none", learn=False)
        decoders = {name: plain if name == "none" else plain.with_drafter(name) for name in DRAFTERS}
        learner = decoders["ngram+m2r2"].drafter.members[1].learner  # type: ignore[attr-defined]
        texts = (inputs.parse_json(line) for _, line in inputs.lines(args.texts))
        for stage in stages:
            began, longest = time.perf_counter(), 0.0
            for text in texts:
                learner.add([*text["prompt_ids"], *text["response_ids"]], len(text["prompt_ids"]))
                more = True
                while more:
                    piece = time.perf_counter()
                    more = decoders["ngram+m2r2"].drafter.learn()
                    longest = max(longest, time.perf_counter() - piece)
                if learner.progress.tokens >= stage:
                    break
            learning = time.perf_counter() - began
            learner.queue.clear()
            found = measured(decoders, prompts, args.max_new_tokens, str(stage))
            learner.queue.clear()  # the held-out prompts are not learned from
            agreement = learner.progress.agreement[-1][1] if learner.progress.agreement else 0.0
            curve.append(
                {
                    "tokens": learner.progress.tokens,
                    "seconds": learning,
                    "longest piece": longest,
                    "agreement": agreement,
                    **found,
                }
            )
            args.output.mkdir(parents=True, exist_ok=True)
            draw(curve, args.output / "curve.svg")
            (args.output / "curve.json").write_text(json.dumps(curve, indent=2))
            figures = "; ".join(
                f"{name} {own['tokens a step']:.2f} a step, {own['over plain']:.2f} x (least {own['least']:.2f})"
                for name, own in found.items()
            )
            done = f"{learner.progress.tokens} tokens, {learning:.0f} s, longest piece {longest:.2f} s"
            print(f"{done}, agreement {agreement:.3f}: {figures}", flush=True)
            if learner.progress.tokens < stage:
                break


if __name__ == "__main__":
    main()
