"""``specdec generate``."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.base import inputs, options, terminal
from specdec.base.errors import SpecDecError, errors_as
from specdec.base.interrupts import interrupting
from specdec.cli import shared, statistics
from specdec.cli.shared import INTERRUPTED, panel, print_json
from specdec.models.catalogue import DEFAULT_MODEL, EMBEDDED
from specdec.speculation import registry

if TYPE_CHECKING:
    from specdec.api.decoder import SpecDecoder
    from specdec.api.generation import GenerationOutput

WARM_UP = 8  # tokens that --compare decodes in both ways before timing
TURNS = 3  # how often --compare decodes in each way
SILENT: Callable[[str], None] = lambda text: None  # noqa: E731 (writes nothing)
LEARNING = 5.0  # seconds after the text that a drafter may learn from it

_model, _text, _sampling, _output = map(panel, ("Model", "Text", "Sampling", "Output"))


@shared.grouped
def generate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [PROMPT]",
            help="The prompt; '-', or no prompt in a pipe, reads it from stdin. The model may stand before it, as for "
            "--model.",
        ),
    ] = None,
    loading: shared.DecoderFlags = shared.DecoderFlags(),
    verifier: shared.Verifier = "exact",
    verifier_option: shared.VerifierOption = None,
    expert_cache: Annotated[
        str | None, _model("Keep this share (0.25) or size (300MB) of a mixture's experts in memory.", "SIZE")
    ] = None,
    expert_prefetch: Annotated[
        bool,
        _model(
            "Read experts ahead of their use; forecasts are learned while the model runs.", names=["--expert-prefetch"]
        ),
    ] = False,
    system: Annotated[str | None, _text(options.System, "TEXT")] = None,
    raw: Annotated[bool, _text("Use the prompt as it is, without the chat template.", names=["--raw"])] = False,
    stop: Annotated[list[str] | None, _text(options.Stop, "TEXT", show_default=False)] = None,
    json_schema: Annotated[Path | None, _text("Constrain the text to JSON that this schema allows.", "FILE")] = None,
    max_new_tokens: Annotated[int, _text(options.MaxNewTokens, "N", min=1)] = 128,
    num_speculative_tokens: shared.Depth = "auto",
    sampling: shared.AllSamplingFlags = shared.AllSamplingFlags(),
    logit_bias: Annotated[list[str] | None, _sampling(options.LogitBias, "TOKEN=BIAS")] = None,
    compare: Annotated[
        bool,
        _output(
            "Decode with and without drafts in turns, three times each; print the speedup and whether the output is "
            "identical.",
            names=["--compare"],
        ),
    ] = False,
    as_json: Annotated[bool, _output("Print one JSON object instead of streaming.", names=["--json"])] = False,
    quiet: Annotated[bool, _output("Print no statistics.", names=["--quiet"])] = False,
    verbose: Annotated[bool, _output("Print more statistics, warnings and tracebacks.", names=["--verbose"])] = False,
) -> None:
    """Generate text. Text streams to stdout; statistics go to stderr."""
    given = words or []
    if len(given) > 2:
        raise SpecDecError("there are several prompts; give one, in quotes, with at most the model before it")
    named, prompt = given[0] if len(given) > 1 else None, given[-1] if given else None
    if len(given) == 1 and _is_model(given[0]):
        named, prompt = given[0], None  # and the prompt comes from a pipe
    loading = replace(loading, model=shared.one_model(named, loading.model, DEFAULT_MODEL))
    if compare:  # a comparison must not draft from the answer of an earlier one
        loading = replace(loading, keep_ngrams=False)
    model, drafter, silent = loading.model, loading.drafter, quiet or as_json
    text = _read(prompt)
    _check_text("--system", system or "")
    _check_text("--stop", "".join(stop or []))
    # Checks that need no model come first, because the model may have to be downloaded; and those that need no torch
    # before it is imported.
    loading.check()
    registry.check_name("verifiers", verifier)
    params = options.SamplingParams(**sampling.keywords, logit_bias=_bias(logit_bias or []))
    schema = None if json_schema is None else _schema(json_schema)
    asked: dict[str, Any] = {"max_new_tokens": max_new_tokens, **vars(params), "stop": stop or [], "constraint": None}
    asked["apply_chat_template"] = False if raw else None
    settings: dict[str, Any] = {"num_speculative_tokens": shared.depth(num_speculative_tokens)}
    rule_options = options.parse_assignments("--verifier-option", verifier_option or [])
    cache = None if expert_cache is None else options.parse_size("--expert-cache", expert_cache)
    with terminal.status("starting", silent):
        terminal.warn_in_lines(verbose)
        from specdec.api.decoder import SpecDecoder
        from specdec.api.prompts import encode
        from specdec.speculation.constraints import Json
        from specdec.speculation.sampling import Sampler

        asked["constraint"] = None if schema is None else Json(schema)
        settings |= asked
        rule = registry.verifier(verifier, rule_options)
    with terminal.status(f"preparing {model}", silent):
        decoder = SpecDecoder.from_pretrained(
            model,
            drafter,
            **loading.keywords | {"learn": bool(loading.learn)},  # None would learn after the command's text only
            verifier=rule,
            expert_cache=cache,
            expert_prefetch=expert_prefetch,
        )
    source = "" if drafter in ("auto", decoder.drafter.traits.label) else drafter  # a folder or NAME=SOURCE
    ids = encode(decoder.tokenizer, text, chat=False if raw else None, system=system, context=decoder.target.context)
    plain, baseline_settings = None, settings | {"num_speculative_tokens": 1}
    if compare:
        plain = decoder.with_drafter("none")
        with terminal.status("warming up", silent):
            for either, own in ((decoder, settings), (plain, baseline_settings)):
                either.generate(
                    ids[-64:], **own | {"max_new_tokens": WARM_UP, "stop": [], "constraint": None}, ignore_eos=True
                )

    # Turns have scopes of their own, so none drafts from the text of another one, or reuses its keys and values.
    scope = {"scope": "turn 1"} if compare else {}
    output, failed = _decode(decoder, ids, settings | scope, SILENT if as_json else terminal.write, silent)
    if not as_json:
        terminal.write("\n")
    comparison, interrupted = None, output.finish_reason == "interrupted"
    if plain is not None and not interrupted and failed is None:
        if not silent:  # no spinner: its thread would slow decoding
            terminal.note(f"decoding with and without drafts in turns, {TURNS} times each, to compare ...")
        decoded = [output]
        for turn in range(1, 2 * TURNS):
            either, own = (plain, baseline_settings) if turn % 2 else (decoder, settings)
            made, failed = _decode(either, ids, own | {"scope": f"turn {turn // 2 + 1}"}, SILENT, silent)
            interrupted = made.finish_reason == "interrupted"
            if interrupted or failed is not None:
                break
            decoded.append(made)
        else:
            sampler = Sampler([decoder.request(ids, **asked).sampler])
            turns = list(zip(decoded[::2], decoded[1::2], strict=True))
            comparison = statistics.compare(decoder, ids, sampler, turns)

    if as_json:
        chat = not raw and bool(getattr(decoder.tokenizer, "chat_template", None))
        del settings["constraint"], settings["apply_chat_template"]
        result: dict[str, Any] = {
            **output.as_dict(),
            "model": model,
            "drafter": decoder.drafter.traits.label,
            "drafter_source": source or None,
            "drafter_options": loading.options,
            **statistics.runtime(decoder),
            "runtime_note": decoder.runtime_note,
            "lossless": rule.lossless,
            "verifier": statistics.rule(decoder),
            "settings": settings | {"system": system, "chat": chat, "json_schema": json_schema and str(json_schema)},
            "note": statistics.advice(decoder, output, comparison) or None,
        }
        if comparison is not None:
            result["compare"] = comparison
        print_json(result)
    elif not quiet:
        statistics.statistics(decoder, output, comparison, verbose, source)
    if failed is not None:
        raise failed
    if loading.learn and decoder.drafter.learner is not None and not interrupted:
        with terminal.status("learning", silent):
            decoder.learn(LEARNING)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if comparison is not None and comparison["fault"]:
        raise typer.Exit(1)


def _is_model(word: str) -> bool:
    """Return whether ``word`` is the name of an embedded model or a GGUF file, and so hardly a prompt."""
    return word in EMBEDDED or (word.endswith(".gguf") and Path(word).is_file())


def _check_text(name: str, text: str) -> None:
    """Raise SpecDecError if ``text``, the value of the argument ``name``, has bytes that were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SpecDecError(f"{name} is not UTF-8 text; give it in UTF-8") from None


def _read(prompt: str | None) -> str:
    """Return the prompt: the argument, or all of stdin if that is "-" or None (not given).

    Raises SpecDecError for an empty prompt, for text that is not UTF-8, and for no prompt where stdin is a terminal or
    closed.
    """
    if prompt in (None, "-") and (sys.stdin is None or (prompt is None and sys.stdin.isatty())):
        raise SpecDecError('no prompt; give one, for example: specdec generate "Why is the sky blue?"')
    if prompt is None or prompt == "-":
        try:
            data = inputs.read_bounded(sys.stdin.buffer, inputs.LINE)
            prompt = data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise SpecDecError(f"the prompt on stdin is not UTF-8 text ({error.reason})") from None
        except ValueError as error:
            raise SpecDecError(f"the prompt on stdin is {error}; shorten it") from None
    else:
        _check_text("the prompt", prompt)
    if not prompt.strip():
        raise SpecDecError("the prompt is empty; give some text")
    return prompt


def _schema(file: Path) -> str:
    with errors_as(f"--json-schema: {file} cannot be read", ValueError):
        text = inputs.read_text(file, 2**20)
    with errors_as(f"--json-schema: {file} is not JSON", ValueError):
        inputs.parse_json(text)
    return text


def _bias(pairs: list[str]) -> dict[int, float] | None:
    """Return {token id: bias} of the texts TOKEN=BIAS in ``pairs``; None if there are none.

    Raises SpecDecError for other texts.
    """
    try:
        return {int(token): float(bias) for token, _, bias in (pair.partition("=") for pair in pairs)} or None
    except ValueError:
        raise SpecDecError("--logit-bias takes TOKEN=BIAS, a token id and a number, such as 504=-100") from None


def _decode(
    decoder: SpecDecoder, ids: list[int], settings: dict[str, Any], write: Callable[[str], None], silent: bool
) -> tuple[GenerationOutput, SpecDecError | None]:
    """Generate once after the prompt ``ids`` and pass the text to ``write`` as it arrives. Ctrl-C ends the generation.

    decoder: generates. settings: arguments of ``SpecDecoder.open``. silent: whether to show no progress.
    Returns the output, also of an interrupted generation, and the error that ended it (None: no error). Raises the
    error if nothing was generated.
    """
    generation = decoder.open([ids], **settings)
    sent = 0
    failed: SpecDecError | None = None
    interrupted = Event()  # the current step and write finish
    with interrupting(interrupted.set), generation:
        try:
            pieces = iter(generation)
            with terminal.status(f"reading the prompt of {len(ids)} tokens", silent):
                first = next(pieces)
            for (piece,) in itertools.chain([first], pieces):
                write(piece)
                sent += len(piece)
                if interrupted.is_set():
                    break
        except SpecDecError as error:
            failed = error
        output = generation.outputs()[0]
        if failed is not None and not output.token_ids:
            raise failed
        write(output.text[sent:])  # text that could have begun a stop string or a character
    return output, failed
