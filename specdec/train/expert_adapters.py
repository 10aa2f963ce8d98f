"""Adapters for expert prefetch, the paper's form: an accelerated residual trained to run ahead at a given rate.

    loss = mean over rows j of 1 - cos(p[j], y[R j]),  j = 0 .. (N - 1) / R

with y[j] the residual in front of row j's router and p[j] the accelerated one (``predict.Accelerated``), made of the
residuals x[j] that enter the rows: the per-layer alignment term of arXiv 2502.02040, on answer positions, base frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.experts.layers import moe_layers
from specdec.experts.predict import Accelerated
from specdec.kernels import rms_unit
from specdec.train.data import Answer
from specdec.train.expert_leaps import observe

RANK = 32
LEARNING_RATE, WARMUP = 2e-3, 20  # peak, and steps until it is reached
STEPS = 4  # gradient steps on a text, each on a part of its positions


def accelerate(x: Sequence[Tensor], down: Tensor, up: Tensor) -> list[Tensor]:
    """Residuals x[j] [T, D] -> accelerated ones p[j] [T, D]; down [n, r, D], up [n, D, r], for the first n rows."""
    p, out = x[0], []
    for j, (a, b) in enumerate(zip(down, up, strict=True)):
        p = p + (x[j] - x[j - 1]) if j else p
        p = p + F.linear(F.linear(rms_unit(p), a), b)
        out.append(p)
    return out


def misalignment(x: Sequence[Tensor], y: Sequence[Tensor], down: Tensor, up: Tensor, rate: int) -> Tensor:
    """The loss above, of residuals x[j], y[j] [T, D]."""
    ahead = accelerate(x, down, up)
    return torch.stack([1 - F.cosine_similarity(p, y[rate * j], -1).mean() for j, p in enumerate(ahead)]).mean()


def fit_expert_adapters(
    model: PreTrainedModel,
    answers: Sequence[Answer],
    rate: int,
    epochs: int = 1,
    progress: Callable[[int, float], None] | None = None,
) -> Accelerated:
    """Train adapters of ``model``, whose experts are in memory or offloaded, on its own answers.

    progress: told the texts seen, and the smoothed loss.
    """
    layers, width = moe_layers(model), model.config.hidden_size
    count, generator = (len(layers) - 1) // rate + 1, torch.Generator().manual_seed(0)
    down = nn.Parameter(torch.randn(count, RANK, width, generator=generator) / width**0.5)
    up = nn.Parameter(torch.zeros(count, width, RANK))
    optimizer = torch.optim.AdamW([down, up], lr=LEARNING_RATE, weight_decay=0.0)
    order = [int(i) for _ in range(epochs) for i in torch.randperm(len(answers), generator=generator)]
    steps, smooth = STEPS * len(order), None
    shape = lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / steps)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    for number, text in enumerate(order, start=1):
        seen, begin = observe(model, layers, answers[text]), len(answers[text].prompt_ids) - 1
        x, y = (torch.stack([r[begin:].float() for r in each]).clone() for each in (seen.entering, seen.middle))
        for part in torch.randperm(x.shape[1], generator=generator).tensor_split(STEPS):
            if len(part):
                loss = misalignment(x[:, part].unbind(), y[:, part].unbind(), down, up, rate)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
            schedule.step()
        if progress is not None:
            progress(number, smooth or 0.0)
    return Accelerated(layers, rate, down.detach(), up.detach())
