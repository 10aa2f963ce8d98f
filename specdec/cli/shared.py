"""Options that several commands share, and helpers for arguments, interruption and JSON."""

from __future__ import annotations

import functools
import inspect
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, is_dataclass, replace
from glob import escape, glob
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from specdec.base import files, options
from specdec.base.errors import SpecDecError
from specdec.models.catalogue import DEFAULT_MODEL, EMBEDDED
from specdec.models.names import adapter_place, check_model, dtype_name
from specdec.models.prepare import read_ahead
from specdec.speculation import registry
from specdec.speculation.drafter_spec import DrafterSpec

INTERRUPTED = 130  # exit code of Ctrl-C


def panel(title: str) -> Callable[..., Any]:
    """Return a function that creates typer options in the help panel ``title``.

    Its parameters: name, such as "--top-k"; help, a text or an option type of ``base.options`` with a description;
    metavar; also, a second name, by which users of vLLM know the option.
    """

    def option(name: str, help: Any, metavar: str | None = None, also: str | None = None, **more: Any) -> Any:
        text = help if isinstance(help, str) else options.description(help)
        return typer.Option(name, *filter(None, [also]), help=text, metavar=metavar, rich_help_panel=title, **more)

    return option


_model, _sampling, _output = map(panel, ("Model", "Sampling", "Output"))


def complete_model(incomplete: str) -> list[str]:
    """Return the names of embedded models and models in the cache that begin with ``incomplete``, for the shell."""
    from specdec.models.cached import cached_models

    known = [*EMBEDDED, *(model.name for model in cached_models())]
    return [name for name in dict.fromkeys(known) if name.startswith(incomplete)]


def complete_drafter(incomplete: str) -> list[str]:
    """Return completions of a drafter's name for the shell; after a "+", the last of the joined names is completed."""
    before, plus, last = incomplete.rpartition("+")
    return [f"{before}{plus}{name}" for name in ["auto", *sorted(registry.names("drafters"))] if name.startswith(last)]


def complete_drafters(incomplete: str) -> list[str]:
    """Return completions of a comma-separated list of drafters for the shell: its last name is completed."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in complete_drafter(last)]


def complete_verifier(incomplete: str) -> list[str]:
    """Return the names of verifiers that begin with ``incomplete``, for the shell."""
    return [name for name in sorted(registry.names("verifiers")) if name.startswith(incomplete)]


def complete_prompts(incomplete: str) -> list[str]:
    """Return the names of prompt sets and the paths that begin with ``incomplete``, for the shell."""
    from specdec.bench.prompts import PACKAGED, PROMPT_SETS

    return _names_and_paths([*PACKAGED, *PROMPT_SETS], incomplete)


def complete_config(kind: str) -> Callable[[str], list[str]]:
    """Return the completion of a YAML file: a shipped one of ``kind`` ("sweeps" or "train"), or a path."""

    def complete(incomplete: str) -> list[str]:
        return _names_and_paths(files.shipped_configs(kind), incomplete)

    return complete


def _names_and_paths(names: Iterable[str], incomplete: str) -> list[str]:
    paths = (f"{path}/" if Path(path).is_dir() else path for path in sorted(glob(f"{escape(incomplete)}*")))
    return [*(name for name in names if name.startswith(incomplete)), *paths]


MODEL = "Name (see 'specdec models'), Hugging Face id, folder or GGUF file."
Model = Annotated[str, _model("--model", MODEL, "NAME", autocompletion=complete_model)]
ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="The same as --model.", autocompletion=complete_model, show_default=False),
]
ModelOption = Annotated[str | None, _model("--model", "The same as MODEL.", "NAME", autocompletion=complete_model)]
Dtype = Annotated[str, _model("--dtype", "auto (the checkpoint's), bfloat16, float16 or float32.", "DTYPE")]
Device = Annotated[
    str, _model("--device", "auto (CUDA where there is one, else cpu), cpu, cuda, cuda:1, mps ...", "DEVICE")
]
Adapter = Annotated[
    str | None,
    _model(
        "--adapter", "LoRA adapter to merge into the weights: folder of PEFT, GGUF file or Hugging Face id.", "NAME"
    ),
]
Runtime = Annotated[
    options.Runtime,
    _model("--runtime", "auto (the fastest that serves the model), native, torch or transformers.", "NAME"),
]
Revision = Annotated[str | None, _model("--revision", "Branch, tag or commit of a Hugging Face id.", "REV")]
TrustRemoteCode = Annotated[bool, _model("--trust-remote-code", "Run Python code that comes with the model.")]
Weights = Annotated[
    options.Weights,
    _model(
        "--weights",
        "auto or dense (as loaded), or int8 or int4 (layers rounded to 8 or 4 bits; native runtime).",
        "KIND",
    ),
]
KVCache = Annotated[
    options.KVCacheFormat,
    _model("--kv-cache", "auto (the model's dtype) or int8 (half the memory; lossy; native runtime).", "KIND"),
]
Packed = Annotated[
    bool,
    _model("--packed/--no-packed", "Keep packed weights on disk, so that later starts are faster."),
]
Drafter = Annotated[
    str,
    _model(
        "--drafter",
        "Name (see 'specdec drafters'), NAME=SOURCE, folder, ORG/NAME or ORG/NAME@REVISION on Hugging Face, or ngram+X "
        "with X one of these; auto: ngram+m2r2.",
        "NAME",
        autocompletion=complete_drafter,
    ),
]
DrafterOption = Annotated[
    list[str] | None,
    _model("--drafter-option", "An option of the drafter, such as exit_layer=8; repeatable.", "KEY=VALUE"),
]
Learn = Annotated[
    bool | None,
    _model(
        "--learn/--no-learn",
        "Let m2r2 learn from the texts while the machine is idle; serve and chat do so by default.",
    ),
]
Verifier = Annotated[
    str,
    _model(
        "--verifier",
        "exact, or a lossy verifier: typical, confident.",
        "NAME",
        autocompletion=complete_verifier,
    ),
]
VerifierOption = Annotated[
    list[str] | None,
    _model("--verifier-option", "An option of the verifier, such as epsilon=0.1; repeatable.", "KEY=VALUE"),
]

Prompts = Annotated[
    str,
    typer.Option(
        metavar="FILE|NAME",
        help="JSONL with turns and category, plain lines, or own, work, mt-bench, koala, self-instruct, wizardlm, "
        "spec-bench, humaneval, gsm8k.",
        autocompletion=complete_prompts,
    ),
]
FirstTurns = Annotated[
    str,
    typer.Option(
        metavar="FILE|NAME",
        help="A file or a name, as for 'specdec bench'; only the first turn of each conversation is used.",
        autocompletion=complete_prompts,
    ),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Number of conversations, evenly spaced over the set; default: all.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Largest number of new tokens in an answer.")]
Depth = Annotated[
    str,
    typer.Option(
        "--num-speculative-tokens", metavar="K", help="Tokens that are drafted in a step; auto chooses the number."
    ),
]
Temperature = Annotated[float, _sampling("--temperature", options.Temperature, "T")]
TopP = Annotated[float, _sampling("--top-p", options.TopP, "P")]
TopK = Annotated[int, _sampling("--top-k", options.TopK, "N")]
Seed = Annotated[int | None, _sampling("--seed", options.Seed, "N", show_default=False)]
JsonLine = Annotated[bool, _output("--json", "Print all results as one line of JSON at the end.")]


@dataclass(frozen=True)
class LoadingFlags:
    """The options of a command that loads a model. The fields are options of the command line."""

    model: Model = DEFAULT_MODEL
    dtype: Dtype = "auto"
    device: Device = "auto"
    runtime: Runtime = "auto"
    weights: Weights = "auto"
    kv_cache: KVCache = "auto"
    adapter: Adapter = None

    def check(self) -> None:
        """Raise SpecDecError for names and paths that are wrong, before anything heavy is imported."""
        check_model(self.model, getattr(self, "revision", None))
        dtype_name(self.dtype)
        check_adapter(self.adapter)

    @property
    def keywords(self) -> dict[str, Any]:
        """All options but the model's name, as keyword arguments of ``SpecDecoder.from_pretrained``."""
        return {name: value for name, value in vars(self).items() if name != "model"}


@dataclass(frozen=True)
class HubFlags(LoadingFlags):
    """``LoadingFlags`` with options for models of the Hugging Face Hub and for packed weights in the cache."""

    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    packed: Packed = True

    def check(self) -> None:
        """Check the options as ``LoadingFlags`` does, then start reading the weights in the background."""
        super().check()
        read_ahead(self.model, self.keywords)


@dataclass(frozen=True)
class DrafterFlags:
    """The options of a command that choose its drafter."""

    drafter: Drafter = "auto"
    drafter_option: DrafterOption = None

    def check(self) -> None:
        """Raise SpecDecError for a drafter that does not exist, before anything heavy is imported."""
        DrafterSpec.parse(self.drafter)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the drafter, parsed. Raises SpecDecError for texts that are not KEY=VALUE."""
        return options.parse_assignments("--drafter-option", self.drafter_option or [])


@dataclass(frozen=True)
class SamplingFlags:
    """The options of a command that choose how tokens are sampled."""

    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    seed: Seed = 0

    @property
    def keywords(self) -> dict[str, Any]:
        """The options as keyword arguments of ``SamplingParams``. Without a seed, one is drawn if it has an effect."""
        drawn = options.new_seed() if self.temperature else 0
        return vars(self) | {"seed": drawn if self.seed is None else self.seed}


@dataclass(frozen=True)
class AllSamplingFlags(SamplingFlags):
    """``SamplingFlags`` with filters and penalties that are used less often."""

    seed: Seed = None
    min_p: Annotated[float, _sampling("--min-p", options.MinP, "P")] = 0.0
    repetition_penalty: Annotated[float | None, _sampling("--repetition-penalty", options.RepetitionPenalty, "R")] = (
        None
    )
    frequency_penalty: Annotated[float, _sampling("--frequency-penalty", options.FrequencyPenalty, "P")] = 0.0
    presence_penalty: Annotated[float, _sampling("--presence-penalty", options.PresencePenalty, "P")] = 0.0


def check_adapter(name: str | None) -> None:
    """Raise SpecDecError if ``name`` is no LoRA adapter on the disk and no possible Hugging Face id; None passes."""
    if name is not None:
        adapter_place(name)


def one_model(argument: str | None, option: str | None, default: str | None = None) -> str:
    """Return the model that is named as an argument or by --model; without both, ``default``.

    option: the value of --model, which is ``default`` if the user does not give it. Raises SpecDecError if two
    different models are named, or none.
    """
    if argument is not None and option not in (None, default, argument):
        raise SpecDecError(f"the model is named twice, as '{argument}' and with --model '{option}'; leave one out")
    if (model := argument or option or default) is None:
        raise SpecDecError("no model is named; give one, such as --model " + DEFAULT_MODEL)
    return model


def _is_argument(parameter: inspect.Parameter) -> bool:
    marks = get_args(parameter.annotation) if get_origin(parameter.annotation) is Annotated else ()
    return any(isinstance(mark, typer.models.ArgumentInfo) for mark in marks)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return ``command`` in the form that typer needs, for use as a decorator.

    Each parameter whose default is a dataclass (such as ``LoadingFlags``) is replaced by options, one per field. A
    command with ``LoadingFlags`` and without positional arguments also takes the model as an argument.
    """
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {n: p.default for n, p in signature.parameters.items() if is_dataclass(p.default)}
    parameters = list[inspect.Parameter]()
    for name, parameter in signature.parameters.items():
        if name not in groups:
            parameters.append(parameter)
            continue
        for field, kind in get_type_hints(parameter.annotation, include_extras=True).items():
            default = getattr(groups[name], field)
            parameters.append(inspect.Parameter(field, parameter.kind, default=default, annotation=kind))

    if loads := [name for name, group in groups.items() if isinstance(group, LoadingFlags)]:
        positional = not any(map(_is_argument, parameters))
        if positional:
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            parameters.insert(0, inspect.Parameter("model_argument", kind, default=None, annotation=ModelArgument))
        default_model = groups[loads[0]].model

    @functools.wraps(command)
    def run(**given: Any) -> None:
        if loads and positional:
            given["model"] = one_model(given.pop("model_argument"), given["model"], default_model)
        for name, group in groups.items():
            given[name] = replace(group, **{field: given.pop(field) for field in vars(group)})
        command(**given)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def depth(text: str, flag: str = "--num-speculative-tokens") -> int | Literal["auto"]:
    """Parse a draft length: "auto" or a number >= 1. Raises SpecDecError, which names ``flag``, for other texts."""
    if text == "auto":
        return "auto"
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise SpecDecError(f"{flag} must be 'auto' or a number >= 1; got '{text}'")


def commas(text: str) -> list[str]:
    """Split a comma-separated list; spaces around its parts and empty parts are dropped."""
    return [part.strip() for part in text.split(",") if part.strip()]


def command_line(*more: str) -> str:
    """Return the command line of this process with further arguments ``more``, quoted for a shell."""
    return shlex.join(["specdec", *sys.argv[1:], *more])


def print_json(value: Any) -> None:
    """Print a value as one line of JSON. Raises ValueError for NaN."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON to the file ``path``, atomically."""
    files.write_atomically(path, (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())
