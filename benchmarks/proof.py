"""Losslessness on real prompts: greedy tokens against ``model.generate``; the last line is JSON.

    python benchmarks/proof.py --limit 20 --max-new-tokens 128 --depths 1,3,7 --drafters none,m2r2,prompt-lookup

float32: tokens must be equal. Other dtypes: every emitted token must be the argmax, or a near-tie, under replay by the
model itself. Exit code 1 if a drafter fails. Without ``--prompts`` the twenty built-in prompts are used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdec import SpecDecoder
from specdec.text import encode
from specdec.verify import NEAR_TIE, margins

PROMPTS = [
    "Explain in two sentences why leaves change colour in autumn.",
    "Write a short Python function that reverses a list.",
    "List five things to pack for a week in the mountains.",
    "Translate to French: The train leaves at nine and I will be late.",
    "What is the capital of Australia, and why was it chosen?",
    "Tell me a story about a lighthouse keeper who is afraid of the dark.",
    "A shop sells pens at 3 for 2 euros. How much do 18 pens cost?",
    "Write a polite email asking a neighbour to turn the music down.",
    "Summarise the plot of Romeo and Juliet in one paragraph.",
    "Give me a recipe for pancakes without eggs.",
    "What are the advantages and disadvantages of electric cars?",
    "Write a haiku about rain on a tin roof.",
    "Correct the grammar: He don't knows where are the keys.",
    "Explain recursion to a ten-year-old.",
    "Write a SQL query that finds the three most frequent customers.",
    "Who painted the Mona Lisa, and when?",
    "Suggest a name and a slogan for a bakery that opens at midnight.",
    "Describe how a bill becomes law, step by step.",
    "Repeat the word 'echo' twelve times, separated by commas.",
    "What should I do if my computer does not turn on?",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=Path, help='JSONL with {"turns": [...]} or {"prompt": ...}')
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--drafters", default="none,m2r2,prompt-lookup")
    parser.add_argument("--depths", default="1,3,7")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runtime", default="auto")
    args = parser.parse_args()

    texts = PROMPTS
    if args.prompts:
        rows = [json.loads(line) for line in args.prompts.read_text("utf-8").splitlines() if line.strip()]
        texts = [row["turns"][0] if "turns" in row else row["prompt"] for row in rows]
    base = SpecDecoder.from_pretrained(args.model, "none", dtype=args.dtype, runtime=args.runtime)
    limit, exact = NEAR_TIE[base.target.dtype], base.target.dtype == torch.float32
    depths = [int(k) for k in args.depths.split(",")]
    arms = [(name, k) for name in args.drafters.split(",") for k in ([1] if name == "none" else depths)]
    decoders = {name: base.with_drafter(name) for name, _ in arms}
    equal, worst = dict.fromkeys(arms, 0), dict.fromkeys(arms, 0.0)
    prompts = [encode(base.tokenizer, text) for text in texts[: args.limit]]
    for ids in track(prompts, "prompts", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        out = base.model.generate(torch.tensor([ids]), max_new_tokens=args.max_new_tokens, do_sample=False)
        expected = out[0, len(ids) :].tolist()
        for arm in arms:
            name, depth = arm
            ours = decoders[name].generate(ids, max_new_tokens=args.max_new_tokens, num_speculative_tokens=depth)
            equal[arm] += ours.token_ids == expected
            worst[arm] = max(worst[arm], float(margins(base.target, ids, ours.token_ids).max()))

    table = Table(title=f"{args.model}, {base.target.runtime} runtime, {args.dtype}, near-tie margin {limit}")
    for column in ("drafter", "K", "equal to model.generate", "largest replay margin", "verdict"):
        table.add_column(column)
    report, failed = [], False
    for arm in arms:
        good = equal[arm] == len(prompts) if exact else worst[arm] <= limit
        failed |= not good
        table.add_row(
            arm[0], str(arm[1]), f"{equal[arm]}/{len(prompts)}", f"{worst[arm]:.3g}", "ok" if good else "FAULT"
        )
        report.append(
            {"drafter": arm[0], "depth": arm[1], "equal": equal[arm], "of": len(prompts), "largest_margin": worst[arm]}
        )
    Console().print(table)
    print(json.dumps({"dtype": args.dtype, "runtime": base.target.runtime, "arms": report}))
    sys.exit(failed)


if __name__ == "__main__":
    main()
