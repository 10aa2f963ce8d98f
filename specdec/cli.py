"""The command line: ``specdec generate``, ``models``, ``drafters`` and ``train``.

Text goes to stdout, everything else to stderr. Bad input is one line and exit code 2; 1 is a fault of ours (an
unexpected exception, an output that should equal plain decoding and does not); 130 is Ctrl-C. torch and transformers
are imported inside the commands that need them, so that help is instant. Knows nothing of how decoding works.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from specdec import __version__, inputs, options, registry, report, terminal
from specdec.bench.command import bench
from specdec.doctor import doctor
from specdec.embedded import DEFAULT_MODEL, embedded_models
from specdec.errors import SpecDecError, SpecDecWarning, did_you_mean
from specdec.pack_experts import pack_experts
from specdec.sweep.command import report as sweep_report
from specdec.sweep.command import sweep
from specdec.train.command import app as train_app
from specdec.tune.command import app as tune_app
from specdec.verify.command import verify

if TYPE_CHECKING:
    from specdec.decoder import GenerationOutput, SpecDecoder
    from specdec.experts.offload import ExpertOptions

LONG = 1024  # tokens of a prompt that is worth a spinner
WARM_UP = 8  # tokens each arm of --compare decodes before it is timed
INTERRUPTED = 130
DEBUG = "SPECDEC_DEBUG"


class Commands(TyperGroup):
    """The root command; turns every failure into one line and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        try:
            code = super().main(args, prog_name or "specdec", complete_var, False, windows_expand_args, **extra)
            sys.stdout.flush()  # while it can still be said that it fails
        except BrokenPipeError:  # whoever reads has seen enough
            code = 1
        except Exception as error:
            if not standalone_mode:
                raise
            code = _explain(error, debug=bool(os.environ.get(DEBUG)) or "--verbose" in args)
        except KeyboardInterrupt:
            code = INTERRUPTED
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def _explain(error: Exception, debug: bool) -> int:
    """Print one line about ``error``; return the exit code."""
    kind, text = type(error).__name__, str(error)
    if isinstance(error, SpecDecError):
        report.error(text)
    elif isinstance(error, typer.Abort):
        return INTERRUPTED
    elif kind == "NoArgsIsHelpError":
        print(text)
    elif hasattr(error, "format_message"):  # a usage error, found by typer
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "specdec"
        report.error(f"{error.format_message().rstrip('.')}; see '{where} --help'")
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" while writing '{error.filename}'" if error.filename else ""
        report.error(f"no space left on the disk{where}; free some and try again")
    elif isinstance(error, RecursionError) and not debug:
        report.error(f"a file or an option is nested too deeply to be read; {DEBUG}=1 shows where")
    elif isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        report.error("out of memory; use a smaller model, a shorter prompt, or --dtype bfloat16")
    else:
        if debug:
            traceback.print_exception(error)
        hint = "" if debug else f"; run with {DEBUG}=1 for the traceback"
        report.error(f"unexpected {kind}: {text}{hint}")
        return 1
    return 2


app = typer.Typer(
    name="specdec",
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Example: specdec generate "Why is the sky blue?" --drafter m2r2 --compare',
)
app.add_typer(
    train_app,
    name="train",
    epilog="Example: specdec train m2r2 --model my-model --prompts prompts.jsonl --output my-drafter --minutes 30",
)
app.command(epilog="Example: specdec bench --drafters hf,none,prompt-lookup,m2r2 --limit 8 --output DIR")(bench)
app.command(epilog="Example: specdec verify --model my-model --drafter my-drafter --prompts prompts.jsonl")(verify)
app.command(epilog="Example: specdec sweep quick drafter=m2r2,prompt-lookup --output DIR")(sweep)
app.command("pack-experts", epilog="Example: specdec pack-experts my-moe experts --fit answers.jsonl")(pack_experts)
app.add_typer(tune_app, name="tune")
app.command("report", epilog="Example: specdec report DIR --format markdown")(sweep_report)
app.command(epilog="Example: specdec doctor --json")(doctor)


def main() -> None:
    try:
        terminal.guard()
    except SpecDecError as error:
        report.error(str(error))
        sys.exit(2)
    app()


def _version(wanted: bool) -> None:
    if wanted:
        print(f"specdec {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Lossless speculative decoding for Hugging Face language models: the same text, sooner."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


class Runtime(StrEnum):
    auto = "auto"
    native = "native"
    graphs = "graphs"
    fused = "fused"
    reference = "reference"


class Weights(StrEnum):
    auto = "auto"
    dense = "dense"
    int8 = "int8"
    int4 = "int4"


def _panel(title: str) -> Callable[..., Any]:
    """A maker of options listed under ``title`` in the help."""

    def option(name: str, help: str, metavar: str | None = None, **more: Any) -> Any:
        return typer.Option(name, help=help, metavar=metavar, rich_help_panel=title, **more)

    return option


_model, _experts, _text, _sampling, _output = map(_panel, ("Model", "Experts", "Text", "Sampling", "Output"))


@app.command(
    epilog='Example: specdec generate "Why is the sky blue?" --drafter m2r2 --compare\n\n'
    "Example: cat letter.txt | specdec generate --system 'Answer in French.' --temperature 0.7 > answer.txt"
)
def generate(
    prompt: Annotated[str | None, typer.Argument(help="'-', or nothing in a pipe, reads it from stdin.")] = None,
    drafter: Annotated[
        str,
        _model(
            "--drafter",
            "Name (see 'specdec drafters'), NAME=SOURCE, folder, or several joined by +; auto: what 'specdec tune "
            "drafter' found for the model, else the m2r2 shipped for it, else prompt-lookup.",
            "NAME",
        ),
    ] = "auto",
    drafter_option: Annotated[
        list[str] | None,
        _model("--drafter-option", "An option of the drafter, such as exit_layer=8; repeatable.", "KEY=VALUE"),
    ] = None,
    verifier: Annotated[
        str, _model("--verifier", "exact, or a lossy acceptance rule: typical, confident.", "NAME")
    ] = "exact",
    verifier_option: Annotated[
        list[str] | None,
        _model("--verifier-option", "An option of the acceptance rule, such as epsilon=0.1; repeatable.", "KEY=VALUE"),
    ] = None,
    exit_threshold: Annotated[
        float | None,
        _model("--exit-threshold", "Of confident: how sure, in [0, 1], a token must be to leave early.", "P"),
    ] = None,
    exact: Annotated[bool, _model("--exact", "Refuse a lossy acceptance rule.")] = False,
    model: Annotated[
        str, _model("--model", "Name (see 'specdec models'), Hugging Face id, folder or GGUF file.", "NAME")
    ] = DEFAULT_MODEL,
    dtype: Annotated[
        str, _model("--dtype", "auto (the checkpoint's), fastest, bfloat16, float16 or float32.", "DTYPE")
    ] = "auto",
    device: Annotated[
        str, _model("--device", "auto (CUDA where there is one, else cpu), cpu, cuda, cuda:1, mps ...", "DEVICE")
    ] = "auto",
    runtime: Annotated[
        Runtime,
        _model("--runtime", "auto (the fastest that serves the model), native, graphs, fused or reference.", "NAME"),
    ] = Runtime.auto,
    weights: Annotated[
        Weights,
        _model("--weights", "auto, dense, or layers rounded to int8 or int4 (CPU, bfloat16): the base, then.", "KIND"),
    ] = Weights.auto,
    compile: Annotated[
        bool, _model("--compile", "Compile layers of the fused or graphs runtime (torch.compile; slow to start).")
    ] = False,
    revision: Annotated[str | None, _model("--revision", "Branch, tag or commit of a Hugging Face id.", "REV")] = None,
    trust_remote_code: Annotated[
        bool, _model("--trust-remote-code", "Run Python code that comes with the model.")
    ] = False,
    expert_cache: Annotated[
        str | None,
        _experts("--expert-cache", "Offload experts; keep this share (0.25) or size (300MB) of them.", "SIZE"),
    ] = None,
    expert_prefetch: Annotated[
        str,
        _experts(
            "--expert-prefetch",
            "Load experts ahead where it pays: none, previous-token, residual or m2r2.",
            "NAME",
        ),
    ] = "none",
    expert_option: Annotated[
        list[str] | None,
        _experts("--expert-option", "folder=DIR, adaptive=false; repeatable.", "KEY=VALUE"),
    ] = None,
    system: Annotated[str | None, _text("--system", "System message before the prompt.", "TEXT")] = None,
    raw: Annotated[bool, _text("--raw", "Use the prompt as it is, without the chat template.")] = False,
    stop: Annotated[
        list[str] | None, _text("--stop", "End before this text; repeatable.", "TEXT", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, _text("--max-new-tokens", "Most new tokens.", "N", min=1)] = 128,
    num_speculative_tokens: Annotated[
        str, _text("--num-speculative-tokens", "Tokens drafted per round; auto adapts, down to none.", "K")
    ] = "auto",
    temperature: Annotated[float, _sampling("--temperature", "0 is greedy: always the likeliest token.", "T")] = 0.0,
    top_p: Annotated[float, _sampling("--top-p", "Keep the likeliest tokens up to this total probability.", "P")] = 1.0,
    top_k: Annotated[int, _sampling("--top-k", "Keep this many likeliest tokens; 0 is off.", "N")] = 0,
    min_p: Annotated[
        float, _sampling("--min-p", "Keep tokens at least this likely, relative to the likeliest.", "P")
    ] = 0.0,
    repetition_penalty: Annotated[
        float | None,
        _sampling("--repetition-penalty", "Above 1 discourages repetition; if not given, the model's own.", "R"),
    ] = None,
    seed: Annotated[int, _sampling("--seed", "Same seed, same text.", "N")] = 0,
    compare: Annotated[
        bool, _output("--compare", "Also decode plainly: speedup, and is the output identical?")
    ] = False,
    as_json: Annotated[bool, _output("--json", "Print one JSON object instead of streaming.")] = False,
    quiet: Annotated[bool, _output("--quiet", "No statistics.")] = False,
    verbose: Annotated[bool, _output("--verbose", "More statistics, warnings, tracebacks.")] = False,
) -> None:
    """Generate text. It streams to stdout as it is accepted; statistics go to stderr."""
    silent = quiet or as_json
    text = _read(prompt)
    system = None if system is None else _utf8("--system", system)
    stop = [_utf8("--stop", one) for one in stop or []]
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_speculative_tokens": _depth(num_speculative_tokens),
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop,
    }
    with report.status("starting", silent):
        _hush(verbose)
        from specdec.decoder import SpecDecoder
        from specdec.sampling import SamplingParams
        from specdec.text import encode

        # What can be judged without the model comes first: it may have to be downloaded.
        penalty = 1.0 if repetition_penalty is None else repetition_penalty
        settings["temperature"] = SamplingParams(temperature, top_k, top_p, min_p, penalty, seed).temperature
        registry.parse(drafter)
        rule_options = options.assignments("--verifier-option", verifier_option or [])
        if exit_threshold is not None:
            if verifier != "confident":
                raise SpecDecError(f"--exit-threshold belongs to --verifier confident; '{verifier}' has none")
            rule_options["exit_threshold"] = exit_threshold
        rule = registry.verifier(verifier, rule_options, exact)
        drafter_options = options.assignments("--drafter-option", drafter_option or [])
        experts = _expert_options(expert_cache, expert_prefetch, expert_option or [])
    with report.status(f"preparing {model}", silent):
        decoder = SpecDecoder.from_pretrained(
            model,
            drafter,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            runtime=runtime.value,
            weights=weights.value,
            compile=compile,
            drafter_options=drafter_options,
            verifier=rule,
            experts=experts,
        )
    tuned = decoder.tuned
    if drafter == "auto":
        drafter = decoder.drafter.name if tuned is None else tuned.drafter
    if tuned is not None and num_speculative_tokens == "auto":
        settings["num_speculative_tokens"] = tuned.num_speculative_tokens
    ids = encode(decoder.tokenizer, text, chat=False if raw else None, system=system, context=decoder.target.context)
    plain, baseline_settings = None, settings | {"num_speculative_tokens": 1}
    if compare:
        plain = decoder.with_drafter("none")
        with report.status("warming up", silent):
            for arm, own in ((decoder, settings), (plain, baseline_settings)):
                arm.generate(ids[-64:], **own | {"max_new_tokens": WARM_UP, "stop": []}, ignore_eos=True)

    output, failed = _decode(decoder, ids, settings, _discard if as_json else terminal.write, silent)
    if not as_json:
        terminal.write("\n")
    comparison, interrupted = None, output.finish_reason == "interrupted"
    if plain is not None and not interrupted:
        if not silent:
            report.note("decoding plainly, to compare ...")  # no spinner: its thread would slow this arm
        baseline, failed = _decode(plain, ids, baseline_settings, _discard, silent)
        interrupted = baseline.finish_reason == "interrupted"
        if not interrupted:
            comparison = _compare(decoder, ids, settings, output, baseline)

    if as_json:
        result = {
            "text": output.text,
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
            "model": model,
            "drafter": decoder.drafter.label,
            "drafter_source": _source(decoder, drafter) or None,
            "drafter_options": drafter_options,
            "tuned": None if tuned is None else asdict(tuned),
            **report.runtime(decoder),
            "runtime_note": decoder.runtime_note,
            "lossless": rule.lossless,
            "verifier": report.rule(decoder),
            "settings": settings
            | {"system": system, "chat": not raw and bool(getattr(decoder.tokenizer, "chat_template", None))},
            "metrics": output.metrics.as_dict(),
            "note": report.unaccepted(decoder, output) or None,
        }
        _print_json(result if comparison is None else result | {"compare": comparison.as_dict()})
    elif not quiet:
        report.statistics(decoder, output, comparison, verbose, _source(decoder, drafter), tuned)
    if failed is not None:
        raise failed
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if comparison is not None and comparison.fault:
        raise typer.Exit(1)


def _source(decoder: SpecDecoder, asked: str) -> str:
    """What the drafter was asked for by, where that is not its name: a folder, or NAME=SOURCE."""
    return "" if asked == decoder.drafter.label else asked


def _utf8(name: str, text: str) -> str:
    try:
        return inputs.argument(name, text)
    except ValueError as error:
        raise SpecDecError(f"{error}; give it in UTF-8") from None


def _read(prompt: str | None) -> str:
    """The prompt, from the argument or stdin. Raises SpecDecError if there is none, and for one that is no text."""
    if prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise SpecDecError('no prompt; give one, for example: specdec generate "Why is the sky blue?"')
    if prompt is None or prompt == "-":
        try:
            data = inputs.whole(sys.stdin.buffer, inputs.LINE)
            prompt = data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise SpecDecError(f"the prompt on stdin is not UTF-8 text ({error.reason})") from None
        except ValueError as error:
            raise SpecDecError(f"the prompt on stdin is {error}; shorten it") from None
    else:
        prompt = _utf8("the prompt", prompt)
    if not prompt.strip():
        raise SpecDecError("the prompt is empty; give some text")
    return prompt


def _expert_options(cache: str | None, prefetch: str, more: list[str]) -> ExpertOptions | None:
    """What --expert-cache and its like say; None without them. Raises SpecDecError for what cannot be."""
    from specdec.experts.offload import ExpertOptions

    if cache is None:
        if prefetch != "none" or more:
            raise SpecDecError(
                "--expert-prefetch and --expert-option go with --expert-cache; give its size, such as 0.25"
            )
        return None
    given = options.assignments("--expert-option", more)
    known = ("folder", "adaptive")
    for name in given:
        if name not in known:
            raise SpecDecError(f"unknown expert option '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}")
    if "folder" in given:
        given["folder"] = Path(str(given["folder"]))
    return ExpertOptions(options.size("--expert-cache", cache), prefetch, **given)


def _depth(text: str) -> int | str:
    if text == "auto" or (text.isdecimal() and int(text) >= 1):
        return text if text == "auto" else int(text)
    raise SpecDecError(f"--num-speculative-tokens must be 'auto' or a number >= 1; got '{text}'")


def _hush(verbose: bool) -> None:
    """Keep the warnings of libraries off stderr, unless asked for. Ours are lines of their own."""
    report.warn_in_lines()
    if verbose:
        return
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", category=SpecDecWarning)
    import transformers

    transformers.logging.set_verbosity_error()


@contextmanager
def _interruptible() -> Iterator[Event]:
    """Turn the first Ctrl-C into an event, so that it cuts no round and no write in half; a second one raises."""
    interrupted, before = Event(), signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    if before is not signal.SIG_IGN:  # ignored, for example, in a script's background jobs
        signal.signal(signal.SIGINT, handler)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _decode(
    decoder: SpecDecoder, ids: list[int], settings: dict[str, Any], write: Callable[[str], None], silent: bool
) -> tuple[GenerationOutput, SpecDecError | None]:
    """One generation, its text handed to ``write`` as it comes. Ctrl-C ends it with what there is.

    So does what makes it fail, which is returned, too; raised, if nothing has been generated.
    """
    with report.status("measuring", silent or settings["num_speculative_tokens"] != "auto"):  # once per machine
        generation = decoder.open([ids], **settings)
    sent = 0
    failed: SpecDecError | None = None
    with _interruptible() as interrupted, generation:
        try:
            pieces = iter(generation)
            with report.status(f"reading the prompt of {len(ids)} tokens", silent or _short(ids)):
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
        write(output.text[sent:])  # held back as the possible beginning of a stop string or character
    return output, failed


def _compare(
    decoder: SpecDecoder, ids: list[int], settings: dict[str, Any], ours: GenerationOutput, plain: GenerationOutput
) -> report.Comparison:
    from specdec.replay import first_difference, margins
    from specdec.sampling import SamplingParams

    params = SamplingParams(
        **{name: settings[name] for name in SamplingParams.__dataclass_fields__ if name != "repetition_penalty"}
    )
    count = min(settings["max_new_tokens"], decoder.target.context - len(ids))
    sampler = decoder.sampler([ids], [count], params, settings["repetition_penalty"])
    if not decoder.verifier.lossless:
        agreed = (margins(decoder.target, ids, ours.token_ids, sampler) <= 0).float().mean().item()
        return report.Comparison(ours, plain, None, report.rule(decoder), agreed)
    return report.Comparison(
        ours, plain, first_difference(decoder.target, ids, ours.token_ids, plain.token_ids, sampler)
    )


def _short(ids: list[int]) -> bool:
    """Whether a terminal does without a spinner while the prompt is read: its thread takes time from the model."""
    return len(ids) < LONG and report.stderr().is_terminal


def _discard(text: str) -> None:
    pass


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(epilog="Example: specdec models --json")
def models(as_json: AsJson = False) -> None:
    """List the embedded models: licence, size of the download and in the cache, whether they are there, and where."""
    rows = embedded_models()
    if as_json:
        _print_json([asdict(row) for row in rows])
    else:
        cells = [
            (
                row.name,
                row.licence,
                f"{row.download_bytes / 1e6:.0f} MB",
                f"{row.cached_bytes / 1e6:.0f} MB",
                "yes" if row.cached else "no",
                row.where,
            )
            for row in rows
        ]
        report.columns(("name", "licence", "download", "on disk", "cached", "where"), cells)


@app.command(epilog="Example: specdec drafters --json")
def drafters(as_json: AsJson = False) -> None:
    """List the drafters: what they are, how to train them, and for which models one is shipped."""
    rows = [_drafter(name) for name in sorted(registry.names("drafters"))]
    if as_json:
        _print_json(rows)
    else:
        cells = [
            (row["name"], row["summary"], row["training"] or "not needed", ", ".join(row["shipped_for"]) or "-")
            for row in rows
        ]
        report.columns(("name", "summary", "training", "shipped for"), cells)


def _drafter(name: str) -> dict[str, Any]:
    try:
        found = registry.lookup("drafters", name)
        summary, training = found.summary, found.training
    except (ImportError, AttributeError, SpecDecError) as error:  # one broken plug-in must not hide the others
        summary, training = f"cannot be loaded: {error}", None
    shipped = Path(str(files("specdec.drafters"))) / "pretrained" / name
    return {
        "name": name,
        "summary": summary,
        "training": training,
        "shipped_for": sorted(path.parent.name for path in shipped.glob("*/config.json")),
    }
