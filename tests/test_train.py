"""The trainer: what it trains is what drafts, it learns, it resumes exactly, and it says clearly what is wrong."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from specdec.drafters.m2r2 import M2R2, M2R2Drafter, M2R2Path
from specdec.draft import State
from specdec.sampling import Sampler, SamplingParams
from specdec.train import states
from specdec.train.batches import assemble, windows
from specdec.train.data import Answer
from specdec.train.runtime import TrainingTarget
from specdec.train.student import Judge, drafts
from specdec.train.trainer import wanted_states

PATHS = {
    "leap": M2R2Path(0, ((2, 4),), True, 4, {2: ["self_attn.q_proj", "self_attn.k_proj"], 3: ["mlp.up_proj"]}),
    "leap from 1": M2R2Path(1, ((2, 3),), True, 4, {2: ["self_attn.v_proj"]}),
    "early": M2R2Path(2, (), False, 4, {0: ["self_attn.q_proj", "mlp.down_proj"], 1: ["self_attn.o_proj"]}),
    "mixed": M2R2Path(1, ((2, 3),), True, 4, {0: ["mlp.up_proj"], 2: ["self_attn.k_proj"]}),
}


def shaken(path: M2R2Path, target: TrainingTarget, vocab: torch.Tensor | None = None) -> M2R2:
    """A network whose every parameter matters."""
    network = M2R2(path, target, vocab)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return network.requires_grad_(False)


def drafted(network: M2R2, target: TrainingTarget, ids: list[int], count: int) -> list[int]:
    """What the drafter itself proposes after ``ids`` (the last is the root)."""
    drafter = M2R2Drafter(network)
    drafter.bind(target)
    drafter.start(1)
    cache, old = target.new_cache(), len(ids) - 1
    positions = torch.arange(old)[None]
    taps = {layer: torch.empty(0) for layer in drafter.taps}
    mask = cache.mask(0, positions)
    target.layers(target.embed(torch.tensor([ids[:-1]]), positions), 0, target.num_layers, positions, mask, cache, taps)
    cache.keep([list(range(old))])
    drafter.observe([list(range(old))], taps)
    state = State(target, cache, Sampler(SamplingParams(temperature=0)), [ids])
    return drafter.propose(state, count).tokens[0].tolist()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("name", PATHS)
@torch.inference_mode()
def test_the_student_drafts_exactly_as_the_drafter(name: str, direct: bool) -> None:
    target = TrainingTarget(tiny_model("llama"))
    target.direct = direct
    path = PATHS[name]
    network = shaken(path, target)
    judge = Judge(target, None)
    for seed in range(4):
        ids = torch.randint(3, 97, (9 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        chain = drafted(network, target, ids, 3)
        answer = Answer(tuple(ids[:4]), (*ids[4:], *chain, 5))
        wanted = wanted_states(path, target.num_layers)
        records = states._records(states._teach(target, [answer], wanted, lambda n: None), wanted)
        rows = windows(records, 64)
        batch = assemble(records, rows, 64, target.device)
        target.forget()
        root = len(ids) - 1 - rows[0][1]  # the window index of the root's position
        own = [
            int(judge.logits(final)[0, root + step].argmax())
            for step, (final, _) in enumerate(drafts(network, target, batch, 3))
        ]
        assert own == chain
