"""Run the ``specdec`` command with llama.cpp among the methods of its benchmarks.

    python benchmarks/other_engines.py bench --drafters none,m2r2,llama.cpp --model MODEL.gguf

Methods in addition to those of ``specdec bench``, also for ``sweep``: llama.cpp, llama.cpp-ngram-cache,
llama.cpp-ngram-simple and llama.cpp-draft-model=FILE. They load the model's own file and decode greedily, one prompt at
a time, with specdec's number of threads, each in a process of its own (``peers``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peers import PEERS, Process, readable

from specdec import cli
from specdec.api.decoder import SpecDecoder
from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.bench.cell import EXTERNAL_METHODS, Cell, ExternalMethod, check_external
from specdec.bench.methods import PASSES, Method, Reply, refuse_batches
from specdec.models import catalogue, prepare

CONTEXT = 4096  # tokens for which another engine makes room


class PeerMethod(Method):
    """A method of a benchmark that decodes with another engine, such as llama.cpp, on the model's own file.

    Rounding may choose other tokens than specdec. The method's option ``context`` is the size of the engine's KV cache
    in tokens.
    base: specdec's decoder of the same model. cell: the settings of the measurement. Raises SpecDecError for settings
        that the engine does not support.
    """

    same_arithmetic = False

    def __init__(self, base: SpecDecoder, cell: Cell) -> None:
        self.kind, source = check_external(cell.drafter, cell.drafter_options)
        peer = PEERS[self.kind]
        refuse_batches(cell)
        if cell.temperature > 0:
            raise SpecDecError(f"'{self.kind}' is measured greedily; leave it out or use --temperature 0")
        path, most = readable(self.kind, model_file(cell.model)), base.target.context
        context = options.check_int("context", cell.drafter_options.get("context", min(CONTEXT, most)), 1, most)
        if peer.mode == "draft-model":
            source = str(readable(self.kind, Path(source) if Path(source).is_file() else None))
        depth = None if cell.num_speculative_tokens == "auto" else cell.num_speculative_tokens
        how = {"threads": torch.get_num_threads(), "context": context, "mode": peer.mode, "source": source}
        self.context, self.eos = context, sorted(base.eos_ids())
        self.process = Process(peer.engine)
        self.engine: dict[str, Any] | None = self.process.ask("load", path=str(path), depth=depth, **how)
        self.pass_seconds: dict[str, float] = self.process.ask("passes", sizes=[n for n in PASSES if n < context])

    def reply(self, prompts: list[list[int]], count: int, seed: int, scope: str = "") -> Reply:
        (ids,) = prompts
        if len(ids) + count > self.context:
            option = f"--drafter-option {self.kind}.context={len(ids) + count}"
            raise SpecDecError(f"a prompt of {len(ids)} tokens does not fit '{self.kind}'; give it more by {option}")
        made = self.process.ask("generate", ids=ids, count=count, eos=self.eos)
        peak = self.process.resident()
        return Reply([made["tokens"]], made["seconds"], made["arrivals"], made["first"], peak_memory_mb=peak)


def model_file(name: str) -> Path | None:
    """Return the GGUF file of the embedded model ``name``, or ``name`` as a path; None: there is neither.

    Downloads the embedded model if need be.
    """
    if name in catalogue.EMBEDDED:
        return prepare.prepare_embedded(name) / prepare.GGUF
    path = Path(name).expanduser().absolute()
    return path if path.exists() else None


def register() -> None:
    """Make the engines of ``peers``, such as llama.cpp, known to ``specdec bench`` as methods."""
    for name, peer in PEERS.items():
        source = "FILE" if peer.mode == "draft-model" else ""
        EXTERNAL_METHODS[name] = ExternalMethod(
            "other_engines:PeerMethod", ("context",), bool(peer.mode), source, peer.missing
        )


if __name__ == "__main__":
    register()
    cli.main()
