"""``specdec bench``: the command line of the benchmark. What it measures is ``specdec.bench.cell``'s matter."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec import options, report
from specdec.bench.cell import BASELINES, Cell
from specdec.bench.show import Bar, hush, say, tables
from specdec.embedded import DEFAULT_MODEL
from specdec.errors import SpecDecError

ARMS = "hf,none,prompt-lookup,m2r2"
INTERRUPTED = 130


def bench(
    model: Annotated[str, typer.Option(help="Name, Hugging Face id, folder or GGUF file.")] = DEFAULT_MODEL,
    drafters: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Arms, with commas between: drafters, and hf, hf-lookup, hf-early-exit, hf-draft-model=MODEL "
            "(model.generate and its assisted modes). none (plain decoding) always runs. If not given: "
            "hf, none, prompt-lookup, and m2r2 where one is shipped for the model.",
        ),
    ] = None,
    drafter_option: Annotated[
        list[str] | None, typer.Option(metavar="ARM.KEY=VALUE", help="An option of one arm; repeatable.")
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            metavar="FILE|NAME",
            help="JSONL with turns and category, plain lines, or own, mt-bench, koala, self-instruct, wizardlm, "
            "spec-bench, humaneval, gsm8k.",
        ),
    ] = "own",
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", envvar="SPECDEC_DATA", help="Folder of named prompt sets.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Conversations, spread over the set; all if not given.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most new tokens of an answer.")] = 128,
    repetitions: Annotated[int, typer.Option(help="Times that everything is decoded.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 1,
    num_speculative_tokens: Annotated[
        str, typer.Option(metavar="K", help="Tokens drafted per round, or auto.")
    ] = "auto",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="As in generate.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="As in generate.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    verifier: Annotated[str, typer.Option(help="Acceptance rule of the drafting arms.")] = "exact",
    verifier_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the rule; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), fastest, bfloat16, float16, float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (CUDA, else cpu), cpu, cuda, cuda:1, mps ...")] = "auto",
    runtime: Annotated[str, typer.Option(help="auto, native, graphs, fused or reference.")] = "auto",
    weights: Annotated[str, typer.Option(help="auto, dense, int8 or int4.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="As in generate.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for results.jsonl (every request) and bench.json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with everything as one line of JSON.")] = False,
) -> None:
    """Measure drafters against plain decoding and model.generate, side by side, prompt by prompt.

    Medians with 95 % bootstrap intervals. Every arm answers the same prompts; a conversation goes on with the plain
    arm's answer.
    """
    names = [name.strip() for name in (ARMS if drafters is None else drafters).split(",") if name.strip()]
    if not names:
        raise SpecDecError(f"--drafters names no arm; give some, such as {ARMS}")
    depth = int(num_speculative_tokens) if num_speculative_tokens.isdecimal() else num_speculative_tokens
    own = _by_arm(names, drafter_option or [])
    against = tuple(name for name in BASELINES if name == "none" or (name == "hf" and name in names))
    shared: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "device": device,
        "runtime": runtime,
        "weights": weights,
        "compile": compile,
        "verifier": verifier,
        "verifier_options": options.assignments("--verifier-option", verifier_option or []),
        "num_speculative_tokens": depth,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "prompts": prompts,
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "repetitions": repetitions,
        "against": against,
    }
    every = names if "none" in names else ["none", *names]
    cells = [Cell(**shared, drafter=name, drafter_options=own.get(name, {})) for name in every]
    folder = _folder(output) if output else None
    with report.status("loading"):
        from specdec.artifacts import shipped
        from specdec.bench.run import Decoders, Run

        hush()
        decoders = Decoders(data_dir)
        if licence := decoders.prompts(cells[0]).licence:
            say(f"prompts: {prompts} ({licence})")
        if drafters is None and shipped("m2r2", decoders.base(cells[0]).target.fingerprint) is None:
            cells = [cell for cell in cells if cell.drafter != "m2r2"]
            say("no m2r2 is shipped for this model, so it is left out; train one: specdec train m2r2 --model ...")
        run = Run(cells, decoders)
    with (
        (folder / "results.jsonl").open("a", buffering=1, encoding="utf-8") if folder else nullcontext() as log,
        Bar("bench") as bar,
    ):
        run.progress = bar
        if log:
            run.record = lambda request: log.write(json.dumps(request.as_dict(), ensure_ascii=False) + "\n")
        try:
            run.execute()
        except KeyboardInterrupt:
            if not run.requests:
                raise
    results = run.results()
    summary = {
        "command": shlex.join(["specdec", *sys.argv[1:]]),
        "configuration": {k: v for k, v in cells[0].as_dict().items() if k not in ("drafter", "drafter_options")},
        "arms": [
            {"drafter": r["cell"]["drafter"], "drafter_options": r["cell"]["drafter_options"], **r["arm"]}
            for r in results
        ],
        **{key: results[0][key] for key in ("prompts", "environment", "seconds", "interrupted")},
    }
    if folder:
        from specdec.artifacts import replace

        replace(folder / "bench.json", (json.dumps(summary, ensure_ascii=False, indent=1) + "\n").encode())
    tables(summary)
    if as_json:
        print(json.dumps(summary, ensure_ascii=False, allow_nan=False))
    if run.interrupted:
        raise typer.Exit(INTERRUPTED)


def _by_arm(names: list[str], pairs: list[str]) -> dict[str, dict[str, Any]]:
    """``ARM.KEY=VALUE`` texts as options by arm; names of arms may have dots in them."""
    out: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        fits = [name for name in names if pair.startswith(f"{name}.")]
        if not fits:
            raise SpecDecError(f"--drafter-option takes ARM.KEY=VALUE with an arm of --drafters; got '{pair}'")
        name = max(fits, key=len)
        out.setdefault(name, {}).update(options.assignments("--drafter-option", [pair[len(name) + 1 :]]))
    return out


def _folder(output: Path) -> Path:
    """The output folder, made if need be. Raises SpecDecError if it holds another benchmark."""
    for name in ("bench.json", "results.jsonl"):
        if (output / name).exists():
            raise SpecDecError(f"'{output}' already holds a benchmark ({name}); choose another --output, or delete it")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecDecError(f"cannot write to '{output}': {error.strerror}") from None
    return output
