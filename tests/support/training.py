"""Training on a tiny model: settings, answers as token ids, and the drafts of a drafter."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from specdec.drafters.m2r2 import M2R2, M2R2Drafter, M2R2Path
from specdec.runtimes.prefill import run_tokens
from specdec.runtimes.target import Target
from specdec.speculation.sampling import RowSampler, Sampler, SamplingParams
from specdec.speculation.state import State
from specdec.train import states
from specdec.train.batches import assemble, windows
from specdec.train.data import TrainingAnswer
from specdec.train.m2r2 import M2R2Settings, path_states
from specdec.train.settings import from_mapping
from specdec.train.student import Teacher, draft_steps

PATHS = {
    "projected": M2R2Path(0, ((2, 4),), True, 4, {2: ["self_attn.q_proj", "self_attn.k_proj"], 3: ["mlp.up_proj"]}),
    "projected from 1": M2R2Path(1, ((2, 3),), True, 4, {2: ["self_attn.v_proj"]}),
    "early": M2R2Path(2, (), False, 4, {0: ["self_attn.q_proj", "mlp.down_proj"], 1: ["self_attn.o_proj"]}),
    "mixed": M2R2Path(1, ((2, 3),), True, 4, {0: ["mlp.up_proj"], 2: ["self_attn.k_proj"]}),
    "early exits": M2R2Path(3, (), False, 4, {n: ["self_attn.q_proj", "mlp.down_proj"] for n in range(3)}, (1, 2)),
    "exits on the way": M2R2Path(2, ((2, 3), (3, 4)), True, 4, {0: ["mlp.up_proj"], 2: ["mlp.up_proj"]}, (1, 3)),
}


def shaken(path: M2R2Path, target: Target, vocab: torch.Tensor | None = None) -> M2R2:
    """Return a random M2R2 network in which every parameter affects the result."""
    network = M2R2(path, target, vocab)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return network.requires_grad_(False)


def drafted(network: M2R2, target: Target, ids: list[int], count: int, sure: float = 1.0) -> list[int]:
    """Return what the drafter proposes after ``ids``, whose last token is the root: ``count`` tokens.

    sure: probability at which a token leaves at an exit; 1: it leaves at the last one.
    """
    drafter = M2R2Drafter(network, exit_confidence=sure)
    drafter.bind(target)
    row_states = [drafter.begin()]
    cache, old = target.new_cache(1), len(ids) - 1
    taps = {layer: torch.empty(0) for layer in drafter.traits.taps}
    run_tokens(target, cache, [ids[:-1]], taps, whole=True)
    drafter.observe(row_states, [list(range(old))], taps)
    state = State(target, cache, Sampler([RowSampler(SamplingParams(temperature=0))]), [ids], row_states=row_states)
    return drafter.propose(state, count).tokens[0].tolist()


@torch.inference_mode()
def same_drafts(target: Target, path: M2R2Path) -> None:
    """Assert that the trainer's draft steps choose the same tokens as the drafter."""
    network = shaken(path, target)
    teacher = Teacher(target, None)
    for seed in (0, 3):
        ids = torch.randint(3, 97, (9 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        chain = drafted(network, target, ids, 3)
        answer = TrainingAnswer(tuple(ids[:4]), (*ids[4:], *chain, 5))
        wanted = path_states(path, target.num_layers)
        records = states._records(states._make_shard(target, [answer], wanted), wanted)
        rows = windows(records, 64)
        batch = assemble(records, rows, target.device)
        root = len(ids) - 1 - rows[0][1]  # the window index of the root's position
        own = [
            [int(teacher.logits(final)[0, root + step].argmax()) for final, _ in exits]
            for step, (exits, _) in enumerate(draft_steps(network, target, batch, 3))
        ]
        assert [tokens[-1] for tokens in own] == chain
        assert own[0][0] == drafted(network, target, ids, 1, sure=0.0)[0]  # at the first exit


class Tokens:
    """A stand-in for a tokenizer, for training on answers that are token ids."""

    chat_template = None
    eos_token_id = 2

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))

    def __call__(self, text: str, **options: Any) -> Any:
        return SimpleNamespace(input_ids=list(map(int, text.split())))


def recipe(answers: Path, output: Path, **changes: Any) -> M2R2Settings:
    values: dict[str, Any] = {
        "method": "m2r2",
        "prompts": [str(answers)],
        "output": str(output),
        "dtype": "float32",
        "segments": [[2, 4]],
        "final_projection": True,
        "rank": 4,
        "draft_vocab": 60,
        "steps": 24,
        "minutes": None,
        "rows": 4,
        "window": 8,
        "fit_tokens": 200,
        "eval_fraction": 0.15,
    }
    return from_mapping(M2R2Settings, values | changes, "test")


def evaluations(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["evaluation"] for line in lines if "evaluation" in line]


def checkpoint_of(output: Path) -> dict[str, torch.Tensor]:
    """Return the master weights and the optimizer's tensors of a checkpoint, by name."""
    saved = torch.load(output / "checkpoint.pt", weights_only=True)
    slots = {f"{n}/{key}": value for n, slot in saved["optimizer"]["state"].items() for key, value in slot.items()}
    return saved["masters"] | slots


class Killed(BaseException):
    pass
