"""``specdec verify``: a certificate of losslessness for the user's own model, drafter and prompts.

Exit code 0 if everything held, 1 if something did not, 2 for bad input, 130 if it was cut short.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec import options, registry, report
from specdec.bench.show import Bar, hush, say
from specdec.embedded import DEFAULT_MODEL
from specdec.errors import SpecDecError
from specdec.terminal import write

INTERRUPTED = 130


def verify(
    model: Annotated[str, typer.Option(help="Name, Hugging Face id, folder or GGUF file.")] = DEFAULT_MODEL,
    drafter: Annotated[str, typer.Option(help="As in generate.")] = "auto",
    drafter_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the drafter; repeatable.")
    ] = None,
    verifier: Annotated[str, typer.Option(help="Acceptance rule.")] = "exact",
    verifier_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the rule; repeatable.")
    ] = None,
    prompts: Annotated[
        str, typer.Option(metavar="FILE|NAME", help="As in bench; the first turn of each conversation counts.")
    ] = "own",
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", envvar="SPECDEC_DATA", help="Folder of named prompt sets.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts, spread over the set; all if not given.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of an answer.")] = 128,
    depths: Annotated[str, typer.Option(metavar="K,K,..", help="Draft depths to check; numbers or auto.")] = "1,3,7",
    draws: Annotated[int, typer.Option(min=0, help="Sampled continuations at each position; 0: none.")] = 128,
    positions: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,..", help="Where in the first answer sampling is tested, in tokens; 0 and 16 if it is so long."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the sampling.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Of the sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="float32 demands equal tokens; bfloat16 and float16 are replayed.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto (CUDA, else cpu), cpu, cuda, cuda:1, mps ...")] = "auto",
    runtime: Annotated[str, typer.Option(help="auto, native, graphs, fused or reference.")] = "auto",
    weights: Annotated[str, typer.Option(help="auto, dense, int8 or int4.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="As in generate.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for certificate.txt and certificate.json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with everything as one line of JSON.")] = False,
) -> None:
    """Check that a drafter changes nothing: greedy tokens against the model itself, sampled ones against its
    distribution. Exit code 1 if something does not hold.
    """
    chosen = _depths(depths)
    places = None if positions is None else _wholes("--positions", positions)
    if places and draws and max(places) >= max_new_tokens:
        raise SpecDecError(
            f"position {max(places)} lies behind answers of {max_new_tokens} tokens; see --max-new-tokens"
        )
    if temperature < options.GREEDY_BELOW:
        raise SpecDecError(
            f"--temperature is that of the sampling and must be >= {options.GREEDY_BELOW:g}; greedy decoding is always "
            "checked"
        )
    with report.status("loading"):
        from specdec.bench.prompts import load_prompts, spread
        from specdec.decoder import SpecDecoder
        from specdec.sampling import SamplingParams
        from specdec.verify.certificate import Certificate, Plan

        hush()
        params = SamplingParams(temperature, top_k, top_p, seed=seed)
        rule = registry.verifier(verifier, options.assignments("--verifier-option", verifier_option or []))
        registry.parse(drafter)
        found = load_prompts(prompts, data_dir)
        if found.licence:
            say(f"prompts: {prompts} ({found.licence})")
        if output:
            _make(output)
        decoder = SpecDecoder.from_pretrained(
            model,
            drafter,
            drafter_options=options.assignments("--drafter-option", drafter_option or []),
            verifier=rule,
            dtype=dtype,
            device=device,
            runtime=runtime,
            weights=weights,
            compile=compile,
        )
        drafter = decoder.tuned.drafter if decoder.tuned else decoder.drafter.name if drafter == "auto" else drafter
    plan = Plan(chosen, spread(found.conversations, limit), max_new_tokens, draws, places, params)
    certificate = Certificate(decoder, plan)
    try:
        with Bar("verify") as bar:
            certificate.run(bar)
    except KeyboardInterrupt:
        if not certificate.greedy[0].answers:
            raise
    about: dict[str, Any] = {
        "command": shlex.join(["specdec", *sys.argv[1:]]),
        "model": model,
        **report.runtime(decoder),
        "runtime_note": decoder.runtime_note,
        "weights": weights,
        "drafter": drafter,
        "verifier": getattr(rule, "label", rule.name),
        "prompts": f"{len(plan.conversations)} of {found.name}",
        "prompts_sha256": found.sha256,
        "max_new_tokens": max_new_tokens,
    }
    title = [
        f"model      {model}, {about['dtype']}, {about['runtime']} runtime on {about['device']}, weights {weights}",
        f"drafter    {drafter}; acceptance rule {about['verifier']}",
        f"prompts    {about['prompts']}, at most {max_new_tokens} new tokens",
        f"command    {about['command']}",
    ]
    page, data = certificate.page(title), about | certificate.as_dict()
    write(f"{page}\n")
    if output:
        from specdec.artifacts import replace

        replace(output / "certificate.txt", (page + "\n").encode())
        replace(output / "certificate.json", (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode())
    if as_json:
        print(json.dumps(data, ensure_ascii=False, allow_nan=False))
    if not certificate.passed:
        raise typer.Exit(1)
    if not certificate.complete:
        raise typer.Exit(INTERRUPTED)


def _depths(text: str) -> list[int | str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part == "auto" or (part.isdecimal() and int(part) >= 1) for part in parts):
        raise SpecDecError(f"--depths takes numbers >= 1 or auto, with commas between; got '{text}'")
    return [part if part == "auto" else int(part) for part in parts]


def _wholes(flag: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise SpecDecError(f"{flag} takes numbers >= 0 with commas between; got '{text}'")
    return [int(part) for part in parts]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecDecError(f"cannot write to '{folder}': {error.strerror}") from None
