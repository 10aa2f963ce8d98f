"""Runs the methods of one or several cells side by side; ``specdec.bench.cell`` describes the result.

Every method answers the same prompts: a conversation continues with the answer of plain decoding (else of
model.generate, else of the first method). Methods take turns prompt by prompt, in a rotating order.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

from specdec.api.decoder import SpecDecoder
from specdec.api.text import encode
from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.base.terminal import OnProgress
from specdec.bench import figures
from specdec.bench.cell import EXTERNAL_METHODS, Cell, check_external, check_method
from specdec.bench.environment import environment
from specdec.bench.figures import BenchRequest, summarize
from specdec.bench.methods import CONTEXT, PASSES, SAMPLING, WARM_UP, Method, OwnMethod, PeakMemory
from specdec.bench.prompts import Conversation, PromptSet, evenly_spaced, load_prompts
from specdec.engine import measure as costs
from specdec.models import loading
from specdec.speculation import registry
from specdec.speculation.sampling import Sampler, streams
from specdec.verify.certificate import first_difference

# Settings of a method; cells that run side by side must agree in all others.
OWN = ("drafter", "drafter_options", "verifier", "verifier_options", "num_speculative_tokens", "against")

Chat = tuple[Conversation, list[str]]  # with its turns and plain decoding's answers so far


class Decoders:
    """What cells share: the model that was used last, its drafters, and prompt sets.

    data_dir: folder of named prompt sets; None: the data folder.
    """

    def __init__(self, data_dir: Path | None = None) -> None:
        self.data_dir = data_dir
        self._base: tuple[dict[str, Any], SpecDecoder] | None = None
        self._loaded: dict[str, SpecDecoder] = {}
        self._prompts: dict[str, PromptSet] = {}

    def base(self, cell: Cell, drafters: Sequence[str] = ()) -> SpecDecoder:
        """A plain decoder of the cell's model. Refuses ``drafters`` that cannot fit before it loads the weights."""
        if self._base is None or self._base[0] != cell.loading:
            self._base, self._loaded = None, {}  # free the model before
            if any(drafter != "none" for drafter in drafters):
                config = loading.read_config(cell.model)
                for drafter in drafters:
                    registry.refuse_early(registry.Choice.of(drafter), config, cell.model)
            how = {name: value for name, value in cell.loading.items() if name != "model"}
            self._base = cell.loading, SpecDecoder.from_pretrained(cell.model, "none", learn=False, **how)
        return self._base[1]

    def method(self, cell: Cell) -> Method:
        """The method of the cell."""
        base = self.base(cell)
        if cell.is_external:
            module, _, name = EXTERNAL_METHODS[cell.drafter.partition("=")[0]].method.partition(":")
            made: Method = getattr(import_module(module), name)(base, cell)
            return made
        key = json.dumps([cell.drafter, cell.drafter_options, cell.verifier, cell.verifier_options], sort_keys=True)
        if key not in self._loaded:
            ruled = copy.copy(base)
            ruled.verifier = registry.verifier(cell.verifier, cell.verifier_options)
            self._loaded[key] = ruled.with_drafter(cell.drafter, **cell.drafter_options)
        return OwnMethod(self._loaded[key], cell)

    def prompts(self, cell: Cell) -> PromptSet:
        """The cell's whole prompt set, as many turns as it wants."""
        if cell.prompts not in self._prompts:
            self._prompts[cell.prompts] = load_prompts(cell.prompts, self.data_dir)
        found = self._prompts[cell.prompts]
        return replace(found, conversations=tuple(replace(c, turns=c.turns[: cell.turns]) for c in found.conversations))


class BenchRun:
    """Cells that differ only in their methods, measured side by side.

    progress, record: called after each request.
    ``execute`` may be interrupted; ``results`` then covers the finished requests. The constructor loads everything and
    raises SpecDecError if something is missing.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        decoders: Decoders,
        progress: OnProgress | None = None,
        record: Callable[[BenchRequest], Any] | None = None,
    ) -> None:
        self.cells, self.decoders = list(cells), decoders
        self.progress, self.record = progress, record
        first = self.first = self.cells[0]
        for cell in cells:
            theirs = first.as_dict()
            differing = [name for name, value in cell.as_dict().items() if name not in OWN and value != theirs[name]]
            if differing:
                raise SpecDecError(f"cells side by side must agree in {', '.join(differing)}")
        for cell in cells:
            check_method(cell.drafter)
            if cell.is_external:
                check_external(cell.drafter, cell.drafter_options)
        self.prompt_set = decoders.prompts(first)
        self.base = decoders.base(first, [cell.drafter for cell in cells if not cell.is_external])
        self.methods: dict[str, Method] = {}
        self.names: dict[str, str] = {}  # a cell's key -> the name of its method
        for cell in cells:
            for one in (*(_alone(cell, name) for name in cell.against), _alone(cell)):
                self._add(one)
        self.plain = next(name for name in ("none", "hf", *self.methods) if name in self.methods)
        self.lossy = any(not method.lossless for method in self.methods.values())
        if self.lossy:
            figures.require_rouge_score()
            if not self.methods[self.plain].lossless:
                raise SpecDecError("a lossy rule is compared with plain decoding; add the baseline none")
        count = first.batch_size
        conversations = evenly_spaced(self.prompt_set.conversations, first.limit)
        self.groups = [conversations[i : i + count] for i in range(0, len(conversations), count)]
        self.passes: dict[str, dict[str, float]] = {}
        self.requests: list[BenchRequest] = []
        self.skipped: list[str] = []
        self.seconds, self.interrupted = 0.0, True
        self.environment = environment() | {
            "device": str(self.base.target.device),
            "dtype": str(self.base.target.dtype).removeprefix("torch."),
            "runtime": self.base.target.runtime,
            "kv_cache": self.base.target.kv_cache,
            "activations": self.base.target.activations,
            "runtime_note": self.base.runtime_note,
            "context": self.base.target.context,
        }

    def _add(self, cell: Cell) -> None:
        """Load the method of ``cell`` under a unique name."""
        if cell.key() not in self.names:
            depth = cell.num_speculative_tokens
            usual = depth in ("auto", self.first.num_speculative_tokens)
            name = label = cell.drafter if usual else f"{cell.drafter}@{depth}"
            number = 1
            while name in self.methods:
                number += 1
                name = f"{label} ({number})"
            self.methods[name], self.names[cell.key()] = self.decoders.method(cell), name

    def execute(self) -> None:
        start, done, tokens = time.perf_counter(), 0, 0
        longest = [max(len(c.turns) for c in group) for group in self.groups]
        total = self.first.repetitions * len(self.methods) * sum(longest)
        try:
            self._time_passes()
            self._warm_up()
            for repetition, number in product(range(self.first.repetitions), range(len(self.groups))):
                chats: list[Chat] = [(conversation, []) for conversation in self.groups[number]]
                for turn in range(longest[number]):
                    chats, prompts = self._prompts(chats, turn)
                    if chats:
                        tokens += self._turn((repetition, number, turn), chats, prompts)
                    done += len(self.methods)
                    if self.progress:
                        self.progress(done, total, tokens)
            self.interrupted = False
        finally:
            self.seconds = time.perf_counter() - start

    def _time_passes(self) -> None:
        """Measure what a pass over several tokens costs, in each engine that reports it."""
        sizes = [n for n in PASSES if n < self.base.target.context]
        own = {str(n): seconds for n, seconds in costs.time_scoring(self.base.target, sizes=sizes).items()}
        timed = {"specdec": own} | {name: method.pass_seconds for name, method in self.methods.items()}
        self.passes = {name: {n: 1e3 * s for n, s in found.items()} for name, found in timed.items() if found}

    def _warm_up(self) -> None:
        most = min(CONTEXT, self.base.target.context - WARM_UP)
        rows = [self._encode([c.turns[0]])[-most:] for c in self.groups[0]]
        for method in self.methods.values():
            method.reply(rows, WARM_UP, self.first.seed, "warm-up")

    def _prompts(self, chats: list[Chat], turn: int) -> tuple[list[Chat], list[list[int]]]:
        """The chats that have this turn and fit into the context with it, and their prompts."""
        continued, prompts, context = [], [], self.base.target.context
        for conversation, texts in chats:
            if turn < len(conversation.turns):
                texts.append(conversation.turns[turn])
                ids = self._encode(texts)
                if len(ids) < context:
                    continued.append((conversation, texts))
                    prompts.append(ids)
                    continue
                what = f"{conversation.id}, turn {turn + 1}: {len(ids)} tokens do not fit the context of {context}"
                if what not in self.skipped:
                    self.skipped.append(what)
        return continued, prompts

    def _turn(self, place: tuple[int, int, int], chats: list[Chat], prompts: list[list[int]]) -> int:
        """Let every method answer one turn of a group of chats; return the number of new tokens."""
        count = min(self.first.max_new_tokens, *(self.base.target.context - len(ids) for ids in prompts))
        names, shift = list(self.methods), len(self.requests) // len(self.methods) % len(self.methods)
        made: dict[str, BenchRequest] = {}
        seed = (self.first.seed + len(self.requests)) % (options.MAX_SEED + 1)
        order = names[len(names) - shift :] + names[: len(names) - shift]
        for name in order:
            with PeakMemory(self.base.target.device) as memory:
                reply = self.methods[name].reply(prompts, count, seed, f"{name}, repetition {place[0]}")
            if reply.peak_memory_mb is None:
                reply.peak_memory_mb = memory.mb
            made[name] = BenchRequest(name, *place, [conversation for conversation, _ in chats], prompts, reply)
        for name in order:
            self._compare(made[name], made[self.plain], count, seed)
            self.requests.append(made[name])
            if self.record:
                self.record(made[name])
        for (_, texts), answer in zip(chats, made[self.plain].reply.tokens, strict=True):
            texts.append(self.base.tokenizer.decode(answer, skip_special_tokens=True))
        return sum(request.reply.count for request in made.values())

    def _encode(self, texts: list[str]) -> list[int]:
        """Encode alternating texts of user and model: in the chat template if there is one, else as paragraphs."""
        if getattr(self.base.tokenizer, "chat_template", None):
            roles = ("user", "assistant")
            return encode(self.base.tokenizer, [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)])
        return encode(self.base.tokenizer, "\n\n".join(texts))

    def _compare(self, request: BenchRequest, plain: BenchRequest, count: int, seed: int) -> None:
        """Record how the request's tokens compare with those of plain decoding."""
        cell, method, target = self.first, self.methods[request.method], self.base.target
        comparable = cell.temperature == 0 or (method.seeded and self.methods[self.plain].seeded)
        for b, (prompt, ours) in enumerate(zip(request.prompts, request.reply.tokens, strict=True)):
            theirs, equality = plain.reply.tokens[b], None
            if comparable and ours == theirs:
                equality = "equal"
            elif comparable and not (method.lossless and method.same_arithmetic):
                equality = "differs"
            elif comparable:
                how = {name: getattr(cell, name) for name in SAMPLING}
                how |= {"seed": seed, "stream": streams(request.prompts)[b]}
                same = self.base.request(prompt, max_new_tokens=count, **how)
                difference = first_difference(target, prompt, ours, theirs, Sampler.of([same.sampler]))
                equality = "near-tie" if difference and difference.near_tie else "fault"
            request.equality.append(equality)
            if self.lossy:
                request.qualities.append(figures.quality(target, self.base.tokenizer, prompt, ours, theirs))

    def results(self) -> list[dict[str, Any]]:
        """One result per cell. Raises SpecDecError if no request was finished."""
        if not self.requests:
            why = f": {self.skipped[0]}" if self.skipped else ""
            raise SpecDecError(f"nothing was measured{why}")
        shared = {
            "prompts": {
                "name": self.prompt_set.name,
                "licence": self.prompt_set.licence,
                "sha256": self.prompt_set.sha256,
                "conversations": sum(map(len, self.groups)),
                "turns": sum(len(c.turns) for group in self.groups for c in group),
                "skipped": self.skipped,
            },
            "environment": self.environment,
            "pass_ms": self.passes,
            "seconds": self.seconds,
            "interrupted": self.interrupted,
        }
        made = {name: [request for request in self.requests if request.method == name] for name in self.methods}
        out = []
        for cell in self.cells:
            name = self.names[_alone(cell).key()]
            labels = {str(label): self.names[_alone(cell, label).key()] for label in cell.against}
            baselines = {label: made[method] for label, method in labels.items()}
            sums = {m: summarize(m, made[m], baselines, self.methods[m]) for m in {name, *labels.values()}}
            compared = {label: sums[method] for label, method in labels.items()}
            out.append(
                {"key": cell.key(), "cell": cell.as_dict(), "method": sums[name], "baselines": compared, **shared}
            )
        return out


def run_cell(cell: Cell, decoders: Decoders, progress: OnProgress | None = None) -> dict[str, Any]:
    """Measure ``cell``; ``specdec.bench.cell`` describes the result.

    decoders: keeps models from cell to cell.
    progress: called after each request.
    Raises SpecDecError if the model, the drafter or the prompts are missing or unfit.
    """
    run = BenchRun([cell], decoders, progress)
    run.execute()
    return run.results()[0]


def _alone(cell: Cell, baseline: str | None = None) -> Cell:
    """The cell of a baseline, or of the cell's own method, without baselines."""
    method = {} if baseline is None else {"drafter": baseline, "drafter_options": {}}
    return cell.with_settings(**method, against=[]).canonical()
