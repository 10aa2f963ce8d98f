"""Forecasts of experts: what passes teach them, what is read ahead, and that results stay as they are."""

import ctypes
import os
from typing import Any

import pytest
import torch
from passes import in_blocks, next_logits, play
from targets import needs_native
from torch import Tensor

from specdec.runtimes.native import experts, forecasts
from specdec.runtimes.native.experts import MappedExperts, _by_token, _Layer
from specdec.runtimes.native.forecasts import Forecasts
from specdec.runtimes.native.target import NativeTarget

WIDTH, EXPERTS, TAKEN = 24, 8, 2


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Layers:
    """Three layers with experts whose residual changes by a linear map from one to the next."""

    def __init__(self) -> None:
        self.routers = {layer: drawn(EXPERTS, WIDTH, seed=layer) for layer in (1, 3, 4)}
        self.maps = [drawn(WIDTH, WIDTH, seed=10 + n) / WIDTH**0.5 for n in range(2)]
        self.made = Forecasts(self.routers, TAKEN)

    def residuals(self, x: Tensor) -> list[Tensor]:
        states = [x]
        for weight in self.maps:
            states.append(states[-1] @ weight.T)
        return states

    def run(self, x: Tensor) -> list[tuple[dict[int, list[int]], list[Tensor]]]:
        """A pass over rows x [T, D]: what each layer says of later ones, and the logits of all."""
        states = self.residuals(x)
        pairs = zip(states, self.routers.values(), strict=True)
        logits = [torch.nn.functional.rms_norm(state, (WIDTH,)) @ router.T for state, router in pairs]
        told = [dict(self.made.seen(n, *pair)) for n, *pair in zip(self.routers, states, logits, strict=True)]
        self.made.work()
        return [(each, logits) for each in told]

    def recall(self) -> float:
        """The share of the experts that a token takes that the layers before it say are likely."""
        right = wanted = 0
        for row in drawn(40, WIDTH, seed=99):
            for told, logits in self.run(row[None])[:-1]:
                for layer, likely in told.items():
                    taken = set(logits[list(self.routers).index(layer)][0].topk(TAKEN).indices.tolist())
                    right, wanted = right + len(taken & set(likely[:TAKEN])), wanted + TAKEN
        return right / wanted


def test_passes_teach_the_forecasts(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = Layers()
    before = layers.recall()
    for seed in range(20):
        layers.run(drawn(32, WIDTH, seed=100 + seed))
    after = layers.recall()
    assert before < 0.6 and after > 0.75, (before, after)
    first, second = layers.made.of.values()
    assert first.targets == [3, 4] and second.targets == [4] and first.next_fit > forecasts.FIRST
    monkeypatch.setattr(forecasts, "LAST", 600)
    for seed in range(20):
        layers.run(drawn(64, WIDTH, seed=200 + seed))
    assert first.sums is None and not first.rows  # the memory is given back
    assert layers.recall() > 0.75


def test_tokens_of_a_pass_are_forecast_together() -> None:
    layers = Layers()
    x = drawn(3, WIDTH, seed=5)
    alone = [layers.run(row[None])[0][0] for row in x]
    together = layers.run(x)[0][0]
    for layer in (3, 4):
        assert len(set(together[layer])) == len(together[layer])
        assert set(together[layer]) >= set().union(*(each[layer] for each in alone))
    assert layers.run(drawn(forecasts.FORECAST_TOKENS + 1, WIDTH))[0][0] == {}


def test_rows_of_another_pass_are_not_mixed_in() -> None:
    layers = Layers()
    states = layers.residuals(drawn(4, WIDTH))
    logits = drawn(4, EXPERTS)
    layers.made.seen(1, states[0], logits)
    layers.made.seen(1, states[0], logits)  # the first pass ended before the next layer
    layers.made.seen(3, states[1][:2], logits[:2])  # one of other tokens
    layers.made.seen(4, states[2][:2], logits[:2])
    assert [each.count for each in layers.made.of.values()] == [0, 2]


def test_what_the_kernels_hold_by_feature_is_read_by_token() -> None:
    rows, width = 20, 18
    numbers = (ctypes.c_float * (2 * 32 * 16))()
    values = drawn(rows, width)
    held = torch.frombuffer(numbers, dtype=torch.float32).view(2, 32, 16)
    for row in range(rows):
        held[row // 16, :width, row % 16] = values[row]
    pointer = ctypes.cast(numbers, experts.FLOATS)
    assert torch.equal(_by_token(rows, pointer, width), values)


def target(**more: Any) -> NativeTarget:
    model = in_blocks("olmoe", ("Q5_0",), num_local_experts=6, num_experts=6, num_experts_per_tok=2)
    return NativeTarget(model, **more)


@needs_native
@pytest.mark.usefixtures("two_threads", "cache")
def test_logits_stay_and_experts_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "FIRST", 8)
    monkeypatch.setattr(forecasts, "ROWS", 4)
    plain, ahead = target(expert_cache=0.5), target(expert_cache=0.5, expert_prefetch=True)
    for ours, theirs in zip(play(ahead), play(plain), strict=True):
        assert torch.equal(ours, theirs)
    found = ahead.experts
    assert isinstance(found, MappedExperts) and found.forecasts is not None
    assert plain.experts is not None and plain.experts.counters.ahead == 0
    assert found.counters.ahead >= found.counters.used > 0
    assert found.counters.misses < plain.experts.counters.misses
    assert all(each.next_fit > 8 for each in found.forecasts.of.values())  # they have been fitted


@needs_native
@pytest.mark.usefixtures("two_threads", "cache")
@torch.inference_mode()
def test_what_is_read_ahead_and_not_taken_is_dropped() -> None:
    made = target(expert_cache=0.5, expert_prefetch=True)
    found, cache = made.experts, made.new_cache()
    next_logits(made, cache, torch.arange(3, 12)[None])
    layer, page = found.layers[max(found.layers)], os.sysconf("SC_PAGESIZE")

    def resident(layer: _Layer, expert: int) -> bool:
        start, size = layer.places[expert]
        pages = (ctypes.c_ubyte * (size // page))()
        ctypes.CDLL(None).mincore(ctypes.c_void_p(layer.memory.data_ptr() + start), ctypes.c_size_t(size), pages)
        return all(each & 1 for each in pages)

    for expert in range(6):
        layer.drop(expert)
    layer.there.clear()
    layer.ahead.clear()
    for expert in range(6):  # as a forecast of everything would
        layer.ahead.add(expert)
        layer.advise(expert, 22)
    next_logits(made, cache, torch.tensor([[12]]))
    assert not layer.ahead and len(layer.there) == 2
    assert [resident(layer, expert) for expert in range(6)] == [expert in layer.there for expert in range(6)]
