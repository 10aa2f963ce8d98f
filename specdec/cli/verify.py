"""``specdec verify``: a certificate of losslessness for the user's own model, drafter and prompts.

Exit code 0 if every check passed, 1 if one failed, 2 for bad input, 130 if it was interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.base import options, terminal
from specdec.base.errors import SpecDecError
from specdec.base.files import write_atomically
from specdec.cli import shared, statistics
from specdec.cli.shared import INTERRUPTED
from specdec.speculation import registry


@shared.grouped
def verify(
    loading: shared.LoadingFlags = shared.LoadingFlags(dtype="float32"),
    drafting: shared.DrafterFlags = shared.DrafterFlags(),
    sampling: shared.SamplingFlags = shared.SamplingFlags(temperature=1.0),
    verifier: shared.Verifier = "exact",
    verifier_option: shared.VerifierOption = None,
    prompts: shared.FirstTurns = "own",
    data_dir: shared.DataDir = None,
    limit: shared.Limit = None,
    max_new_tokens: shared.MaxNewTokens = 128,
    depths: Annotated[str, typer.Option(metavar="K,K,..", help="Draft lengths to check; numbers or auto.")] = "1,3,7",
    draws: Annotated[int, typer.Option(min=0, help="Sampled continuations at each position; 0: none.")] = 128,
    positions: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,..", help="Token positions of the first answer at which sampling is tested; default: 0 and 16."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for certificate.txt and certificate.json.")
    ] = None,
    as_json: shared.JsonLine = False,
) -> None:
    """Check that a drafter changes nothing: greedy tokens against the model, sampled ones against its distribution.

    The exit code is 1 if a check fails.

    In float32 greedy tokens must be equal; in bfloat16 and float16 every token is replayed through the model.
    """
    model, drafter, weights = loading.model, drafting.drafter, loading.weights
    chosen = [shared.depth(part, "--depths") for part in shared.commas(depths)]
    places = None if positions is None else [_position(part) for part in shared.commas(positions)]
    if places and draws and max(places) >= max_new_tokens:
        raise SpecDecError(
            f"position {max(places)} lies behind answers of {max_new_tokens} tokens; see --max-new-tokens"
        )
    if sampling.temperature < options.GREEDY_BELOW:
        raise SpecDecError(
            f"--temperature is for sampling and must be >= {options.GREEDY_BELOW:g}; greedy decoding is always checked"
        )
    loading.check()
    drafting.check()
    registry.check_name("verifiers", verifier)
    with terminal.status("loading"):
        from specdec.api.decoder import SpecDecoder
        from specdec.bench.prompts import evenly_spaced, load_prompts
        from specdec.models.gguf.blocks import temporarily_dense
        from specdec.verify.certificate import Certificate, CheckPlan

        terminal.warn_in_lines()
        params = options.SamplingParams(**vars(sampling))
        rule = registry.verifier(verifier, options.parse_assignments("--verifier-option", verifier_option or []))
        found = load_prompts(prompts, data_dir)
        if found.licence:
            terminal.say(f"prompts: {prompts} ({found.licence})")
        if output:
            shared.make_folder(output)
        decoder = SpecDecoder.from_pretrained(
            model, drafter, **loading.keywords, drafter_options=drafting.options, verifier=rule, learn=False
        )
        drafter = decoder.tuned.drafter if decoder.tuned else decoder.drafter.name if drafter == "auto" else drafter
    plan = CheckPlan(chosen, evenly_spaced(found.conversations, limit), max_new_tokens, draws, places, params)
    certificate = Certificate(decoder, plan)
    try:
        with terminal.Bar("verify") as bar, temporarily_dense(decoder.model):
            certificate.run(bar)
    except KeyboardInterrupt:
        if not certificate.greedy[0].answers:
            raise
    about: dict[str, Any] = {
        "command": shared.command_line(),
        "model": model,
        **statistics.runtime(decoder),
        "runtime_note": decoder.runtime_note,
        "weights": weights,
        "drafter": drafter,
        "verifier": rule.label,
        "prompts": f"{len(plan.conversations)} of {found.name}",
        "prompts_sha256": found.sha256,
        "max_new_tokens": max_new_tokens,
    }
    title = [
        f"model      {model}, {about['dtype']}, {about['runtime']} runtime on {about['device']}, weights {weights}"
        + (f", activations in {about['activations']}" if about["activations"] != "as computed" else "")
        + (f", KV cache {loading.kv_cache}" if loading.kv_cache != "auto" else ""),
        f"drafter    {drafter}; acceptance rule {about['verifier']}",
        f"prompts    {about['prompts']}, at most {max_new_tokens} new tokens",
        f"command    {about['command']}",
    ]
    page, data = certificate.page(title), about | certificate.as_dict()
    terminal.write(f"{page}\n")
    if output:
        write_atomically(output / "certificate.txt", (page + "\n").encode())
        shared.write_json(output / "certificate.json", data)
    if as_json:
        shared.print_json(data)
    if not certificate.passed:
        raise typer.Exit(1)
    if not certificate.complete:
        raise typer.Exit(INTERRUPTED)


def _position(text: str) -> int:
    if not text.isdecimal():
        raise SpecDecError(f"--positions takes comma-separated numbers >= 0; got '{text}'")
    return int(text)
