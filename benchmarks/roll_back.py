"""Three ways of rolling back recurrent layers, on random models: memory of a row and time of a step.

    python benchmarks/roll_back.py --steps 30

A step scores a block of 1 + k tokens and accepts the root and 0, 1, ..., k of them in turn.
replay: the state before the block is kept; what is accepted of the block runs through the recurrent mixers again before
the next block (what the reference runtime does). token by token: mixers run one token after another, and every state is
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

from specdec.runtimes.layer_pass import Pass
from specdec.runtimes.recurrent import Advance, Recurrent, States
from specdec.runtimes.reference import ReferenceTarget

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


@torch.inference_mode()
def measure(target: ReferenceTarget, way: str, drafted: int, steps: int, context: int) -> tuple[float, int]:
    """Milliseconds of a step, and bytes of a row's recurrent layers while a block is uncommitted."""
    cache, held = target.new_cache(), 0
    recurrent = [layer for layer, name in enumerate(target.mixers) if name is not None]
    if way == "token by token":
        cache.recurrent = {layer: TokenByToken(1) for layer in recurrent}

    def run(count: int) -> None:
        ids = torch.randint(target.vocab_size, (1, count))
        positions = torch.arange(cache.rows[0], cache.rows[0] + count)[None]
        given = Pass(positions, cache.mask(0, positions), cache)
        target.readout(target.layers(target.embed(ids, positions), 0, target.num_layers, given))

    run(context)
    cache.commit([range(context)])
    taken = []
    for number in range(steps + drafted + 1):
        accepted = 1 + number % (drafted + 1)
        start = time.perf_counter()
        run(1 + drafted)
        for state in cache.recurrent.values() if not held else ():
            kept = [state.states, *(state.each if isinstance(state, TokenByToken) else [state.ahead or {}])]
            held += sum(map(size_of, kept))
            held += state.inputs.nbytes if way == "replay" and state.inputs is not None else 0
        if way == "extra pass" and accepted <= drafted:
            cache.roll_back()
            run(accepted)
        cache.commit([range(accepted)])
        if number > drafted:  # the first ones have things to prepare
            taken.append(time.perf_counter() - start)
    return 1000 * statistics.mean(taken), held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--drafted", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--families", nargs="*", default=["qwen3_5_text", "bamba", "lfm2"])
    given = parser.parse_args()
    ways = ("replay", "token by token", "extra pass")
    table = Table("model", "drafted", *(f"{way}: ms" for way in ways), *(f"{way}: kB" for way in ways))
    for size, sizes in SIZES.items():
        for family in given.families:
            torch.manual_seed(0)
            whole = {"vocab_size": 1024, "num_key_value_heads": 4, "max_position_embeddings": 4096, **sizes}
            config = AutoConfig.for_model(family, **whole, **changes(family, sizes))
            target = ReferenceTarget(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
            for drafted in given.drafted:
                found = [measure(target, way, drafted, given.steps, given.context) for way in ways]
                times, bytes_ = ([f"{part[i] / (1, 1000)[i]:.1f}" for part in found] for i in (0, 1))
                table.add_row(f"{family}, {size}", str(drafted), *times, *bytes_)
    Console().print(table)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, float32")


if __name__ == "__main__":
    main()
