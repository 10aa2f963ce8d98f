"""Layer skipping: parts of layers, what is drafted without them, the file a skip set comes from, and its search."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, tiny_model

from specdec.target import ReferenceTarget

PARALLEL = ("phi", "gpt_neox")  # attention and MLP read the same input


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_parts_of_a_layer_make_the_layer(family: str) -> None:
    target = ReferenceTarget(tiny_model(family))
    positions = torch.arange(7)[None]
    x = target.embed(torch.arange(3, 10)[None], positions)

    def run(*parts: str) -> torch.Tensor:
        cache, y = target.new_cache(), x
        mask = cache.mask(0, positions)
        for part in parts:
            if part == "layer":
                y = target.layers(y, 1, 2, positions, mask, cache)
            else:
                y = target.sublayer(y, 1, part, positions, mask, cache)  # type: ignore[arg-type]
        assert cache.lengths[1] == (7 if parts[0] != "mlp" else 0)
        return y

    whole, attention, mlp = run("layer"), run("attention"), run("mlp")
    assert not any(torch.allclose(a, b) for a, b in ((whole, attention), (whole, mlp), (attention, x), (mlp, x)))
    both = attention + mlp - x if family in PARALLEL else run("attention", "mlp")
    torch.testing.assert_close(both, whole)
    torch.testing.assert_close(run("layer"), whole)  # the model has its parts back
