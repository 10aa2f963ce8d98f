"""A generation under way: steps of the loop, their text, and what every row has so far."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from specdec.api.text import Detokenizer
from specdec.engine.depth import DepthPolicy
from specdec.engine.loop import Loop
from specdec.engine.metrics import RequestMetrics
from specdec.runtimes.experts.offload import Meter
from specdec.runtimes.target import Target
from specdec.speculation.draft import Drafter, Verifier
from specdec.speculation.sampling import Sampler


class Decoder(Protocol):
    """What a generation uses of a ``SpecDecoder``."""

    target: Target
    drafter: Drafter
    verifier: Verifier
    tokenizer: Any

    def ended(self, generation: Generation) -> None:
        """The generation is closed, and its drafter free for another one."""


@dataclass
class GenerationOutput:
    """One finished (or interrupted) request.

    token_ids: the new tokens, as plain decoding would return them (an end-of-sequence token included).
    text: their text without special tokens, ending before a stop string.
    finish_reason: "eos", "length" or "stop"; "interrupted" if the stream was closed early.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    metrics: RequestMetrics

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return vars(self) | {"metrics": self.metrics.as_dict()}


class Generation:
    """A generation under way. Iterating yields, per step, the new text of each row ("" where there is none).

    ``steps`` runs the same steps, without decoding text on the way: ``outputs`` has it in the end.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: list[list[int]],
        limits: list[int],
        policy: DepthPolicy,
        sampler: Sampler,
        stops: list[str],
        eos: frozenset[int],
    ) -> None:
        self.decoder, self.eos = decoder, eos
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.texts = [Detokenizer(decoder.tokenizer, stops) if decoder.tokenizer else None for _ in prompts]
        self.loop = Loop(
            decoder.target, decoder.drafter, decoder.verifier, sampler, prompts, limits, self._stop, policy
        )
        self.events: Iterator[list[tuple[int, list[int]]]] | None = self.loop.steps()
        self.meter: Meter | None = None  # of expert loads, from the end of the prefill on
        self.release: Callable[[], object] = lambda: None  # the drafter
        self._turn, self._closing = threading.RLock(), False  # closing waits for the step that another thread is in

    def _stop(self, row: int, token: int) -> str | None:
        """Take one new token of ``row`` into its output; say whether the row ends with it, and why."""
        self.tokens[row].append(token)
        text = self.texts[row]
        if text is not None:
            text.push(token)
        if token in self.eos:
            return "eos"
        return "stop" if text is not None and text.stopped else None

    def __iter__(self) -> Iterator[list[str]]:
        for events in self.steps():
            ledger, pieces = self.loop.ledger, [""] * len(self.tokens)
            ledger.restart()
            for row, _ in events:
                text = self.texts[row]
                if text is not None:
                    pieces[row] = text.finish() if row in self.loop.finished else text.take()
            ledger.mark("detokenise")
            yield pieces

    def steps(self) -> Iterator[list[tuple[int, list[int]]]]:
        """Run the steps; yield for each the rows that went on, and their new tokens."""
        while (events := self._step()) is not None:
            yield events

    def _step(self) -> list[tuple[int, list[int]]] | None:
        """One step, or None at the end."""
        with self._turn:
            if self.events is None or self._closing:
                self.close()
                return None
            events = next(self.events, None)
            if self.meter is None and self.decoder.target.experts is not None:
                self.meter = Meter(self.decoder.target.experts.store)
            if events is None:
                self.close()
            return events

    def outputs(self) -> list[GenerationOutput]:
        """What every row has so far."""
        out = []
        if self.meter is not None and self.decoder.target.experts is not None:
            decoded = sum(len(tokens) - 1 for tokens in self.tokens)  # the first of each row came with the prefill
            for metrics in self.loop.metrics:
                metrics.experts = self.meter.figures(decoded)
        for row, (tokens, text) in enumerate(zip(self.tokens, self.texts, strict=True)):
            if text is not None:
                text.finish()
            reason = self.loop.finished.get(row, "interrupted")
            out.append(GenerationOutput(text.text if text else "", list(tokens), reason, self.loop.metrics[row]))
        return out

    def close(self) -> None:
        """End the generation and free its cache; ``outputs`` stays available."""
        self._closing = True
        with self._turn:
            if self.events is not None:
                self.events = None
                self.loop.state.cache = self.decoder.target.new_cache(0)
                self.decoder.ended(self)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
