"""SpecDecoder: what comes in, what comes out, and what is refused."""

import gc
import weakref

import pytest
import torch
from refusals import refused
from tiny import greedy_reference, save_tiny, tiny_model
from tiny_tokenizers import Letters
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdec import Request, SpecDecError, SpecDecoder
from specdec.models import drafter_folder, loading, source

PROMPT = [5, 6, 7, 8]


@pytest.fixture
def decoder(llama: PreTrainedModel) -> SpecDecoder:
    return SpecDecoder(llama, Letters(), drafter="prompt-lookup")


def test_generate_returns_tokens_text_reason_and_consistent_figures(llama, decoder: SpecDecoder) -> None:
    out = decoder.generate(PROMPT, max_new_tokens=30)
    assert out.token_ids == greedy_reference(llama, PROMPT, 30)
    assert out.text == Letters().decode(out.token_ids) and out.finish_reason == "length"
    m = out.metrics
    assert m.num_new_tokens == 30 == 1 + m.num_spec_steps + m.num_accepted_draft_tokens
    assert m.mean_acceptance_length == pytest.approx(29 / m.num_spec_steps)
    assert m.draft_acceptance_rate == pytest.approx(m.num_accepted_draft_tokens / m.num_draft_tokens)
    assert sum(m.acceptance_histogram) == m.num_spec_steps
    assert sum(n * c for n, c in enumerate(m.acceptance_histogram)) == m.num_accepted_draft_tokens
    assert m.prefill_seconds > 0 and m.decode_seconds > 0
    assert m.tokens_per_second == pytest.approx(29 / m.decode_seconds)
    assert sum(m.phases.values()) == pytest.approx(m.prefill_seconds + m.decode_seconds)


def test_the_pieces_of_a_batch_are_the_whole_texts(decoder: SpecDecoder) -> None:
    """Where a row begins while another one runs, its prompt and its first draft are a part of one step."""
    prompts = [PROMPT, PROMPT[:2], PROMPT]
    with decoder.open(prompts, max_new_tokens=30, num_speculative_tokens=2, max_rows=2) as generation:
        texts = ["".join(pieces) for pieces in zip(*generation, strict=True)]
        assert texts == [out.text for out in generation.outputs()]
    with decoder.open(prompts, max_new_tokens=30, num_speculative_tokens=2, max_rows=2) as generation:
        assert all(len(dict(events)) == len(events) for events in generation.steps())


def test_closing_a_stream_early_frees_its_cache_and_the_decoder(decoder: SpecDecoder) -> None:
    stream = decoder.stream(PROMPT, max_new_tokens=60)
    next(stream)
    cache = weakref.ref(stream.gi_frame.f_locals["generation"].engine.batch.cache)  # type: ignore[attr-defined]
    with pytest.raises(SpecDecError, match="still open"):
        decoder.generate(PROMPT)
    stream.close()  # type: ignore[attr-defined]
    gc.collect()
    assert cache() is None
    assert len(decoder.generate(PROMPT, max_new_tokens=3).token_ids) == 3


WRONG: dict[str, list[object]] = {
    "max_new_tokens": [2.5, "8", None, True, 0, -1],
    "num_speculative_tokens": ["many", -1, 2.5, None, True],
    "temperature": ["hot", None, True, -1, float("nan"), float("inf"), 10**400, torch.tensor([1.0, 2.0])],
    "top_k": [2.0, "5", None, -1],
    "top_p": ["x", None, 0, 1.5],
    "min_p": ["x", -0.1, 2],
    "repetition_penalty": ["x", 0, float("nan")],
    "frequency_penalty": ["x", 2.5, None, True],
    "presence_penalty": ["x", -2.5, None],
    "logit_bias": [5, {"5": 1}, {5: 101}, {-1: 1}, {5: "x"}, [(5, 1)]],
    "seed": [2**63, 2**70, -1, 1.5, "x"],
    "stop": [5, ["a", 5], None, b"a"],
    "apply_chat_template": [1, "yes"],
    "system": [5, ["a"]],
    "logits_processor": [5, [5], None],
    "ignore_eos": [1, None],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_refused_by_name(decoder: SpecDecoder, name: str) -> None:
    methods = {
        "generate": lambda **given: decoder.generate(PROMPT, **given),
        "generate_batch": lambda **given: decoder.generate_batch([PROMPT], **given),
        "stream": lambda **given: list(decoder.stream(PROMPT, **given)),
        "open": lambda **given: decoder.open([PROMPT], **given),
    }
    for value in WRONG[name]:
        for method in methods.values():
            with refused(rf"^{name}(\.\S+)? must be ") as caught:
                method(**{name: value})
            assert len(str(caught.value)) < 160
    assert decoder.generate(PROMPT, max_new_tokens=2).finish_reason == "length"  # nothing is left open


def test_wrong_prompts_are_refused_by_name(decoder: SpecDecoder) -> None:
    with pytest.raises(SpecDecError, match=r"^prompt must be text, token ids"):
        decoder.generate(None)  # type: ignore[arg-type]
    with pytest.raises(SpecDecError, match=r"^prompts\[1\] must be text, token ids .* got True"):
        decoder.generate_batch([PROMPT, True])  # type: ignore[list-item]
    for prompts in ("text", b"text", 5, None, iter([PROMPT])):
        with pytest.raises(SpecDecError, match=r"^prompts must be a list of prompts; got .*; use generate for one"):
            decoder.generate_batch(prompts)  # type: ignore[arg-type]
    rows = decoder.generate_batch(torch.tensor([PROMPT, PROMPT]), max_new_tokens=3)  # type: ignore[arg-type]
    assert len(rows) == 2 and rows[0].token_ids == rows[1].token_ids


def test_a_wrong_keyword_names_the_method_that_was_called(llama, decoder: SpecDecoder) -> None:
    calls = {
        "generate": lambda: decoder.generate(PROMPT, max_tokens=5),
        "generate_batch": lambda: decoder.generate_batch([PROMPT], max_tokens=5),
        "stream": lambda: decoder.stream(PROMPT, max_tokens=5),
        "open": lambda: decoder.open([PROMPT], max_tokens=5),  # type: ignore[call-arg]
    }
    for method, call in calls.items():
        with refused(rf"^SpecDecoder.{method} takes no 'max_tokens' .did you mean 'max_new_t"):
            call()
    with pytest.raises(SpecDecError, match=r"^SpecDecoder takes no 'drafters' \(did you mean 'drafter'\?\); it takes"):
        SpecDecoder(llama, drafters="none")  # type: ignore[call-arg]
    with pytest.raises(SpecDecError, match=r"from_pretrained takes no 'weight' \(did you mean 'weights'\?\); it takes"):
        SpecDecoder.from_pretrained("nowhere", weight="int8")
    with pytest.raises(SpecDecError, match=r"from_pretrained takes no 'model'.*; it takes name, drafter, "):
        SpecDecoder.from_pretrained(model="nowhere")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "smollm2-135m-instruct"}, "model must be a loaded model; SpecDecoder.from_pretrained loads one"),
        ({"drafter": 5}, "drafter must be a valid string or an instance of Path"),
        ({"drafter": ""}, "no drafter is named in ''"),
        ({"drafter": "+"}, r"no drafter is named in '\+'"),
        ({"drafter_options": {1: 2}}, "drafter_options.1 must be a valid string"),
        ({"weights": None}, "weights must be a valid string"),
        ({"verifier": 5}, "verifier must be a valid string or an instance of Verifier"),
        ({"expert_cache": "much"}, "expert_cache must be a valid number"),
    ],
)
def test_wrong_arguments_of_the_constructor_are_refused(llama, given: dict, message: str) -> None:
    with pytest.raises(SpecDecError, match=message):
        SpecDecoder(**{"model": llama, "drafter": "none"} | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": 5}, "name must be a valid string or an instance of PathLike; got 5"),
        ({"dtype": 32}, "dtype must be a valid string or an instance of dtype"),
        ({"device": 0}, "device must be a valid string or an instance of device"),
        ({"trust_remote_code": "yes"}, "trust_remote_code must be a valid boolean"),
        ({"drafter": "promt-lookup"}, "unknown drafter 'promt-lookup'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(monkeypatch, given: dict, message: str) -> None:
    monkeypatch.setattr(loading, "load", None)
    with pytest.raises(SpecDecError, match=message):
        SpecDecoder.from_pretrained(**given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_is_changed_in_place_is_refused(dtype: torch.dtype) -> None:
    """The decoder has packed copies of some weights, and keys and values that were made with the others."""
    model = tiny_model().to(dtype)
    decoder = SpecDecoder(model, drafter="prompt-lookup")
    decoder.generate(PROMPT, max_new_tokens=3)
    assert not decoder.model_changed
    torch.optim.SGD(model.parameters(), 0.1).step()  # without gradients it changes nothing
    decoder.generate(PROMPT, max_new_tokens=3)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    for call in (decoder.generate, decoder.with_drafter("none").generate):
        with pytest.raises(SpecDecError, match="the model's weights have changed since this SpecDecoder was made"):
            call(PROMPT, max_new_tokens=3)
    assert len(SpecDecoder(model, drafter="none").generate(PROMPT, max_new_tokens=3).token_ids) == 3


def test_padded_tensors_are_refused(llama: PreTrainedModel) -> None:
    tokenizer = Letters()
    decoder = SpecDecoder(llama, tokenizer, drafter="prompt-lookup")
    rows = torch.tensor([[50, 5, 6, 7], [5, 6, 7, 50]])
    decoder.generate_batch(rows, max_new_tokens=2)
    tokenizer.pad_token_id = 50  # type: ignore[attr-defined]
    for row in rows:
        with pytest.raises(SpecDecError, match="prompts has padding, which would be read as text"):
            decoder.generate_batch(torch.stack((row, torch.tensor([5, 6, 7, 8]))), max_new_tokens=2)
    tokenizer.pad_token_id = tokenizer.eos_token_id  # type: ignore[attr-defined]
    decoder.generate_batch(rows, max_new_tokens=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_peft_model_generates_as_it_does_itself(dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny_model().to(dtype)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.eval()
    assert SpecDecoder(adapted, drafter="none").generate(PROMPT, max_new_tokens=9).token_ids == greedy_reference(
        adapted, PROMPT, 9
    )
    prompts = peft.get_peft_model(tiny_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(SpecDecError, match="cannot run adapters that learn prompts"):
        SpecDecoder(prompts)


def test_vanishing_temperatures_are_greedy(decoder: SpecDecoder) -> None:
    greedy = decoder.generate(PROMPT, max_new_tokens=8).token_ids
    for temperature in (1e-40, 5e-324, 9e-6):
        assert decoder.generate(PROMPT, max_new_tokens=8, temperature=temperature).token_ids == greedy
    assert len(decoder.generate(PROMPT, max_new_tokens=8, temperature=1e-5).token_ids) == 8


def test_for_an_embedded_model_it_is_refused_before_the_download(monkeypatch) -> None:
    monkeypatch.setattr(source, "prepare_embedded", None)
    with pytest.raises(SpecDecError, match="no m2r2-paper drafter is shipped for this model"):
        SpecDecoder.from_pretrained("gemma3-270m", "m2r2-paper")


@pytest.mark.parametrize("drafter", ["medusa", "ngram+medusa"])
def test_a_trained_drafter_that_is_not_shipped_is_refused_before_the_weights(tmp_path, monkeypatch, drafter) -> None:
    name = str(save_tiny(tmp_path))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(SpecDecError, match=rf"shipped for this model; train one: specdec train .*{name}"):
        SpecDecoder.from_pretrained(name, drafter)
    monkeypatch.setattr(drafter_folder, "may_be_shipped", lambda drafter, config: True)
    with pytest.raises(SpecDecError, match="cannot load model"):  # the weights are needed to tell
        SpecDecoder.from_pretrained(name, drafter)


def test_the_automatic_device_is_a_gpu_where_there_is_one(monkeypatch) -> None:
    assert loading.find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(loading, "_try_out", lambda place, dtype: None)
    assert loading.find_device("auto").type == "cuda"
    asked = []

    def load(name: str, *, device: str, **more: object) -> None:
        asked.append(device)
        raise SpecDecError("enough")

    monkeypatch.setattr(loading, "load", load)
    for more in (
        {},
        {"weights": "int8"},
        {"kv_cache": "int8"},
        {"runtime": "native"},
        {"weights": "int8", "device": "cuda"},
    ):
        with pytest.raises(SpecDecError, match="enough"):
            SpecDecoder.from_pretrained("model", **more)
    assert asked == ["auto", "cpu", "cpu", "cpu", "cuda"]


def test_a_cuda_device_that_cannot_compute_is_passed_over(monkeypatch) -> None:
    def refuse(place: torch.device, dtype: object) -> None:
        if place.type == "cuda":
            raise SpecDecError("no kernel image")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(loading, "_try_out", refuse)
    assert loading.find_device("auto").type == "cpu"
    with pytest.raises(SpecDecError, match="no kernel image"):
        loading.find_device("cuda")


def test_an_engine_closes_at_the_end_of_a_with_block(llama) -> None:
    decoder = SpecDecoder(llama, drafter="prompt-lookup")
    with decoder.engine() as engine:
        assert [event.tokens for event in engine.submit(Request(PROMPT, 2))] and not engine.closed
        with pytest.raises(SpecDecError, match="still open"):
            decoder.generate(PROMPT)
    assert engine.closed and decoder.generate(PROMPT, max_new_tokens=2).token_ids  # the drafter is free again


def test_another_drafter_takes_its_own_options(llama: PreTrainedModel) -> None:
    plain = SpecDecoder(llama, drafter="none")
    assert plain.with_drafter("prompt-lookup", {"continuations": 3}).drafter.continuations == 3
    with pytest.raises(SpecDecError, match="continuation"):
        plain.with_drafter("prompt-lookup", {"continuation": 3})
