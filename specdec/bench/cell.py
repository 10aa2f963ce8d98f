"""A cell: the settings of one measurement, as plain values, and the format of its result.

A cell is one method on one prompt set, interleaved with its baselines. A method is a drafter with its options, or one
of ``EXTERNAL_METHODS``: ``model.generate``, plain or with prompt lookup (``hf``, ``hf-lookup``), or an engine that
``benchmarks/other_engines.py`` adds.
``specdec.bench.run.measure`` yields one mapping of JSON values for each cell:

    key          ``cell.key()``
    cell         ``cell.as_dict()``
    method       FIGURES of the cell's own method
    baselines    {baseline: FIGURES}; cells that ran together share the measurements of their baselines
    failed_baselines  {baseline: its error}; these have no figures
    prompts      {"name", "licence", "sha256" (of the file), "conversations", "turns", "skipped": [prompts that exceed
                 the model's context]}
    environment  CPU, threads, memory, versions, git commit, device, runtime, dtype ...
    pass_ms      {"specdec" or another engine: {number of tokens: ms of one pass, the minimum of five}}
    seconds      wall time of the run
    interrupted  True if the run was cut short; the figures and "prompts" then cover the requests that were finished
    stopped      the error that cut it short; else None

FIGURES of a method (a request is one batch of prompts, answered once; tokens are raw ids):

    name (``method_label``), requests, tokens, lossless
    engine          version and settings of an external engine; else None
    tokens_per_second         EST, over whole calls, prefill included
    prefill_ms, first_token_ms, decode_ms_per_token     EST; the prefill yields the first token
    speedup         {baseline: EST}  seconds per token of the baseline over ours, whole calls, request by request
    worst           {baseline: of the prompt with the least speedup, the median over its repetitions; or None}
    latency_ms      {"token" (whole call per token), "first_token", "step" (between deliveries of tokens):
                    {"p50", "p99"} over requests or steps, or None}
    mean_acceptance_length    EST, tokens per step, pooled over all steps; includes the bonus token
    acceptance_rate           accepted tokens over the depths of the drafts (of a tree, its longest path); None if
                              nothing was drafted
    acceptance_per_position   [share of accepted tokens at this position, over all drafts that reach it]
    drafts_per_position       [number of these drafts]
    acceptance_histogram      entry n: steps that accepted n drafted tokens
    mean_layers_per_token     EST, layers run per token, pooled
    phase_ms_per_step        {"draft", "score", "accept", "commit", "detokenise", "overhead": ms}
    peak_memory_mb  of the process during the method's calls (CPU, Linux), or allocated on the CUDA device; else None
    equal_to_plain  {"equal", "near_ties", "faults", "of"}: outputs compared with plain decoding; near_ties and faults
                    are None for a lossy rule and for other arithmetic (an external engine, or model.generate beside
                    values in 8 bits); None for sampling beside hf methods
    quality         {"agreement", "nll", "rouge_l": EST} under the full model if a lossy rule took part; else None
    categories      {category: {"requests", "tokens", "tokens_per_second": EST, "speedup": {baseline: EST},
                    "worst": {baseline: number or None}, "mean_acceptance_length": EST or None}}

From mean_acceptance_length to phase_ms_per_step, external methods have None, an empty list or an empty mapping.
EST is {"value", "low", "high"}: a median (or a pooled ratio) and the 95 % interval of a bootstrap over conversations;
low and high are None for a single conversation. EST is None where there is nothing to estimate.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.base.options import (
    GREEDY_BELOW,
    Count,
    Depth,
    GivenSeed,
    KVCacheFormat,
    Runtime,
    Temperature,
    TopK,
    TopP,
    Weights,
)
from specdec.base.settings import Settings
from specdec.models.catalogue import DEFAULT_MODEL


@dataclass(frozen=True)
class ExternalMethod:
    """An entry of ``EXTERNAL_METHODS``: a method of a benchmark in which another engine decodes.

    method: "module:Class" of a ``specdec.bench.methods.Method``, constructed from the decoder and the cell.
    options: names of the options that the method takes.
    drafts: whether the method drafts; if not, it can be a baseline.
    source: what the user gives after = as SOURCE in NAME=SOURCE, such as "FILE"; "": the method needs no source.
    missing: why the method cannot run here; "": it can run.
    """

    method: str = "specdec.bench.methods:HFMethod"
    options: tuple[str, ...] = ()
    drafts: bool = True
    source: str = ""
    missing: str = ""


EXTERNAL_METHODS = {"hf": ExternalMethod(drafts=False), "hf-lookup": ExternalMethod()}


Text = Annotated[str, Field(min_length=1)]
GROUPS = ("drafter", "verifier")  # settings whose values have options
DRAFT_LENGTH = "num_speculative_tokens"
# Names of settings in labels and tables.
SHORT = {"max_new_tokens": "tokens", "batch_size": "batch", "temperature": "T", DRAFT_LENGTH: "length"}


def _baseline(name: str) -> str:
    known = ["none", *(name for name, other in EXTERNAL_METHODS.items() if not other.source)]
    if name not in known:
        raise PydanticCustomError("choice", "must be one of {expected}", {"expected": ", ".join(known)})
    return name


def check_external(name: str, given: Mapping[str, Any]) -> tuple[str, str]:
    """Split the external method ``NAME`` or ``NAME=SOURCE`` into its name and its source ("" without one).

    given: the options of the method. Raises SpecDecError for unknown options, a missing source, and if the method
    cannot run here.
    """
    kind, _, source = name.partition("=")
    other = EXTERNAL_METHODS[kind]
    if other.source and not source:
        raise SpecDecError(f"'{kind}' needs a second model; give {kind}={other.source}")
    if other.missing:
        raise SpecDecError(f"'{kind}' {other.missing}")
    options.check_names(kind, given, other.options, source if not other.source and source else None)
    return kind, source


class Cell(Settings):
    """The settings of one measurement, of one method (drafter and verifier with their options) on one prompt set.

    Settings that are not listed here are those of ``SpecDecoder.from_pretrained`` and of ``SamplingParams``. Cells are
    frozen. The constructor raises SpecDecError for values of wrong types or out of range.

    drafter: a drafter as ``specdec generate --drafter`` takes it, or one of ``EXTERNAL_METHODS``.
    num_speculative_tokens: draft length, or "auto".
    prompts: a file, or the name of a prompt set.
    limit: number of conversations, evenly spaced over the set; None: all.
    turns: largest number of turns of a conversation; None: all.
    max_new_tokens: largest number of new tokens per turn.
    batch_size: conversations decoded together.
    repetitions: number of times that everything is decoded.
    against: names of baselines, methods that are measured in turns with it: "none" (plain decoding), "hf", ...
    """

    model: Text = DEFAULT_MODEL
    dtype: Text = "auto"
    device: Text = "auto"
    runtime: Runtime = "auto"
    weights: Weights = "auto"
    kv_cache: KVCacheFormat = "auto"
    adapter: Text | None = None
    drafter: Text = "auto"
    drafter_options: dict[str, Any] = Field({})
    verifier: Text = "exact"
    verifier_options: dict[str, Any] = Field({})
    num_speculative_tokens: Depth = "auto"
    temperature: Annotated[Temperature, AfterValidator(lambda value: 0.0 if value < GREEDY_BELOW else value)] = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    seed: GivenSeed = 0
    prompts: Text = "own"
    limit: Count | None = None
    turns: Count | None = None
    max_new_tokens: Count = 128
    batch_size: Count = 1
    repetitions: Count = 1
    against: tuple[Annotated[str, AfterValidator(_baseline)], ...] = Field(("none",), strict=False)

    @property
    def loading(self) -> dict[str, Any]:
        """The settings that decide which model is loaded and how, as arguments of ``SpecDecoder.from_pretrained``."""
        names = "model", "dtype", "device", "runtime", "weights", "kv_cache", "adapter"
        return {name: getattr(self, name) for name in names}

    @property
    def is_external(self) -> bool:
        """Whether ``drafter`` is one of ``EXTERNAL_METHODS``, in which another engine than specdec's decodes."""
        return self.drafter.partition("=")[0] in EXTERNAL_METHODS

    def with_settings(self, **changes: Any) -> Cell:
        """Return a checked copy of the cell in which ``changes`` (setting=value) replace its settings."""
        return Cell(**self.as_dict() | changes)

    def canonical(self) -> Cell:
        """Return a copy in which settings without effect have their defaults: equal measurements are then equal cells.

        These settings are the verifier with its options for plain decoding and external methods, and the draft length
        ("auto") for plain decoding and external methods that do not draft.
        """
        changes: dict[str, Any] = {}
        if self.drafter == "none" or self.is_external:
            changes = {"verifier": "exact", "verifier_options": {}}
        if self.drafter == "none" or (self.drafter in EXTERNAL_METHODS and not EXTERNAL_METHODS[self.drafter].drafts):
            changes["num_speculative_tokens"] = "auto"
        return self.with_settings(**changes)

    def as_dict(self) -> dict[str, Any]:
        """Return every setting as a plain value for JSON and YAML."""
        return self.model_dump(mode="json")

    def key(self) -> str:
        """Return a hash of the settings, 16 hex digits, that is equal in every process and on every machine."""
        text = json.dumps(self.as_dict(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def axes(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return {axis: value} of the settings of a cell (``Cell.as_dict()``), with an axis of its own for each option.

    An axis is the name of a setting, or of an option: ``drafter.NAME.OPTION`` or ``verifier.NAME.OPTION``.
    """
    out: dict[str, Any] = {}
    for name, value in cell.items():
        group = name.removesuffix("_options")
        out |= {name: value} if group == name else _flattened(f"{group}.{cell[group]}.", value)
    return out


def as_yaml(value: Any) -> str:
    """Return a JSON value as YAML on one line, for tables: a text as it is, None as "", others as JSON."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def short_name(axis: str) -> str:
    """Return the short name of an ``axis`` (of ``axes``): OPTION for an option, "tokens" for max_new_tokens, ...

    A name that has no short form is returned unchanged.
    """
    name = axis.rpartition(".")[2] if axis.startswith(tuple(f"{group}." for group in GROUPS)) else axis
    return SHORT.get(name, name)


def method_label(cell: Mapping[str, Any]) -> str:
    """Return what decodes in a cell (``Cell.as_dict()``), such as ``m2r2@2 nodes=8 confident exit_threshold=0.8``.

    The label is the drafter, the draft length unless it is "auto", the options of the drafter, and the verifier with
    its options unless it is ``exact``. Cells of one group have different labels if their methods differ.
    """
    length = cell[DRAFT_LENGTH]
    own: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name, value in axes(cell).items():
        if "." in name:
            own[name.partition(".")[0]].append(f"{short_name(name)}={as_yaml(value)}")
    drafter = cell["drafter"] if length == "auto" else f"{cell['drafter']}@{length}"
    verifier = [] if cell["verifier"] == "exact" else [cell["verifier"]]
    return " ".join([drafter, *own["drafter"], *verifier, *own["verifier"]])


def _flattened(prefix: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested options as one mapping whose names are joined by dots and begin with ``prefix``."""
    out: dict[str, Any] = {}
    for name, value in options.items():
        out |= _flattened(f"{prefix}{name}.", value) if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return out
