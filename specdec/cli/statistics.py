"""The figures of one generation and its comparison with plain decoding, as ``specdec generate`` prints them.

On a terminal the figures are a table, in a pipe lines of ``label: value``.
"""

from __future__ import annotations

import math
import statistics as numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from specdec.base.terminal import as_text, stderr

if TYPE_CHECKING:
    from specdec.api.decoder import SpecDecoder
    from specdec.api.generation import GenerationOutput
    from specdec.engine.metrics import RequestMetrics
    from specdec.speculation.sampling import Sampler

Facts = list[tuple[str, str]]  # (label, value) each
MIN_DRAFTED = 8  # drafted tokens from which a note says that none was accepted
TIMED_DRAFTED = 16  # drafted tokens in an output from which a comparison gives a speedup


def statistics(
    decoder: SpecDecoder,
    output: GenerationOutput,
    comparison: dict[str, Any] | None,
    verbose: bool,
    source: str = "",
) -> None:
    """Print the figures of one generation, ``output`` of ``decoder``, to stderr.

    comparison: the result of ``compare``; None: there was none. verbose: whether to print phases and self-checks, too.
    source: the folder or NAME=SOURCE from which the drafter was loaded; "": its name says it.
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
            ("steps", f"{m.num_spec_steps}, {m.num_drafted_steps} with drafts"),
            ("drafter", decoder.drafter.traits.label + (f" (from {source})" if source else "")),
            ("runtime", " ".join(list(runtime(decoder).values())[:3]) + f", {_formats(decoder)}"),
        ]
    ]
    if decoder.adapter is not None:
        blocks[-1].append(("adapter", decoder.adapter))
    if m.accepted_by_source:
        by_source = ", ".join(f"{count} {name}" for name, count in m.accepted_by_source.items())
        blocks[-1].append(("accepted drafts", by_source))
    if not decoder.verifier.lossless:
        blocks.append([("verifier", rule(decoder))])
    if m.exit_layers:
        shares = ", ".join(f"{share:.0%} after {layers} layers" for layers, share in m.exit_shares.items())
        blocks[-1] += [
            ("layers per token", f"{m.mean_layers_per_token:.1f} of {m.num_layers}"),
            ("tokens that left early", shares),
        ]
    if decoder.target.experts is not None:
        blocks.append(experts(decoder.target.experts.describe(), m.experts))
    if comparison is not None:
        blocks.append(_compared(comparison))
    if hint := advice(decoder, output, comparison):
        blocks.append([("note", hint)])
    if verbose:
        blocks.append([(f"{phase} time", f"{seconds:.3f} s") for phase, seconds in m.phases.items()])
        blocks.append([("self-check difference", f"{decoder.target.logit_difference:.1e} of the largest logit")])
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
            table.add_row(*(as_text(console, cell) for pair in block[first : first + side_by_side] for cell in pair))
        console.print(table)


def compare(
    decoder: SpecDecoder,
    prompt: list[int],
    sampler: Sampler,
    turns: Sequence[tuple[GenerationOutput, GenerationOutput]],
) -> dict[str, Any]:
    """Compare outputs with drafts with those of plain decoding; return JSON values.

    decoder: has decoded. prompt: token ids.
    turns: (output with drafts, output of plain decoding) of each turn. sampler: a sampler like the one that chose the
    tokens of all outputs.
    The keys of the result:
    turns: number of turns.
    speedup: median speedup over the turns; speedup_range: the lowest and the highest; both None if they would say
    nothing. speedup_note: why they are None, else None.
    identical: whether the tokens are equal in each turn; outcome says so in words.
    fault: whether the tokens differ in a way that neither rounding nor a lossy verifier explains.
    agreement: the share of tokens that the full model would choose, too; None for a lossless verifier.
    first_difference: index of the first different token; None without one or with a lossy verifier.
    logit_gap: distance from the best logit there; None without one, and if it is infinite.
    plain: the output of plain decoding, of the first turn that differs, else of the first turn.
    plain_tokens_per_second: the median of plain decoding over the turns.
    """
    from specdec.verify.replay import first_difference, margins  # heavy

    ours, plain = next((turn for turn in turns if turn[0].token_ids != turn[1].token_ids), turns[0])
    timed, plainly = ([turn[way].metrics for turn in turns] for way in (0, 1))
    difference = agreement = None
    identical, outcome = ours.token_ids == plain.token_ids, "yes"
    if not decoder.verifier.lossless:
        agreement = (margins(decoder.target, prompt, ours.token_ids, sampler) <= 0).float().mean().item()
        outcome = "yes" if identical else f"no: {rule(decoder)}"
    elif not identical:
        difference = first_difference(decoder.target, prompt, ours.token_ids, plain.token_ids, sampler)
        outcome = f"no ({difference})"
    return {
        "outcome": outcome,
        "turns": len(turns),
        **speedup(timed, plainly, decoder.drafter.traits.drafts),
        "plain_tokens_per_second": numbers.median(metrics.tokens_per_second for metrics in plainly),
        "identical": identical,
        "fault": difference is not None and not difference.near_tie,
        "agreement": agreement,
        "first_difference": None if difference is None else difference.index,
        "logit_gap": None if difference is None or math.isinf(difference.margin) else difference.margin,
        "plain": plain.as_dict(),
    }


def speedup(ours: Sequence[RequestMetrics], plain: Sequence[RequestMetrics], drafts: bool) -> dict[str, Any]:
    """Return the speedup of decoding with drafts, ``ours``, over plain decoding, turn by turn, as JSON values.

    ours, plain: the metrics of each turn, with drafts and without. drafts: whether the decoder has a drafter.
    The keys of the result:
    speedup: median over the turns; speedup_range: the lowest and the highest; both None if they would say nothing.
    speedup_note: why they are None, else None.
    """
    note, drafted = None, min(metrics.num_draft_tokens for metrics in ours)
    if not drafts:
        note = "none: the decoder has no drafter"
    elif not all(metrics.tokens_per_second for metrics in (*ours, *plain)):
        note = "none: there is no decode step to time"
    elif drafted < TIMED_DRAFTED:
        note = f"none: only {drafted} tokens were drafted, and {TIMED_DRAFTED} are the least that say something"
    if note is not None:
        return {"speedup": None, "speedup_range": None, "speedup_note": note}
    ratios = [ours.tokens_per_second / plain.tokens_per_second for ours, plain in zip(ours, plain, strict=True)]
    return {"speedup": numbers.median(ratios), "speedup_range": [min(ratios), max(ratios)], "speedup_note": None}


def _compared(comparison: dict[str, Any]) -> Facts:
    agreement, gain = comparison["agreement"], comparison["speedup_note"]
    if gain is None:
        low, high = comparison["speedup_range"]
        gain = f"{comparison['speedup']:.2f}x [{low:.2f}–{high:.2f}], median and range of {comparison['turns']}"
    facts = [
        ("speedup over plain decoding", gain),
        ("plain tokens/s", f"{comparison['plain_tokens_per_second']:.1f}"),
        ("output identical to plain decoding", comparison["outcome"]),
    ]
    return facts + ([] if agreement is None else [("agreement with the full model", f"{agreement:.0%}")])


def experts(what: str, figures: dict[str, float]) -> Facts:
    """Return the lines to print about experts that are read from the disk, as (label, value).

    what: text that describes their cache. figures: ``RequestMetrics.experts``; empty: only the cache is described.
    """
    facts = [("experts", what)]
    if figures:
        facts += [
            ("experts found in memory", f"{figures['hit_rate']:.0%}"),
            ("experts read ahead, used", f"{figures['read_ahead']:.0f}, {figures['read_ahead_used']:.0f}"),
            ("read per accepted token", f"{figures['bytes_per_token'] / 1e6:.2f} MB"),
            ("stalled per token", f"{figures['stall_ms_per_token']:.1f} ms"),
        ]
    return facts


def advice(decoder: SpecDecoder, output: GenerationOutput, comparison: dict[str, Any] | None) -> str:
    """Return a sentence about drafts that bring nothing; "" if there is no drafter, or if they bring something.

    output: a generation of ``decoder``.
    comparison: the result of ``compare``, whose speedup decides; None: there was none.
    """
    m, label, training = output.metrics, decoder.drafter.traits.label, decoder.drafter.training
    faster = comparison is not None and (comparison["speedup"] or 0.0) > 1
    if faster or not decoder.drafter.traits.drafts:
        return ""
    if m.num_draft_tokens >= MIN_DRAFTED and not m.num_accepted_draft_tokens:
        other = f"train one for this model ({training})" if training else "'specdec drafters' lists others"
        return (
            f"none of the {m.num_draft_tokens} tokens that {label} drafted was accepted: it does not fit this model or "
            f"this prompt; {other}, or decode plainly (--drafter none)"
        )
    if m.draft_note is None or m.draft_saved_seconds > 0:
        return ""
    drafted = f"{m.num_drafted_steps} of {m.num_spec_steps} steps drafted"
    return f"drafting gained nothing over plain decoding: {m.draft_note} ({drafted})"


def rule(decoder: SpecDecoder) -> str:
    """Return the name of the decoder's verifier; for a lossy one ``lossy (NAME with its options)``."""
    verifier = decoder.verifier
    return verifier.name if verifier.lossless else f"lossy ({verifier.label})"


def _formats(decoder: SpecDecoder) -> str:
    target = decoder.target
    parts = [
        "weights " + (target.weight_format if target.weight_format == "as loaded" else f"in {target.weight_format}")
    ]
    held = {"activations": target.activations, "KV cache": target.kv_cache}
    return ", ".join(parts + [f"{what} in {how}" for what, how in held.items() if how != "as computed"])


def runtime(decoder: SpecDecoder) -> dict[str, str]:
    """Return the runtime, dtype, device, the formats of weights, activations and KV cache, and the adapter, as texts.

    The keys are "runtime", "dtype", "device", "storage" (of weights), "activations", "kv_cache" and, if an adapter is
    merged into the model, "adapter", in this order.
    """
    target = decoder.target
    dtype, device = str(target.dtype).removeprefix("torch."), str(target.device)
    held = {"storage": target.weight_format, "activations": target.activations, "kv_cache": target.kv_cache}
    found = {"runtime": target.runtime, "dtype": dtype, "device": device} | held
    return found if decoder.adapter is None else found | {"adapter": decoder.adapter}
