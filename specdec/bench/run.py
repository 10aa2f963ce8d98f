"""Runs the arms of one or several cells side by side and sums them up; ``specdec.bench.cell`` describes the result.

Every arm answers the same prompts: a conversation goes on with the plain arm's answer (else that of model.generate,
else of the first arm). Arms take turns prompt by prompt, in an order that rotates. Knows no files and no terminal.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from specdec import dtypes, hub, options, registry
from specdec.bench import quality as judge
from specdec.bench.arms import CONTEXT, WARM_UP, Arm, HFArm, OwnArm, PeakMemory
from specdec.bench.cell import HF_ARMS, Cell, Progress
from specdec.bench.environment import environment
from specdec.bench.figures import Request, figures
from specdec.bench.prompts import Conversation, PromptSet, load_prompts, spread
from specdec.decoder import SpecDecoder
from specdec.errors import SpecDecError
from specdec.replay import first_difference
from specdec.text import encode

# Settings that make an arm; in the others, cells that run side by side must agree.
OWN = ("drafter", "drafter_options", "verifier", "verifier_options", "num_speculative_tokens", "against")


class Decoders:
    """What cells share: the loaded model (the last one used), its drafters, and prompt sets.

    data_dir: the folder of named prompt sets; None: $SPECDEC_DATA. first_turns: conversations end after their first.
    """

    def __init__(self, data_dir: Path | None = None, first_turns: bool = False) -> None:
        self.data_dir, self.first_turns = data_dir, first_turns
        self._base: tuple[tuple[Any, ...], SpecDecoder] | None = None
        self._arms: dict[str, SpecDecoder] = {}
        self._prompts: dict[str, PromptSet] = {}

    def base(self, cell: Cell, drafters: Sequence[str] = ()) -> SpecDecoder:
        """The cell's model, decoding plainly; not loaded if one of ``drafters`` cannot fit a model of its size."""
        key = (cell.model, cell.dtype, cell.device, cell.runtime, cell.weights, cell.compile)
        if self._base is None or self._base[0] != key:
            self._base, self._arms = None, {}  # free the last one first
            if any(drafter != "none" for drafter in drafters):
                config = hub.read_config(cell.model, "auto" if cell.dtype == dtypes.FASTEST else cell.dtype)
                for drafter in drafters:
                    registry.refuse_early(drafter, config, cell.model)
            model, dtype, device, runtime, weights, compile = key
            base = SpecDecoder.from_pretrained(
                model, "none", dtype=dtype, device=device, runtime=runtime, weights=weights, compile=compile
            )
            self._base = key, base
        return self._base[1]

    def arm(self, cell: Cell) -> Arm:
        """The cell's own arm."""
        base = self.base(cell)
        if cell.drafter.partition("=")[0] in HF_ARMS:
            return HFArm(base, cell.drafter, cell.drafter_options, cell)
        key = json.dumps([cell.drafter, cell.drafter_options, cell.verifier, cell.verifier_options], sort_keys=True)
        if key not in self._arms:
            ruled = copy.copy(base)
            ruled.verifier = registry.verifier(cell.verifier, cell.verifier_options)
            self._arms[key] = ruled.with_drafter(cell.drafter, **cell.drafter_options)
        return OwnArm(self._arms[key], cell)

    def prompts(self, cell: Cell) -> PromptSet:
        """The cell's whole prompt set."""
        if cell.prompts not in self._prompts:
            found = load_prompts(cell.prompts, self.data_dir)
            if self.first_turns:
                shorter = tuple(replace(c, turns=c.turns[:1]) for c in found.conversations)
                found = replace(found, conversations=shorter)
            self._prompts[cell.prompts] = found
        return self._prompts[cell.prompts]


class Run:
    """Cells that differ in their arms alone, measured side by side.

    progress: called after each request. record: given each request as it is done. ``execute`` may be interrupted;
    ``results`` then sums up what was done. Raises SpecDecError if something cannot be loaded, before anything runs.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        decoders: Decoders,
        progress: Progress | None = None,
        record: Callable[[Request], Any] | None = None,
    ) -> None:
        self.cells, self.decoders = list(cells), decoders
        self.progress, self.record = progress, record
        first = self.first = self.cells[0]
        for cell in cells:
            theirs = first.as_dict()
            differing = [name for name, value in cell.as_dict().items() if name not in OWN and value != theirs[name]]
            if differing:
                raise SpecDecError(f"cells side by side must agree in {', '.join(differing)}")
        self.prompt_set = decoders.prompts(first)
        named = [cell.drafter for cell in cells if cell.drafter.partition("=")[0] not in HF_ARMS]
        self.base = decoders.base(first, named)
        self.arms: dict[str, Arm] = {}
        self.names: dict[str, str] = {}  # of the arm of each cell, by the cell's key
        for cell in cells:
            baselines = [_baseline(cell, name) for name in cell.against]
            for one in (*baselines, cell):
                self._add(one)
        self.plain = next(name for name in ("none", "hf", *self.arms) if name in self.arms)
        self.lossy = any(not arm.lossless for arm in self.arms.values())
        if self.lossy:
            judge.require()
            if not self.arms[self.plain].lossless:
                raise SpecDecError("a lossy rule is judged by what plain decoding says; add the baseline none")
        count = first.batch_size
        conversations = spread(self.prompt_set.conversations, first.limit)
        self.groups = [conversations[i : i + count] for i in range(0, len(conversations), count)]
        self.requests: list[Request] = []
        self.skipped: list[str] = []
        self.seconds, self.interrupted = 0.0, True
        self._prompts: dict[tuple[int, int], list[tuple[Conversation, list[int]]]] = {}  # by group and turn
        self._answers: dict[tuple[Conversation, int], str] = {}  # of the plain arm, which conversations go on with
        self.environment = environment() | {
            "device": str(self.base.target.device),
            "dtype": str(self.base.target.dtype).removeprefix("torch."),
            "runtime": self.base.target.runtime,
            "runtime_note": self.base.runtime_note,
            "context": self.base.target.context,
        }

    def _add(self, cell: Cell) -> None:
        """Load the cell's own arm under a name of its own."""
        cell = _identity(cell)
        key = cell.key()
        if key in self.names:
            return
        name, number = cell.drafter, 1
        while name in self.arms:
            number += 1
            name = f"{cell.drafter} ({number})"
        self.arms[name], self.names[key] = self.decoders.arm(cell), name

    def execute(self) -> None:
        start, done, tokens = time.perf_counter(), 0, 0
        total = self.first.repetitions * len(self.arms) * sum(max(len(c.turns) for c in g) for g in self.groups)
        try:
            self._warm_up()
            for repetition in range(self.first.repetitions):
                for number, group in enumerate(self.groups):
                    for turn in range(max(len(c.turns) for c in group)):
                        tokens += self._turn(repetition, number, turn)
                        done += len(self.arms)
                        if self.progress:
                            self.progress(done, total, tokens)
            self.interrupted = False
        finally:
            self.seconds = time.perf_counter() - start

    def _warm_up(self) -> None:
        most = min(CONTEXT, self.base.target.context - WARM_UP)
        rows = [self._encode([c.turns[0]])[-most:] for c in self.groups[0]]
        for arm in self.arms.values():
            arm.reply(rows, WARM_UP, self.first.seed)

    def _turn(self, repetition: int, group: int, turn: int) -> int:
        """Have every arm answer one turn of a group of conversations; return the number of new tokens."""
        rows = self._rows(group, turn)
        if not rows:
            return 0
        conversations, prompts = [c for c, _ in rows], [ids for _, ids in rows]
        count = min(self.first.max_new_tokens, *(self.base.target.context - len(ids) for ids in prompts))
        names, shift = list(self.arms), len(self.requests) // len(self.arms) % len(self.arms)
        made: dict[str, Request] = {}
        seed = (self.first.seed + len(self.requests)) % (options.MAX_SEED + 1)
        order = names[len(names) - shift :] + names[: len(names) - shift]
        for name in order:
            with PeakMemory(self.base.target.device) as memory:
                reply = self.arms[name].reply(prompts, count, seed)
            reply.peak_memory_mb = memory.mb
            made[name] = Request(name, repetition, group, turn, conversations, prompts, reply)
        for name in order:
            self._judge(made[name], made[self.plain], count, seed)
            self.requests.append(made[name])
            if self.record:
                self.record(made[name])
        for conversation, answer in zip(conversations, made[self.plain].reply.tokens, strict=True):
            text = self.base.tokenizer.decode(answer, skip_special_tokens=True)
            self._answers.setdefault((conversation, turn), text)
        return sum(request.reply.count for request in made.values())

    def _rows(self, group: int, turn: int) -> list[tuple[Conversation, list[int]]]:
        """The conversations of the group that have this turn, each with its prompt: all turns and answers so far."""
        if (group, turn) not in self._prompts:
            rows = []
            for conversation in self.groups[group]:
                texts = self._history(conversation, turn)
                if texts is None:
                    continue
                ids, context = self._encode(texts), self.base.target.context
                if len(ids) < context:
                    rows.append((conversation, ids))
                else:
                    what = f"{conversation.id}, turn {turn + 1}"
                    self.skipped.append(f"{what}: {len(ids)} tokens do not fit the context of {context}")
            self._prompts[group, turn] = rows
        return self._prompts[group, turn]

    def _history(self, conversation: Conversation, turn: int) -> list[str] | None:
        """Turns and answers alternating, up to this turn; None if there is no such turn, or an earlier was skipped."""
        answers = [self._answers.get((conversation, earlier)) for earlier in range(turn)]
        if turn >= len(conversation.turns) or None in answers:
            return None
        texts = [text for pair in zip(conversation.turns, answers, strict=False) for text in pair if text is not None]
        return [*texts, conversation.turns[turn]]

    def _encode(self, texts: list[str]) -> list[int]:
        """Texts of user and model alternating, as a chat if the model has a template, else as paragraphs."""
        if getattr(self.base.tokenizer, "chat_template", None):
            roles = ("user", "assistant")
            return encode(self.base.tokenizer, [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)])
        return encode(self.base.tokenizer, "\n\n".join(texts))

    def _judge(self, request: Request, plain: Request, count: int, seed: int) -> None:
        target, arm = self.base.target, self.arms[request.arm]
        comparable = self.first.temperature == 0 or (arm.seeded and self.arms[self.plain].seeded)
        rows = list(zip(request.prompts, request.reply.tokens, plain.reply.tokens, strict=True))
        for b, (prompt, ours, theirs) in enumerate(rows):
            verdict: str | None = None
            if comparable:
                verdict = "equal"
                if ours != theirs:
                    verdict, difference = "differs", None
                    if arm.lossless:
                        sampler = arm.sampler(request.prompts, count, seed)
                        sampler.select([b])
                        difference = first_difference(target, prompt, ours, theirs, sampler)
                    if difference is not None:
                        verdict = "near-tie" if difference.near_tie else "fault"
            request.verdicts.append(verdict)
            if self.lossy:
                request.qualities.append(judge.quality(target, self.base.tokenizer, prompt, ours, theirs))

    def results(self) -> list[dict[str, Any]]:
        """One result per cell. Raises SpecDecError if not a single request was finished."""
        if not self.requests:
            why = f": {self.skipped[0]}" if self.skipped else ""
            raise SpecDecError(f"nothing was measured{why}")
        prompts = {
            "name": self.prompt_set.name,
            "licence": self.prompt_set.licence,
            "sha256": self.prompt_set.sha256,
            "conversations": sum(map(len, self.groups)),
            "turns": sum(len(c.turns) for group in self.groups for c in group),
            "skipped": self.skipped,
        }
        out = []
        for cell in self.cells:
            name = self.names[_identity(cell).key()]
            against = {label: self.names[_identity(_baseline(cell, label)).key()] for label in cell.against}
            baselines = {label: self._of(arm) for label, arm in against.items()}
            sums = {arm: figures(arm, self._of(arm), baselines, self.arms[arm].lossless) for arm in against.values()}
            out.append(
                {
                    "key": cell.key(),
                    "cell": cell.as_dict(),
                    "arm": figures(name, self._of(name), baselines, self.arms[name].lossless),
                    "against": {label: sums[arm] for label, arm in against.items()},
                    "prompts": prompts,
                    "environment": self.environment,
                    "seconds": self.seconds,
                    "interrupted": self.interrupted,
                }
            )
        return out

    def _of(self, arm: str) -> list[Request]:
        return [request for request in self.requests if request.arm == arm]


def _baseline(cell: Cell, name: str) -> Cell:
    """The cell of a baseline: the same settings, its own arm, and nothing beside it."""
    return Cell.from_dict(cell.as_dict() | {"drafter": name, "drafter_options": {}, "against": []})


def _identity(cell: Cell) -> Cell:
    """The cell without what does not change its arm: plain decoding and model.generate know no acceptance rule."""
    plain: dict[str, Any] = {"against": []}
    if cell.drafter == "none" or cell.drafter.partition("=")[0] in HF_ARMS:
        plain |= {"verifier": "exact", "verifier_options": {}}
    if cell.drafter in ("none", "hf"):
        plain |= {"num_speculative_tokens": "auto"}
    return Cell.from_dict(cell.as_dict() | plain)
