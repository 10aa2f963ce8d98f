"""``specdec verify``: a certificate of losslessness for the user's own model, drafter and prompts.

The exit code is 0 if every check passed, 1 if one failed or had not enough drafts, 2 for bad input, and 130 if the run
was interrupted by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.base import options, terminal
from specdec.base.errors import SpecDecError, errors_as
from specdec.base.files import write_atomically
from specdec.base.interrupts import interrupt, interrupting
from specdec.cli import shared, statistics
from specdec.cli.shared import INTERRUPTED
from specdec.speculation import registry


@shared.grouped
def verify(
    loading: shared.LoadingFlags = shared.LoadingFlags(),
    drafting: shared.DrafterFlags = shared.DrafterFlags(),
    sampling: shared.SamplingFlags = shared.SamplingFlags(temperature=1.0),
    verifier: shared.Verifier = "exact",
    verifier_option: shared.VerifierOption = None,
    prompts: shared.FirstTurns = "own",
    limit: shared.Limit = None,
    max_new_tokens: shared.MaxNewTokens = 128,
    num_speculative_tokens: Annotated[
        str, typer.Option(metavar="K", help="Draft length beside the automatic one; auto: the automatic one alone.")
    ] = "4",
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together; 1: no batches.", min=1)] = 4,
    min_drafted: Annotated[int, typer.Option(help="Drafted tokens that each part needs.", min=0)] = 32,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for certificate.txt and certificate.json.")
    ] = None,
    as_json: shared.JsonLine = False,
) -> None:
    """Check that a drafter changes nothing: compare tokens with those of plain decoding, greedily and in sampling.

    The model runs as in generate. Samples are drawn with the same random numbers. Each difference is a proven near-tie
    of the logits, or a fault; the exit code is then 1, as it is without enough drafts. With --dtype float32 greedy
    tokens are also compared with those of model.generate.
    """
    lengths = list(dict.fromkeys(["auto", shared.depth(num_speculative_tokens)]))
    if sampling.temperature < options.GREEDY_BELOW:
        raise SpecDecError(
            f"--temperature is for sampling and must be >= {options.GREEDY_BELOW:g}; greedy decoding is always checked"
        )
    loading.check()
    drafting.check()
    registry.check_name("verifiers", verifier)
    from specdec.bench.prompts import evenly_spaced, load_prompts

    found = load_prompts(prompts)
    with terminal.status("loading"):
        import yaml

        from specdec.api.decoder import SpecDecoder
        from specdec.api.prompts import encode
        from specdec.bench.environment import environment
        from specdec.verify.certificate import Certificate

        terminal.warn_in_lines()
        params = options.SamplingParams(**vars(sampling))
        rule = registry.verifier(verifier, options.parse_assignments("--verifier-option", verifier_option or []))
        if found.licence:
            terminal.say(f"prompts: {prompts} ({found.licence})")
        if output:
            with errors_as(f"cannot write to '{output}'"):
                output.mkdir(parents=True, exist_ok=True)
        decoder = SpecDecoder.from_pretrained(
            loading.model,
            drafting.drafter,
            **loading.keywords,
            drafter_options=drafting.options,
            verifier=rule,
            learn=False,
        )
        chosen = evenly_spaced(found.conversations, limit)
        encoded = [(c.id, encode(decoder.tokenizer, c.turns[0], context=decoder.target.context)) for c in chosen]
        certificate = Certificate(decoder, encoded, params, max_new_tokens, lengths, batch_size, min_drafted)
    where = environment()  # with the load before the run
    try:
        with terminal.Bar("verify") as bar, interrupting(interrupt, ended=True):
            certificate.run(bar)
    except KeyboardInterrupt:
        if not certificate.checks["greedy"].answers:
            raise
    about: dict[str, Any] = {
        "model": loading.model,
        "fingerprint": decoder.target.fingerprint,
        "drafter": decoder.drafter.traits.label,
        "drafter_source": drafting.drafter,
        "specdec": where.pop("specdec"),
        "commit": where.pop("commit"),
        "load_average": where.pop("load_average"),
        **statistics.runtime(decoder),
        "runtime_note": decoder.runtime_note,
        "num_speculative_tokens": lengths,
        "verifier": rule.label,
        "prompts": f"{len(encoded)} of {found.name}",
        "prompts_sha256": found.sha256,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "sampling": vars(sampling),
        "command": shared.command_line(),
        "environment": where,
    }
    facts = yaml.safe_dump(about, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
    page, data = certificate.page(facts), about | certificate.as_dict()
    terminal.write(f"{page}\n")
    if output:
        write_atomically(output / "certificate.txt", (page + "\n").encode(errors="backslashreplace"))
        shared.write_json(output / "certificate.json", data)
    if as_json:
        shared.print_json(data)
    if certificate.result != "FAILED" and not certificate.complete:
        raise typer.Exit(INTERRUPTED)
    if certificate.result != "PASSED":
        raise typer.Exit(1)
