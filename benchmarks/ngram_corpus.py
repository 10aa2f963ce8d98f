"""The corpus of the n-gram drafter: made of recorded answers, and measured on others by exact replay.

    python benchmarks/ngram_corpus.py pack corpus.txt.xz MODEL=answers.jsonl.gz OTHER=more.jsonl.gz --not eval.jsonl
    python benchmarks/ngram_corpus.py replay MODEL=answers.jsonl.gz --hold-out 150

Answers are JSONL with ``prompt_ids`` and ``response_ids``, in the tokens of the model before the "=". ``pack`` leaves
out answers that share 12 words in a row with a file after ``--not``. The package's corpus has the answers of
Qwen2.5-Coder-1.5B-Instruct, then those of SmolLM2-135M-Instruct. ``replay`` drafts the last answers anew with an
eighth, a quarter, half and all of the others: tokens a step at 16 nodes, and how often nodes are right, by estimate.
"""

from __future__ import annotations

import argparse
import itertools
import lzma
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specdec.base import inputs
from specdec.drafters.ngram import CORPUS_WEIGHT, NO_CANDIDATES, OWN_WEIGHT
from specdec.models.loading import read_tokenizer
from specdec.runtimes.tree_drafting import Candidates
from specdec.speculation.ngram import Grower, Ints, Prior, Texts

SHORTEST, NODES = 40, 16  # characters of a text; nodes of a tree
Answer = tuple[list[int], list[int]]  # the prompt's tokens, and the answer's


def grams(text: str) -> set[tuple[str, ...]]:
    """Each 12 words in a row."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 12]) for i in range(len(words) - 11)}


def strings(value: Any) -> Iterator[str]:
    """All texts in a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def records(path: str) -> list[dict[str, Any]]:
    return [inputs.parse_json(line) for _, line in inputs.lines(Path(path))]


def answers(source: str) -> tuple[Any, list[Answer]]:
    """The tokenizer and the answers of MODEL=FILE."""
    model, _, path = source.partition("=")
    return read_tokenizer(model), [(row["prompt_ids"], row["response_ids"]) for row in records(path)]


def pack(output: Path, sources: Sequence[str], refused: Iterable[str]) -> None:
    known = {gram for path in refused for row in records(path) for text in strings(row) for gram in grams(text)}
    kept, seen = list[str](), 0
    for source in sources:
        tokenizer, found = answers(source)
        for _, ids in found:
            text = tokenizer.decode(ids, skip_special_tokens=True).replace("\0", "").strip()
            text, seen = text.split("\ufffd")[0], seen + 1  # cut in the middle of a character
            if len(text) >= SHORTEST and not grams(text) & known:
                kept.append(text)
    output.write_bytes(lzma.compress("\0".join(kept).encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{len(kept)} of {seen} answers, {output.stat().st_size / 1e3:.0f} kB")


def accepted(tree: Candidates, truth: Sequence[int]) -> list[int]:
    """The nodes of a tree that are right, counted from 1."""
    nodes = {edge: node for node, edge in enumerate(zip(tree.parents, tree.tokens, strict=True), start=1)}
    path = list(itertools.accumulate(truth, lambda node, token: nodes.get((node, token), -1), initial=0))[1:]
    return path[: path.index(-1)] if -1 in path else path


def replayed(held: Sequence[Answer], corpus: Ints, vocab_size: int, right: Any) -> float:
    """Tokens a step. right: [10, 3], by estimate in tenths: nodes, the sum of estimates, and nodes that were right."""
    grower, texts = Grower(Prior.count(corpus, vocab_size)), Texts(len(corpus))
    texts.add(corpus)
    steps = tokens = 0
    for prompt, answer in held:
        own, ids, seen = Texts(1 << 16), [*prompt, answer[0]], 0
        while done := answer[len(ids) - len(prompt) :]:
            own.add(ids[seen:])
            seen = len(ids)
            sources = [(texts, CORPUS_WEIGHT), (own, OWN_WEIGHT)]
            tree = grower(ids, sources, NODES, NO_CANDIDATES, nodes=NODES, general=1)
            path = accepted(tree, done)
            for node, score in enumerate(tree.scores, start=1):
                right[min(int(10 * math.exp(score)), 9)] += 1, math.exp(score), node in path
            steps, tokens = steps + 1, tokens + min(len(path) + 1, len(done))
            ids += done[: len(path) + 1]
    return tokens / steps


def replay(source: str, count: int) -> None:
    tokenizer, found = answers(source)
    held = [each for each in found if len(each[1]) > 1][-count:]
    asked = {tuple(prompt) for prompt, _ in held}
    others = [ids for prompt, ids in found if tuple(prompt) not in asked]
    for share in (8, 4, 2, 1):
        corpus = np.array([*itertools.chain.from_iterable((-1, *ids) for ids in others[::share]), -1], np.int32)
        right = np.zeros((10, 3))
        print(f"{len(corpus)} tokens: {replayed(held, corpus, len(tokenizer), right):.3f} tokens a step")
    for nodes, estimates, hits in right[right[:, 0] > 0]:
        print(f"{nodes:8.0f} nodes, estimated {estimates / nodes:.3f}, real {hits / nodes:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    make = commands.add_parser("pack")
    make.add_argument("output", type=Path)
    make.add_argument("sources", nargs="+", metavar="MODEL=FILE")
    make.add_argument("--not", nargs="*", default=[], dest="refused", metavar="FILE")
    measure = commands.add_parser("replay")
    measure.add_argument("source", metavar="MODEL=FILE")
    measure.add_argument("--hold-out", type=int, default=150)
    given = parser.parse_args()
    if given.command == "pack":
        pack(given.output, given.sources, given.refused)
    else:
        replay(given.source, given.hold_out)


if __name__ == "__main__":
    main()
