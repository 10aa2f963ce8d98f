"""GGUF blocks in the kernels' tiles: their values are those of ``gguf``, and products are those of bf16 tiles."""

from __future__ import annotations

import threading

import gguf
import numpy as np
import pytest
import torch
from test_fused import apart

from specdec.base.errors import SpecDecError
from specdec.models.blocks import KINDS, Blocks
from specdec.runtimes.native import library, linear

pytestmark = [
    pytest.mark.skipif(not library.runs(), reason="the native kernels do not run here"),
    pytest.mark.usefixtures("kernels"),
]
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0]}
HALVES |= {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}  # where a block has float16 numbers
TILES = {"Q4_0": "Q4", "Q4_1": "Q4", "Q5_0": "Q5", "Q5_1": "Q5", "Q8_0": "Q8", "Q4_K": "K4", "Q5_K": "K5", "Q6_K": "K6"}


def random_blocks(kind: str, out: int, inputs: int, scales: tuple[float, float] = (0.001, 0.02)) -> Blocks:
    """Blocks of random codes; their float16 numbers are in the range ``scales``, of either sign."""
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(len(kind) * out + inputs)
    data = random.integers(0, 256, (out, inputs // weights, size), dtype=np.uint8)
    for at in HALVES[kind]:
        halves = random.uniform(*scales, data.shape[:2]) * random.choice([-1, 1], data.shape[:2])
        data[:, :, at : at + 2] = halves.astype(np.float16)[..., None].view(np.uint8)
    return Blocks(torch.from_numpy(data.reshape(out, -1)), kind, inputs)


def alike(got: torch.Tensor, of_bf16: torch.Tensor, most: float = 0.01) -> bool:
    """Equal, or on AVX2, whose weights in fewer bits are not rounded to bf16, as near as that rounding is."""
    if library.load().level != "avx2":
        return torch.equal(got, of_bf16)
    return apart(got.float(), of_bf16.float()) < most


@pytest.mark.parametrize("tokens", [1, 3, 7, 20, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_blocks_equal_those_of_their_bf16_values(kind: str, tokens: int) -> None:
    blocks = random_blocks(kind, 48, 512)
    packed, dense = linear.Packed([blocks]), linear.Packed([blocks.numbers().bfloat16()])
    assert packed.kinds == {getattr(library, TILES[kind])}
    x = torch.randn(tokens, 512).bfloat16()
    assert alike(packed(x), dense(x))
    assert torch.equal(packed(x)[-1:], packed(x[-1:]))


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_the_widest_maps_fit_the_stack_and_wider_ones_are_refused(kind: str, tokens: int) -> None:
    blocks, x = random_blocks(kind, 16, linear.WIDEST), torch.randn(tokens, linear.WIDEST).bfloat16()
    got: list[torch.Tensor] = []
    before = threading.stack_size(2 << 20)
    try:
        thread = threading.Thread(target=lambda: got.append(linear.Packed([blocks])(x)))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert apart(got[0].float(), (x @ blocks.numbers().bfloat16().T).float()) < 0.02
    wider = random_blocks(kind, 16, 1 << 20)
    with pytest.raises(SpecDecError, match="at most 131072 inputs"):
        linear.Packed([wider])
    assert not linear.serves(torch.empty(16, 1 << 20, dtype=torch.bfloat16))


@pytest.mark.parametrize("scales", [(0.001, 0.02), (1e-7, 1e-6), (100.0, 4000.0), (0.0, 0.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_hold_the_very_values(kind: str, scales: tuple[float, float]) -> None:
    blocks = random_blocks(kind, 32, 256, scales)
    one_hot = torch.eye(256).bfloat16()
    assert torch.equal(linear.Packed([blocks])(one_hot).T, blocks.numbers().bfloat16())


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0"])
def test_scales_that_tiles_cannot_hold_are_held_in_bf16(kind: str) -> None:
    blocks = random_blocks(kind, 32, 256, (60000.0, 65000.0))
    packed = linear.Packed([blocks])
    assert packed.kinds == {library.BF16}
    assert torch.equal(packed(torch.eye(256).bfloat16()).T, blocks.numbers().bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_table(kind: str) -> None:
    blocks, index = random_blocks(kind, 40, 256), torch.tensor([[3, 0], [39, 3]])
    assert torch.equal(linear.RowTable(blocks)(index), blocks.numbers(index.flatten()).bfloat16().view(2, 2, 256))
    dense = blocks.numbers().bfloat16()
    assert torch.equal(linear.RowTable(dense)(index), dense[index])
    assert torch.equal(linear.unpack(blocks, None, torch.bfloat16), dense)


def test_a_map_of_several_kinds_with_rows_in_another_order() -> None:
    order = torch.randperm(32).int()
    q4, q6 = random_blocks("Q4_K", 32, 256), random_blocks("Q6_K", 20, 256)
    permuted = Blocks(q4.data, "Q4_K", 256, order)
    plain = torch.randn(16, 256).bfloat16()
    weight = torch.cat([q4.numbers()[order.long()].bfloat16(), plain, q6.numbers().bfloat16()])
    assert torch.equal(permuted.numbers().bfloat16(), weight[:32])
    bias, x = torch.randn(68), torch.randn(5, 256).bfloat16()
    packed = linear.Packed([permuted, plain, q6], bias)
    assert packed.kinds == {library.K4, library.BF16, library.K6}
    assert alike(packed(x), linear.Packed([weight], bias)(x))
    assert packed.largest(x, None, 0.0) == packed(x).argmax(-1).tolist()
