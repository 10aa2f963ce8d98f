"""The expert predictor in closed form: from a layer's residual to the router logits of later layers.

For a layer j and a later layer l (or l = j): ridge regression from [unit RMS of the residual that enters j; 1] to the
router's logits at l. Because ridge regression is linear in its goal, this equals a projection to the normalised
residual of layer l followed by that layer's own router. After the last layers of a token come those of the next token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.drafters.ridge import Sums
from specdec.runtimes.experts.layers import MoELayer, moe_layers
from specdec.runtimes.experts.predict import DISTANCES, LinearPredictor, slope_of
from specdec.runtimes.linear_maps import rms_unit
from specdec.train.data import TrainingAnswer

CONTEXT = 384  # tokens of an answer, prompt included


@torch.inference_mode()
def observe(
    model: PreTrainedModel, layers: list[MoELayer], answer: TrainingAnswer
) -> tuple[list[Tensor], list[Tensor]]:
    """Run the model over a text: for each layer its input [T, D] and its router's logits [T, E]."""
    ids = torch.tensor([(answer.prompt_ids + answer.response_ids)[:CONTEXT]], device=model.device)
    entering, states, hooks = list[Tensor](), list[Tensor](), []
    for layer in layers:
        for module, seen in ((layer.entry, entering), (layer.block.gate, states)):
            hooks.append(module.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].flatten(0, -2))))
    try:
        model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return entering, [x.float() @ layer.router.float().T for x, layer in zip(states, layers, strict=True)]


@torch.inference_mode()
def fit_predictor(
    model: PreTrainedModel, answers: Sequence[TrainingAnswer], progress: Callable[[int], None] = lambda texts: None
) -> LinearPredictor:
    """Fit the predictor on ``answers`` of ``model``, whose experts are in memory or offloaded.

    progress: called with the number of texts that were read.
    """
    layers = moe_layers(model)
    rows = len(layers)
    # For each layer: the layers that it predicts, and whether they belong to the next token.
    plan = [[((j + d) % rows, j + d >= rows) for d in DISTANCES if d < rows] for j in range(rows)]
    width, experts = layers[0].router.shape[1], len(layers[0].router)
    maps = [nn.Linear(width, experts * len(ahead)) for ahead in plan]
    fits = [Sums(each.in_features, each.out_features) for each in maps]
    for number, answer in enumerate(answers, start=1):
        entering, logits = observe(model, layers, answer)
        for x, ahead, sums in zip(entering, plan, fits, strict=True):
            goals = [logits[l][1:] if wrap else logits[l][:-1] for l, wrap in ahead]  # (T - 1, E) each
            sums.add(rms_unit(x.float())[:-1], torch.cat(goals, 1))
        progress(number)
    for sums, each in zip(fits, maps, strict=True):
        sums.fit(each)
    return LinearPredictor(
        [[l for l, _ in ahead] for ahead in plan],
        [each.weight.unflatten(0, (-1, experts)) for each in maps],
        [each.bias.unflatten(0, (-1, experts)) for each in maps],
        slope_of(layers),
        layers[0].top_k,
    )


@torch.inference_mode()
def recalls(
    model: PreTrainedModel, predictors: Mapping[str, LinearPredictor], answers: Sequence[TrainingAnswer]
) -> dict[str, dict[int, float]]:
    """The share of a token's k experts that are among the k best predictions, by number of layers ahead.

    For each predictor, and for the experts of the previous token ("previous-token").
    """
    layers = moe_layers(model)
    k, names = layers[0].top_k, (*predictors, "previous-token")
    shares: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in names}
    for answer in answers:
        (entering, logits), start = observe(model, layers, answer), len(answer.prompt_ids)
        chosen = [torch.zeros_like(y, dtype=torch.bool).scatter_(1, y.topk(k).indices, True).cpu() for y in logits]
        for j, x in enumerate(entering):
            for name, predictor in predictors.items():
                best = torch.from_numpy(predictor.logits(j, x[start:])).topk(k, 2).indices  # (T, n, k)
                for i, row in enumerate(predictor.targets[j]):
                    if row >= j:  # of this token
                        shares[name][row - j] += chosen[row][start:].gather(1, best[:, i]).float().mean(1).tolist()
            for row in range(j, min(j + max(DISTANCES), len(layers) - 1) + 1):
                again = chosen[row][start:] & chosen[row][start - 1 : -1]
                shares["previous-token"][row - j] += (again.sum(1) / k).tolist()
    return {name: {d: fmean(each) for d, each in sorted(by.items())} for name, by in shares.items()}
