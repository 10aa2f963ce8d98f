"""Leaps for expert prefetch, in closed form: from a layer's residual and the previous token's state to routers ahead.

For a layer j and a layer l ahead, ridge regression from [unit RMS of the residual at j; unit RMS of the previous
token's router input at l; 1] to the router logits at l. Because ridge regression is linear in its goal, this equals a
leap to the normalised residual of layer l followed by that layer's own router (see ``specdec.experts.predict``). Layers
of the next token are ahead of the last ones of this token. Knows nothing about gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.experts.layers import MoELayer, moe_layers
from specdec.experts.predict import DISTANCES, Forecaster, Leaps, Sight, slope_of
from specdec.kernels import rms_unit
from specdec.train.data import Answer
from specdec.train.fit import Moments

CONTEXT = 384  # tokens of an answer, prompt included

Seen = list[tuple[Tensor, Tensor]]  # per row: residual and router input [T, D] of one text


@contextmanager
def watching(layers: list[MoELayer]) -> Any:
    """Collects what the routers of a model see while it runs: a list that is filled by each forward pass."""
    seen: dict[str, list[Tensor]] = {"residual": [], "state": []}
    hooks = []
    for layer in layers:
        hooks.append(layer.norm.register_forward_pre_hook(lambda _, x: seen["residual"].append(x[0].flatten(0, 1))))
        hooks.append(layer.block.gate.register_forward_pre_hook(lambda _, x: seen["state"].append(x[0].flatten(0, -2))))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def observe(model: PreTrainedModel, layers: list[MoELayer], answer: Answer) -> Seen:
    """Run the model over a text once."""
    ids = torch.tensor([(answer.prompt_ids + answer.response_ids)[:CONTEXT]], device=model.device)
    with watching(layers) as seen:
        model(ids, use_cache=False)
    return list(zip(seen["residual"], seen["state"], strict=True))


def pairs(rows: int) -> list[list[tuple[int, bool]]]:
    """For each row, the rows it predicts, far ones first, and whether they are the next token's."""
    return [[((j + d) % rows, j + d >= rows) for d in DISTANCES if d < rows] for j in range(rows)]


@torch.inference_mode()
def fit_expert_leaps(
    model: PreTrainedModel,
    answers: Sequence[Answer],
    progress: Callable[[int], None] | None = None,
    targets: list[list[int]] | None = None,
) -> Leaps:
    """Leaps of ``model``, whose experts are in memory, from texts it should be good at: its own answers.

    progress: told the texts seen. targets: the rows, of the same token, that each row predicts; None: those at
    ``DISTANCES``, of the next token too.
    """
    layers = moe_layers(model)
    rows = len(layers)
    plan = pairs(rows) if targets is None else [[(l, False) for l in ahead] for ahead in targets]
    problems = [((f"x{j}", f"p{l}{w:d}"), f"y{l}{w:d}") for j in range(rows) for l, w in plan[j]]
    moments = Moments(problems)
    for number, answer in enumerate(answers, start=1):
        seen = observe(model, layers, answer)
        if len(seen[0][0]) < 3:
            continue
        parts = {}
        for j, (x, _) in enumerate(seen):
            parts[f"x{j}"] = rms_unit(x.float())[1:-1]
        for l, wrap in {pair for targets in plan for pair in targets}:
            n, router = seen[l][1].float(), layers[l].router.float()
            logits, unit = n @ router.T, rms_unit(n)
            parts[f"p{l}{wrap:d}"] = unit[1:-1] if wrap else unit[:-2]
            parts[f"y{l}{wrap:d}"] = logits[2:] if wrap else logits[1:-1]
        moments.add(parts)
        if progress is not None:
            progress(number)
    width = model.config.hidden_size
    now, before, bias = list[Tensor](), list[Tensor](), list[Tensor]()
    none = torch.zeros(0, len(layers[0].router), width)
    for j in range(rows):
        if not plan[j]:
            now, before, bias = [*now, none], [*before, none], [*bias, none[:, :, 0]]
            continue
        solved = [moments.solve((f"x{j}", f"p{l}{w:d}"), f"y{l}{w:d}") for l, w in plan[j]]
        now.append(torch.stack([w[:, :width] for w, _ in solved]))
        before.append(torch.stack([w[:, width:] for w, _ in solved]))
        bias.append(torch.stack([b for _, b in solved]))
    return Leaps(
        "m2r2", [[l for l, _ in plan[j]] for j in range(rows)], now, before, bias, slope_of(layers), layers[0].top_k
    )


@torch.inference_mode()
def recalls(
    model: PreTrainedModel, arms: Mapping[str, Forecaster], answers: Sequence[Answer]
) -> dict[str, dict[int, Share]]:
    """Share of the experts a token is routed to that are among the k foremost predicted, by layers ahead.

    For each of ``arms`` at its own targets, and for the experts of the previous token at those of the first. Token by
    token, as decoding sees them.
    """
    layers = moe_layers(model)
    k, first = layers[0].top_k, next(iter(arms.values()))
    found: dict[str, dict[int, Share]] = {name: defaultdict(Share) for name in (*arms, "previous-token")}
    for answer in answers:
        seen = observe(model, layers, answer)
        logits = torch.stack([n.float() @ layer.router.float().T for (_, n), layer in zip(seen, layers, strict=True)])
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(2, logits.topk(k, 2).indices, True).numpy()
        for t in range(len(answer.prompt_ids), logits.shape[1]):
            for j, (x, n) in enumerate(seen):
                sight = Sight(j, x[t : t + 1], n[t : t + 1], [])
                for name, arm in arms.items():
                    arm.look(sight)
                    if not arm.targets[j]:
                        continue
                    best = arm.logits(sight)[0].argsort(1)[:, -k:]
                    for row, experts in zip(arm.targets[j], best, strict=True):
                        if row > j:
                            found[name][row - j].add(int(chosen[row, t, experts].sum()), k)
                for row in first.targets[j]:
                    if row > j:
                        found["previous-token"][row - j].add(int((chosen[row, t] & chosen[row, t - 1]).sum()), k)
    return {name: dict(sorted(by.items())) for name, by in found.items()}


@dataclass
class Share:
    """``hits`` of ``total``."""

    hits: int = 0
    total: int = 0

    def add(self, hits: int, total: int) -> None:
        self.hits, self.total = self.hits + hits, self.total + total

    def __float__(self) -> float:
        return self.hits / max(self.total, 1)


def within(by: Mapping[int, Share], low: int, high: int) -> float:
    """The share over all distances from ``low`` to ``high``."""
    parts = [share for distance, share in by.items() if low <= distance <= high]
    return float(Share(sum(p.hits for p in parts), sum(p.total for p in parts)))
