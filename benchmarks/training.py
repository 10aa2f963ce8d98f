"""The table behind the shipped M2R2: short trainings over paths, ranks and amounts of data, alike in everything else.

    python benchmarks/training.py run --prompts answers.jsonl.gz --output DIR
    python benchmarks/training.py table --output DIR

``run`` trains every row of ``ROWS`` that DIR does not hold yet, for the same number of updates: what ``specdec train
m2r2 --preset PRESET --steps N --set KEY=VALUE`` does, but teacher states are computed once for all rows with the same
answers. ``answers.jsonl.gz``: token-id answers, such as an ``answers.jsonl`` of an earlier run. The same answers are
held out in all rows; of the others each row learns from a share. ``table`` measures on this machine what each row's
drafts cost (let nothing else run) and prints figures on the held-out answers, in Markdown; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from specdec import SpecDecoder
from specdec.base.terminal import Progress
from specdec.engine.depth.costs import Costs
from specdec.engine.depth.measure import measure
from specdec.models import drafter_folder, loading
from specdec.train import data, states
from specdec.train.m2r2 import path_of
from specdec.train.m2r2_settings import M2R2Settings, wanted_states
from specdec.train.output import open_output
from specdec.train.runtime import training_target
from specdec.train.settings import TrainSettings, load_settings
from specdec.train.speed import predict
from specdec.train.trainer import train

DEFAULTS = TrainSettings()
SHARE = 0.154  # of the answers, where a row says nothing else
SHORT = {"fit_tokens": 40_000, "eval_answers": 40}
PROJECTED: dict[str, Any] = {"segments": [[20, 24]], "final_leap": True, **SHORT}
ROWS: dict[str, tuple[str, float, dict[str, Any]]] = {  # name: preset, share of the answers, settings
    "20-23, rank 56": ("m2r2", SHARE, PROJECTED),
    "20-22": ("m2r2", SHARE, PROJECTED | {"segments": [[20, 23]]}),
    "20-24": ("m2r2", SHARE, PROJECTED | {"segments": [[20, 25]]}),
    "20-23, rank 16": ("m2r2", SHARE, PROJECTED | {"rank": 16}),
    "m2r2-paper (exit 6)": ("m2r2-paper", SHARE, SHORT),
    "half of the answers": ("m2r2", SHARE / 2, PROJECTED),
    "exit 3, 20-23": ("m2r2", SHARE, PROJECTED | {"exit_layer": 3}),
    "20-23, rank 32": ("m2r2", SHARE, PROJECTED | {"rank": 32}),
    "20-23, rank 64": ("m2r2", SHARE, PROJECTED | {"rank": 64}),
    "a quarter of the answers": ("m2r2", SHARE / 4, PROJECTED),
    "2.3 times the answers": ("m2r2", 0.35, PROJECTED),
}


def folder(output: Path, name: str) -> Path:
    return output / "".join(c if c.isalnum() or c == "-" else "_" for c in name)


def settings_of(output: Path, name: str, steps: int) -> M2R2Settings:
    preset, share, changes = ROWS[name]
    given = {"prompts": [str(answers_file(output, share))], "output": str(folder(output, name)), "steps": steps}
    return load_settings(M2R2Settings, "m2r2", preset, given | changes)


def answers_file(output: Path, share: float) -> Path:
    return output / f"answers-{share:g}.jsonl"


def write_answers(prompts: Path, output: Path) -> None:
    """A file for each share: all answers that are held out, and the first of the others in an order drawn once."""
    answers = [a for a in data.read([prompts]) if isinstance(a, data.Answer) and len(a.response_ids) > 1]
    train_, held = data.split(answers, DEFAULTS.eval_fraction)
    random.Random(0).shuffle(train_)
    for share in {share for _, share, _ in ROWS.values()}:
        if answers_file(output, share).exists():
            continue
        some = held + train_[: round(share * len(train_))]
        lines = [json.dumps({"prompt_ids": a.prompt_ids, "response_ids": a.response_ids}) for a in some]
        drafter_folder.replace(answers_file(output, share), "\n".join(lines).encode())


def share_states(output: Path, names: list[str], steps: int) -> None:
    """Compute the teacher states of all rows with the same answers, and have their folders point there."""
    model, _ = loading.load(DEFAULTS.model, dtype=DEFAULTS.dtype, device="cpu")
    target = training_target(model)
    for share in dict.fromkeys(ROWS[name][1] for name in names):
        rows = [name for name in names if ROWS[name][1] == share]
        recipes = [settings_of(output, name, steps) for name in rows]
        wanted = [wanted_states(path_of(recipe, target), target.num_layers) for recipe in recipes]
        union = states.Wanted(
            tuple(sorted({layer for w in wanted for layer in w.kv})),
            tuple(sorted({layer for w in wanted for layer in w.hidden})),
        )
        answers = [a for a in data.read([answers_file(output, share)]) if isinstance(a, data.Answer)]
        train_, held = data.split(answers, recipes[0].eval_fraction)
        random.Random(recipes[0].seed).shuffle(train_)  # as the trainer does
        place = output / f"states-{share:g}"
        with Progress() as progress:
            for part, some in (("eval", held[: recipes[0].eval_answers]), ("train", train_)):
                states.compute(place / part, target, some, union, progress, f"{part}, {share:g}")
        for name in rows:
            link = open_output(settings_of(output, name, steps), resume=True) / "states"
            if not link.exists():
                link.symlink_to(place.resolve(), target_is_directory=True)


def run(prompts: Path, output: Path, steps: int, names: list[str]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_answers(prompts, output)
    left = [name for name in names if not (folder(output, name) / "seconds").exists()]
    share_states(output, left, steps)
    for name in left:
        start = time.process_time()
        train(settings_of(output, name, steps), resume=True, console=Console(stderr=True))
        (folder(output, name) / "seconds").write_text(f"{time.process_time() - start:.0f}")


def measured(output: Path, names: list[str]) -> dict[str, Costs]:
    """What drafting and scoring cost with each row's drafter: the least of two visits; scoring is the same for all."""
    model, _ = loading.load(DEFAULTS.model, dtype=DEFAULTS.dtype, device="cpu")
    found: dict[str, list[Costs]] = {name: [] for name in names}
    for name in names * 2:
        decoder = SpecDecoder(model, None, drafter=folder(output, name))
        found[name] += measure(decoder.target, [decoder.drafter], decoder.verifier)
    every = [costs.score for visits in found.values() for costs in visits]
    score = {n: min(seconds[n] for seconds in every) for n in every[0]}
    return {name: Costs(score, (min(costs.drafts[-1] for costs in visits),)) for name, visits in found.items()}


def table(output: Path) -> None:
    rows = []
    names = [name for name in ROWS if (folder(output, name) / "seconds").exists()]
    costs = measured(output, names)
    print(
        "| row | draft cost | tokens learnt from | agreement, steps 1-4 | 1 - TV | mean acceptance length | predicted |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in names:
        figures = [
            line["evaluation"]
            for line in map(json.loads, (folder(output, name) / "metrics.jsonl").read_text("utf-8").splitlines())
            if "evaluation" in line
        ]
        before, after = figures[0], figures[-1]
        tokens = drafter_folder.read_config(folder(output, name))["training"]["tokens_in_answers"]
        speedup, depth = predict(after["chain"], costs[name])
        cost = costs[name].drafts[-1][1] / costs[name].score[1]
        rows.append(
            {"row": name, "cost": cost, "tokens": tokens, "closed_form": before, "trained": after}
            | {"speedup": speedup, "depth": depth, "cpu_seconds": int((folder(output, name) / "seconds").read_text())}
        )
        steps = " ".join(f"{x:.3f}" for x in after["top1"])
        print(
            f"| {name} | {cost:.3f} | {tokens:,} | {before['top1'][0]:.3f} -> {steps} | {after['overlap'][0]:.3f} | "
            f"{before['score']:.2f} -> {after['score']:.2f} | {speedup:.2f} x at {depth} |"
        )
    print(json.dumps(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--prompts", type=Path, help="token-id answers (run)")
    parser.add_argument("--output", type=Path, required=True, help="folder of all rows")
    parser.add_argument("--steps", type=int, default=40, help="updates of each row (run)")
    given = parser.parse_args()
    if given.what == "table":
        table(given.output)
    elif given.prompts is None:
        parser.error("run needs --prompts")
    else:
        run(given.prompts, given.output, given.steps, list(ROWS))


if __name__ == "__main__":
    main()
