"""Measure decoding after long texts: the default drafter beside plain decoding, and llama.cpp; the last line is JSON.

    export LLAMA_CPP=FOLDER                          # see engine_llama_cpp.py
    python benchmarks/long_texts.py MODEL --contexts 256,1024,4096,16384 --llama-cpp plain,ngram-cache

A prompt is a document and a request: a summary, a question on the document, code in a repository, or something
unrelated to it. The documents are this repository's pages and source files, cut so that the prompt has as many tokens
as the column says. Each prompt is decoded plainly and with drafts in turns, in one process, whose prefixes are kept, so
that only the first turn of a document computes its keys and values. A figure is the median over the turns of the
seconds per token after the first delivery; speedups are ratios within a turn. llama.cpp decodes the same token ids in a
process of its own while this one is idle.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peers import Process
from rich.console import Console
from rich.table import Table

from specdec import SpecDecoder
from specdec.base import machine

ROOT = Path(__file__).parent.parent
DOCUMENTS = {
    "pages": [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/lab").glob("*.md"))],
    "code": [*sorted((ROOT / "specdec/engine").rglob("*.py")), *sorted((ROOT / "specdec/speculation").rglob("*.py"))],
}
REQUESTS = {  # kind -> document, request
    "summary": ("pages", "Summarise the text above in ten sentences."),
    "question": (
        "pages",
        "What does the text above say about drafts and how they are verified? Quote it.",
    ),
    "code": (
        "code",
        "Take the first class of the files above, add a method `describe` to it that returns its state "
        "as a dict, and give the whole class.",
    ),
    "unrelated": ("pages", "Leave the text above aside. Write a short story about the keeper of a lighthouse."),
}


@dataclass
class Figures:
    """The figures of one prompt. A turn decodes it once plainly and once with drafts.

    Seconds per token count from the first delivery of tokens.

    kind: kind of the request, such as "summary".
    context: number of tokens of the prompt.
    prefill: seconds to the first token, if no prefix of the prompt was cached; None: one was.
    plain: seconds per token of plain decoding, of each turn.
    drafted: seconds per token with drafts, of each turn.
    acceptance: tokens per step with drafts, of each turn.
    peers: seconds per token of other engines, by name.
    same: whether the texts of all turns are equal.
    """

    kind: str
    context: int
    prefill: float | None = None
    plain: list[float] = field(default_factory=list)
    drafted: list[float] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)
    peers: dict[str, float] = field(default_factory=dict)
    same: bool = True

    def speedup(self) -> float:
        """Return the median over the turns of the speed with drafts divided by the speed of plain decoding."""
        return statistics.median(a / b for a, b in zip(self.plain, self.drafted, strict=True))


def prompt(decoder: SpecDecoder, kind: str, context: int) -> list[int]:
    """Return the token ids of a prompt with exactly ``context`` tokens: a document, cut to fit, and a request.

    kind: kind of the request, such as "summary". Ends the program if the document is too short.
    """
    document, request = REQUESTS[kind]
    tokenizer: Any = decoder.tokenizer
    text = "\n\n".join(f"{path.relative_to(ROOT)}:\n{path.read_text('utf-8')}" for path in DOCUMENTS[document])
    body = tokenizer(text, add_special_tokens=False)["input_ids"]
    mark = "\0DOCUMENT\0"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{mark}\n\n{request}"}], tokenize=False, add_generation_prompt=True
    )
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in whole.split(mark))
    room = context - len(before) - len(after)
    if room > len(body):
        sys.exit(f"the documents for '{kind}' have {len(body)} tokens; {context} are too many")
    return [*before, *body[: max(room, 0)], *after]


def decode(decoder: SpecDecoder, ids: list[int], tokens: int, depth: Any) -> tuple[float, float, list[int], float]:
    """Decode ``tokens`` tokens greedily after the prompt ``ids``.

    depth: draft length; 0: plain decoding; "auto": chosen in each step. Returns (seconds to the first delivery, seconds
    per token after it, the token ids, tokens per step).
    """
    begun, arrivals, made = time.perf_counter(), list[float](), list[int]()
    counts = list[int]()
    options: Any = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
    with decoder.open([ids], num_speculative_tokens=depth, **options) as generation:
        for events in generation.steps():
            new = [token for _, row in events for token in row]
            if new:
                arrivals.append(time.perf_counter() - begun)
                counts.append(len(new))
                made += new
    seconds = (arrivals[-1] - arrivals[0]) / (len(made) - counts[0])
    return arrivals[0], seconds, made, (len(made) - counts[0]) / (len(counts) - 1)


def measure(decoder: SpecDecoder, args: argparse.Namespace, peers: dict[str, Process]) -> list[Figures]:
    """Measure every prompt with specdec and all other engines, print each to stderr, and return the figures.

    args: the options of the command line. peers: processes of other engines, by name.
    """
    found = list[Figures]()
    for context in args.contexts:
        kept = set[str]()
        for kind in args.kinds:
            ids, own = prompt(decoder, kind, context), Figures(kind, context)
            texts = list[list[int]]()
            first, *_ = decode(decoder, ids, 2, 0)  # computes or finds the prefix
            if REQUESTS[kind][0] not in kept:
                own.prefill = first
                kept.add(REQUESTS[kind][0])
            decode(decoder, ids, args.tokens, "auto")  # costs and calibration are those of use, not of a first request
            for turn in range(args.turns):
                for depth in ((0, "auto"), ("auto", 0))[turn % 2]:
                    _, seconds, made, length = decode(decoder, ids, args.tokens, depth)
                    (own.plain if depth == 0 else own.drafted).append(seconds)
                    own.acceptance += [length] * (depth != 0)
                    texts.append(made)
            own.same = all(text == texts[0] for text in texts)
            for name, peer in peers.items():
                answer = peer.ask("generate", ids=ids, count=args.tokens, eos=[])
                count, arrivals = len(answer["tokens"]), answer["arrivals"]
                own.peers[name] = (arrivals[-1] - arrivals[0]) / (count - answer["first"])
            found.append(own)
            others = " ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in own.peers.items())
            print(
                f"{context} {kind}: plain {1000 * statistics.median(own.plain):.1f} ms a token, "
                f"x {own.speedup():.2f}, {statistics.median(own.acceptance):.2f} tokens a step, "
                f"equal: {own.same} {others}",
                file=sys.stderr,
                flush=True,
            )
    return found


def show(found: Sequence[Figures], console: Console) -> None:
    """Print a table with a line for each prompt, and one with the geometric means of all prompts of the same length."""
    names = [*found[0].peers]
    columns = ["plain, ms a token", "x plain", "tokens a step", "prefill, tokens/s", *(f"x {name}" for name in names)]
    table = Table("context", "kind", *columns)
    mean = statistics.geometric_mean
    for context in dict.fromkeys(own.context for own in found):
        rows = [own for own in found if own.context == context]
        for own in rows:
            drafted = statistics.median(own.drafted)
            table.add_row(
                f"{context:,}", own.kind, f"{1000 * statistics.median(own.plain):.1f}", f"{own.speedup():.2f}",
                f"{statistics.median(own.acceptance):.2f}", f"{context / own.prefill:.0f}" if own.prefill else "",
                *(f"{own.peers[name] / drafted:.2f}" for name in names),
            )  # fmt: skip
        table.add_row(
            f"{context:,}", "all", f"{1000 * mean(statistics.median(own.plain) for own in rows):.1f}",
            f"{mean(own.speedup() for own in rows):.2f}",
            f"{mean(statistics.median(own.acceptance) for own in rows):.2f}", "",
            *(f"{mean(own.peers[name] / statistics.median(own.drafted) for own in rows):.2f}" for name in names),
            end_section=True,
        )  # fmt: skip
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("model", help="a GGUF file, if llama.cpp is measured")
    parser.add_argument("--drafter", default="ngram+m2r2")
    parser.add_argument("--contexts", type=numbers, default=[256, 1024, 4096, 16384], help="tokens of the prompts")
    parser.add_argument("--kinds", type=names, default=[*REQUESTS])
    parser.add_argument("--tokens", type=int, default=96, help="that are generated")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--llama-cpp", type=names, default=[], metavar="plain,ngram-cache,..")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    options = {"ngram": {"store": 0}} if "ngram+" in args.drafter else {}  # no turn drafts from the text of another one
    decoder = SpecDecoder.from_pretrained(
        args.model, drafter=args.drafter, drafter_options=options, device="cpu", learn=False
    )
    peers = {}
    for mode in args.llama_cpp:
        peer = peers[f"llama.cpp {mode}"] = Process("engine_llama_cpp:LlamaCppKeeping")
        mode = "" if mode == "plain" else mode
        context = max(args.contexts) + args.tokens + 64
        peer.ask("load", path=args.model, threads=args.threads, context=context, mode=mode, source="", depth=None)
    found = measure(decoder, args, peers)
    show(found, Console())
    print(json.dumps({"processor": machine.processor_name(), "figures": [asdict(own) for own in found]}))
    return int(not all(own.same for own in found))


if __name__ == "__main__":
    sys.exit(main())
