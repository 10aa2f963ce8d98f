"""The expert predictor in closed form: from a layer's residual to the router logits of layers ahead.

For a layer j and a layer l ahead (or l = j): ridge regression from [unit RMS of the residual that enters j; 1] to the
router's logits at l. Because ridge regression is linear in its goal, this equals a projection to the normalised
residual of layer l followed by that layer's own router. Layers of the next token are ahead of the last ones of this
token. Needs no gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.runtimes.experts.layers import MoELayer, moe_layers
from specdec.runtimes.experts.predict import DISTANCES, LinearPredictor, slope_of
from specdec.runtimes.linear_maps import rms_unit
from specdec.train.data import Answer
from specdec.train.fit import Moments

CONTEXT = 384  # tokens of an answer, prompt included


@dataclass
class Seen:
    """Of one text, by row, [T, D] each: what enters, and the router's input."""

    entering: list[Tensor] = field(default_factory=list)
    state: list[Tensor] = field(default_factory=list)


@torch.inference_mode()
def observe(model: PreTrainedModel, layers: list[MoELayer], answer: Answer) -> Seen:
    """Run the model over a text once."""
    ids = torch.tensor([(answer.prompt_ids + answer.response_ids)[:CONTEXT]], device=model.device)
    seen, hooks = Seen(), []
    for layer in layers:
        for module, into in ((layer.entry, seen.entering), (layer.block.gate, seen.state)):
            hooks.append(module.register_forward_pre_hook(lambda _, x, into=into: into.append(x[0].flatten(0, -2))))
    try:
        model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@torch.inference_mode()
def fit_predictor(
    model: PreTrainedModel,
    answers: Sequence[Answer],
    progress: Callable[[int], None] | None = None,
    distances: Sequence[int] = DISTANCES,
) -> LinearPredictor:
    """Fit to texts that ``model``, whose experts are in memory or offloaded, should be good at: its own answers.

    progress: called with the number of texts read. distances: how many layers ahead each layer predicts.
    """
    layers = moe_layers(model)
    rows = len(layers)
    # For each row: the rows it predicts, and whether they are the next token's.
    plan = [[((j + d) % rows, j + d >= rows) for d in distances if d < rows] for j in range(rows)]
    problems = [[((f"x{j}",), f"y{l}{wrap:d}") for l, wrap in ahead] for j, ahead in enumerate(plan)]
    moments = Moments(problem for some in problems for problem in some)
    for number, answer in enumerate(answers, start=1):
        seen = observe(model, layers, answer)
        if len(seen.entering[0]) < 2:
            continue
        parts = {f"x{j}": rms_unit(x.float())[:-1] for j, x in enumerate(seen.entering)}
        for l, wrap in {pair for ahead in plan for pair in ahead}:
            logits = seen.state[l].float() @ layers[l].router.float().T
            parts[f"y{l}{wrap:d}"] = logits[1:] if wrap else logits[:-1]
        moments.add(parts)
        if progress is not None:
            progress(number)
    none = torch.zeros(0, *layers[0].router.shape)
    weight, bias = [none] * rows, [none[..., 0]] * rows
    for j, some in enumerate(problems):
        if some:
            weight[j], bias[j] = map(torch.stack, zip(*(moments.solve(*problem) for problem in some), strict=True))
    return LinearPredictor([[l for l, _ in ahead] for ahead in plan], weight, bias, slope_of(layers), layers[0].top_k)


@torch.inference_mode()
def recalls(
    model: PreTrainedModel, predictors: Mapping[str, LinearPredictor], answers: Sequence[Answer]
) -> dict[str, dict[int, float]]:
    """Share of the experts a token is routed to that are among the k foremost predicted, by layers ahead.

    For each of ``predictors`` at its own targets, and for the experts of the previous token at those of the first.
    """
    layers = moe_layers(model)
    k, first = layers[0].top_k, next(iter(predictors.values()))
    hits: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in (*predictors, "previous-token")}
    for answer in answers:
        seen, start = observe(model, layers, answer), len(answer.prompt_ids)
        logits = torch.stack([n.float() @ l.router.float().T for n, l in zip(seen.state, layers, strict=True)])
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(2, logits.topk(k, 2).indices, True).cpu()
        for j, x in enumerate(seen.entering):
            for name, predictor in predictors.items():
                best = torch.from_numpy(predictor.logits(j, x[start:])).topk(k, 2).indices  # (T, n, k)
                for i, row in enumerate(predictor.targets[j]):
                    if row >= j:
                        hits[name][row - j] += chosen[row, start:].gather(1, best[:, i]).float().mean(1).tolist()
            for row in first.targets[j]:
                if row >= j:
                    both = chosen[row, start:] & chosen[row, start - 1 : -1]
                    hits["previous-token"][row - j] += (both.sum(1) / k).tolist()
    return {name: {d: sum(each) / len(each) for d, each in sorted(by.items())} for name, by in hits.items()}
