"""A cell: one measurement, described by plain values, and what comes out of it.

A cell is one arm (a drafter with its options, or ``model.generate`` in one of its modes: ``hf``, ``hf-lookup``,
``hf-early-exit``, ``hf-draft-model=MODEL``) on one prompt set, with the baselines that run interleaved beside it.
Importing this module imports nothing heavy. ``run_cell`` returns one JSON-able mapping:

    key          ``cell.key()``
    cell         ``cell.as_dict()``
    arm          FIGURES of the cell's own arm
    against      {baseline: FIGURES}; baselines of cells that ran together are the same measurements
    prompts      {"name", "licence", "sha256" (of the file), "conversations", "turns", "skipped": [what did not fit the
                 model's context, and why]}
    environment  cpu, threads, memory, versions, git commit, device, runtime, dtype ... as plain values
    seconds      wall time of the run
    interrupted  True if the run was cut short; the figures are of what was done

FIGURES of an arm (one request is one batch of prompts, answered once; all tokens are counted as raw ids):

    name, requests, tokens, lossless
    tokens_per_second         EST, whole calls: prefill included
    decode_tokens_per_second  EST, tokens after the first, per second after the first
    prefill_ms, first_token_ms, decode_ms_per_token     EST; the first token comes with the prefill
    speedup         {baseline: EST}  seconds per token of the baseline over ours, whole calls, request by request
    decode_speedup  {baseline: EST}  the same after the first token
    mean_acceptance_length    EST, tokens per round, pooled over all rounds (the bonus token counts); None for hf arms
    acceptance_rate           accepted over drafted tokens; None for hf arms and where nothing was drafted
    acceptance_per_position   [share of drafts that deep whose token stood]
    acceptance_histogram      entry n: rounds that accepted n drafted tokens
    mean_layers_per_token     EST, layers a token went through before it stood, pooled; None for hf arms
    ledger_ms_per_round       {"draft", "score", "accept", "commit", "detokenise", "overhead": ms}; {} for hf arms
    peak_memory_mb  of the process during the arm's calls (CPU, Linux), or allocated on the CUDA device; None elsewhere
    equal_to_plain  {"equal", "near_ties", "faults", "of"}: outputs against plain decoding (near_ties and faults are
                    None for a lossy rule, which may differ); None for sampling beside hf arms
    quality         {"agreement", "nll", "rouge_l": EST} under the full model, where a lossy rule took part; else None
    categories      {category: {"requests", "tokens", "tokens_per_second": EST, "speedup": {baseline: EST},
                    "mean_acceptance_length": EST or None}}

EST is {"value", "low", "high"}: a median (pooled where it says so) and the 95 % interval of a bootstrap over
conversations; low and high are None if there was only one. EST is None where there is nothing to estimate.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from specdec import options
from specdec.embedded import DEFAULT_MODEL
from specdec.errors import SpecDecError, did_you_mean

if TYPE_CHECKING:
    from specdec.bench.run import Decoders

HF_ARMS = ("hf", "hf-lookup", "hf-early-exit", "hf-draft-model")
RUNTIMES = ("auto", "native", "graphs", "fused", "reference")
WEIGHTS = ("auto", "dense", "int8", "int4")
BASELINES = ("none", "hf", "hf-lookup", "hf-early-exit")

Progress = Callable[[int, int, int], None]  # requests done, requests in all, tokens decoded so far


@dataclass(frozen=True)
class Cell:
    """One measurement. Raises SpecDecError for a value of the wrong type or out of range.

    drafter: a drafter as ``specdec generate --drafter`` takes it, or one of ``HF_ARMS``.
    num_speculative_tokens: depth of each round's draft, or "auto".
    prompts: a file, or the name of a prompt set. limit: conversations, spread over the set; None: all of it.
    repetitions: times that everything is decoded. against: baselines that run interleaved with the arm.
    """

    model: str = DEFAULT_MODEL
    dtype: str = "auto"
    device: str = "auto"
    runtime: str = "auto"
    weights: str = "auto"
    compile: bool = False
    drafter: str = "auto"
    drafter_options: dict[str, Any] = field(default_factory=dict)
    verifier: str = "exact"
    verifier_options: dict[str, Any] = field(default_factory=dict)
    num_speculative_tokens: int | str = "auto"
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    prompts: str = "own"
    limit: int | None = None
    max_new_tokens: int = 128
    batch_size: int = 1
    repetitions: int = 1
    against: tuple[str, ...] = ("none",)

    def __post_init__(self) -> None:
        for name in ("model", "dtype", "device", "drafter", "verifier", "prompts"):
            _check(name, isinstance(getattr(self, name), str) and getattr(self, name) != "", "a text", self)
        for name, known in (("runtime", RUNTIMES), ("weights", WEIGHTS)):
            value = getattr(self, name)
            _check(name, value in known, f"one of {', '.join(known)}{did_you_mean(str(value), known)}", self)
        _check("compile", isinstance(self.compile, bool), "true or false", self)
        for name in ("drafter_options", "verifier_options"):
            value = getattr(self, name)
            _check(name, isinstance(value, dict) and all(isinstance(key, str) for key in value), "a mapping", self)
        for name in ("max_new_tokens", "batch_size", "repetitions"):
            _check(name, _whole(getattr(self, name), 1), "a whole number >= 1", self)
        _check("top_k", _whole(self.top_k, 0), "a whole number >= 0", self)
        _check("seed", options.SEED.holds(self.seed), options.SEED.need, self)
        _check("limit", self.limit is None or _whole(self.limit, 1), "a whole number >= 1, or null for all", self)
        depth = self.num_speculative_tokens
        _check("num_speculative_tokens", depth == "auto" or _whole(depth, 1), "'auto' or a whole number >= 1", self)
        _check("temperature", _number(self.temperature) and self.temperature >= 0, "a number >= 0", self)
        _check("top_p", _number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]", self)
        for name in self.against:
            near = did_you_mean(str(name), BASELINES)
            _check("against", name in BASELINES, f"a list of {', '.join(BASELINES)}{near}", self)
        for name in ("temperature", "top_p"):  # 0 and 0.0 are one cell
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.temperature < options.GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """The cell that ``as_dict`` (or a YAML mapping) describes. Raises SpecDecError for unknown keys, too."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise SpecDecError(f"unknown setting '{key}'{did_you_mean(str(key), known)}; known: {', '.join(known)}")
        clean = dict(values)
        if isinstance(clean.get("against"), list):
            clean["against"] = tuple(clean["against"])
        elif "against" in clean and not isinstance(clean["against"], tuple):
            raise SpecDecError(f"against must be a list of {', '.join(BASELINES)}; got {clean['against']!r}")
        return cls(**clean)

    def as_dict(self) -> dict[str, Any]:
        """Every setting as plain values for JSON and YAML."""
        return dataclasses.asdict(self) | {"against": list(self.against)}

    def key(self) -> str:
        """A name that is the same for equal cells, in every process and on every machine; 16 hex digits."""
        settings = self.as_dict()
        if not self.compile:
            del settings["compile"]  # younger than results that are kept
        text = json.dumps(settings, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_cell(cell: Cell, decoders: Decoders, progress: Progress | None = None) -> dict[str, Any]:
    """Measure ``cell``; the result is described at the top of this module.

    decoders: the loaded models (``specdec.bench.run.Decoders()``), kept from cell to cell. progress: called after each
    request. Raises SpecDecError if the model, the drafter or the prompts cannot be had.
    """
    from specdec.bench.run import Run  # heavy

    run = Run([cell], decoders, progress)
    run.execute()
    return run.results()[0]


def _check(name: str, good: bool, need: str, cell: Cell) -> None:
    if not good:
        raise SpecDecError(f"{name} must be {need}; got {getattr(cell, name)!r}")


def _whole(value: Any, low: int) -> bool:
    return type(value) is int and value >= low


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
