"""A small second model for ``--drafter draft-model``: a few of a Llama's own layers, distilled for minutes.

    python examples/second_model.py --prompts answers.jsonl.gz --output small --minutes 20
    specdec generate "Why is the sky blue?" --drafter draft-model=small --compare

The base answers the prompts (unless they come answered), and the small model learns its next-token distribution on the
answers: KL(base || small). Embeddings, head and tokenizer are the base's own and stay as they are.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdec import SpecDecError, SpecDecoder
from specdec.models import loading
from specdec.models.catalogue import DEFAULT_MODEL
from specdec.train import data
from specdec.train.answers import AnswerSampling, answer_prompts, encode_prompts
from specdec.train.data import TrainingAnswer

ROWS, LENGTH = 4, 256  # answers of an update, and tokens of each that count


def shrink(base: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """A model of these layers of ``base``, in their order. Raises SpecDecError if it is no Llama or lacks them."""
    count = base.config.num_hidden_layers
    if base.config.model_type != "llama":
        raise SpecDecError(f"this recipe is for Llamas; the model is a '{base.config.model_type}'")
    if not layers or not 0 <= min(layers) <= max(layers) < count:
        raise SpecDecError(f"layers must be some of 0 .. {count - 1}; got {layers}")
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = len(layers)
    small = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    own = base.state_dict()
    tensors = {key: tensor for key, tensor in own.items() if ".layers." not in key}
    for place, layer in enumerate(layers):
        start = f"model.layers.{layer}."
        tensors |= {f"model.layers.{place}.{k[len(start) :]}": t for k, t in own.items() if k.startswith(start)}
    small.load_state_dict(tensors)
    return small


def loss(base: PreTrainedModel, small: PreTrainedModel, answers: list[TrainingAnswer]) -> tuple[Tensor, float]:
    """KL(base || small) per answer token, and the share of them on which the two agree."""
    rows = [[*a.prompt_ids, *a.response_ids][:LENGTH] for a in answers]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    counts = torch.zeros_like(ids, dtype=torch.bool)  # positions whose next token is the answer's
    for row, answer in enumerate(answers):
        counts[row, len(answer.prompt_ids) - 1 : len(rows[row]) - 1] = True
    with torch.no_grad():
        teacher = base.model(ids).last_hidden_state[counts]  # type: ignore[operator, union-attr]
        goal = base.lm_head(teacher).float().log_softmax(-1)  # type: ignore[operator]
    student = small.lm_head(small.model(ids).last_hidden_state[counts]).log_softmax(-1)  # type: ignore[operator, union-attr]
    agreement = (student.argmax(-1) == goal.argmax(-1)).float().mean()
    return F.kl_div(student, goal, log_target=True, reduction="batchmean"), float(agreement)


def distil(
    base: PreTrainedModel,
    small: PreTrainedModel,
    answers: list[TrainingAnswer],
    minutes: float,
    rate: float,
    progress: Progress,
) -> float:
    """Train ``small`` for ``minutes``; return its agreement with the base over the last updates."""
    trained = [p for name, p in small.named_parameters() if ".layers." in name or "norm" in name]
    small.requires_grad_(False).train()
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in trained], betas=(0.9, 0.98), weight_decay=0.0)
    task, draw = progress.add_task("distilling", total=1.0), random.Random(0)
    start, mean = time.monotonic(), 0.0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = rate * (1 - done)
        divergence, agreement = loss(base, small, draw.sample(answers, min(ROWS, len(answers))))
        optimizer.zero_grad()
        divergence.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        mean = agreement if not mean else 0.95 * mean + 0.05 * agreement
        text = f"distilling: KL {divergence.item():.3f}, agreement {mean:.3f}"
        progress.update(task, completed=done, description=text)
    return mean


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the base: name, Hugging Face id or folder of a Llama")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts or answers, as 'specdec train' takes them")
    parser.add_argument("--output", required=True, type=Path, help="folder of the small model")
    parser.add_argument("--layers", default="0,1,10,20,28,29", help="layers of the base that it is made of")
    parser.add_argument("--minutes", default=20.0, type=float)
    parser.add_argument("--learning-rate", default=5e-4, type=float)
    given = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        base, tokenizer = loading.load(given.model, dtype="auto")
        small = shrink(base.requires_grad_(False).eval(), [int(layer) for layer in given.layers.split(",")])
        given.output.mkdir(parents=True, exist_ok=True)
        with Progress(console=console) as progress:
            items = encode_prompts(tokenizer, data.read([given.prompts]), given.model)
            sampling = AnswerSampling(0.0, 1.0, 0)
            decoder = SpecDecoder(base, tokenizer, drafter="none")
            answers = answer_prompts(given.output, decoder, items, 128, sampling, progress)
            usable = [a for a in answers if len(a.prompt_ids) + 1 < LENGTH and a.response_ids]
            if not usable:
                raise SpecDecError(f"no answer begins within {LENGTH} tokens; give shorter prompts")
            agreement = distil(base, small, usable, given.minutes, given.learning_rate, progress)
        torch.nn.Module.to(small, base.dtype)
        small.save_pretrained(given.output)
        tokenizer.save_pretrained(given.output)
    except (SpecDecError, ValueError, OSError) as error:
        console.print(f"error: {' '.join(str(error).split())}", markup=False, soft_wrap=True)
        sys.exit(2)
    console.print(
        f"{given.output}: agreement {agreement:.3f}; use --drafter draft-model={given.output}", soft_wrap=True
    )


if __name__ == "__main__":
    main()
