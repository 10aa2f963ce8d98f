"""``SpecGenerate``: what ``model.generate`` returns with the engine is what it returns without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from tiny import save_tiny, tiny_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from specdec.base.errors import SpecDecError
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.integrations.transformers import SpecGenerate

ROWS = [[5, 6, 7, 8, 5, 6], [9, 10, 11], [3, 4, 3, 4, 3, 4, 3]]


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def pair(model: Any, rows: list[list[int]], spec: SpecGenerate | None = None, **given: Any) -> tuple[Any, Any]:
    """What the call returns without the engine, and with it."""
    inputs = padded(rows)
    given = {"max_new_tokens": 20, "do_sample": False, **given}
    spec = spec or SpecGenerate("prompt-lookup", num_speculative_tokens=3)
    return model.generate(**inputs, **given), model.generate(**inputs, **given, custom_generate=spec)


@pytest.mark.parametrize(("family", "rows"), [("llama", 1), ("gpt2", 3)])
def test_greedy_tensors_are_equal(family: str, rows: int) -> None:
    """(Of every family: test_drafters_matrix.)"""
    plain, ours = pair(tiny_model(family), ROWS[:rows])
    assert torch.equal(plain, ours)


class NoMore(LogitsProcessor):
    """Of a caller: forbids in each row of the call another token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for b in range(len(scores)):
            scores[b, (input_ids[b, -1] + b) % scores.shape[1]] = -torch.inf
            scores[b, 30 + b] = 9.0 if len(input_ids[0]) % 3 == 0 else scores[b, 30 + b]
        return scores


class After(StoppingCriteria):
    """Ends rows at different lengths."""

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        return torch.tensor([input_ids.shape[1] >= 12 + 2 * b for b in range(len(input_ids))])


def own_row(b: int, ids: Tensor) -> list[int]:
    assert str(ROWS[b])[1:-1] in str(ids.tolist()), "the text is of another row"
    return [10 + b, 20 + b, 30 + len(ids) % 5]


OPTIONS: dict[str, dict[str, Any]] = {
    "max_length": {"max_new_tokens": None, "max_length": 15},
    "repetition penalty": {"repetition_penalty": 1.5},
    "encoder repetition penalty": {"encoder_repetition_penalty": 2.0},
    "n-grams": {"no_repeat_ngram_size": 2},
    "n-grams of the prompt": {"encoder_no_repeat_ngram_size": 2},
    "least new tokens": {"min_new_tokens": 9, "eos_token_id": list(range(2, 60))},
    "many ends": {"eos_token_id": list(range(2, 20))},
    "no end": {"eos_token_id": None},
    "prefix function": {"prefix_allowed_tokens_fn": lambda b, ids: [10 + b, 20 + b, 30 + len(ids) % 5]},
    "prefix function with a state of each row": {"prefix_allowed_tokens_fn": lambda b, ids: own_row(b, ids)},
    "own processor": {"logits_processor": [NoMore()]},
    "own criterion": {"stopping_criteria": StoppingCriteriaList([After()])},
    "own criterion, no end": {"stopping_criteria": StoppingCriteriaList([After()]), "eos_token_id": -1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_honoured(name: str) -> None:
    plain, ours = pair(tiny_model(), ROWS, **OPTIONS[name], return_dict_in_generate=True)
    assert isinstance(ours, GenerateDecoderOnlyOutput) and torch.equal(plain.sequences, ours.sequences)


@pytest.mark.parametrize("drafter", ["prompt-lookup", PromptLookupDrafter()])
def test_drafts_are_accepted_and_the_first_call_says_what_it_prepares(drafter, capsys) -> None:
    model, spec = tiny_model(), SpecGenerate(drafter, num_speculative_tokens=3)
    given = {"max_new_tokens": 60, "do_sample": False, "custom_generate": spec}
    model.generate(torch.tensor([[5, 6] * 8]), **given)
    assert spec.metrics[0].num_accepted_draft_tokens > 0
    [line] = capsys.readouterr().err.splitlines()
    assert "preparing the llama model for drafter 'prompt-lookup'" in line
    model.generate(torch.tensor([[5, 6] * 8]), **given)
    assert not capsys.readouterr().err


def test_a_model_in_training_stays_so_and_its_new_weights_are_used() -> None:
    model, spec = tiny_model(), SpecGenerate("prompt-lookup")
    model.train()
    model.lm_head.eval()
    for _ in range(2):
        ours = model.generate(**padded(ROWS), do_sample=False, max_new_tokens=12, custom_generate=spec)
        assert model.training and model.model.layers[0].training and not model.lm_head.training
        assert torch.equal(ours, model.generate(**padded(ROWS), do_sample=False, max_new_tokens=12))
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(-2)


def sampled(model: Any, rows: list[list[int]] = ROWS, **given: Any) -> Tensor:
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "max_new_tokens": 12}
    spec = SpecGenerate("prompt-lookup", num_speculative_tokens=given.pop("depth", 3))
    return model.generate(**padded(rows), **{**options, **given}, custom_generate=spec)


def test_samples_follow_the_seed() -> None:
    model = tiny_model()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(sampled(model))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    before = torch.random.get_rng_state()
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    made = [sampled(model, generator=seed, depth=depth) for seed, depth in zip(seeds, (3, 1), strict=True)]
    assert torch.equal(*made) and torch.equal(before, torch.random.get_rng_state())


def test_samples_have_the_models_distribution() -> None:
    model, count = tiny_model(), 400
    with torch.no_grad():
        logits = model(torch.tensor(ROWS[:1])).logits[0, -1] / 0.5
    kept = logits >= logits.topk(4).values[-1]
    expected = logits.masked_fill(~kept, -torch.inf).softmax(0)[kept] * count
    torch.manual_seed(0)
    how = {"temperature": 0.5, "top_k": 4, "top_p": 1.0, "min_p": 0.0, "max_new_tokens": 1}
    out = sampled(model, ROWS[:1], num_return_sequences=count, **how)
    found = torch.bincount(out[:, -1], minlength=len(kept))
    assert found[~kept].sum() == 0
    assert ((found[kept] - expected) ** 2 / expected).sum() < 21.1  # chi-square, 3 degrees of freedom, 1e-4


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.put_: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.put_.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_the_prompt_and_each_token() -> None:
    model, ours, theirs = tiny_model(), Heard(), Heard()
    inputs = {**padded(ROWS[:1]), "max_new_tokens": 12, "do_sample": False}
    model.generate(**inputs, streamer=theirs)
    model.generate(**inputs, custom_generate=SpecGenerate("prompt-lookup", streamer=ours))
    assert ours.put_ == theirs.put_ and ours.ended == theirs.ended == 1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"num_beams": 2}, "cannot do beam search"),
        ({"prompt_lookup_num_tokens": 3}, "cannot do assisted generation"),
        ({"return_dict_in_generate": True, "output_scores": True}, "does not support output_scores"),
        ({"guidance_scale": 1.5}, "UnbatchedClassifierFree.* has a state"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "row 0 of attention_mask masks tokens after its first"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, "row 0 of attention_mask masks every token"),
        ({"position_ids": torch.tensor([[4, 5, 6]])}, "leave position_ids out"),
        ({"max_new_tokens": 500}, "may be 503 tokens, more than the model's context of 128"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(given: dict[str, Any], text: str) -> None:
    asked = {"max_new_tokens": 4, "do_sample": False, **given}
    with pytest.raises(SpecDecError, match=text):
        tiny_model().generate(torch.tensor([[5, 6, 7]]), **asked, custom_generate=SpecGenerate("prompt-lookup"))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"drafter": "nope"}, "unknown drafter 'nope'"),
        ({"runtme": "native"}, "SpecGenerate takes no 'runtme' .did you mean 'runtime'"),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens must be"),
        ({"stop_strings": ["x"]}, "stop_strings need a tokenizer"),
    ],
)
def test_wrong_settings_are_refused(given: dict[str, Any], text: str) -> None:
    with refused(text):
        spec = SpecGenerate(**{"drafter": "prompt-lookup"} | given)
        tiny_model().generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False, custom_generate=spec)


def test_encoder_decoder_models_are_refused() -> None:
    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1))
    with pytest.raises(SpecDecError, match="cannot run encoder-decoder models"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, custom_generate=SpecGenerate("prompt-lookup"))


def test_stop_strings_end_a_row(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = {**tokenizer("abcabc", return_tensors="pt"), "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    stop = tokenizer.decode(model.generate(**inputs)[0, 10:12])
    expected = model.generate(**inputs, stop_strings=[stop], tokenizer=tokenizer)
    spec = SpecGenerate("prompt-lookup", tokenizer=tokenizer, stop_strings=stop)
    assert torch.equal(model.generate(**inputs, custom_generate=spec), expected)
    assert expected.shape[1] < 6 + 16


def test_one_object_serves_one_model_after_another() -> None:
    spec = SpecGenerate("prompt-lookup", num_speculative_tokens=2)
    for family in ("llama", "gpt2", "llama"):
        plain, ours = pair(tiny_model(family), ROWS[:1], spec)
        assert torch.equal(plain, ours)
