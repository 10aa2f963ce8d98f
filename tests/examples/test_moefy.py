"""examples/moefy.py: what it trains is what it exports, and splitting alone changes nothing."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from pages import ROOT
from tiny import tiny_model

EXAMPLE = ROOT / "examples" / "moefy.py"


@pytest.fixture(scope="module")
def moefy():
    spec = importlib.util.spec_from_file_location("moefy", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(count: int) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, 97, (count, 40), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"prompt_ids": row[:5], "response_ids": row[5:]} for row in ids]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).float().norm() / b.float().norm()).item()


@torch.inference_mode()
def test_all_parts_together_are_the_dense_model(moefy):
    dense = tiny_model("llama", hidden_size=64, intermediate_size=64).to(torch.bfloat16)
    ids = torch.tensor([rows(1)[0]["response_ids"]])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    parts = [moefy.Routed(layer.mlp, order, torch.zeros(4, 64), 4, 32) for layer in dense.model.layers]
    assert relative(moefy.export(dense, parts)(ids).logits, dense(ids).logits) < 0.05


def test_what_is_fitted_and_trained_is_what_is_exported(moefy, monkeypatch):
    monkeypatch.setattr(moefy, "WIDTH", 32)
    dense = tiny_model("llama", hidden_size=64, intermediate_size=64).to(torch.bfloat16)
    mlps = [layer.mlp for layer in dense.model.layers]
    routed = moefy.split(dense, rows(16), 4, 2, 32)
    ids, answer = moefy.collate(rows(3))
    kl, error = moefy.distil(dense, mlps, routed, ids, answer)
    (kl + error).backward()
    assert all(parameter.grad is not None for module in routed for parameter in module.parameters())
    moefy.use(dense, routed)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        own = dense(ids).logits
        moefy.use(dense, mlps)
        assert relative(moefy.export(dense, routed)(ids).logits, own) < 0.15
