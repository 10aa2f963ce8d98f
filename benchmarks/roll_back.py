"""Three ways of rolling back recurrent layers, on random models: memory of a row and time of a step.

    python benchmarks/roll_back.py --steps 30

A step scores a block of 1 + k tokens and accepts the root and 0, 1, ..., k of them in turn.
replay: the state before the block is kept; what is accepted of the block runs through the recurrent mixers again before
the next block (what the runtimes do). token by token: mixers run one token after another, and every state is
kept. extra pass: as the first, but what is accepted runs through the whole model again, at once.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from specdec.runtimes.fused import FAMILIES, FusedTarget
from specdec.runtimes.layer_pass import Pass
from specdec.runtimes.recurrent import Advance, Recurrent, States
from specdec.runtimes.reference import ReferenceTarget
from specdec.runtimes.target import Target

WAYS = ("replay", "token by token", "extra pass")
SIZES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128},
    "middle": {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "intermediate_size": 2816},
}


def changes(family: str, size: dict[str, int]) -> dict[str, object]:
    """What a family's config has beside its size: every second layer is recurrent."""
    heads, layers = size["num_attention_heads"], size["num_hidden_layers"] // 2
    head = size["hidden_size"] // heads
    if family == "qwen3_5_text":
        keys = {f"linear_num_{part}_heads": heads for part in ("key", "value")}
        keys |= {f"linear_{part}_head_dim": head for part in ("key", "value")}
        return {**keys, "head_dim": head, "layer_types": ["linear_attention", "full_attention"] * layers}
    if family == "bamba":
        odd = list(range(1, 2 * layers, 2))
        return {"mamba_n_heads": 2 * heads, "mamba_d_head": head, "mamba_d_state": head, "attn_layer_indices": odd}
    return {"layer_types": ["conv", "full_attention"] * layers}


class TokenByToken(Recurrent):
    """Keeps the state after every uncommitted token."""

    def __init__(self, batch: int) -> None:
        super().__init__(batch)
        self.each: list[States] = []

    def run(self, x: Tensor, held: int, tree: Tensor | None, advance: Advance) -> Tensor:
        del self.each[held:]
        outs = []
        for token in x.split(1, 1):
            out, states = advance(token, self.each[-1] if self.each else self.states, False)
            outs.append(out)
            self.each.append(states)
        return torch.cat(outs, 1)

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        [path] = paths
        if path:
            self.states = self.each[path[-1]]
        self.each = []


def size_of(states: States) -> int:
    return sum(state.nbytes for state in states.values())


class Played:
    """A text that goes on by one way, step by step. taken: seconds of each step. held: bytes of its recurrent layers
    while a block is uncommitted."""

    def __init__(self, target: Target, way: str, drafted: int, context: int) -> None:
        self.target, self.way, self.drafted = target, way, drafted
        self.cache, self.held, self.taken = target.new_cache(), 0, list[float]()
        if way == "token by token":
            self.cache.recurrent = {layer: TokenByToken(1) for layer in target.recurrent_layers}
        self.run(context)
        self.cache.commit([range(context)])

    def run(self, count: int) -> None:
        cache, target = self.cache, self.target
        ids = torch.randint(target.vocab_size, (1, count))
        positions = torch.arange(cache.rows[0], cache.rows[0] + count)[None]
        given = Pass(positions, cache.mask(0, positions), cache)
        target.readout(target.layers(target.embed(ids, positions), 0, target.num_layers, given))

    def step(self, accepted: int) -> None:
        start = time.perf_counter()
        self.run(1 + self.drafted)
        for state in self.cache.recurrent.values() if not self.taken else ():
            kept = [state.states, *(state.each if isinstance(state, TokenByToken) else [state.ahead or {}])]
            self.held += sum(map(size_of, kept))
            self.held += state.inputs.nbytes if self.way == "replay" and state.inputs is not None else 0
        if self.way == "extra pass" and accepted <= self.drafted:
            self.cache.roll_back()
            self.run(accepted)
        self.cache.commit([range(accepted)])
        self.taken.append(time.perf_counter() - start)

    def seconds(self) -> float:
        """Of a step: the median for each number of accepted tokens, and the mean of those."""
        every = self.drafted + 1  # the first ones have things to prepare
        return statistics.mean(statistics.median(self.taken[every + n :: every]) for n in range(every))


@torch.inference_mode()
def measure(targets: dict[str, Target], drafted: int, steps: int, context: int) -> dict[tuple[str, str], Played]:
    """Each runtime and way, step by step in turn."""
    found = {(name, way): Played(target, way, drafted, context) for name, target in targets.items() for way in WAYS}
    for number in range(steps + drafted + 1):
        for played in found.values():
            played.step(1 + number % (drafted + 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--drafted", type=int, nargs="*", default=[0, 4])
    parser.add_argument("--families", nargs="*", default=["qwen3_5_text", "bamba", "lfm2"])
    parser.add_argument("--sizes", nargs="*", default=[*SIZES])
    given = parser.parse_args()
    table = Table("model", "runtime", "drafted", *(f"{way}: ms" for way in WAYS), *(f"{way}: kB" for way in WAYS))
    for size, sizes in ((name, SIZES[name]) for name in given.sizes):
        for family in given.families:
            torch.manual_seed(0)
            whole = {"vocab_size": 1024, "num_key_value_heads": 4, "max_position_embeddings": 4096, **sizes}
            config = AutoConfig.for_model(family, **whole, **changes(family, sizes))
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            targets: dict[str, Target] = {"reference": ReferenceTarget(model)}
            if family in FAMILIES:
                targets["fused"] = FusedTarget(model)
            for drafted in given.drafted:
                found = measure(targets, drafted, given.steps, given.context)
                for name in targets:
                    ways = [found[name, way] for way in WAYS]
                    times = [f"{1000 * each.seconds():.1f}" for each in ways]
                    table.add_row(
                        f"{family}, {size}", name, str(drafted), *times, *(f"{each.held / 1000:.0f}" for each in ways)
                    )
    Console().print(table)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, float32")


if __name__ == "__main__":
    main()
