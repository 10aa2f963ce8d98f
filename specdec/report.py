"""What the command line shows: statistics, comparison with plain decoding, tables, notes and error lines.

The same figures are a small table on a terminal and ``label: value`` lines (or tab-separated columns) in a pipe.
Knows results and metrics, but no models and no commands; imports nothing heavy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from specdec.errors import SpecDecWarning
from specdec.terminal import printable, shown
from specdec.terminal import status as status
from specdec.terminal import stderr as stderr

if TYPE_CHECKING:
    from specdec.decoder import GenerationOutput, SpecDecoder
    from specdec.replay import Difference
    from specdec.tune.settings import Tuned

Facts = list[tuple[str, str]]
ENOUGH = 8  # drafted tokens, before it is remarked that none was accepted
_python_warns = warnings.showwarning


@dataclass(frozen=True)
class Comparison:
    """Plain decoding of the same prompt in the same run.

    speedup: plain decode seconds per token over ours; None if either decoded no token after its first.
    difference: where two outputs part, as replay of the logits explains it; None if they are equal, or may differ.
    lossy: the acceptance rule, if it may change the output; a difference is then no fault.
    agreement: share of our tokens that the full model would choose after those before them; known for lossy rules.
    """

    ours: GenerationOutput
    plain: GenerationOutput
    difference: Difference | None = None
    lossy: str = ""
    agreement: float | None = None

    @property
    def speedup(self) -> float | None:
        ours, plain = self.ours.metrics.tokens_per_second, self.plain.metrics.tokens_per_second
        return ours / plain if ours > 0 and plain > 0 else None

    @property
    def identical(self) -> bool:
        return self.ours.token_ids == self.plain.token_ids

    @property
    def fault(self) -> bool:
        """A difference that rounding does not explain, by a rule that allows none."""
        return not self.lossy and self.difference is not None and not self.difference.near_tie

    @property
    def verdict(self) -> str:
        if self.identical:
            return "yes"
        if self.lossy:
            return f"no: {self.lossy}"
        return f"no ({self.difference})"

    def facts(self) -> Facts:
        speed = "no decode step to time" if self.speedup is None else f"{self.speedup:.2f}x"
        facts = [
            ("speedup over plain decoding", speed),
            ("plain tokens/s", f"{self.plain.metrics.tokens_per_second:.1f}"),
            ("output identical to plain decoding", self.verdict),
        ]
        if self.agreement is not None:
            facts.append(("agreement with the full model", f"{self.agreement:.0%}"))
        return facts

    def as_dict(self) -> dict[str, Any]:
        gap = None if self.difference is None else self.difference.margin
        return {
            "speedup": self.speedup,
            "identical": self.identical,
            "fault": self.fault,
            "verdict": self.verdict,
            "agreement": self.agreement,
            "first_difference": None if self.difference is None else self.difference.index,
            "logit_gap": gap if gap is not None and math.isfinite(gap) else None,
            "plain": {
                "text": self.plain.text,
                "token_ids": self.plain.token_ids,
                "finish_reason": self.plain.finish_reason,
                "metrics": self.plain.metrics.as_dict(),
            },
        }


def statistics(
    decoder: SpecDecoder,
    output: GenerationOutput,
    comparison: Comparison | None,
    verbose: bool,
    source: str = "",
    tuned: Tuned | None = None,
) -> None:
    """Print the figures of one generation to stderr.

    source: what the drafter was asked for by, where that is not its name. tuned: the settings that were applied.
    """
    m = output.metrics
    rate = f"{m.draft_acceptance_rate:.0%}" if m.num_draft_tokens else "nothing drafted"
    blocks: list[Facts] = [
        [
            ("tokens", str(m.num_new_tokens)),
            ("finish", output.finish_reason),
            ("tokens/s", f"{m.tokens_per_second:.1f}"),
            ("prefill", f"{m.prefill_seconds:.2f} s"),
            ("decode", f"{m.decode_seconds:.2f} s"),
            ("mean acceptance length", f"{m.mean_acceptance_length:.2f}"),
            ("acceptance rate", rate),
            ("rounds", str(m.num_spec_steps)),
            ("drafter", decoder.drafter.label + (f" (from {source})" if source else "")),
            ("runtime", " ".join(list(runtime(decoder).values())[:3]) + f", weights {_held(decoder)}"),
        ]
    ]
    if tuned is not None:
        blocks[-1].append(("settings", f"tuned ({tuned.speedup:.2f}x plain on {tuned.prompts})"))
    if not decoder.verifier.lossless:
        blocks.append([("acceptance rule", rule(decoder))])
    if m.exit_layers:
        shares = ", ".join(f"{share:.0%} after {layers}" for layers, share in m.exit_shares.items())
        blocks[-1] += [
            ("layers per token", f"{m.mean_layers_per_token:.1f} of {m.num_layers}"),
            ("tokens that left", shares),
        ]
    if decoder.target.experts is not None:
        blocks.append(experts(decoder.target.experts.describe(), m.experts))
    if comparison is not None:
        blocks.append(comparison.facts())
    if hint := unaccepted(decoder, output):
        blocks.append([("note", hint)])
    if verbose:
        blocks.append([(f"{phase} time", f"{seconds:.3f} s") for phase, seconds in m.ledger.items()])
        blocks.append([("self-check difference", f"{decoder.target.spread:.1e} of the largest logit")])
        if decoder.target.chosen:
            blocks.append([("chosen by timings", decoder.target.chosen)])
        if decoder.runtime_note:
            blocks.append([("runtime note", decoder.runtime_note)])
    console = stderr()
    if not console.is_terminal:
        for block in blocks:
            console.print(Text("; ".join(f"{label}: {value}" for label, value in block)), soft_wrap=True)
        return
    for block in blocks:
        side_by_side = 1 if any(len(value) > 24 for _, value in block) else 2
        table = Table.grid(padding=(0, 2))
        for _ in range(side_by_side):
            table.add_column(style="dim", min_width=22)
            table.add_column(overflow="fold", min_width=12)
        for first in range(0, len(block), side_by_side):
            table.add_row(*(shown(console, cell) for pair in block[first : first + side_by_side] for cell in pair))
        console.print(table)


def experts(what: str, figures: dict[str, float]) -> Facts:
    """What loading experts took while decoding."""
    if not figures:
        return [("experts", what)]
    return [
        ("experts", what),
        ("experts found cached", f"{figures['hit_rate']:.0%}"),
        ("in time", f"{figures['in_time_rate']:.0%}"),
        ("read per accepted token", f"{figures['bytes_per_token'] / 1e6:.2f} MB"),
        ("stalled per token", f"{figures['stall_ms_per_token']:.1f} ms"),
    ]


def unaccepted(decoder: SpecDecoder, output: GenerationOutput) -> str:
    """What to do about a drafter of whose tokens none was accepted; empty where some were, or too few were drafted."""
    m = output.metrics
    if m.num_draft_tokens < ENOUGH or m.num_accepted_draft_tokens:
        return ""
    training = decoder.drafter.training
    advice = f"train one for this model ({training})" if training else "'specdec drafters' lists others"
    return (
        f"none of the {m.num_draft_tokens} tokens that {decoder.drafter.label} drafted was accepted: it does not fit "
        f"this model or this prompt; {advice}, or decode plainly (--drafter none)"
    )


def rule(decoder: SpecDecoder) -> str:
    """The acceptance rule by name; a lossy one says so, with its settings."""
    verifier = decoder.verifier
    return verifier.name if verifier.lossless else f"lossy ({getattr(verifier, 'label', verifier.name)})"


def _held(decoder: SpecDecoder) -> str:
    storage = decoder.target.storage
    return storage if storage == "as loaded" else f"in {storage}"


def runtime(decoder: SpecDecoder) -> dict[str, str]:
    """Which runtime ran, in which dtype, where, and what its weights are held in."""
    target = decoder.target
    dtype, device = str(target.dtype).removeprefix("torch."), str(target.device)
    return {"runtime": target.runtime, "dtype": dtype, "device": device, "storage": target.storage}


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to stdout: aligned on a terminal, tab-separated in a pipe."""
    console = Console(highlight=False)
    if not console.is_terminal:
        for row in (header, *rows):
            print("\t".join(row))  # rich would expand the tabs
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    header, rows = [printable(name) for name in header], [[printable(cell) for cell in row] for row in rows]
    # Words stay whole where they fit; the first columns get the room that is left.
    cells = list(zip(header, *rows, strict=True))  # by column
    words = [max((cell_len(word) for cell in column for word in cell.split()), default=0) for column in cells]
    room = console.width - sum(words) - 2 * (len(words) - 1)
    for name, column, word in zip(header, cells, words, strict=True):
        more = min(max(map(cell_len, column)) - word, max(room, 0))
        table.add_column(Text(name), overflow="fold", width=word + more if room >= 0 else None)
        room -= more
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def note(message: str) -> None:
    """One dim line on stderr, only on a terminal."""
    console = stderr()
    if console.is_terminal:
        console.print(shown(console, message, style="dim"))


def warn_in_lines() -> None:
    """From now on, each ``SpecDecWarning`` is one line on stderr."""
    warnings.showwarning = _warn


def _warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    if issubclass(category, SpecDecWarning):
        console = stderr()
        console.print(shown(console, f"note: {message}"), soft_wrap=True)
    else:
        _python_warns(message, category, *where, **more)


def error(message: str) -> None:
    """``error: <message>`` on stderr, always one line."""
    console, line = stderr(), " ".join(message.split())
    console.print(Text.assemble(("error: ", "bold red"), shown(console, line)), soft_wrap=True)
