"""Drafter folders are data: whole, checked, and refused with one clear line when they are not what they claim."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import zoo
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from specdec import SpecDecoder
from specdec.base.errors import SpecDecError
from specdec.drafters.m2r2 import M2R2, M2R2Path
from specdec.drafters.m2r2.network import load_network
from specdec.models import drafter_folder, identity
from specdec.models.gguf.blocks import BlockLinear, quantize
from specdec.models.identity import fingerprint
from specdec.runtimes.transformers import TransformersTarget

PATH = M2R2Path(1, ((2, 3),), True, 4, {2: ["self_attn.q_proj", "mlp.down_proj"]})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A drafter folder for the tiny llama."""
    target = TransformersTarget(tiny_model())
    network = M2R2(PATH, target, torch.arange(0, 50, dtype=torch.int32))
    config = {"drafter": "m2r2", "version": 1, "base": {"fingerprint": fingerprint(target.model)}}
    drafter_folder.write(tmp_path / "drafter", config | {"path": PATH.to_json()}, network.state_dict())
    return tmp_path / "drafter"


def change(folder: Path, **entries: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def test_a_folder_of_an_earlier_version_loads_alike(folder: Path) -> None:
    target = TransformersTarget(tiny_model())
    now, path = load_network(target, folder), PATH.to_json()
    change(folder, path={"final_leap": path.pop("final_projection"), **path})
    held = load_file(folder / "model.safetensors")
    save_file({n.replace("projections.", "leaps."): t for n, t in held.items()}, folder / "model.safetensors")
    before = load_network(target, folder)
    assert before.path == PATH and len(before.projections) == 2
    torch.testing.assert_close(before.state_dict(), now.state_dict(), rtol=0, atol=0)


def cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def tensors(folder: Path, **change: torch.Tensor) -> None:
    save_file(load_file(folder / "model.safetensors") | change, folder / "model.safetensors")


NAN, INF = torch.full((32, 96), torch.nan), torch.full((32,), torch.inf)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (cut_weights, "truncated"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"), "no safetensors file"),
        (lambda f: (f / "config.json").write_text("{"), "cannot read"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "does not describe a specdec drafter"),
        (lambda f: change(f, drafter="m2r3"), "did you mean 'm2r2'"),
        (lambda f: change(f, path={"exit_layer": 1}), "no valid M2R2 path"),
        (lambda f: change(f, path=PATH.to_json() | {"exit_layer": 9}), "does not fit a model of 4 layers"),
        (lambda f: change(f, path=PATH.to_json() | {"rank": 8}), "do not fit each other"),
        (lambda f: change(f, path=PATH.to_json() | {"adapters": {"2": ["mlp.experts"]}}), "does not have"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "nested too deeply"),
        (lambda f: (f / "config.json").write_text('{"drafter": "m2r2", "n": ' + "9" * 5000 + "}"), "cannot read"),
        (lambda f: (f / "config.json").write_text(" " * 5_000_000 + "{}"), "larger than 4 MB"),
        (lambda f: change(f, base=["x"]), "'base' is not a mapping"),
        (lambda f: change(f, path=PATH.to_json() | {"rank": 10**9}), "rank in .* to 512; got 1000000000"),
        (lambda f: change(f, path=PATH.to_json() | {"exit_layer": float("inf")}), "no valid M2R2 path"),
        (lambda f: change(f, router=10**9), "the router's width in .* to 512; got 1000000000"),
        (
            lambda f: tensors(f, **{"projections.0.weight": NAN}),
            "tensor 'projections.0.weight' in .* holds NaN or infinite",
        ),
        (lambda f: tensors(f, **{"projections.0.bias": INF}), "tensor 'projections.0.bias' in .* NaN or inf"),
        (
            lambda f: tensors(f, **{"projections.0.bias": torch.zeros(32, dtype=torch.int32)}),
            "of whole numbers; for this",
        ),
        (
            lambda f: tensors(f, **{"projections.0.bias": torch.zeros(32, dtype=torch.uint8)}),
            "is U8; it must be one of",
        ),
        (lambda f: tensors(f, draft_vocab=torch.zeros(5, 10, dtype=torch.int32)), "draft vocabulary .* is .5, 10. of"),
        (lambda f: tensors(f, draft_vocab=torch.zeros(98, dtype=torch.int32)), "must be a list of 1 .. 97 whole"),
        (lambda f: tensors(f, draft_vocab=torch.tensor([97])), "names tokens that the model does not have"),
    ],
)
def test_damaged_and_foreign_folders_are_refused_before_anything_is_allocated(
    folder: Path, damage, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    damage(folder)
    made = torch.randn
    bounded = lambda *size, **given: made(*size, **given) if max(size) < 10**6 else pytest.fail("allocated")  # noqa: E731
    monkeypatch.setattr(torch, "randn", bounded)
    with refused(message) as caught:
        SpecDecoder(model, drafter=folder)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["deed", "mixture-of-depths", "medusa", "public"])
def test_every_learned_drafter_is_bounded_and_finite(tmp_path: Path, name: str) -> None:
    target = TransformersTarget(tiny_model())
    networks = {"deed": zoo.heads(target, 1, 3), "mixture-of-depths": zoo.routers(target), "medusa": zoo.medusa(target)}
    network = getattr(networks.get(name), "network", networks.get(name))
    counts = {"deed": {"exits": [1, 3], "width": 8}, "mixture-of-depths": {"first": 1}}
    counts["medusa"] = {"heads": 3, "layers": 1}
    config = {"drafter": name, "base": {"fingerprint": target.fingerprint}, **counts.get(name, {})}
    if name == "public":
        config = {"medusa_num_heads": 1, "medusa_num_layers": 1}
        blocks = {"0.0.linear.weight": torch.zeros(32, 32), "0.0.linear.bias": torch.zeros(32)}
        drafter_folder.write(tmp_path, config, blocks | {"0.1.weight": torch.zeros(97, 32)})
        (tmp_path / "model.safetensors").rename(tmp_path / "medusa_lm_head.safetensors")
    else:
        drafter_folder.write(tmp_path, config, network.state_dict())
    kind = "medusa" if name == "public" else name
    SpecDecoder(target.model, drafter=f"{kind}={tmp_path}", runtime="transformers")
    key = {"deed": "width", "mixture-of-depths": "first", "medusa": "heads", "public": "medusa_num_heads"}[name]
    change(tmp_path, **{key: 10**9})
    with pytest.raises(SpecDecError, match=r"must be less than or equal to .*; got 1000000000"):
        SpecDecoder(target.model, drafter=f"{kind}={tmp_path}", runtime="transformers")
    change(tmp_path, **config)
    file = next(tmp_path.glob("*.safetensors"))
    stored = load_file(file)
    odd = next(key for key in stored if stored[key].is_floating_point())
    stored[odd].view(-1)[0] = torch.nan
    save_file(stored, file)
    with pytest.raises(SpecDecError, match=f"tensor '{odd}' in .* holds NaN or infinite values"):
        SpecDecoder(target.model, drafter=f"{kind}={tmp_path}", runtime="transformers")


def test_a_drafter_for_other_weights_is_refused_with_both_fingerprints(folder: Path) -> None:
    other = tiny_model("llama", hidden_act="gelu")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(0.1)
    with pytest.raises(SpecDecError) as caught:
        SpecDecoder(other, drafter=folder)
    assert fingerprint(tiny_model()) in str(caught.value) and fingerprint(other) in str(caught.value)


def test_a_full_disk_leaves_the_old_file_and_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "model.safetensors").read_bytes()

    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(SpecDecError, match="No space left on device"):
        drafter_folder.write(folder, {"drafter": "m2r2"}, {"x": torch.zeros(3)})
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_matrices_in_8_bits_are_read_as_matrices_within_half_a_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide, odd = torch.randn(40, 64) * torch.logspace(-6, 2, 40)[:, None], torch.randn(3, 20, 56)
    given = {"wide": wide, "odd": odd, "zero": torch.zeros(64, 64)}
    given |= {"bias": torch.randn(4096), "small": torch.ones(2, 2)}
    drafter_folder.write(tmp_path, {"drafter": "m2r2"}, given | {"ids": torch.arange(9)}, "int8")
    kept = load_file(tmp_path / "model.safetensors")
    assert kept["wide.codes"].dtype == torch.int8 and kept["wide.scales"].shape == (40, 2)
    assert kept["odd.scales"].shape == (3, 20, 1) and "wide" not in kept and "bias" in kept and "small" in kept
    read = drafter_folder.read_tensors(tmp_path)
    assert read.keys() == given.keys() | {"ids"} and torch.equal(read["zero"], torch.zeros(64, 64).bfloat16())
    assert all(torch.equal(read[name], given[name]) for name in ("bias", "small"))
    for name in ("wide", "odd"):
        groups = given[name].unflatten(-1, (kept[f"{name}.scales"].shape[-1], -1))
        most = groups.abs().amax(-1, keepdim=True).expand_as(groups).flatten(-2)
        assert bool(((read[name].float() - given[name]).abs() <= most / 254 + most / 256).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projections.0.weight.scales": None}, "'projections.0.weight' in .* 8-bit codes without scales that fit"),
        ({"projections.0.weight.scales": torch.ones(32, 5).bfloat16()}, "without scales that fit"),
        ({"projections.0.weight.codes": torch.ones(32, 96)}, "without scales that fit"),
        ({"projections.0.weight": torch.ones(32, 96)}, "is stored twice or"),
        ({"projections.0.weight.scales": torch.full((32, 3), 3e38).bfloat16()}, "holds NaN or inf"),
    ],
)
def test_codes_that_no_matrix_has_are_refused(folder: Path, change, message: str) -> None:
    drafter_folder.write(folder, drafter_folder.read_config(folder), drafter_folder.read_tensors(folder), "int8")
    kept = load_file(folder / "model.safetensors") | change
    save_file({name: value for name, value in kept.items() if value is not None}, folder / "model.safetensors")
    with refused(message):
        SpecDecoder(tiny_model(), drafter=folder)


def in_blocks(model, kind: str):
    """The model with the layers' matrices, of 32 inputs and more, in GGUF blocks."""
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, torch.nn.Linear) and module.in_features % 32 == 0:
                layer.set_submodule(name, BlockLinear(quantize(module.weight, kind), module.bias, module.weight.dtype))
    return model


def sampled(folder: Path, model) -> None:
    """Have the folder's drafter be one for ``model``, with samples."""
    base = {"fingerprint": fingerprint(model), "name": "the-base", "samples": identity.samples(model)}
    change(folder, base=base)


def perturbed(model, part: float):
    """The model after training moved its weights by ``part`` of their size."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * part)
    return model


FORMS = {
    "float32": lambda: tiny_model(),
    "bfloat16": lambda: tiny_model().bfloat16(),
    "Q8_0": lambda: in_blocks(tiny_model(), "Q8_0"),
    "Q4_1": lambda: in_blocks(tiny_model(), "Q4_1"),
    "Q4_0": lambda: in_blocks(tiny_model(), "Q4_0"),
}


@pytest.mark.parametrize("trained", ["float32", "Q4_0"])
def test_a_drafter_serves_every_precision_of_its_model_and_says_so(folder: Path, trained: str, capsys) -> None:
    model = FORMS[trained]()
    sampled(folder, model)
    config = drafter_folder.read_config(folder)
    assert len(json.dumps(config["base"]["samples"])) < 12_000
    for name, make in FORMS.items():
        target = TransformersTarget(other := make())
        drafter_folder.check_base(config, target, str(folder))
        said = capsys.readouterr().err
        assert ("trained on the-base;" in said) == (fingerprint(other) != fingerprint(model)), name
        assert said.count("\n") <= 1


@pytest.mark.parametrize(("trained", "part"), [("float32", 0.03), ("Q8_0", 0.05), ("Q4_0", 0.1)])
def test_a_fine_tune_is_refused_in_every_precision(folder: Path, trained: str, part: float) -> None:
    sampled(folder, FORMS[trained]())
    config = drafter_folder.read_config(folder)
    for kind in ("", "Q8_0"):
        other = perturbed(tiny_model(), part)
        target = TransformersTarget(in_blocks(other, kind) if kind else other)
        with refused(r"trained for base weights .* differ by more than rounding\); train one"):
            drafter_folder.check_base(config, target, str(folder))


def test_one_changed_matrix_and_another_architecture_are_refused(folder: Path) -> None:
    model = tiny_model()
    sampled(folder, model)
    config = drafter_folder.read_config(folder)
    name = next(n for n, each in config["base"]["samples"].items() if len(each["shape"]) == 2)
    with torch.no_grad():
        model.get_parameter(name).neg_()
    with pytest.raises(SpecDecError, match=f"the values of '{name}' differ by more than rounding"):
        drafter_folder.check_base(config, TransformersTarget(model), str(folder))
    config["base"] |= {"num_layers": 4, "model_type": "llama"}
    for other, message in (
        (tiny_model("qwen2"), "another architecture or size"),
        (tiny_model(num_hidden_layers=5), "another architecture or size"),
        (tiny_model(vocab_size=101), r"'.*' is \(101, 32\) in the model and \(97, 32\) in the other"),
    ):
        with pytest.raises(SpecDecError, match=message):
            drafter_folder.check_base(config, TransformersTarget(other), str(folder))


@pytest.mark.parametrize(
    "samples",
    [
        {},
        {"model.norm.weight": {"shape": [32], "values": "1 nan"}},
        {"model.norm.weight": {"shape": [32], "values": "1 2"}},
        {"x": {"shape": [1], "values": "1" * 5000}},
    ],
)
def test_broken_samples_are_refused(folder: Path, samples) -> None:
    change(folder, base={"fingerprint": "x", "samples": samples})
    with pytest.raises(SpecDecError, match="has broken samples of the base model"):
        SpecDecoder(tiny_model(), drafter=folder)


def test_a_shipped_drafter_is_found_by_fingerprint_then_by_samples(folder: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda name: tmp_path)
    sampled(folder, FORMS["Q4_0"]())
    near, own = (tmp_path / "pretrained" / "m2r2" / name for name in ("a-other", "b-own"))
    near.parent.mkdir(parents=True)
    folder.rename(near)
    model, fine = tiny_model(), perturbed(tiny_model(), 0.1)
    assert drafter_folder.find_shipped("m2r2", TransformersTarget(model)) == near
    assert drafter_folder.find_shipped("m2r2", TransformersTarget(fine)) is None
    shutil.copytree(near, own)
    change(own, base={"fingerprint": fingerprint(model)})
    assert drafter_folder.find_shipped("m2r2", TransformersTarget(model)) == own
