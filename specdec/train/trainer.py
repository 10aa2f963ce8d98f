"""``train``: prompts in, a drafter folder out; every stage resumes where a killed run stopped.

Stages: the base answers the prompts (unless they come answered), its states are computed once, what has a closed form
is fitted, then gradients take over (``specdec.train.run``). The base stays frozen, and only answer positions count.
Knows no drafter: what is trained is a ``TrainingMethod``.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from specdec.api.decoder import SpecDecoder
from specdec.base.errors import SpecDecError
from specdec.base.terminal import stderr
from specdec.models import device, drafter_folder, generation_config, loading
from specdec.train import data, states
from specdec.train.answers import AnswerSampling, answer_prompts, encode_prompts
from specdec.train.data import Prompt, TrainingAnswer
from specdec.train.method import Work, lookup
from specdec.train.output import STATES, open_output
from specdec.train.run import TrainingRun, progress_bars
from specdec.train.runtime import check_memory, keep_freed_memory, training_target
from specdec.train.settings import TrainSettings
from specdec.train.world import World, join


def train(settings: TrainSettings, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Train, write the best drafter to ``settings.output`` and return its figures on held-out answers.

    Raises SpecDecError for unusable settings, prompts, models and folders, for a full disk and for a loss that is not a
    number any more; what was computed stays, and ``resume`` continues from it.
    """
    if not settings.prompts and not settings.text:
        raise SpecDecError("nothing to train on; give --prompts FILE or --text FILE")
    with join(str(device.find_device(settings.device))) as world:
        if settings.rows < world.size:
            raise SpecDecError(f"{world.size} processes cannot share batches of {settings.rows} rows; raise 'rows'")
        with world.after_the_first():  # the others find on the disk what the first one computes
            run = _prepare(settings, resume or not world.first, console or stderr(), world)
        return run.train(resume)


def _prepare(settings: TrainSettings, resume: bool, console: Console, world: World) -> TrainingRun:
    """Everything that comes before gradients; what is on the disk already is read."""
    # What can be checked without the model comes first.
    items = data.read([Path(p) for p in settings.prompts]) if settings.prompts else []
    texts = data.read_texts([Path(p) for p in settings.text])
    held = data.read([Path(p) for p in settings.holdout]) if settings.holdout else []
    output = open_output(settings, resume)
    keep_freed_memory()
    fits = partial(check_memory, settings.model, dtype=settings.dtype, device=torch.device(world.device))
    model, tokenizer = loading.load(settings.model, dtype=settings.dtype, device=world.device, check=fits)
    decoder = SpecDecoder(model, tokenizer, drafter="none")  # as users run it: training dequantises the model
    target = training_target(model)
    if settings.init:
        drafter_folder.check_base(drafter_folder.read_config(Path(settings.init)), target, settings.init)
    method = lookup(settings.method)(settings, target)
    data.refuse_foreign(items, target.vocab_size)
    encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # noqa: E731
    data.refuse_other_tokens(items, tokenizer.decode, encode, _turn(tokenizer))
    data.refuse_held_out(items, held, tokenizer.decode)
    data.refuse_held_out([Prompt((text,)) for text in texts], held, tokenizer.decode, "text")
    with progress_bars(console) as progress:
        prompts = encode_prompts(tokenizer, items, settings.model)
        sampling = AnswerSampling(settings.sampled, settings.temperature, settings.seed)
        answers = answer_prompts(output, decoder, prompts, settings.max_new_tokens, sampling, progress)
        usable = [a for a in answers if len(a) <= target.context and len(a.response_ids) > 1]
        train, held_out = _split(settings, usable, _pieces(settings, texts, tokenizer, target.context))
        vocab = None
        if settings.draft_vocab:
            ends = sorted(generation_config.eos_token_ids(model, tokenizer))
            vocab = data.draft_vocabulary(train, settings.draft_vocab, ends, target.vocab_size).to(target.device)
        method.prepare(Work(output, train, held_out, vocab, decoder, console, progress))
        records = [
            states.compute(output / STATES / name, target, part, method.wanted(), progress, name)
            for name, part in (("eval", held_out), ("train", train))
        ]
    return TrainingRun(method, vocab, records[1], records[0], output, decoder, console, world)


def _turn(tokenizer: Any) -> str:
    """What the chat template has between a user's text and the answer; empty if there is no template."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    mark = "specdec"
    messages = [{"role": "user", "content": mark}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text.rpartition(mark)[2].strip()


def _pieces(settings: TrainSettings, texts: list[str], tokenizer: Any, context: int) -> list[TrainingAnswer]:
    """Plain texts, cut to what is trained on."""
    ids = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
    return [piece for part in ids for piece in data.pieces(part, min(settings.text_tokens, context))]


def _split(
    settings: TrainSettings, answers: list[TrainingAnswer], texts: list[TrainingAnswer]
) -> tuple[list[TrainingAnswer], list[TrainingAnswer]]:
    """Answers and texts to train on, shuffled, and those held out: answers if there are any, as they are drafted."""
    train, held_out = data.split(answers or texts, settings.eval_fraction)
    train += texts if answers else []
    random.Random(settings.seed).shuffle(train)
    return train, held_out[: settings.eval_answers]
