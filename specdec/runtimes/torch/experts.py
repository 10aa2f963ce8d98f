"""A mixture of experts in the place of an MLP: the router, and the experts that each token takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.models.families import Mixture, Numbers
from specdec.models.gguf.blocks import BIASES, BlockExperts
from specdec.runtimes.decoder_layer import router
from specdec.runtimes.torch.linear import Linear

Choose = Callable[[Tensor], Tensor]


class Experts:
    """The mixture of experts of a layer.

    mlp: the module of the model.
    act: activation of the experts' gates.
    shared: MLP that all tokens run beside the experts; None: there is none.
    """

    def __init__(self, mlp: Any, mixture: Mixture, numbers: Numbers, act: Linear, shared: Linear | None) -> None:
        self.router, self.experts, self.mixture = router(mlp), mlp.experts, mixture
        self.numbers, self.act = numbers, act
        self.shared, self.gate = shared, None if shared is None else mlp.shared_expert_gate
        own = mlp.experts
        self.is_transposed = bool(own.transposed if isinstance(own, BlockExperts) else own.is_transposed)

    def __call__(self, x: Tensor, routed: Tensor | None = None, choose: Choose | None = None) -> Tensor:
        """Return the mixture's outputs [B, T, D] for inputs ``x`` [B, T, D].

        routed: tensor that is filled with the router's logits [B T, E]; None: they are not returned.
        choose: function from these logits to the experts [B T, k] that tokens use; None: the largest logits decide.
        """
        flat = x.flatten(0, 1)
        logits = F.linear(flat, self.router.weight, getattr(self.router, "bias", None)).float()
        if routed is not None:
            routed.copy_(logits)
        probabilities = logits.softmax(-1)
        taken = probabilities.topk(self.mixture.top_k).indices if choose is None else choose(logits)
        shares = probabilities.gather(1, taken)
        shares = shares / shares.sum(-1, keepdim=True) if self.mixture.normalize_top_k else shares
        places = dict[int, list[int]]()  # of each expert that is taken
        for place, number in enumerate(taken.flatten().tolist()):
            places.setdefault(number, []).append(place)
        out, shares = torch.zeros(flat.shape, device=x.device), shares.flatten()
        for number in sorted(places):
            index = torch.tensor(places[number], device=x.device)
            rows = index // self.mixture.top_k
            out.index_add_(0, rows, self._run(number, flat[rows]).float() * shares[index, None])
        if self.shared is not None and self.gate is not None:
            out = out + self.gate(flat).sigmoid() * self.shared(flat)
        return out.to(x.dtype).view(x.shape)

    def _run(self, number: int, x: Tensor) -> Tensor:
        """Return the outputs [n, D] of expert ``number`` for inputs ``x`` [n, D]."""
        own, biases = self.experts, [None, None]
        if isinstance(own, BlockExperts):
            gate_up, down = own.expert(number)
        else:
            gate_up, down = own.gate_up_proj[number], own.down_proj[number]
        if self.is_transposed:
            gate_up, down, biases = gate_up.mT, down.mT, [getattr(own, name)[number].to(x.dtype) for name in BIASES]
        inner = F.linear(x, gate_up, biases[0])
        gate, up = (inner[..., ::2], inner[..., 1::2]) if self.is_transposed else inner.chunk(2, -1)
        if limit := self.numbers.limit:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return F.linear(gate * torch.sigmoid(gate * self.numbers.alpha) * (up + 1), down, biases[1])
        return F.linear(self.act(gate) * up, down, biases[1])
