"""Measure how a drafter that learns by itself improves with the text it has seen, beside plain decoding and n-grams.

    python benchmarks/learning.py MODEL --texts answers.jsonl --prompts mt-bench --output DIR

``--texts`` are requests of the past: JSONL with ``prompt_ids`` and ``response_ids``, as ``specdec train`` writes them.
At each number of ``--tokens``, all drafters decode the prompts in turns; a shipped drafter is left out. What was
learned is stored in DIR/learned, from which the next run continues, and a copy after each number of tokens in
DIR/TOKENS. ``curve.json`` and ``curve.svg`` have tokens per step and the speed over plain decoding. With a number as
``--depth``, tokens per step do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from matplotlib.figure import Figure

from specdec.api.decoder import SpecDecoder
from specdec.base import inputs
from specdec.bench.prompts import evenly_spaced, load_prompts
from specdec.drafters.m2r2 import learned
from specdec.drafters.m2r2.learning import M2R2Learner
from specdec.models import drafter_folder

Figures = dict[str, dict[str, Any]]
KEPT = "latest", "read"


def opened(plain: SpecDecoder, folder: Path, drafter: str = "m2r2") -> SpecDecoder:
    """Return a copy of the decoder ``plain`` with a drafter that continues learning from what ``folder`` has stored.

    drafter: name of the drafter. A drafter of the package is left out, so that learning starts from nothing.
    """
    shipped = mock.patch.object(drafter_folder, "find_shipped", lambda *args: None)
    with shipped, mock.patch.object(learned, "folder", lambda: folder):
        decoder = plain.with_drafter(drafter)
    if drafter == "m2r2" and (rest := folder / "texts.pt").exists():
        vars(learner_of(decoder)).update(torch.load(rest, weights_only=False))
    return decoder


def learner_of(decoder: SpecDecoder) -> M2R2Learner:
    """Return the object through which the drafter of ``decoder`` learns while it decodes."""
    return decoder.drafter.learner  # type: ignore[attr-defined,no-any-return]


def learn(decoder: SpecDecoder, ids: list[int], start: int) -> float:
    """Let the drafter of ``decoder`` learn from one text; return the seconds of its longest uninterrupted work.

    ids: token ids of prompt and answer. start: index of the answer's first token.
    """
    learner_of(decoder).add(ids, start)
    longest, more = 0.0, True
    while more:
        began = time.perf_counter()
        more = decoder.drafter.learner.work()
        longest = max(longest, time.perf_counter() - began)
    return longest


def keep(decoder: SpecDecoder) -> None:
    """Write what the drafter of ``decoder`` has learned to its folder, and the texts that it has in memory."""
    learner = learner_of(decoder)
    learner.save()
    if learner.fits.store.path.exists():
        torch.save({name: vars(learner)[name] for name in KEPT}, learner.fits.store.path.parent / "texts.pt")


def measured(decoders: dict[str, SpecDecoder], prompts: list[str], **how: Any) -> Figures:
    """Decode the prompts with every decoder; return its figures by name of the decoder.

    The figures of a decoder are "tokens a step" (over all prompts), "over plain" (the median over the prompts of its
    speed divided by that of plain decoding), "least" (the smallest of these) and "slowest" (the prompt with it).
    decoders: by name; "none" is plain decoding. how: arguments of ``SpecDecoder.open``. Ends the program if a drafter
    changes the text.
    """
    speeds: dict[str, list[float]] = {name: [] for name in decoders}
    steps, tokens, text = dict.fromkeys(decoders, 0), dict.fromkeys(decoders, 0), list[int]()
    for prompt in prompts:
        for name, decoder in decoders.items():
            with decoder.open([prompt], **how) as generation:
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
        | {"slowest": prompts[own.index(min(own))]}
        for name, own in over.items()
    }


def draw(curve: list[dict[str, Any]], names: list[str], path: Path) -> None:
    """Draw the speed over plain decoding of each drafter in ``names`` into the picture file ``path``.

    curve: the entries of curve.json, each with "tokens" (learned from) and, by drafter, figures such as "over plain".
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in names:
        axes.plot(
            [stage["tokens"] for stage in curve], [stage[name]["over plain"] for stage in curve], "o-", label=name
        )
    axes.set_xscale("symlog", linthresh=1000)
    axes.set_xlabel("tokens learned from")
    axes.set_ylabel("x plain decoding, median of prompts")
    axes.legend()
    figure.savefig(path)


def texts_after(path: Path, number: int) -> Iterator[tuple[list[int], int]]:
    """Yield (token ids, number of prompt tokens) of each text in a JSONL file, without the first ``number`` texts.

    A line has "prompt_ids" and "response_ids". Texts with an answer of one token are left out and not counted.
    """
    for _, line in inputs.lines(path):
        text = inputs.parse_json(line)
        ids, start = [*text["prompt_ids"], *text["response_ids"]], len(text["prompt_ids"])
        if len(ids) > start + 1:  # others are not learned from
            number -= 1
            if number < 0:
                yield ids, start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--prompts", default="mt-bench")
    parser.add_argument("--limit", type=int, default=10, help="number of prompts")
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--tokens", default="0,1000,2000,4000,8000,16000,32000,64000,100000")
    parser.add_argument("--drafters", default="ngram,m2r2,ngram+m2r2")
    parser.add_argument("--depth", default="auto", help="draft length")
    parser.add_argument("--minutes", type=float, default=1e9, help="of learning in this run; the next one goes on")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    (now := args.output / "learned").mkdir(parents=True, exist_ok=True)
    kept, names = args.output / "curve.json", args.drafters.split(",")
    curve: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    conversations = evenly_spaced(load_prompts(args.prompts).conversations, args.limit)
    prompts = [conversation.turns[0] for conversation in conversations]
    how: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
    how["num_speculative_tokens"] = "auto" if args.depth == "auto" else int(args.depth)
    plain = SpecDecoder.from_pretrained(args.model, drafter="none", learn=False, prefix_reuse=False)
    decoder, end = opened(plain, now), time.monotonic() + 60 * args.minutes
    learner = learner_of(decoder)
    texts = texts_after(args.texts, learner.fits.progress.texts)
    for stage in [int(n) for n in args.tokens.split(",")][len(curve) :]:
        began, longest = time.perf_counter(), 0.0
        for text in texts if learner.fits.progress.tokens < stage else ():
            longest = max(longest, learn(decoder, *text))
            if learner.fits.progress.tokens >= stage or time.monotonic() >= end:
                break
        keep(decoder)
        learning = time.perf_counter() - began
        done = f"{learner.fits.progress.tokens} tokens, {learning:.0f} s, longest piece {longest:.2f} s"
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        if learner.fits.progress.tokens < stage and time.monotonic() >= end:
            print(f"{done}, {memory:.0f} MB at most: time is up", flush=True)
            break
        copied = shutil.copytree(now, args.output / str(stage), dirs_exist_ok=True)
        decoders = {"none": plain} | {name: opened(plain, copied, name) for name in names}  # as in a new process
        found = measured(decoders, prompts, scope=str(stage), **how)
        agreement = learner.fits.progress.agreement[-1][1] if learner.fits.progress.agreement else 0.0
        measures = {"tokens": learner.fits.progress.tokens, "seconds": learning, "longest piece": longest, "MB": memory}
        curve.append(measures | {"agreement": agreement} | found)
        draw(curve, names, args.output / "curve.svg")
        kept.write_text(json.dumps(curve, indent=2))
        figures = "; ".join(
            f"{name} {own['tokens a step']:.2f} a step, {own['over plain']:.2f} x "
            f"(least {own['least']:.2f}, {own['slowest'][:40]!r})"
            for name, own in found.items()
        )
        print(f"{done}, {memory:.0f} MB at most, agreement {agreement:.3f}: {figures}", flush=True)
        if learner.fits.progress.tokens < stage:
            break


if __name__ == "__main__":
    main()
