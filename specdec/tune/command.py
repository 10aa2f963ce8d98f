"""``specdec tune``: the command line of the searches for settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec import report
from specdec.bench.show import Bar, hush, say
from specdec.embedded import DEFAULT_MODEL
from specdec.errors import SpecDecError
from specdec.tune.settings import Tuned, place, store

if TYPE_CHECKING:
    from specdec.tune.layer_skip import Skips

ANSWER = 48  # tokens of the model's answer to each prompt
TIMED = 4  # prompts on which the finalists are timed
SEARCHED = 0.7  # share of the time for the search; then the finalists are timed

app = typer.Typer(no_args_is_help=True, help="Choose settings for your model, machine and prompts, by measurement.")


@app.callback()
def _group() -> None:
    """Choose settings for your model, machine and prompts, by measurement."""


@app.command(
    "drafter",
    epilog='Example: specdec tune drafter --prompts prompts.jsonl; then: specdec generate "Why is the sky blue?"',
)
def drafter(
    prompts: Annotated[
        str, typer.Option(metavar="FILE|NAME", help="As in bench; the first turn of each conversation counts.")
    ] = "own",
    drafters: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Only these, with commas between; else all that fit.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts, spread over the file.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Most new tokens of an answer.")] = 96,
    model: Annotated[str, typer.Option(help="Name, Hugging Face id, folder or GGUF file.")] = DEFAULT_MODEL,
    dtype: Annotated[str, typer.Option(help="auto, fastest, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (CUDA, else cpu), cpu, cuda, cuda:1, mps ...")] = "auto",
    runtime: Annotated[str, typer.Option(help="auto, native, graphs, fused or reference.")] = "auto",
    weights: Annotated[str, typer.Option(help="auto, dense, int8 or int4.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="As in generate.")] = False,
) -> None:
    """Find the fastest drafter and draft length, and keep them: generate uses them from then on."""
    with report.status("loading"):
        from specdec.bench.cell import Cell
        from specdec.bench.run import Decoders
        from specdec.tune.drafter import candidates, every, search

        hush()
        base = Cell(
            model=model, dtype=dtype, device=device, runtime=runtime, weights=weights, compile=compile,
            drafter="none", prompts=prompts, limit=limit, max_new_tokens=max_new_tokens,
        )  # fmt: skip
        decoders = Decoders(first_turns=True)
        device = str(decoders.base(base).device)
        named = [name.strip() for name in drafters.split(",") if name.strip()] if drafters else None
        cells, refused = candidates(decoders, base, named or every())
    for line in refused:
        say(f"left out: {line}")
    if not cells:
        raise SpecDecError("no drafter fits the model; see 'specdec drafters'")
    with Bar("tune") as bar:
        rows = search(decoders, cells, bar)
    cells_of = [
        (row.cell.drafter, str(row.cell.num_speculative_tokens), f"{row.tokens_per_round:.2f}", f"{row.speedup:.2f}")
        for row in rows
    ]
    report.columns(("drafter", "draft length", "tokens/round", "x plain"), cells_of)
    best = rows[0]
    if faults := sum(row.faults for row in rows):
        raise SpecDecError(f"{faults} outputs differ from plain decoding; nothing is kept, please report this")
    worth = best.speedup > 1
    tuned = Tuned(
        best.cell.drafter if worth else "none",
        best.cell.num_speculative_tokens if worth else "auto",
        round(best.speedup, 3) if worth else 1.0,
        f"{limit} of {prompts}",
    )
    path = place(model, dtype, device, runtime, weights, compile)
    store(path, tuned)
    depth = tuned.num_speculative_tokens
    length = "" if depth == "auto" else f" --num-speculative-tokens {depth}"
    say(f"kept in {path}")
    say(f"specdec generate now uses --drafter {tuned.drafter}{length} for this model: {tuned.speedup:.2f}x plain")


@app.command(
    "layer-skip",
    epilog="Example: specdec tune layer-skip --prompts prompts.jsonl --minutes 5 --output skips.yaml; then: "
    'specdec generate "Why is the sky blue?" --drafter layer-skip=skips.yaml',
)
def layer_skip(
    prompts: Annotated[
        str, typer.Option(metavar="FILE|NAME", help="As in bench; the first turn of each conversation counts.")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="YAML file for what was found.")] = Path(
        "layer-skip.yaml"
    ),
    minutes: Annotated[float, typer.Option(min=0.01, help="Time for the search.")] = 5.0,
    limit: Annotated[int, typer.Option(min=1, help="Prompts, spread over the file.")] = 12,
    model: Annotated[str, typer.Option(help="Name, Hugging Face id, folder or GGUF file.")] = DEFAULT_MODEL,
    dtype: Annotated[str, typer.Option(help="auto, fastest, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (CUDA, else cpu), cpu, cuda, cuda:1, mps ...")] = "auto",
    runtime: Annotated[str, typer.Option(help="auto, native, graphs, fused or reference.")] = "auto",
    weights: Annotated[str, typer.Option(help="auto, dense, int8 or int4.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="As in generate.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the search.")] = 0,
) -> None:
    """Search the layers, and parts of layers, that drafting does best without: fastest, not most often right."""
    with report.status("loading"):
        from specdec import hub
        from specdec.bench.prompts import load_prompts, spread
        from specdec.decoder import SpecDecoder
        from specdec.text import encode
        from specdec.tune.layer_skip import FINALISTS, Search, measure_prices, time_in_decoding

        hush()
        found = spread(load_prompts(prompts).conversations, limit)
        decoder = SpecDecoder.from_pretrained(
            model, "none", dtype=dtype, device=device, runtime=runtime, weights=weights, compile=compile
        )
    target = decoder.target
    with report.status("measuring"):
        ids = [encode(decoder.tokenizer, conversation.turns[0]) for conversation in found]
        ids = [row for row in ids if len(row) + ANSWER < target.context]
        if not ids:
            raise SpecDecError(f"no prompt leaves room for {ANSWER} tokens in the model's context of {target.context}")
        answers = [out.token_ids for out in decoder.generate_batch(ids, max_new_tokens=ANSWER)]
        prices = measure_prices(target)
        search = Search(target, list(zip(ids, answers, strict=True)), prices)
    say(
        f"one token, ms: a layer {1e3 * prices.layer:.3f}, its attention alone {1e3 * prices.attention:.3f}, its MLP "
        f"alone {1e3 * prices.mlp:.3f}, embedding and readout {1e3 * prices.ends:.3f}"
    )
    with report.status("searching") as spinner:

        def tell(text: str) -> None:
            if spinner is not None:
                spinner.update(f"searching: {text}")

        best = search.run(60 * minutes * SEARCHED, tell, seed)[:FINALISTS]
    with report.status("timing"):
        best = time_in_decoding(decoder, ids[:TIMED], best, ANSWER)
    _show(best)
    first = best[0]
    assert first.measured is not None
    _write(output, first, {"name": hub.own_name(model), "fingerprint": target.fingerprint})
    say(
        f"{output}: {first.measured:.2f}x plain decoding, of {len(search.seen)} sets tried; "
        f"use --drafter layer-skip={output}"
    )
    if first.measured < 1:
        say("no set is faster than plain decoding here; with automatic depth this drafter will hardly be used")


def _show(best: list[Skips]) -> None:
    cells = [
        (
            _ranges(s.attn),
            _ranges(s.mlp),
            f"{s.agreement:.3f}",
            str(s.depth),
            f"{s.tokens:.2f}",
            f"{s.predicted:.2f}",
            f"{s.measured:.2f}",
        )
        for s in best
    ]
    header = ("without attention", "without MLP", "agreement", "drafts", "tokens/round", "predicted x", "measured x")
    report.columns(header, cells)


def _ranges(layers: frozenset[int]) -> str:
    """Layers as ranges: 3-5, 8."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(f"{lo}-{hi}" if hi > lo else str(lo) for lo, hi in parts) or "-"


def _write(path: Path, skips: Skips, base: dict[str, Any]) -> None:
    import yaml

    from specdec.artifacts import replace

    measured = {"depth": skips.depth, "agreement": round(skips.agreement, 4), "speedup": round(skips.measured or 0, 3)}
    data = {"drafter": "layer-skip", "base": base, "attn": sorted(skips.attn), "mlp": sorted(skips.mlp)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(data | {"measured": measured}, sort_keys=False, default_flow_style=None)
        replace(path, text.encode())
    except OSError as error:
        raise SpecDecError(f"cannot write '{path}': {error.strerror or error}") from None
