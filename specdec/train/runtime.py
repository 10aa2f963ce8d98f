"""The target as training runs it: the reference, with a direct path for Llama-like layers on large batches.

The direct path multiplies adapters into the weights (one product per linear map and batch instead of three per pass),
folds grouped query heads into rows, and compiles what lies between the attention calls. It is compared with the
reference when it is built and is left out where a model needs anything it does not do.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from specdec.adapters import Adapters
from specdec.cache import KVCache, Mask
from specdec.target import ReferenceTarget

DIRECT = ("llama", "mistral")  # families whose layer is: norm, q k v, rotary, attention, o; norm, silu-gated MLP
LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


class TrainingTarget(ReferenceTarget):
    """A ``ReferenceTarget`` that is fast on blocks of many tokens.

    compiled: use ``torch.compile`` where the model has a direct path and compilation works; ``say`` is told once where
    it does not. Merged adapter weights are kept from call to call: call ``forget`` when the adapters have changed.
    """

    def __init__(
        self, model: PreTrainedModel, compiled: bool = False, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self.direct, self.compiles, self.say = False, False, say
        self._merged: dict[int, list[Tensor]] = {}
        self._train: tuple[Callable[..., Any], ...] = (_before, _after)  # blocks of one shape, with gradients
        self._teach: tuple[Callable[..., Any], ...] = (_before, _after)  # blocks of any shape
        super().__init__(model)
        modules = [dict(block.named_modules()) for block in self.blocks]
        self.direct = model.config.model_type in DIRECT and all(
            getattr(m[name], "bias", None) is None for m in modules for name in LINEARS
        )
        if self.direct:
            self._self_check()  # raises for a direct path that strays from the model
            self.compiles = compiled and can_compile(self.device)
            self._train = tuple(self.compiled(part) for part in (_before, _after))
            self._teach = tuple(self.compiled(part, dynamic=True) for part in (_before, _after))

    def compiled(self, part: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
        """``part``, a function of tensors without side effects, compiled if this target compiles.

        Compilers fail for reasons that are none of the training's (a broken toolchain, a full disk for their files):
        from the first failure on, every part of this target runs as it is written.
        """
        if not self.compiles:
            return part
        logging.getLogger("torch._inductor").setLevel(logging.ERROR)
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
        # By default the backward pass is compiled when it is needed, far from the call that could do without.
        functorch_config.force_non_lazy_backward_lowering = True
        quick = torch.compile(part, dynamic=dynamic)

        def run(*args: Any) -> Any:
            if self.compiles:
                try:
                    return quick(*args)
                except Exception as error:
                    values = part(*args)  # raises what is not the compiler's fault
                    self.compiles = False
                    reason = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
                    self.say(f"torch.compile failed, training goes on without it, but slower ({reason})")
                    return values
            return part(*args)

        return run

    def forget(self) -> None:
        """Drop merged weights: the adapters have changed, or a new graph begins."""
        self._merged.clear()

    def layers(
        self,
        x: Tensor,
        lo: int,
        hi: int,
        positions: Tensor,
        mask: Mask,
        cache: KVCache,
        taps: dict[int, Tensor] | None = None,
        adapters: Adapters | None = None,
        adapted: int | None = None,
    ) -> Tensor:
        if not self.direct or (adapters is not None and adapted is not None):
            return super().layers(x, lo, hi, positions, mask, cache, taps, adapters, adapted)
        before, after = self._train if torch.is_grad_enabled() else self._teach
        rotary: Any = self.base.rotary_emb
        cos, sin = rotary(x, positions)  # (B, T, d)
        for layer in range(lo, hi):
            if taps is not None and layer in taps:
                taps[layer] = x
            wq, wk, wv, wo, gate, up, down = self._weights(layer, adapters)
            block: Any = self.blocks[layer]
            norm1, norm2 = block.input_layernorm, block.post_attention_layernorm
            q, k, v = before(x, norm1.weight, norm1.variance_epsilon, wq, wk, wv, cos, sin)
            k, v = cache.append(layer, k, v)
            x = after(x, self._attend(q, k, v, layer, mask), wo, norm2.weight, norm2.variance_epsilon, gate, up, down)
        if taps is not None and hi in taps:
            taps[hi] = x
        return x

    def _weights(self, layer: int, adapters: Adapters | None) -> list[Tensor]:
        if layer in self._merged and adapters is not None:
            return self._merged[layer]
        weights = [self.blocks[layer].get_submodule(name).weight for name in LINEARS]
        if adapters is None:
            return weights
        factors = adapters.factors(layer)
        for i, name in enumerate(LINEARS):
            if name in factors:
                down, up = factors[name]
                weights[i] = weights[i] + (up @ down).to(weights[i].dtype)
        self._merged[layer] = weights
        return weights

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, mask: Mask) -> Tensor:
        """q [B, H, T, d], k and v [B, H', S, d] -> [B, T, H d]; the queries that share a key head are one long row."""
        b, heads, t, d = q.shape
        group = heads // k.shape[1]
        key = ("rows", self.windows[layer])
        if key not in mask.memo:
            visible = mask.bool_mask(self.windows[layer])
            if visible is not None:  # additive: a bool mask is turned into one again at every call
                visible = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
                visible = visible.repeat(1, 1, group, 1)
            mask.memo[key] = visible
        rows = q.reshape(b, k.shape[1], group * t, d)
        scale = getattr(self.blocks[layer].self_attn, "scaling", d**-0.5)
        y = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask.memo[key], scale=scale)
        return y.reshape(b, heads, t, d).transpose(1, 2).reshape(b, t, heads * d)


def can_compile(device: torch.device) -> bool:
    """Whether ``torch.compile`` finds what it needs: a C++ compiler for the CPU, triton elsewhere."""
    if device.type == "cpu":
        return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
    return importlib.util.find_spec("triton") is not None


def keep_freed_memory() -> None:
    """Have glibc reuse large blocks instead of returning them: fresh pages cost more than the arithmetic on them.

    An elementwise operation on 20 MB was seen to take 42 ms with the defaults and 5 ms so. Elsewhere: no effect.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its highest
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
            mallopt(-2, 256 << 20)  # M_TOP_PAD


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, T, d]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _before(
    x: Tensor, norm: Tensor, eps: float, wq: Tensor, wk: Tensor, wv: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer input [B, T, D] -> rotated q [B, H, T, d], rotated k and v [B, H', T, d]."""
    n = _norm(x, norm, eps)
    cos, sin = cos[:, None], sin[:, None]
    q, k, v = (F.linear(n, w).unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2) for w in (wq, wk, wv))
    return _turn(q, cos, sin), _turn(k, cos, sin), v.contiguous()


def _after(
    x: Tensor, y: Tensor, wo: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """Layer input [B, T, D] and attention result [B, T, H d] -> layer output [B, T, D]."""
    x = x + F.linear(y, wo)
    n = _norm(x, norm, eps)
    return x + F.linear(F.silu(F.linear(n, gate)) * F.linear(n, up), down)
