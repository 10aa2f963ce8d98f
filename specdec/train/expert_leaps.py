"""Leaps for expert prefetch, in closed form: from a layer's residual and the previous token's to routers ahead.

For a layer j and a layer l ahead (or l = j), ridge regression to the router logits at l from [unit RMS of the residual
that enters j; the router's input a layer before j; unit RMS of the residual that entered l with the previous token; the
router's input there; 1]. Because ridge regression is linear in its goal, this equals a leap to the normalised
residual of layer l followed by that layer's own router (see ``specdec.experts.predict``). Layers of the next token are
ahead of the last ones of this token. Knows nothing about gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.experts.layers import MoELayer, moe_layers
from specdec.experts.predict import DISTANCES, PAST, Forecaster, Leaps, slope_of
from specdec.kernels import rms_unit
from specdec.train.data import Answer
from specdec.train.fit import Moments

CONTEXT = 384  # tokens of an answer, prompt included


@dataclass
class Seen:
    """Of one text, by row, [T, D] each: what enters, what is in front of the router, and the router's input."""

    entering: list[Tensor] = field(default_factory=list)
    middle: list[Tensor] = field(default_factory=list)
    state: list[Tensor] = field(default_factory=list)


@torch.inference_mode()
def observe(model: PreTrainedModel, layers: list[MoELayer], answer: Answer) -> Seen:
    """Run the model over a text once."""
    ids = torch.tensor([(answer.prompt_ids + answer.response_ids)[:CONTEXT]], device=model.device)
    seen, hooks = Seen(), []
    for layer in layers:
        places = ((layer.entry, seen.entering), (layer.norm, seen.middle), (layer.block.gate, seen.state))
        for module, into in places:
            hooks.append(module.register_forward_pre_hook(lambda _, x, into=into: into.append(x[0].flatten(0, -2))))
    try:
        model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def pairs(rows: int, distances: Sequence[int]) -> list[list[tuple[int, bool]]]:
    """For each row, the rows it predicts, and whether they are the next token's."""
    return [[((j + d) % rows, j + d >= rows) for d in distances if d < rows] for j in range(rows)]


@torch.inference_mode()
def fit_expert_leaps(
    model: PreTrainedModel,
    answers: Sequence[Answer],
    progress: Callable[[int], None] | None = None,
    distances: Sequence[int] = DISTANCES,
) -> Leaps:
    """Leaps of ``model``, whose experts are in memory or offloaded, from texts it should be good at: its own answers.

    progress: called with the number of texts read. distances: how many layers ahead each layer predicts.
    """
    layers = moe_layers(model)
    rows = len(layers)
    plan = pairs(rows, distances)
    problems = [
        [((f"x{j}", f"s{j}", f"p{l}{w:d}", f"r{l}{w:d}"), f"y{l}{w:d}") for l, w in ahead]
        for j, ahead in enumerate(plan)
    ]
    moments = Moments(problem for some in problems for problem in some)
    scales = [float(layer.norm.weight.detach().float().square().mean().sqrt()) for layer in layers]
    for number, answer in enumerate(answers, start=1):
        seen = observe(model, layers, answer)
        if len(seen.entering[0]) < 3:
            continue
        parts, units = {}, [rms_unit(x.float()) for x in seen.entering]
        states = [x.float() / scale for x, scale in zip(seen.state, scales, strict=True)]  # of about unit RMS, too
        for j, unit in enumerate(units):
            parts[f"x{j}"], parts[f"s{j}"] = unit[1:-1], states[j - 1][1:-1] if j else states[-1][:-2]
        for l, wrap in {pair for targets in plan for pair in targets}:
            logits = seen.state[l].float() @ layers[l].router.float().T
            for name, each in ((f"p{l}{wrap:d}", units[l]), (f"r{l}{wrap:d}", states[l])):
                parts[name] = each[1:-1] if wrap else each[:-2]
            parts[f"y{l}{wrap:d}"] = logits[2:] if wrap else logits[1:-1]
        moments.add(parts)
        if progress is not None:
            progress(number)
    width = model.config.hidden_size
    weights: dict[str, list[Tensor]] = {name: [] for name in ("now", *PAST, "bias")}
    none = torch.zeros(0, len(layers[0].router), width)
    for j, some in enumerate(problems):
        solved = [moments.solve(*problem) for problem in some]
        found = [torch.stack(each) for each in zip(*(w.split(width, 1) for w, _ in solved), strict=True)] or [none] * 4
        found[1] = found[1] / scales[j - 1]
        found[3] = torch.stack([w / scales[l] for w, (l, _) in zip(found[3], plan[j], strict=True)]) if some else none
        found.append(torch.stack([b for _, b in solved]) if some else none[..., 0])
        for name, part in zip(weights, found, strict=True):
            weights[name].append(part)
    targets = [[l for l, _ in ahead] for ahead in plan]
    past = {name: weights[name] for name in PAST}
    return Leaps("m2r2", targets, weights["now"], past, weights["bias"], slope_of(layers), layers[0].top_k)


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
        logits = torch.stack([n.float() @ l.router.float().T for n, l in zip(seen.state, layers, strict=True)])
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(2, logits.topk(k, 2).indices, True).numpy()
        for t in range(len(answer.prompt_ids), logits.shape[1]):
            for j, x in enumerate(seen.entering):
                for name, arm in arms.items():
                    best = arm.logits(j, x[t : t + 1])[0].argsort(1)[:, -k:]
                    for row, experts in zip(arm.targets[j], best, strict=True):
                        if row >= j:
                            found[name][row - j].add(int(chosen[row, t, experts].sum()), k)
                    arm.routed(j, seen.state[j][t : t + 1], [])
                for row in first.targets[j]:
                    if row >= j:
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
