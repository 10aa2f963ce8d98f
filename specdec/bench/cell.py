"""A cell: one measurement, described by plain values, and what comes out of it.

A cell is one method on one prompt set, with the baselines that run interleaved beside it. A method is a drafter with
its options, or one of ``OTHERS``: ``model.generate`` in one of its modes (``hf``, ``hf-lookup``, ``hf-early-exit``,
``hf-assistant=MODEL``), or another engine that ``benchmarks/other_engines.py`` adds.
``specdec.bench.run.run_cell`` returns one JSON-able mapping:

    key          ``cell.key()``
    cell         ``cell.as_dict()``
    method       FIGURES of the cell's own method
    baselines    {baseline: FIGURES}; baselines of cells that ran together are the same measurements
    prompts      {"name", "licence", "sha256" (of the file), "conversations", "turns", "skipped": [what did not fit the
                 model's context, and why]}
    environment  cpu, threads, memory, versions, git commit, device, runtime, dtype ... as plain values
    pass_ms      {"specdec" or another engine: {tokens: ms of a pass over so many, the least of five}}
    seconds      wall time of the run
    interrupted  True if the run was cut short; the figures are of what was done

FIGURES of a method (one request is one batch of prompts, answered once; all tokens are counted as raw ids):

    name, requests, tokens, lossless
    engine          version and settings of another engine; None for ours and for model.generate
    tokens_per_second         EST, whole calls: prefill included
    decode_tokens_per_second  EST, tokens after the first, per second after the first
    prefill_ms, first_token_ms, decode_ms_per_token     EST; the first token comes with the prefill
    speedup         {baseline: EST}  seconds per token of the baseline over ours, whole calls, request by request
    decode_speedup  {baseline: EST}  the same after the first token
    latency_ms      {"token" (of a request, whole call), "first_token", "step" (between arrivals of tokens):
                    {"p50", "p99"}}, percentiles over requests or steps; None where there is none
    mean_acceptance_length    EST, tokens per step, pooled over all steps (the bonus token counts); None but for ours
    acceptance_rate           accepted over drafted tokens; None but for ours and where nothing was drafted
    acceptance_per_position   [share of drafts of at least that depth whose token there was accepted]
    conditional_acceptance    [the same, of the drafts whose tokens before it were all accepted]
    acceptance_histogram      entry n: steps that accepted n drafted tokens
    mean_layers_per_token     EST, layers that a token went through, pooled; None but for ours
    ledger_ms_per_step        {"draft", "score", "accept", "commit", "detokenise", "overhead": ms}; {} but for ours
    peak_memory_mb  of the process during the method's calls (CPU, Linux), or allocated on the CUDA device; else None
    equal_to_plain  {"equal", "near_ties", "faults", "of"}: outputs against plain decoding (near_ties and faults are
                    None for a lossy rule and for another engine, which may differ); None for sampling beside hf methods
    quality         {"agreement", "nll", "rouge_l": EST} under the full model, where a lossy rule took part; else None
    categories      {category: {"requests", "tokens", "tokens_per_second": EST, "speedup": {baseline: EST},
                    "mean_acceptance_length": EST or None}}

EST is {"value", "low", "high"}: a median (pooled where it says so) and the 95 % interval of a bootstrap over
conversations; low and high are None if there was only one. EST is None where there is nothing to estimate.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from specdec.base import options
from specdec.base.errors import SpecDecError, did_you_mean
from specdec.base.options import (
    GREEDY_BELOW,
    Activations,
    Count,
    Depth,
    KVCacheFormat,
    Runtime,
    Seed,
    Temperature,
    TopK,
    TopP,
    Weights,
)
from specdec.base.settings import Settings
from specdec.models.catalogue import DEFAULT_MODEL
from specdec.speculation import registry


@dataclass(frozen=True)
class Other:
    """A method in which another engine decodes.

    method: "module:Class" of a ``specdec.bench.methods.Method`` that is made of the model and the cell. options: their
    names. drafts: whether it drafts. source: what NAME=SOURCE names; "": it takes none. missing: why it cannot run.
    """

    method: str = "specdec.bench.methods:HFMethod"
    options: tuple[str, ...] = ()
    drafts: bool = True
    source: str = ""
    missing: str = ""


OTHERS = {  # by name
    "hf": Other(drafts=False),
    "hf-lookup": Other(),
    "hf-early-exit": Other(options=("exit_layer",)),
    "hf-assistant": Other(source="MODEL"),
}


Text = Annotated[str, Field(min_length=1)]


def _baselines() -> tuple[str, ...]:
    return ("none", *(name for name, other in OTHERS.items() if not other.source))


def _baseline(name: str) -> str:
    if name not in (known := _baselines()):
        raise PydanticCustomError("choice", "unknown", {"expected": ", ".join(known)})
    return name


def check_other(name: str, given: Mapping[str, Any]) -> tuple[str, str]:
    """The kind and the source of a method of ``OTHERS``. Raises SpecDecError for options that it has not, and where it
    cannot run."""
    kind, _, source = name.partition("=")
    other = OTHERS[kind]
    if other.source and not source:
        raise SpecDecError(f"'{kind}' needs a second model; give {kind}={other.source}")
    if other.missing:
        raise SpecDecError(f"'{kind}' {other.missing}")
    options.check_names(kind, given, other.options, source if not other.source and source else None)
    return kind, source


def check_method(name: str) -> None:
    """Raise SpecDecError for what is neither a drafter nor one of ``OTHERS``."""
    kind, known = name.partition("=")[0], (*registry.names("drafters"), *OTHERS)
    if kind in known:
        return
    if not ("+" in kind or "/" in kind or Path(kind).is_dir()):
        raise SpecDecError(f"unknown method '{name}'{did_you_mean(kind, known)}; known: {', '.join(sorted(known))}")
    registry.parse(name)


class Cell(Settings):
    """One measurement.

    drafter: a drafter as ``specdec generate --drafter`` takes it, or one of ``OTHERS``.
    num_speculative_tokens: depth of each step's draft, or "auto".
    prompts: a file, or the name of a prompt set. limit: conversations, spread over the set; None: all of it.
    repetitions: times that everything is decoded. against: baselines that run interleaved with the method.
    """

    model: Text = DEFAULT_MODEL
    dtype: Text = "auto"
    device: Text = "auto"
    runtime: Runtime = Field(Runtime.auto, strict=False)
    weights: Weights = Field(Weights.auto, strict=False)
    kv_cache: KVCacheFormat = Field(KVCacheFormat.auto, strict=False)
    activations: Activations = Field(Activations.auto, strict=False)
    drafter: Text = "auto"
    drafter_options: dict[str, Any] = Field({})
    verifier: Text = "exact"
    verifier_options: dict[str, Any] = Field({})
    num_speculative_tokens: Depth = "auto"
    temperature: Annotated[Temperature, AfterValidator(lambda value: 0.0 if value < GREEDY_BELOW else value)] = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    seed: Seed = 0
    prompts: Text = "own"
    limit: Annotated[Count | None, Field(title="a whole number >= 1, or null for all")] = None
    max_new_tokens: Count = 128
    batch_size: Count = 1
    repetitions: Count = 1
    against: tuple[Annotated[str, AfterValidator(_baseline)], ...] = Field(
        ("none",), strict=False, title=f"a list of {', '.join(_baselines())}"
    )

    @property
    def loading(self) -> dict[str, Any]:
        """What decides which model is loaded, and how."""
        names = "model", "dtype", "device", "runtime", "weights", "kv_cache", "activations"
        return {name: str(getattr(self, name)) for name in names}

    @property
    def is_other(self) -> bool:
        """Whether another engine decodes."""
        return self.drafter.partition("=")[0] in OTHERS

    def but(self, **changes: Any) -> Cell:
        """The cell with other values for some settings."""
        return Cell(**self.as_dict() | changes)

    def canonical(self) -> Cell:
        """The cell without what makes no difference: plain decoding and other engines know no acceptance rule."""
        changes: dict[str, Any] = {}
        if self.drafter == "none" or self.is_other:
            changes = {"verifier": "exact", "verifier_options": {}}
        if self.drafter == "none" or (self.drafter in OTHERS and not OTHERS[self.drafter].drafts):
            changes["num_speculative_tokens"] = "auto"
        return self.but(**changes)

    def as_dict(self) -> dict[str, Any]:
        """Every setting as plain values for JSON and YAML."""
        return self.model_dump(mode="json")

    def key(self) -> str:
        """A name that is the same for equal cells, in every process and on every machine; 16 hex digits."""
        text = json.dumps(self.as_dict(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
