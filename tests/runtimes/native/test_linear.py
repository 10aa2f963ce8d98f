"""GGUF blocks in the kernels' tiles: products with activations in 8 bits are those of the algorithm, with the values
that ``gguf`` reads, to the last bit in every build."""

import threading

import gguf
import numpy as np
import pytest
import torch
from passes import apart, random_blocks
from targets import needs_native
from tiny_gguf import HALVES

from specdec.base import cores
from specdec.models.gguf.blocks import KINDS, Blocks
from specdec.runtimes.native import library, linear

pytestmark = [needs_native, pytest.mark.usefixtures("kernels")]
TILES = {"Q4_0": "Q4", "Q4_1": "Q4", "Q5_0": "Q5", "Q5_1": "Q5", "Q8_0": "Q8", "Q4_K": "K4", "Q5_K": "K5", "Q6_K": "K6"}
TILES |= {"MXFP4": "MX"}


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a b + c, rounded once: products of float32 are exact in float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def pieces(blocks: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [out, in / 32, 32], scales [out, in / 32, 2] and lows [out, in / 32]: weight = scale code + low."""
    kind, (out, inputs) = blocks.kind, blocks.shape
    data = blocks.data.numpy().reshape(out, -1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
    half = lambda at: data[:, :, at : at + 2].copy().view(np.float16)[..., 0].astype(np.float32)  # noqa: E731
    values = blocks.dequantized().numpy().reshape(out, inputs // 32, 32)
    if kind == "Q6_K":
        scale = half(208)[..., None] * data[:, :, 192:208].view(np.int8).astype(np.float32)  # 16 for 256 weights
        scale, low = scale.reshape(out, -1, 2), np.zeros((out, inputs // 32), np.float32)
    elif kind in ("Q4_K", "Q5_K"):
        scales, mins = gguf.quants.Q4_K.get_scale_min(data[:, :, 4:16].reshape(-1, 12))
        scale = (half(0)[..., None] * scales.reshape(*data.shape[:2], 8)).reshape(out, -1, 1).repeat(2, -1)
        low = -(half(2)[..., None] * mins.reshape(*data.shape[:2], 8)).reshape(out, -1)
    elif kind == "MXFP4":
        scale, low = np.exp2(data[:, :, :1].astype(np.float32) - 128).repeat(2, -1), np.float32(0) * data[:, :, 0]
    else:
        low = half(2) if kind in ("Q4_1", "Q5_1") else half(0) * {"Q8_0": 0, "Q4_0": -8, "Q5_0": -16}[kind]
        scale = half(0)[..., None].repeat(2, -1)
    each = scale.astype(np.float64).repeat(16, -1)
    codes = np.divide(values - low[..., None].astype(np.float64), each, out=np.zeros(each.shape), where=each != 0)
    return codes.round().astype(np.int64), scale, low


def integer_products(blocks: Blocks, x: torch.Tensor) -> np.ndarray:
    """bf16 x [T, in] -> float32 [T, out], as integer.c says."""
    codes, scale, low = pieces(blocks)
    v = x.float().numpy().reshape(len(x), -1, 32)
    most = np.maximum(np.abs(v).max(-1), np.float32(1e-30))
    own = most * np.float32(1 / 127)
    q = np.rint(v * (np.float32(127) / most)[..., None]).astype(np.int64)
    result = np.zeros((len(x), len(codes)), np.float32)
    for k in range(codes.shape[1]):
        halves = [(q[:, None, k, h] * codes[None, :, k, h]).sum(-1) for h in (slice(16), slice(16, 32))]
        if blocks.kind == "Q6_K":
            value = halves[0].astype(np.float32) * scale[None, :, k, 0]
            value = fma(halves[1].astype(np.float32), scale[None, :, k, 1], value)
        else:
            value = (halves[0] + halves[1]).astype(np.float32) * scale[None, :, k, 0]
        if blocks.kind not in ("Q6_K", "Q8_0", "MXFP4"):
            value = fma(low[None, :, k], q[:, k].sum(-1, keepdims=True).astype(np.float32), value)
        result = fma(value, own[:, k : k + 1], result)
    return result


@pytest.mark.parametrize("bits", [0x7E00, 0x7FFF, 0xFE00, 0xFFFF])
def test_a_scale_that_is_no_number_stays_none(bits: int) -> None:
    """Also one whose bits overflow when they are rounded as if they were a number's."""
    data = np.zeros((1, 34), np.uint8)
    data[:, :2], data[:, 2:] = np.array([bits], np.uint16).view(np.uint8), 1
    rows = linear.RowTable(Blocks(torch.from_numpy(data), "Q8_0", 32))(torch.tensor([0]))
    assert rows.isnan().all()


SCALES = [(0.001, 0.02), (1e-7, 1e-6), (100.0, 4000.0), (0.0, 0.0)]


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_integer_products_are_those_of_the_algorithm(kind: str, scales: tuple[float, float]) -> None:
    """Codes and activations at their ends, too: sums in 16 bits must hold them."""
    blocks, random = random_blocks(kind, 48, 512, scales), torch.Generator().manual_seed(9)
    if scales == SCALES[0]:
        blocks.data[:16] |= 0xF0  # large codes
        each = blocks.data[:16].view(16, -1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
        for at in HALVES.get(kind, [0]):
            each[..., at], each[..., at + 1] = 64, 40
        if kind == "MXFP4":
            each[..., 0], each[..., 1:] = 120, 0x77
    packed = linear.Packed([blocks])
    assert packed.kinds == {getattr(library, TILES[kind])}
    x = torch.randn(70, 512, generator=random) * 10 ** torch.randint(-3, 4, (70, 16, 1), generator=random).expand(
        70, 16, 32
    ).reshape(70, 512)
    x[1], x[2], x[3, :40] = 1, -1, 0
    x = x.bfloat16()
    expected = torch.from_numpy(integer_products(blocks, x)).bfloat16()
    for tokens in (1, 2, 3, 4, 5, 16, 17, 70):
        assert torch.equal(packed(x[:tokens]), expected[:tokens]), tokens
        assert torch.equal(packed(x[-tokens:]), expected[-tokens:]), tokens


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0"])
def test_wide_maps_fit_the_stack(kind: str) -> None:
    blocks, x = random_blocks(kind, 16, 1 << 17), torch.randn(40, 1 << 17).bfloat16()
    dense, got = blocks.dequantized().bfloat16(), list[torch.Tensor]()
    expected = (x @ dense.T).float()
    before = threading.stack_size(2 << 20)
    try:
        thread = threading.Thread(
            target=lambda: got.extend(
                linear.Packed([weight])(x[:tokens]) for weight in (blocks, dense) for tokens in (2, 40)
            )
        )
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert all(apart(y.float(), expected[: len(y)]) < 0.02 for y in got) and len(got) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so(kind: str) -> None:
    packed, x = linear.Packed([random_blocks(kind, 32, 256)]), torch.ones(3, 256).bfloat16()
    x[0, 40], x[1, 3] = float("nan"), float("-inf")
    y = packed(x)
    assert not y[:2].isfinite().any() and y[2].isfinite().all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0"])
def test_scales_that_tiles_cannot_hold_are_held_in_bf16(kind: str) -> None:
    blocks = random_blocks(kind, 32, 256, (60000.0, 65000.0))
    packed = linear.Packed([blocks])
    assert packed.kinds == {library.BF16}
    assert torch.equal(packed(torch.eye(256).bfloat16()).T, blocks.dequantized().bfloat16())


POWERS = (1, 1, False), (1, 8, True), (2, 1, True), (251, 7, True), (252, 0, False)


@pytest.mark.parametrize(("power", "code", "held"), POWERS)
def test_so_are_powers_of_two_that_floats_cannot_hold(power: int, code: int, held: bool) -> None:
    """A block of zeros may have any scale that is not too large."""
    blocks = random_blocks("MXFP4", 32, 256)
    blocks.data.view(32, 8, 17)[3, 2] = torch.tensor([power] + 16 * [17 * code], dtype=torch.uint8)
    packed = linear.Packed([blocks])
    assert packed.kinds == {library.MX if held else library.BF16}
    values, expected = packed(torch.eye(256).bfloat16()).T, blocks.dequantized().bfloat16()
    inside = (expected.abs() < 2.0**120) & (expected.abs() >= 2.0**-126)  # other products are beyond floats
    assert torch.equal(values[inside], expected[inside])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_an_embedding_have_the_values_of_their_blocks(kind: str) -> None:
    blocks, index = random_blocks(kind, 40, 256), torch.tensor([[3, 0], [39, 3]])
    assert torch.equal(linear.RowTable(blocks)(index), blocks.dequantized(index.flatten()).bfloat16().view(2, 2, 256))
    dense = blocks.dequantized().bfloat16()
    assert torch.equal(linear.RowTable(dense)(index), dense[index])
    assert torch.equal(linear.unpack(blocks, None, torch.bfloat16), dense)


def test_a_map_of_several_kinds_with_rows_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order = torch.randperm(32).int()
    q4, q6 = random_blocks("Q4_K", 32, 256), random_blocks("Q6_K", 20, 256)
    permuted = Blocks(q4.data, "Q4_K", 256, order)
    plain = torch.randn(16, 256).bfloat16()
    weight = torch.cat([q4.dequantized()[order.long()].bfloat16(), plain, q6.dequantized().bfloat16()])
    assert torch.equal(permuted.dequantized().bfloat16(), weight[:32])
    bias, x = torch.randn(68), torch.randn(5, 256).bfloat16()
    with monkeypatch.context() as patch:
        patch.setattr(linear, "_block_tiles", None)  # nothing is packed twice
        packed = linear.Packed([permuted, plain, q6], bias)
    assert packed.kinds == {library.BF16} and not packed.rounded
    assert torch.equal(packed(x), linear.Packed([weight], bias)(x))
    rounded, parts = linear.Packed([permuted, q6], bias[16:]), [linear.Packed([each]) for each in (permuted, q6)]
    separate = torch.cat([part(x).float() for part in parts], -1)
    assert apart(rounded(x).float(), separate + bias[16:]) < 0.01
    assert packed.largest(x, None, 0.0) == packed(x).argmax(-1).tolist()


@pytest.mark.parametrize("rows", [1, 2, 7, 10])
def test_a_screened_map_finds_the_same_largest_output(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also among outputs that 4 bits do not tell apart, the first of equal ones, and for inputs that are not finite."""
    monkeypatch.setattr(cores, "cpus", lambda: 3)
    random = torch.Generator().manual_seed(6)
    blocks = random_blocks("Q8_0", 1003, 256)
    codes = blocks.data.view(1003, 8, 34)
    codes[100:400] = codes[100]
    codes[100:400, :, 2:] ^= torch.randint(0, 4, (300, 8, 32), generator=random, dtype=torch.uint8)
    codes[700:] = codes[:303].clone()
    packed, full = linear.Packed([blocks], scale=0.5), linear.Packed([blocks], scale=0.5)
    packed.bound_argmax(blocks)
    assert packed.nbytes < 0.6 * full.nbytes
    near, norm = blocks.dequantized()[100], torch.rand(256, generator=random) + 0.5
    x = ((near / near.std() + torch.randn(40, 256, generator=random)) / norm).bfloat16()
    x[-1] = -x[-1]  # the largest one is small
    x[5, 3], x[6, 3], x[7] = float("nan"), float("inf"), 0
    expected = full(x, norm, 1e-5).argmax(-1)
    assert sum(100 <= token < 400 for token in expected.tolist()) > 20 and expected.unique().numel() > 10
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            parts = x.split(rows)
            found, few = ([t for part in parts for t in each.largest(part, norm, 1e-5)] for each in (packed, full))
            assert found == few == full.largest(x, norm, 1e-5) and found[5:7] == [-1, -1]
            finite = x.isfinite().all(-1)
            assert torch.equal(torch.tensor(found)[finite], expected[finite])
    finally:
        torch.set_num_threads(threads)


def test_a_screened_map_does_not_read_what_cannot_be_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "threads", lambda: 1)  # who begins with a tile would decide which bound it gives
    blocks = random_blocks("Q8_0", 640, 256)
    packed, numbers = linear.Packed([blocks]), blocks.dequantized()
    packed.bound_argmax(blocks)
    x = (numbers[70] / numbers.std())[None].bfloat16()
    assert packed.largest(x, None, 0.0) == [70]
    tiles = packed.tiles[0].view(40, 8, 544)
    tiles[20] = tiles[4]  # those of outputs 64 to 79
    tiles[20, :, :32].view(torch.float16).mul_(2)
    assert packed(x).argmax() == 326 and packed.largest(x, None, 0.0) == [70]


@pytest.mark.parametrize("rows", [1, 20])
def test_norms_round_as_transformers_does(rows: int) -> None:
    """To 16 bits after scaling, and after the weight; of some families after the weight alone. Sums are exact."""
    x = torch.randint(-8, 9, (rows, 64), generator=torch.Generator().manual_seed(4)).bfloat16()
    weight = torch.rand(64, generator=torch.Generator().manual_seed(5)) + 0.5
    scaled = x.float() * (1 / (x.float().square().mean(-1, keepdim=True) + 0.25).sqrt())
    packed = linear.Packed([torch.eye(64).bfloat16()])
    twice, once = (scaled.bfloat16().float() * weight).bfloat16(), (scaled * weight).bfloat16()
    assert torch.equal(packed(x, weight, 0.25), twice) and torch.equal(packed(x, weight, 0.25, after_weight=True), once)
    assert not torch.equal(twice, once)
