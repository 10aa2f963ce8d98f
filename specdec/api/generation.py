"""A generation under way: steps of the loop, their text, and what every row has so far."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from specdec.api.text import Detokenizer
from specdec.engine.loop import Loop
from specdec.engine.metrics import RequestMetrics
from specdec.runtimes.experts.offload import Meter


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

    def __init__(self, loop: Loop, tokenizer: Any, stops: list[str], eos: frozenset[int]) -> None:
        self.loop, self.eos = loop, eos
        self.texts = [Detokenizer(tokenizer, stops) for _ in loop.rows]
        loop.stop = self._stop
        self.events: Iterator[list[tuple[int, list[int]]]] | None = loop.steps()
        self.meter: Meter | None = None  # of expert loads, from the end of the prefill on
        self.ended: Callable[[], object] = lambda: None  # called once
        self._turn, self._closing = threading.RLock(), False  # closing waits for the step that another thread is in

    def _stop(self, row: int, token: int) -> str | None:
        """Take one new token of ``row`` into its output; return why the row ends with it, if it does."""
        self.texts[row].push(token)
        if token in self.eos:
            return "eos"
        return "stop" if self.texts[row].stopped else None

    def __iter__(self) -> Iterator[list[str]]:
        for events in self.steps():
            ledger, pieces = self.loop.ledger, [""] * len(self.texts)
            ledger.restart()
            for row, _ in events:
                text = self.texts[row]
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
            if self.meter is None and self.loop.target.experts is not None:
                self.meter = Meter(self.loop.target.experts.store)
            if events is None:
                self.close()
            return events

    def outputs(self) -> list[GenerationOutput]:
        """What every row has so far."""
        out = []
        if self.meter is not None and self.loop.target.experts is not None:
            decoded = sum(len(text.ids) - 1 for text in self.texts)  # the first of each row came with the prefill
            for metrics in self.loop.metrics:
                metrics.experts = self.meter.figures(decoded)
        for row, (text, metrics) in enumerate(zip(self.texts, self.loop.metrics, strict=True)):
            text.finish()
            reason = self.loop.finished.get(row, "interrupted")
            out.append(GenerationOutput(text.text, list(text.ids), reason, metrics))
        return out

    def close(self) -> None:
        """End the generation and free its cache; ``outputs`` stays available."""
        self._closing = True
        with self._turn:
            if self.events is not None:
                self.events = None
                self.loop.state.cache = self.loop.target.new_cache(0)
                self.ended()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
