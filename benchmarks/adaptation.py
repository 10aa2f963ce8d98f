"""How far requests of one kind improve a drafter that has taught itself on texts of all kinds.

    python benchmarks/adaptation.py MODEL --learned DIR/16000 --output DIR

``--learned`` is a stage that ``learning.py`` kept. From it, each of six kinds begins: the model answers requests that
templates make, 20 are learned from, and 10 others are decoded with a fixed draft length before and after it. Tokens a
step do not depend on the machine. ``adaptation.json`` has them; the next run goes on with the kinds that are missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from learning import learn, learner_of, opened

from specdec.api.decoder import SpecDecoder

Text = tuple[list[int], int]  # token ids, and the number of those of the prompt

PEOPLE = "Ana Ruiz", "Bo Larsen", "Chen Wei", "Dina Haddad", "Emeka Obi", "Farah Khan"
CITIES = "Lisbon", "Oslo", "Chengdu", "Beirut", "Lagos", "Sofia"
GOODS = "blender", "desk lamp", "rain jacket", "office chair", "headset", "water bottle"
TROUBLES = "arrived broken", "has not arrived", "has the wrong colour", "was charged twice"
TABLES = (
    "customers(id, name, city, created_at)",
    "orders(id, customer_id, total, status, ordered_on)",
    "employees(id, name, department, salary, hired_on)",
    "products(id, name, category, price, stock)",
    "courses(id, title, teacher, credits)",
    "flights(id, origin, destination, departs_at, price)",
)
TASKS = (
    "List the ten most recent rows.",
    "Count rows for each value of the third column, where there are more than 5.",
    "Find the average of the numeric column for each value of the second one.",
    "Find duplicates by the second column.",
    "Show the top 3 rows of each group by the numeric column.",
    "Delete rows that have NULL in any column.",
)
TOPICS = (
    *("why the sky is blue", "how to bake bread", "what a stock exchange is", "how vaccines work"),
    *("who invented the telephone", "what to see in Rome", "how to learn to swim", "why leaves fall"),
    *("how a bicycle stays upright", "what inflation is", "how bees make honey", "why we dream"),
    *("how to save money", "what a black hole is", "how to calm a crying baby", "how clocks work"),
)
FUNCTIONS = (
    *("is_leap_year(year)", "reverse_words(text)", "median(numbers)", "roman(number)", "flatten(lists)"),
    *("is_palindrome(text)", "gcd(a, b)", "title_case(text)", "chunks(items, size)", "to_binary(number)"),
)
PIRATE = (
    "You are Captain Redbeard, an old pirate. You answer with 'Arr' and 'matey', and end with advice for life at sea."
)
KINDS: dict[str, tuple[str, ...] | Any] = {
    "json": (
        "Extract a JSON object with the keys people, places, dates and facts (short strings) from the text. Reply with "
        "JSON only.\n\nText: In {}, {} opened a shop in {} that sells one {} a day and is closed on Sundays.",
        ("2019", "2021", "2023"),
        *(PEOPLE, CITIES, GOODS),
    ),
    "sql": ("Given the PostgreSQL table {}.\nTask: {}\nAnswer with one SQL statement.", TABLES, TASKS),
    "persona": ("{} {}.", ("Tell me", "Explain"), TOPICS),
    "support": (
        "Write a short, polite reply to {}, a customer whose {} {}. Offer a solution.",
        *(PEOPLE, GOODS, TROUBLES),
    ),
    "tests": (
        "Write {} pytest tests for the Python function {}. Only code.",
        *(("three", "four", "five"), FUNCTIONS),
    ),
    "translation": (
        "Translate to French: The {} that I bought in {} {}, so I would like my money back.",
        *(GOODS, CITIES, TROUBLES),
    ),
}


def answered(decoder: SpecDecoder, kind: str, count: int, limit: int) -> list[Text]:
    """Texts of a kind, plainly decoded, no two prompts alike."""
    template, *parts = KINDS[kind]
    prompts = [template.format(*each) for each in random.Random(kind).sample([*itertools.product(*parts)], count)]
    how: dict[str, Any] = {"system": PIRATE} if kind == "persona" else {}
    with decoder.open(prompts, max_new_tokens=limit, **how) as generation:
        for _ in generation.steps():
            pass
    return [(list(request.ids), len(request.prompt)) for request in generation.requests]


def tokens_a_step(decoder: SpecDecoder, texts: list[Text], depth: int) -> float:
    """Raises SystemExit if one is decoded to another text."""
    steps = tokens = 0
    for ids, start in texts:
        with decoder.open([ids[:start]], max_new_tokens=len(ids) - start, num_speculative_tokens=depth) as generation:
            generation.requests[0].learn = False
            for _ in generation.steps():
                pass
        [out] = generation.outputs()
        if out.token_ids != ids[start:]:
            raise SystemExit("another text than plain decoding")
        steps += out.metrics.num_spec_steps
        tokens += out.metrics.num_spec_steps + out.metrics.num_accepted_draft_tokens
    return tokens / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--learned", type=Path, required=True)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--requests", type=int, default=20, help="that are learned from")
    parser.add_argument("--held-out", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    kept = args.output / "adaptation.json"
    found: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    plain = SpecDecoder.from_pretrained(args.model, drafter="none", learn=False)
    for kind in (each for each in args.kinds.split(",") if each not in found):
        answers = args.output / f"{kind}.json"
        if not answers.exists():
            answers.write_text(json.dumps(answered(plain, kind, args.requests + args.held_out, args.max_new_tokens)))
        texts = json.loads(answers.read_text())
        with tempfile.TemporaryDirectory() as folder:
            decoder = opened(plain, Path(shutil.copytree(args.learned, folder, dirs_exist_ok=True)))
            before, learner = tokens_a_step(decoder, texts[args.requests :], args.depth), learner_of(decoder)
            tokens, fits = learner.fits.progress.tokens, learner.fits.progress.fits
            for ids, start in texts[: args.requests]:
                learn(decoder, ids, start)
            after = tokens_a_step(decoder, texts[args.requests :], args.depth)
        found[kind] = {"tokens": learner.fits.progress.tokens - tokens, "fits": learner.fits.progress.fits - fits}
        found[kind] |= {"before": before, "after": after, "gain": after / before - 1}
        kept.write_text(json.dumps(found, indent=2))
        print(f"{kind}: " + ", ".join(f"{name} {figure:.3g}" for name, figure in found[kind].items()), flush=True)
    gains = [each["gain"] for each in found.values()]
    print(f"gain: median {statistics.median(gains):+.1%}, least {min(gains):+.1%}")


if __name__ == "__main__":
    main()
