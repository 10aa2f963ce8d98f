"""Measures the cells of one group side by side; ``specdec.bench.cell`` describes the result.

The cells of a group differ only in their methods. Every method answers the same prompts: a conversation continues with
the answer of plain decoding (else of model.generate, else of the first method). Methods take turns prompt by prompt, in
a rotating order, so a group measures each baseline once. A method that fails is left out, and the others continue.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from itertools import chain, count, product
from typing import Any

from specdec.api.decoder import SpecDecoder
from specdec.api.prompts import encode
from specdec.base import options
from specdec.base.errors import SpecDecError, one_line, out_of_memory
from specdec.base.terminal import OnProgress
from specdec.bench import figures
from specdec.bench.cell import EXTERNAL_METHODS, Cell, method_label
from specdec.bench.environment import environment
from specdec.bench.figures import BenchRequest, summarize
from specdec.bench.methods import CONTEXT, PASSES, SAMPLING, WARM_UP, Method, OwnMethod, PeakMemory, Reply
from specdec.bench.pass_times import time_scoring
from specdec.bench.prompts import Conversation, PromptSet, evenly_spaced, load_prompts
from specdec.models import loading
from specdec.speculation import registry
from specdec.speculation.drafter_spec import DrafterSpec
from specdec.speculation.sampling import Sampler, streams
from specdec.verify.replay import first_difference

Record = dict[str, Any]  # a result of ``specdec.bench.cell``, or {"key", "cell", "error", "seconds"}
Chat = tuple[Conversation, list[str]]  # a conversation, and its texts so far: user turns and answers, alternating


class Decoders:
    """A cache that the cells of a benchmark share: the last loaded model, its drafters, and prompt sets.

    A base is a decoder of the model without a drafter. Only one model is in memory at a time.
    """

    def __init__(self) -> None:
        self._base: tuple[dict[str, Any], SpecDecoder] | None = None
        self._loaded: dict[str, SpecDecoder] = {}
        self._prompts: dict[str, PromptSet] = {}

    def check(self, cell: Cell) -> None:
        """Raise SpecDecError if a drafter of the cell cannot work with its model. Reads the config, no weights."""
        for method in _methods(cell):
            if not method.is_external and method.drafter != "none":
                spec = DrafterSpec.parse(method.drafter).resolved()
                spec.refuse_early(cell.model)
                spec.refuse_early(cell.model, loading.read_config(cell.model))

    def base(self, cell: Cell) -> SpecDecoder:
        """Return a decoder of the cell's model without a drafter.

        It is the one of the last call if model and loading are the same; otherwise that one is dropped and the model is
        loaded.
        """
        if self._base is None or self._base[0] != cell.loading:
            self._base, self._loaded = None, {}  # free the previous model first
            how = {name: value for name, value in cell.loading.items() if name != "model"}
            how |= {"learn": False, "prefix_reuse": False}  # every answer runs its whole prompt
            self._base = cell.loading, SpecDecoder.from_pretrained(cell.model, "none", **how)
        return self._base[1]

    def method(self, cell: Cell) -> Method:
        """Return the method that the cell measures, without its baselines. Raises SpecDecError if it cannot be loaded.

        Drafters and their decoders are kept for later cells with the same model.
        """
        base = self.base(cell)
        if cell.is_external:
            module, _, name = EXTERNAL_METHODS[cell.drafter.partition("=")[0]].method.partition(":")
            external: Method = getattr(import_module(module), name)(base, cell)
            return external
        key = json.dumps([cell.drafter, cell.drafter_options, cell.verifier, cell.verifier_options], sort_keys=True)
        if key not in self._loaded:
            ruled = copy.copy(base)
            ruled.verifier = registry.verifier(cell.verifier, cell.verifier_options)
            self._loaded[key] = ruled.with_drafter(cell.drafter, cell.drafter_options)
        return OwnMethod(self._loaded[key], cell)

    def prompts(self, cell: Cell) -> PromptSet:
        """Return the prompt set of the cell, not limited by ``cell.limit``, with at most ``cell.turns`` turns each."""
        if cell.prompts not in self._prompts:
            self._prompts[cell.prompts] = load_prompts(cell.prompts)
        found = self._prompts[cell.prompts]
        return replace(found, conversations=tuple(replace(c, turns=c.turns[: cell.turns]) for c in found.conversations))

    def chats(self, cells: Iterable[Cell]) -> dict[str, Any]:
        """Return {name of a prompt set: the conversations that the cells take of it} as JSON values.

        A conversation is {"id", "category", "turns"}.
        """
        found = dict[str, dict[str, Any]]()
        for cell in {(cell.prompts, cell.limit, cell.turns): cell for cell in cells}.values():
            for chat in evenly_spaced(self.prompts(cell).conversations, cell.limit):
                found.setdefault(cell.prompts, {})[f"{chat.id}, {len(chat.turns)}"] = asdict(chat)
        return {name: list(chats.values()) for name, chats in found.items()}


class BenchRun:
    """The measurement of one group of cells, side by side. ``execute`` measures and ``results`` returns the records.

    The constructor loads everything and raises SpecDecError if the model or the prompts are missing. ``execute`` may be
    interrupted; ``results`` then covers the finished requests.
    The plain method, with which others are compared, is plain decoding, else ``model.generate``, else the first method.
    A request is one turn of a batch of conversations, answered by one method. A chat is a conversation with the texts
    of user and model so far.
    cells: differ only in their methods. decoders: the cache of loaded models.
    progress: called after each turn with (finished turns, all turns, new tokens); None: not called.
    record: called with each finished request; None: not called.
    methods: {name: method} of those that have not failed. requests: their finished requests.
    passes: {"specdec" or an external method's name: {number of tokens: ms of a forward pass}}.
    skipped: a text about each prompt that exceeds the context.
    errors: {``key()`` of a method's cell: the exception that ended it}, for loading and for answers.
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
        self.started = time.perf_counter()
        self.seconds = 0.0  # duration of the run
        self.interrupted = True  # until the run has ended
        self.stopped: str | None = None  # the error that ended it
        self.methods: dict[str, Method] = {}  # name -> method
        self.names: dict[str, str] = {}  # key of a method's cell -> name
        self.errors: dict[str, Exception] = {}  # key of a failed method's cell -> its error
        self.prompt_set = decoders.prompts(first)
        self.base = decoders.base(first)
        for key, method in {m.key(): m for cell in cells for m in reversed(_methods(cell))}.items():
            try:
                self._load(method)
            except Exception as error:
                self.errors[key] = error
        self.plain = next((name for name in ("none", "hf", *self.methods) if name in self.methods), "")
        self.lossy = any(not method.lossless for method in self.methods.values())
        if self.lossy and not self.methods[self.plain].lossless:
            raise SpecDecError("a lossy rule is compared with plain decoding; add the baseline none")
        count = first.batch_size
        conversations = evenly_spaced(self.prompt_set.conversations, first.limit)
        self.groups = [conversations[i : i + count] for i in range(0, len(conversations), count)]
        self.passes: dict[str, dict[str, float]] = {}  # engine -> {number of tokens: ms of a forward pass}
        self.requests: list[BenchRequest] = []
        self.skipped: list[str] = []
        self.environment = environment() | {
            "device": str(self.base.target.device),
            "dtype": str(self.base.target.dtype).removeprefix("torch."),
            "runtime": self.base.target.runtime,
            "kv_cache": self.base.target.kv_cache,
            "activations": self.base.target.activations,
            "runtime_note": self.base.runtime_note,
            "context": self.base.target.context,
        }

    def _load(self, cell: Cell) -> None:
        """Load the method of a cell: the engine with model, drafter and verifier that the cell names.

        Adds it to ``methods`` under its label, to which a number such as " (2)" is added if the label is taken. Raises
        SpecDecError if it cannot be loaded.
        """
        label = method_label(cell.as_dict())
        numbers = (f" ({number})" for number in count(2))
        name = next(name for more in chain(("",), numbers) if (name := f"{label}{more}") not in self.methods)
        method = self.decoders.method(cell)
        if not method.lossless:
            figures.require_rouge_score()
        self.methods[name], self.names[cell.key()] = method, name

    def execute(self) -> None:
        """Measure: time forward passes, warm up, and let all methods answer all turns of all conversations.

        The results go to ``passes``, ``requests``, ``skipped`` and ``errors``, of which ``results`` makes the records.
        A method that fails is left out; errors of the plain method and KeyboardInterrupt are raised.
        """
        if all(map(self._error, self.cells)):  # no method could be loaded
            return
        done = tokens = turns = 0
        longest = [max(len(c.turns) for c in group) for group in self.groups]
        total = self.first.repetitions * sum(longest)
        try:
            self._time_passes()
            self._warm_up()
            for repetition, number in product(range(self.first.repetitions), range(len(self.groups))):
                chats: list[Chat] = [(conversation, []) for conversation in self.groups[number]]
                for turn in range(longest[number]):
                    chats, prompts = self._prompts(chats, turn)
                    if chats:
                        tokens += self._turn((repetition, number, turn), chats, prompts, turns)
                        turns += 1
                    done += 1
                    if self.progress:
                        self.progress(done, total, tokens)
            self.interrupted = False
        finally:
            self.seconds = time.perf_counter() - self.started

    def _time_passes(self) -> None:
        """Set ``passes`` to the milliseconds of forward passes over 1, 2, 4, 8 and 16 tokens (``PASSES``).

        The entry "specdec" is measured here, for numbers below the model's context. An external engine has an entry if
        its method has the times (``Method.pass_seconds``).
        """
        sizes = [n for n in PASSES if n < self.base.target.context]
        own = {str(n): seconds for n, seconds in time_scoring(self.base.target, sizes=sizes).items()}
        timed = {"specdec": own} | {name: method.pass_seconds for name, method in self.methods.items()}
        self.passes = {name: {n: 1e3 * s for n, s in found.items()} for name, found in timed.items() if found}

    def _warm_up(self) -> None:
        most = min(CONTEXT, self.base.target.context - WARM_UP)
        rows = [self._encode([c.turns[0]])[-most:] for c in self.groups[0]]
        for name in list(self.methods):
            self._reply(name, rows, WARM_UP, self.first.seed, "warm-up")

    def _reply(self, name: str, prompts: list[list[int]], count: int, seed: int, scope: str) -> Reply | None:
        """Return the answer of method ``name``; None if it fails, which removes the method and its requests.

        The error is then in ``errors``; that of the plain method is raised.

        prompts: token ids of each row. count: maximum number of new tokens of a row. seed: that of sampling.
        scope: a name; texts that were answered under another name are not used for drafts.
        """
        try:
            with PeakMemory(self.base.target.device) as memory:
                reply = self.methods[name].reply(prompts, count, seed, scope)
        except Exception as error:
            if name == self.plain:
                raise
            key = next(key for key, known in self.names.items() if known == name)
            self.errors[key] = error
            del self.methods[name], self.names[key]
            self.requests = [request for request in self.requests if request.method != name]
            return None
        if reply.peak_memory_mb is None:
            reply.peak_memory_mb = memory.mb
        return reply

    def _prompts(self, chats: list[Chat], turn: int) -> tuple[list[Chat], list[list[int]]]:
        """Add user turn ``turn`` (from 0) to the texts of the chats that have it, in place.

        Returns the chats whose prompts then fit the context, and these prompts (token ids). The others that have the
        turn are named in ``skipped``.
        """
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

    def _turn(self, turn_key: tuple[int, int, int], chats: list[Chat], prompts: list[list[int]], number: int) -> int:
        """Let every method answer one turn of a group of chats; return the number of new tokens of all methods.

        The answers are added to ``requests``, and that of the plain method to the texts of the chats, in place.
        turn_key: (repetition, group, turn). prompts: token ids of each chat.
        number: number of earlier turns of the run; it sets the order of the methods and the seed.
        """
        count = min(self.first.max_new_tokens, *(self.base.target.context - len(ids) for ids in prompts))
        names, shift = list(self.methods), number % len(self.methods)
        requests: dict[str, BenchRequest] = {}
        seed = (self.first.seed + number) % (options.MAX_SEED + 1)
        for name in names[len(names) - shift :] + names[: len(names) - shift]:
            scope = f"{self.first.key()}, {name}, repetition {turn_key[0]}"  # other groups have the same prompts
            if reply := self._reply(name, prompts, count, seed, scope):
                conversations = [conversation for conversation, _ in chats]
                requests[name] = BenchRequest(name, *turn_key, conversations, prompts, reply, self._cells(name))
        for request in requests.values():
            self._compare(request, requests[self.plain], count, seed)
            self.requests.append(request)
            if self.record:
                self.record(request)
        for (_, texts), answer in zip(chats, requests[self.plain].reply.tokens, strict=True):
            texts.append(self.base.tokenizer.decode(answer, skip_special_tokens=True))
        return sum(request.reply.count for request in requests.values())

    def _cells(self, name: str) -> list[str]:
        """Return the keys of the cells whose method, or one of whose baselines, is the method ``name``."""
        return [cell.key() for cell in self.cells if name in (self.names.get(m.key()) for m in _methods(cell))]

    def _encode(self, texts: list[str]) -> list[int]:
        """Return the token ids of the prompt that ends with the last of ``texts``, for the model to answer.

        It is the chat in the tokenizer's template or, if that has none, the texts with an empty line between them.

        texts: the messages of user and model in turn; the first and the last one are the user's.
        """
        if getattr(self.base.tokenizer, "chat_template", None):
            roles = ("user", "assistant")
            return encode(self.base.tokenizer, [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)])
        return encode(self.base.tokenizer, "\n\n".join(texts))

    def _compare(self, request: BenchRequest, plain: BenchRequest, count: int, seed: int) -> None:
        """Set the fields ``equality`` and ``qualities`` of ``request``, by comparison with plain decoding.

        plain: the request of the plain method for the same prompts. count, seed: token limit and seed of both requests.
        """
        cell, method, target = self.first, self.methods[request.method], self.base.target
        comparable = cell.temperature == 0 or (method.seeded and self.methods[self.plain].seeded)
        for b, (prompt, ours) in enumerate(zip(request.prompts, request.reply.tokens, strict=True)):
            theirs, equality = plain.reply.tokens[b], None
            if comparable and ours == theirs:
                equality = "equal"
            elif comparable and not self._alike(request.method):
                equality = "differs"
            elif comparable:
                how = {name: getattr(cell, name) for name in SAMPLING}
                how |= {"seed": seed, "stream": streams(request.prompts)[b]}
                same = self.base.request(prompt, max_new_tokens=count, **how)
                difference = first_difference(target, prompt, ours, theirs, Sampler([same.sampler]))
                equality = "near-tie" if difference and difference.near_tie else "fault"
            request.equality.append(equality)
            if self.lossy:
                request.qualities.append(figures.quality(target, self.base.tokenizer, prompt, ours, theirs))

    def _alike(self, name: str) -> bool:
        """Return whether the method ``name`` must choose the tokens of the plain method, but for near-ties."""
        method, plain = self.methods[name], self.methods[self.plain]
        return method.lossless and method.same_arithmetic and plain.same_arithmetic

    def results(self) -> list[Record]:
        """Return one record per cell, in the order of ``cells``, from the requests so far; call it after ``execute``.

        It is an error record if the cell's method failed (``failure_record``).

        Raises SpecDecError if no request was finished.
        """
        if not self.requests and not all(map(self._error, self.cells)):
            why = f": {self.skipped[0]}" if self.skipped else ""
            raise SpecDecError(f"nothing was measured{why}")
        chats = [(number, chat) for number, group in enumerate(self.groups) for chat in group]
        turns = {(number, id(chat), turn) for number, chat in chats for turn in range(len(chat.turns))}
        if self.interrupted:  # only those that were answered
            turns = {
                (request.group, id(chat), request.turn) for request in self.requests for chat in request.conversations
            }
        shared = {
            "prompts": {
                "name": self.prompt_set.name,
                "licence": self.prompt_set.licence,
                "sha256": self.prompt_set.sha256,
                "conversations": len({(group, chat) for group, chat, _ in turns}),
                "turns": len(turns),
                "skipped": self.skipped,
            },
            "environment": self.environment,
            "pass_ms": self.passes,
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "stopped": self.stopped,
        }
        requests = {name: [request for request in self.requests if request.method == name] for name in self.methods}
        return [self._result(cell, requests, shared) for cell in self.cells]

    def _error(self, cell: Cell) -> Exception | None:
        """Return the exception that ended the cell's method, in loading or in an answer; None: it has not failed."""
        return self.errors.get(_methods(cell)[0].key())

    def _result(self, cell: Cell, by_method: dict[str, list[BenchRequest]], shared: Record) -> Record:
        """Return the record of ``cell``, an error record if its method failed.

        by_method: name of a method -> its requests. shared: entries that all records have.
        """
        if error := self._error(cell):
            return failure_record(cell, error, time.perf_counter() - self.started)
        method, *others = (method.key() for method in _methods(cell))
        name, keys = self.names[method], dict(zip(map(str, cell.against), others, strict=True))
        baselines = {label: self.names[key] for label, key in keys.items() if key in self.names}
        failed = {label: _text(self.errors[key]) for label, key in keys.items() if key in self.errors}
        requests = {label: by_method[method] for label, method in baselines.items()}
        names = {name, *baselines.values()}
        found = {
            each: summarize(each, by_method[each], requests, self.methods[each], self._alike(each)) for each in names
        }
        compared = {label: found[each] for label, each in baselines.items()}
        figures = {"method": found[name], "baselines": compared, "failed_baselines": failed}
        result = {"key": cell.key(), "cell": cell.as_dict(), **figures, **shared}
        try:
            json.dumps(result, allow_nan=False)
            return result
        except ValueError as error:  # NaN fails this cell only
            return failure_record(cell, error, self.seconds)


def measure(
    cells: Sequence[Cell],
    decoders: Decoders,
    progress: OnProgress | None = None,
    record: Callable[[BenchRequest], Any] | None = None,
) -> Iterator[Record]:
    """Measure a group of cells and yield the record of each cell; cells that cannot start come first.

    Errors become records. One that ends the group, such as one of plain decoding, leaves the records of what was
    finished, marked ``interrupted``. Only KeyboardInterrupt is raised, after these records.

    decoders: the cache of loaded models.
    progress: called after each turn with (finished turns, all turns, new tokens); None: not called.
    record: called with each finished request; None: not called.
    """
    start, left, interrupt = time.perf_counter(), list[Cell](), None
    for cell in cells:
        try:
            decoders.check(cell)
            left.append(cell)
        except Exception as error:
            yield failure_record(cell, error, time.perf_counter() - start)
    if not left:
        return
    try:
        run = BenchRun(left, decoders, progress, record)
        try:
            run.execute()
        except KeyboardInterrupt as stopped:
            if not run.requests:
                raise
            interrupt = stopped
        except Exception as error:
            if not run.requests:
                raise
            run.stopped = _text(error)
        yield from run.results()
    except Exception as error:
        yield from [failure_record(cell, error, time.perf_counter() - start) for cell in left]
    if interrupt:
        raise interrupt


def failure_record(cell: Cell, error: BaseException, seconds: float) -> Record:
    """Return the record of a cell that failed: {"key", "cell", "error" (one line of text), "seconds"}.

    seconds: spent until the failure.
    """
    return {"key": cell.key(), "cell": cell.as_dict(), "error": _text(error), "seconds": seconds}


def _text(error: BaseException) -> str:
    if out_of_memory(error):
        return "out of memory"
    text = one_line(error)
    return text if isinstance(error, SpecDecError) else f"unexpected {type(error).__name__}: {text}"


def _methods(cell: Cell) -> list[Cell]:
    """Return the cell's own method and then its baselines (``against``), each as a cell without baselines."""
    baselines: list[dict[str, Any]] = [{"drafter": name, "drafter_options": {}} for name in cell.against]
    return [cell.with_settings(**changes, against=[]).canonical() for changes in ({}, *baselines)]
