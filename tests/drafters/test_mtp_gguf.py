"""The layer for multi-token prediction in a GGUF file drafts what its safetensors form drafts, by the name alone."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from targets import needs_native
from tiny import model_of, rough_model, save_native, sizes_of, tamed
from tiny_gguf import write_family
from typer.testing import CliRunner
from zoo import watched

from specdec import SpecDecError, SpecDecoder, cli
from specdec.base.errors import SpecDecWarning
from specdec.models import names
from specdec.models.gguf.blocks import BlockLinear, Blocks
from specdec.models.prediction_layer import FORMATS, find, read
from specdec.speculation.draft import Draft

QWEN, N = FORMATS[0], 4
GGUF = {QWEN.token_norm: "enorm", QWEN.state_norm: "hnorm", QWEN.projection: "eh_proj", QWEN.norm: "shared_head_norm"}
PROMPTS = [[*range(5, 12)], [*range(20, 60)], [33, 34, 33, 34, 33], [7]]


class Made(NamedTuple):
    """A model, its prediction layer as a model of one layer, and the tensors around that by their safetensors names."""

    model: Any
    layer: Any
    around: dict[str, torch.Tensor]

    @property
    def nextn(self) -> dict[str, np.ndarray]:
        """The tensors around the layer, as in a GGUF file."""
        found = {}
        for name, tensor in self.around.items():
            values = tensor.float() + (name != QWEN.projection)  # norms there are factors
            found[f"blk.{N}.nextn.{GGUF[name]}.weight"] = values.numpy()
        return found


def made(family: str = "qwen3_5_text", **changes: Any) -> Made:
    sizes = sizes_of(family) | {"vocab_size": 100, "eos_token_id": None, "max_position_embeddings": 512} | changes
    model = tamed(rough_model(family, **sizes)).bfloat16()
    own = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    layer = tamed(rough_model(family, **(sizes | own))).bfloat16()
    torch.manual_seed(5)
    width = model.config.hidden_size
    around = {part: 0.3 * torch.randn(width) for part in (QWEN.token_norm, QWEN.state_norm)}
    around |= {QWEN.projection: 0.3 * torch.randn(width, 2 * width), QWEN.norm: layer.model.norm.weight.detach()}
    return Made(model, layer, {name: tensor.bfloat16() for name, tensor in around.items()})


def to_gguf(path: Path, given: Made, kind: str = "BF16", **more: Any) -> Path:
    return write_family(path, given.model, kind, predicts=given.layer, **({"tensors": given.nextn} | more))


def to_safetensors(folder: Path, given: Made) -> Path:
    """The same checkpoint as its authors publish it, with the tokenizer of another tiny model."""
    kind, config = given.model.config.model_type, given.model.config
    save_native(folder, kind)
    given.model.save_pretrained(folder)
    own = {key.partition("layers.0."): value for key, value in given.layer.state_dict().items()}
    tensors = dict(given.model.state_dict())
    tensors |= {f"mtp.layers.0.{part}": value.clone() for (_, found, part), value in own.items() if found}
    tensors |= {f"mtp.{name}.weight": value.clone() for name, value in given.around.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert config.num_hidden_layers == N
    return folder


def decoder(path: Path, **more: Any) -> SpecDecoder:
    return SpecDecoder.from_pretrained(path, **more)


def texts(own: SpecDecoder, count: int = 24, **more: Any) -> list[list[int]]:
    outputs = own.generate_batch(PROMPTS, max_new_tokens=count, ignore_eos=True, **more)
    return [output.token_ids for output in outputs]


Seen = list[tuple[list[list[int]], Draft]]


def drafts(own: SpecDecoder, **more: Any) -> tuple[list[list[int]], dict[tuple[int, ...], list[int]]]:
    """Texts, and what was drafted after which text."""
    seen: Seen = watched(own.drafter)
    out = texts(own, num_speculative_tokens=3, **more)
    return out, {tuple(ids): row for rows, each in seen for ids, row in zip(rows, each.lists(), strict=True)}


FAMILIES = ["qwen3_5_text", "qwen3_next", "qwen3_5_moe_text"]


@needs_native
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_drafts_what_its_safetensors_form_drafts(cache: Path, tmp_path: Path, family: str) -> None:
    given = made(family)
    from_gguf = decoder(to_gguf(tmp_path / "it.gguf", given), drafter="mtp")
    from_folder = decoder(to_safetensors(tmp_path / "folder", given), drafter="mtp")
    assert from_gguf.target.runtime == from_folder.target.runtime == "native"
    assert all(type(each.drafter.head.draft_target) is type(each.target) for each in (from_gguf, from_folder))
    (out, found), (other, expected) = drafts(from_gguf), drafts(from_folder)
    assert out == other == texts(from_gguf.with_drafter("none"))
    assert found == expected and sum(map(len, found.values())) > 50


@needs_native
@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_0"])
def test_by_name_alone_it_is_joined_with_n_grams(cache: Path, tmp_path: Path, kind: str) -> None:
    own = decoder(to_gguf(tmp_path / "it.gguf", made(), kind))
    assert own.drafter.traits.label == "ngram+mtp" and own.drafter.traits.has_probabilities
    plain = own.with_drafter("none")
    assert texts(own) == texts(plain)
    assert texts(own, temperature=0.8, seed=3) == texts(plain, temperature=0.8, seed=3)
    linear = own.drafter.other.head.draft_target.model.model.layers[0].mlp.up_proj
    assert isinstance(linear, BlockLinear) == (kind != "BF16")
    row = json.loads(CliRunner().invoke(cli.app, ["models", "--json"]).stdout)[-1]
    assert row["name"].endswith("it.gguf") and row["drafters"] == ["mtp"]


@needs_native
def test_a_folder_by_name_alone_drafts_too(cache: Path, tmp_path: Path) -> None:
    own = decoder(to_safetensors(tmp_path / "folder", made()))
    assert own.drafter.traits.label == "ngram+mtp" and own.drafter.other.head.draft_target.runtime == "native"
    assert texts(own) == texts(own.with_drafter("none"))


@needs_native
def test_a_process_that_ends_at_once(cache: Path, tmp_path: Path) -> None:
    path = to_gguf(tmp_path / "it.gguf", made())
    load = f"from specdec import SpecDecoder; decoder = SpecDecoder.from_pretrained({str(path)!r})"
    request = "decoder.request('AB', max_new_tokens=400, ignore_eos=True)"
    for code in (load, f"{load}; engine = decoder.engine(); next(iter(engine.submit({request})))"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@needs_native
def test_a_run_says_what_drafts(cache: Path, tmp_path: Path) -> None:
    path = to_gguf(tmp_path / "it.gguf", made())
    done = CliRunner().invoke(cli.app, ["generate", "AB", "--model", str(path), "--max-new-tokens", "8"])
    assert done.exit_code == 0 and "drafter: ngram+mtp" in done.output, done.output


@needs_native
def test_the_projection_stays_in_its_blocks(cache: Path, tmp_path: Path) -> None:
    given = made()
    packed = gguf.quants.quantize(given.around[QWEN.projection].float().numpy(), gguf.GGMLQuantizationType.Q8_0)
    name = f"blk.{N}.nextn.eh_proj.weight"
    path = write_family(
        tmp_path / "it.gguf", given.model, "Q8_0", predicts=given.layer, tensors=given.nextn, in_blocks={name: packed}
    )
    own = decoder(path)
    found = find(own.model)
    assert found is not None and isinstance(read(own.model, found).projection, Blocks)
    assert own.drafter.traits.label == "ngram+mtp" and texts(own) == texts(own.with_drafter("none"))


@pytest.mark.parametrize("runtime", ["torch", "transformers"])
def test_other_runtimes_run_the_layer_in_float32(cache: Path, tmp_path: Path, runtime: str) -> None:
    own = decoder(to_gguf(tmp_path / "it.gguf", made()), runtime=runtime, dtype="float32", device="cpu")
    assert own.drafter.traits.label == "ngram+mtp"
    assert type(own.drafter.other.head.draft_target) is type(own.target)
    assert texts(own) == texts(own.with_drafter("none"))


@needs_native
def test_rows_that_do_not_draft_and_a_long_text(cache: Path, tmp_path: Path) -> None:
    own = decoder(to_gguf(tmp_path / "it.gguf", made()))
    plain = own.with_drafter("none")
    prompts = [[3 + n % 90 for n in range(400)], [*range(5, 30)], [9]]

    def run(each: SpecDecoder) -> list[list[int]]:
        depths = 0, None, 2
        made = [
            each.request(torch.tensor([ids]), max_new_tokens=30, ignore_eos=True, num_speculative_tokens=depth)
            for ids, depth in zip(prompts, depths, strict=True)
        ]
        engine = each.stepped_engine()
        for request in made:
            engine.submit(request)
        for _ in engine.steps():
            pass
        return [request.ids for request in made]

    assert run(own) == run(plain)


DAMAGED: dict[str, Callable[[dict[str, np.ndarray]], None]] = {
    "'blk.4.nextn.eh_proj' is F32 (64, 64), not (64, 128)": lambda found: found.update(
        {f"blk.{N}.nextn.eh_proj.weight": np.zeros((64, 64), np.float32)}
    ),
    "'blk.4.nextn.enorm' is missing": lambda found: found.pop(f"blk.{N}.nextn.enorm.weight"),
    "'blk.4.nextn.hnorm' is F32 (32,), not (64,)": lambda found: found.update(
        {f"blk.{N}.nextn.hnorm.weight": np.zeros(32, np.float32)}
    ),
    "infinite or NaN": lambda found: found[f"blk.{N}.nextn.eh_proj.weight"].__setitem__(0, np.nan),
    "tensors of type I32, which cannot be read": lambda found: found.update(
        {f"blk.{N}.nextn.eh_proj.weight": np.zeros((64, 128), np.int32)}
    ),
    "tensors that do not belong": lambda found: found.update({f"blk.{N}.other.weight": np.zeros(32, np.float32)}),
}


@needs_native
@pytest.mark.parametrize("why", DAMAGED)
def test_a_layer_that_does_not_fit_is_left_out_with_one_line(cache: Path, tmp_path: Path, why: str) -> None:
    given = made()
    found = given.nextn
    DAMAGED[why](found)
    path = to_gguf(tmp_path / "it.gguf", given, tensors=found)
    with pytest.warns(SpecDecWarning, match=f"(?s){re.escape(why)}.*it does not draft") as warned:
        own = decoder(path)
    assert all("\n" not in str(each.message) for each in warned)
    assert own.drafter.traits.label == "ngram+m2r2" and texts(own) == texts(own.with_drafter("none"))
    with pytest.raises(SpecDecError, match=re.escape(why)):
        decoder(path, drafter="mtp")


@needs_native
def test_a_layer_without_a_matrix_is_left_out(cache: Path, tmp_path: Path) -> None:
    """Also without the tensor by which layers are counted."""
    given = made()
    for part in ("self_attn.o_proj", "mlp.up_proj"):
        other = Made(given.model, model_of("qwen3_5_text", num_hidden_layers=1, layer_types=["full_attention"]), {})
        where, _, leaf = part.rpartition(".")
        del getattr(other.layer.model.layers[0], where)._modules[leaf]
        path = to_gguf(tmp_path / f"{leaf}.gguf", other, tensors=given.nextn)
        with pytest.warns(SpecDecWarning, match="missing.*it does not draft"):
            own = decoder(path)
        assert own.drafter.traits.label == "ngram+m2r2"


@needs_native
def test_a_companion_file_beside_the_model_has_the_layer(cache: Path, tmp_path: Path) -> None:
    given = made()
    whole = to_gguf(tmp_path / "whole.gguf", given)
    folder = tmp_path / "models"
    folder.mkdir()
    path = write_family(folder / "Tiny-4B-BF16.gguf", given.model, "BF16")
    assert decoder(folder).drafter.traits.label == "ngram+m2r2"
    beside = to_gguf(folder / "mtp-Tiny-4B-Q8_0.gguf", given, apart=True)
    to_gguf(folder / "mtp-Tiny-4B-BF16.gguf", made(hidden_size=128), apart=True)  # of another size
    assert names.gguf_in(folder) == path and names.companions(path)[-1] == beside
    own = decoder(folder)
    assert own.drafter.traits.label == "ngram+mtp"
    expected = drafts(decoder(whole, drafter="mtp"))
    assert drafts(own.with_drafter("mtp")) == drafts(own.with_drafter(f"mtp={beside}")) == expected


def test_names_of_companions(tmp_path: Path) -> None:
    model = tmp_path / "Qwen3.5-4B-Q4_K_M.gguf"
    for name in ("mtp-Qwen3.5-4B-BF16", "mtp-Qwen3.5-4B", "mtp-Qwen3.5-9B", "mtp-Qwen3.5-4B-Q4_K_M", "mtp-", "Qwen3.5"):
        (tmp_path / f"{name}.gguf").touch()
    found = [path.stem for path in names.companions(model)]
    assert found == ["mtp-Qwen3.5-4B-BF16", "mtp-Qwen3.5-4B-Q4_K_M", "mtp-Qwen3.5-4B"]
