"""What ``specdec bench`` and ``specdec verify`` show while they run and at the end. Imports nothing heavy."""

from __future__ import annotations

import time
import warnings
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from specdec import report
from specdec.errors import SpecDecWarning
from specdec.terminal import Progress, stderr, tell, write


class Bar:
    """Progress on stderr; called with (done, total, tokens decoded so far)."""

    def __init__(self, what: str) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        self.progress = Progress(*columns, transient=True)
        self.task = self.progress.add_task(what, total=None, rate="")
        self.start = time.perf_counter()

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, done: int, total: int, tokens: int) -> None:
        rate = f"{tokens / (time.perf_counter() - self.start):.1f} tok/s"
        self.progress.update(self.task, completed=done, total=total, rate=rate)


def hush() -> None:
    """Keep the warnings of libraries off stderr. Ours are lines of their own."""
    from transformers.utils import logging

    report.warn_in_lines()
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", category=SpecDecWarning)
    logging.set_verbosity_error()


def say(message: str) -> None:
    """One line on stderr."""
    tell(stderr(), message)


def estimate(value: dict[str, float | None] | None, form: str = ".2f") -> str:
    """An estimate and its interval: ``2.41 [2.30–2.55]``; empty if there is none."""
    if value is None:
        return ""
    if value["low"] is None:
        return f"{value['value']:{form}}"
    return f"{value['value']:{form}} [{value['low']:{form}}–{value['high']:{form}}]"


def tables(summary: dict[str, Any]) -> None:
    """Print the figures of a benchmark: what it was, speed, and where the time went."""
    arms, cell, about, prompts = (summary[key] for key in ("arms", "configuration", "environment", "prompts"))
    skipped = f", {len(prompts['skipped'])} skipped" if prompts["skipped"] else ""
    times = f"{cell['repetitions']} repetition{'s' * (cell['repetitions'] > 1)}"
    how = "greedy" if cell["temperature"] == 0 else f"temperature {cell['temperature']:g}"
    write(
        f"{cell['model']}, {about['dtype']}, {about['runtime']} runtime on {about['device']}, {about['threads']} "
        f"threads, {about['cpu']}\n"
        f"{prompts['conversations']} conversations of {prompts['name']}{skipped}, {how}, at most "
        f"{cell['max_new_tokens']} tokens, batch of {cell['batch_size']}, {times}, "
        f"{summary['seconds']:.0f} s{' (interrupted)' if summary['interrupted'] else ''}\n\n"
    )
    hf = any("hf" in arm["speedup"] for arm in arms)
    header = ["arm", "tok/s", "x plain", *(["x generate"] if hf else []), "first token ms", "tokens/round", "equal"]
    rows = []
    for arm in arms:
        speedups = [estimate(arm["speedup"].get(name)) for name in (["none", "hf"] if hf else ["none"])]
        first, length = estimate(arm["first_token_ms"], ".0f"), estimate(arm["mean_acceptance_length"])
        rows.append([arm["name"], estimate(arm["tokens_per_second"], ".1f"), *speedups, first, length, _equal(arm)])
    report.columns(header, rows)
    print()
    phases = list(dict.fromkeys(phase for arm in arms for phase in arm["ledger_ms_per_round"]))
    header = ["arm", "prefill ms", "decode ms/token", *(f"{p} ms/round" for p in phases), "accepted at 1, 2 ..", "MB"]
    rows = []
    for arm in arms:
        ledger, memory = arm["ledger_ms_per_round"], arm["peak_memory_mb"]
        rows.append(
            [
                arm["name"],
                f"{arm['prefill_ms']['value']:.0f}" if arm["prefill_ms"] else "",
                f"{arm['decode_ms_per_token']['value']:.1f}" if arm["decode_ms_per_token"] else "",
                *(f"{ledger[p]:.1f}" if p in ledger else "" for p in phases),
                " ".join(f"{share:.2f}".removeprefix("0") for share in arm["acceptance_per_position"]),
                "" if memory is None else f"{memory:.0f}",
            ]
        )
    report.columns(header, rows)
    if any(arm["quality"] for arm in arms):
        print()
        header = ["arm", "agreement", "nll/token", "ROUGE-L", "layers/token"]
        rows = []
        for arm in arms:
            q = arm["quality"]
            layers = estimate(arm["mean_layers_per_token"], ".1f")
            rows.append([arm["name"], *(estimate(q[k], ".3f") for k in ("agreement", "nll", "rouge_l")), layers])
        report.columns(header, rows)
    for line in prompts["skipped"]:
        say(f"skipped {line}")


def _equal(arm: dict[str, Any]) -> str:
    equal = arm["equal_to_plain"]
    if equal is None:
        return "sampled"
    text = f"{equal['equal']}/{equal['of']}"
    if not arm["lossless"]:
        return f"{text} (lossy)"
    if equal["near_ties"]:
        text += f", {equal['near_ties']} near-tie{'s' * (equal['near_ties'] > 1)}"
    return text + (f", {equal['faults']} FAULT{'S' * (equal['faults'] > 1)}" if equal["faults"] else "")
