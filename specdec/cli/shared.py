"""Options that several commands share, and helpers for arguments, interruption and JSON."""

from __future__ import annotations

import codecs
import functools
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from glob import escape, glob
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from specdec.base import files, options
from specdec.base.errors import SpecDecError
from specdec.models.catalogue import DEFAULT_MODEL, EMBEDDED
from specdec.models.names import adapter_place, check_model, dtype_name
from specdec.speculation import registry
from specdec.speculation.drafter_spec import DrafterSpec

INTERRUPTED = 130  # exit code of Ctrl-C


def panel(title: str) -> Callable[..., Any]:
    """Return a function ``option(help, metavar=None, names=(), **more)`` that creates a ``typer.Option``.

    A panel is a titled group of options in the text that ``--help`` prints.

    title: title of the panel that lists the options.

    The parameters of the returned function:
    help: the option's description; or an annotated type of ``base.options``, whose description is used.
    metavar: what the help prints for the option's value, such as "DIR"; None: typer's choice.
    names: the names of the option on the command line, such as ("--top-k",); (): typer makes one from the name of the
        command's parameter.
    more: further keyword arguments of ``typer.Option``.
    """

    def option(help: Any, metavar: str | None = None, names: Sequence[str] = (), **more: Any) -> Any:
        text = help if isinstance(help, str) else options.description(help)
        return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=title, **more)

    return option


_model, _sampling, _output = map(panel, ("Model", "Sampling", "Output"))


def completing(
    names: Callable[[], Iterable[str]], separators: str = "", paths: bool = False
) -> Callable[[str], list[str]]:
    """Return a shell-completion function for typer: it takes the beginning of an argument and returns whole arguments.

    names: function that returns the names that can be given; it is called at each completion.
    separators: characters that may separate several names in the argument; the last name is completed. "": one name.
    paths: whether the argument may also be a path of a file or folder.
    """

    def complete(incomplete: str) -> list[str]:
        begin = max(incomplete.rfind(separator) for separator in separators or "\0") + 1
        found = [incomplete[:begin] + name for name in names() if name.startswith(incomplete[begin:])]
        there = sorted(glob(f"{escape(incomplete)}*")) if paths else ()
        return [*found, *(f"{path}/" if Path(path).is_dir() else path for path in there)]

    return complete


def _models() -> Iterable[str]:
    from specdec.models.cached import cached_models

    return dict.fromkeys([*EMBEDDED, *(model.name for model in cached_models())])


def _drafters() -> Iterable[str]:
    return ["auto", *sorted(registry.names("drafters"))]


def _prompt_sets() -> Iterable[str]:
    from specdec.bench.prompts import PACKAGED, PROMPT_SETS

    return [*PACKAGED, *PROMPT_SETS]


def complete_config(kind: str) -> Callable[[str], list[str]]:
    """Return a shell-completion function for an argument that is a shipped YAML file of ``kind``, or a path.

    kind: "sweeps" or "train".
    """
    return completing(functools.partial(files.shipped_configs, kind), paths=True)


complete_model = completing(_models)
complete_drafters = completing(_drafters, "+,")
complete_prompts = completing(_prompt_sets, paths=True)

MODEL = "Name (see 'specdec models'), Hugging Face id, folder or GGUF file."
Model = Annotated[str, _model(MODEL, "NAME", autocompletion=complete_model)]
ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="The same as --model.", autocompletion=complete_model, show_default=False),
]
_same = _model("The same as MODEL.", "NAME", ["--model"], autocompletion=complete_model, show_default=False)
ModelOption = Annotated[str | None, _same]
NamedModel = Annotated[str, _same]  # "": no model is named, which ``grouped`` refuses
Dtype = Annotated[str, _model("auto (the checkpoint's), bfloat16, float16 or float32.", "DTYPE")]
Device = Annotated[str, _model("auto (CUDA where there is one, else cpu), cpu, cuda, cuda:1, mps ...", "DEVICE")]
Adapter = Annotated[
    str | None, _model("LoRA adapter to merge into the weights: folder of PEFT, GGUF file or Hugging Face id.", "NAME")
]
Runtime = Annotated[
    options.Runtime, _model("auto (the fastest that serves the model), native, torch or transformers.", "NAME")
]
Revision = Annotated[str | None, _model("Branch, tag or commit of a Hugging Face id.", "REV")]
TrustRemoteCode = Annotated[bool, _model("Run Python code that comes with the model.", names=["--trust-remote-code"])]
Weights = Annotated[
    options.Weights,
    _model("auto or dense (as loaded), or int8 or int4 (layers rounded to 8 or 4 bits; native runtime).", "KIND"),
]
KVCache = Annotated[
    options.KVCacheFormat, _model("auto (the model's dtype) or int8 (half the memory; lossy; native runtime).", "KIND")
]
Packed = Annotated[
    bool, _model("Keep packed weights on disk, so that later starts are faster.", names=["--packed/--no-packed"])
]
Drafter = Annotated[
    str,
    _model(
        "Name (see 'specdec drafters'), NAME=SOURCE, folder, ORG/NAME or ORG/NAME@REVISION on Hugging Face, or ngram+X "
        "with X one of these; auto: ngram+m2r2, or ngram+mtp if the model has such a layer.",
        "NAME",
        autocompletion=completing(_drafters, "+"),
    ),
]
DrafterOption = Annotated[
    list[str] | None, _model("An option of the drafter, such as exit_layer=8; repeatable.", "KEY=VALUE")
]
Learn = Annotated[
    bool | None,
    _model(
        "Let m2r2 learn from the texts while the machine is idle; serve and chat do so by default.",
        names=["--learn/--no-learn"],
    ),
]
NgramCorpus = Annotated[
    Path | None, _model("A text file, or a folder of them, that n-grams draft from, too.", "FILE|DIR")
]
KeepNgrams = Annotated[
    bool,
    _model("Keep the tokens of texts on disk, so that n-grams draft from them later.", names=["--keep-ngrams"]),
]
Verifier = Annotated[
    str,
    _model(
        "exact, or a lossy verifier: typical, confident.",
        "NAME",
        autocompletion=completing(lambda: sorted(registry.names("verifiers"))),
    ),
]
VerifierOption = Annotated[
    list[str] | None, _model("An option of the verifier, such as epsilon=0.1; repeatable.", "KEY=VALUE")
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
Temperature = Annotated[float, _sampling(options.Temperature, "T")]
TopP = Annotated[float, _sampling(options.TopP, "P")]
TopK = Annotated[int, _sampling(options.TopK, "N")]
Seed = Annotated[int | None, _sampling(options.Seed, "N", show_default=False)]
JsonLine = Annotated[bool, _output("Print all results as one line of JSON at the end.", names=["--json"])]


@dataclass(frozen=True)
class LoadingFlags:
    """The options of a command that loads a model, by the names that they have on the command line.

    Each field is the option ``--NAME`` with - for _, as text or None; its type, such as ``Device``, has its help.
    """

    model: Model = DEFAULT_MODEL
    dtype: Dtype = "auto"
    device: Device = "auto"
    runtime: Runtime = "auto"
    weights: Weights = "auto"
    kv_cache: KVCache = "auto"
    adapter: Adapter = None

    def check(self) -> None:
        """Raise SpecDecError for a wrong model, dtype or adapter, before anything heavy is imported.

        It looks at names and at paths on the disk, and loads nothing.
        """
        check_model(self.model, getattr(self, "revision", None))
        dtype_name(self.dtype)
        check_adapter(self.adapter)

    @property
    def keywords(self) -> dict[str, Any]:
        """Return all options but the model's name, as keyword arguments of ``SpecDecoder.from_pretrained``."""
        return {name: value for name, value in vars(self).items() if name != "model"}


@dataclass(frozen=True)
class DrafterFlags:
    """The command-line options that choose a drafter.

    drafter: the text after ``--drafter``: "auto", a name, NAME=SOURCE, a drafter folder, ORG/NAME, or ngram+X.
    drafter_option: the texts after each ``--drafter-option``, "KEY=VALUE" each, not parsed yet (``options`` parses
        them); None: the option is not given.
    """

    drafter: Drafter = "auto"
    drafter_option: DrafterOption = None

    def check(self) -> None:
        """Raise SpecDecError if ``drafter`` has a wrong form or an unknown name, before anything heavy is imported.

        The texts of ``drafter_option`` are not checked, and no repository is looked up.
        """
        DrafterSpec.parse(self.drafter)

    @property
    def options(self) -> dict[str, Any]:
        """Return the drafter's options as {KEY: VALUE}, each VALUE parsed as YAML: numbers, lists, texts, ...

        Raises SpecDecError for texts that are not KEY=VALUE.
        """
        return options.parse_assignments("--drafter-option", self.drafter_option or [])


@dataclass(frozen=True)
class DecoderFlags(LoadingFlags, DrafterFlags):
    """The options of a command that decodes with a model, which may be downloaded, and a drafter.

    ``options`` are those of the drafter, and ``keywords`` those of ``SpecDecoder.from_pretrained``.

    ngram_corpus: text file or folder that n-gram drafts search; None: none. keep_ngrams: keep texts for later runs.
    learn: whether a drafter that teaches itself learns; None: as the command does by default.
    """

    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    packed: Packed = True
    learn: Learn = None
    ngram_corpus: NgramCorpus = None
    keep_ngrams: KeepNgrams = False

    def check(self) -> None:
        """Raise SpecDecError for a model, an adapter, a drafter or an ``ngram_corpus`` that cannot be used.

        It looks at names and at paths on the disk, before anything heavy is imported.
        """
        super().check()
        DrafterFlags.check(self)
        if self.ngram_corpus is not None and not os.path.exists(self.ngram_corpus):
            raise SpecDecError(f"--ngram-corpus: '{self.ngram_corpus}' does not exist; name a text file or a folder")

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of the drafter, {name: value}, with those that have command-line options of their own.

        ``ngram_corpus`` becomes the option ``corpus`` of n-grams, and ``keep_ngrams`` their option ``keep``. For joined
        drafters, such as ngram+m2r2, options are {name of a drafter: its options}.

        Raises SpecDecError if one of the two is given and the drafter has no n-grams.
        """
        given, own = super().options, dict[str, Any]()
        if self.ngram_corpus is not None:
            own["corpus"] = str(self.ngram_corpus)
        if self.keep_ngrams:
            own["keep"] = True
        names = [part.name for part in DrafterSpec.parse(self.drafter).parts] if own else []
        if names and "ngram" not in names:
            what = "--ngram-corpus and --keep-ngrams need n-grams, such as --drafter ngram+m2r2"
            raise SpecDecError(f"{what}; got '{self.drafter}'")
        if not own or names == ["ngram"]:
            return given | own
        nested = given.get("ngram", {})
        return given | {"ngram": nested | own if isinstance(nested, dict) else nested}

    @property
    def keywords(self) -> dict[str, Any]:
        """Return all options but model and drafter, as keyword arguments of ``SpecDecoder.from_pretrained``."""
        drafting = {"drafter", "drafter_option", "ngram_corpus", "keep_ngrams"}
        own = {name: value for name, value in super().keywords.items() if name not in drafting}
        return own | {"drafter_options": self.options}


@dataclass(frozen=True)
class SamplingFlags:
    """The options of a command that choose how tokens are sampled: the fields of ``SamplingParams`` that it offers.

    seed: seed of the random numbers; None: one is drawn where it has an effect.
    """

    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    seed: Seed = 0

    @property
    def keywords(self) -> dict[str, Any]:
        """Return the options as keyword arguments of ``SamplingParams``. Draws a missing seed if it has an effect."""
        drawn = options.new_seed() if self.temperature else 0
        return vars(self) | {"seed": drawn if self.seed is None else self.seed}


@dataclass(frozen=True)
class AllSamplingFlags(SamplingFlags):
    """All options that choose how tokens are sampled: ``SamplingFlags``, and the less common filters and penalties.

    seed: seed of the random numbers; None: one is drawn where it has an effect.
    repetition_penalty: above 1 discourages repetition, 1 is off; None: the model's own.
    """

    seed: Seed = None
    min_p: Annotated[float, _sampling(options.MinP, "P")] = 0.0
    repetition_penalty: Annotated[float | None, _sampling(options.RepetitionPenalty, "R")] = None
    frequency_penalty: Annotated[float, _sampling(options.FrequencyPenalty, "P")] = 0.0
    presence_penalty: Annotated[float, _sampling(options.PresencePenalty, "P")] = 0.0


def check_adapter(name: str | None) -> None:
    """Raise SpecDecError if ``name`` is no LoRA adapter on the disk and no possible Hugging Face id; None passes."""
    if name is not None:
        adapter_place(name)


def one_model(argument: str | None, option: str | None, default: str | None = None) -> str:
    """Return the model that is named as an argument or by --model; without both, ``default``.

    argument: the positional argument; None: not given.
    option: the value of --model, which is ``default`` if the user does not give it. Raises SpecDecError if two
    different models are named, or none.
    """
    if argument is not None and option not in (None, default, argument):
        raise SpecDecError(f"the model is named twice, as '{argument}' and with --model '{option}'; leave one out")
    if not (model := argument or option or default):
        raise SpecDecError("no model is named; give one, such as --model " + DEFAULT_MODEL)
    return model


def _is_argument(parameter: inspect.Parameter) -> bool:
    marks = get_args(parameter.annotation) if get_origin(parameter.annotation) is Annotated else ()
    return any(isinstance(mark, typer.models.ArgumentInfo) for mark in marks)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return a function for typer that takes the options of ``command`` one by one and calls it; used as a decorator.

    Each parameter whose default is a dataclass (such as ``LoadingFlags``) is replaced by options, one per field. A
    command with an option ``model`` and without positional arguments also takes the model as an argument.

    command: the function of a command, whose parameters are annotated for typer.
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

    named = next((parameter for parameter in parameters if parameter.name == "model"), None)
    if named is not None and any(map(_is_argument, parameters)):
        named = None
    if named is not None:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.insert(0, inspect.Parameter("model_argument", kind, default=None, annotation=ModelArgument))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        if named is not None:
            given["model"] = one_model(given.pop("model_argument"), given["model"], named.default)
        for name, group in groups.items():
            given[name] = replace(group, **{field: given.pop(field) for field in vars(group)})
        command(**given)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def depth(text: str) -> int | Literal["auto"]:
    """Return the draft length that ``text`` gives: "auto" or a number >= 1. Raises SpecDecError for other texts."""
    if text == "auto":
        return "auto"
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise SpecDecError(f"--num-speculative-tokens must be 'auto' or a number >= 1; got '{text}'")


def command_line(*more: str) -> str:
    """Return the command line of this process with further arguments ``more``, quoted for a shell."""
    return shlex.join(["specdec", *sys.argv[1:], *more])


def print_json(value: Any) -> None:
    """Print a value as one line of JSON to stdout, in ASCII unless stdout is UTF-8. Raises ValueError for NaN."""
    ascii_only = codecs.lookup(sys.stdout.encoding or "ascii").name != "utf-8"
    print(json.dumps(value, ensure_ascii=ascii_only, allow_nan=False))


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON to the file ``path``, atomically; a file that is there is replaced."""
    text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    files.write_atomically(path, text.encode(errors="backslashreplace"))
