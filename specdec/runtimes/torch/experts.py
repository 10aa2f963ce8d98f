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
COPIES = 3  # times an expert that is copied is read or written


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

    def __call__(
        self, x: Tensor, routed: Tensor | None = None, choose: Choose | None = None, together: bool = False
    ) -> Tensor:
        """Return the mixture's outputs [B, T, D] for inputs ``x`` [B, T, D].

        routed: tensor that is filled with the router's logits [B T, E]; None: they are not returned.
        choose: function from these logits to the experts [B T, k] that tokens use; None: the largest logits decide.
        together: whether few tokens run without the host; otherwise the host reads which experts tokens use.
        """
        flat = x.flatten(0, 1)
        logits = F.linear(flat, self.router.weight, getattr(self.router, "bias", None)).float()
        if routed is not None:
            routed.copy_(logits)
        probabilities = logits.softmax(-1)
        taken = probabilities.topk(self.mixture.top_k).indices if choose is None else choose(logits)
        shares = probabilities.gather(1, taken)
        shares = shares / shares.sum(-1, keepdim=True) if self.mixture.normalize_top_k else shares
        out = (self._together if together else self._one_by_one)(flat, taken, shares)
        if self.shared is not None and self.gate is not None:
            out = out + self.gate(flat).sigmoid() * self.shared(flat)
        return out.to(x.dtype).view(x.shape)

    def _one_by_one(self, x: Tensor, taken: Tensor, shares: Tensor) -> Tensor:
        """Return the sums [n, D] of the outputs of the experts ``taken`` [n, k] for inputs ``x`` [n, D].

        Outputs are multiplied by ``shares`` [n, k]. The host reads ``taken``.
        """
        places = dict[int, list[int]]()  # of each expert that is taken
        for place, number in enumerate(taken.flatten().tolist()):
            places.setdefault(number, []).append(place)
        out, shares = torch.zeros(x.shape, device=x.device), shares.flatten()
        for number in sorted(places):
            index = torch.tensor(places[number], device=x.device)
            rows = index // self.mixture.top_k
            out.index_add_(0, rows, self._run(number, x[rows]).float() * shares[index, None])
        return out

    def _together(self, x: Tensor, taken: Tensor, shares: Tensor) -> Tensor:
        """Return what ``_one_by_one`` returns, without the host: all experts run, or copies of those that are taken."""
        (count, top_k), every = taken.shape, self.router.weight.shape[0]
        if COPIES * count * top_k < every:
            made = self._run(taken.flatten(), x.repeat_interleave(top_k, 0)[:, None]).view(count, top_k, -1)
            return (made.float() * shares[..., None]).sum(1)
        made = self._run(slice(None), x.expand(every, -1, -1)).float()  # (E, n, D)
        weights = shares.new_zeros(count, every).scatter_(1, taken, shares)
        return (made * weights.mT[..., None]).sum(0)

    def _run(self, number: int | slice | Tensor, x: Tensor) -> Tensor:
        """Return the outputs [n, D] of expert ``number`` for inputs ``x`` [n, D]; of several, [E', n, D] for such x."""
        own, biases = self.experts, [None, None]
        if isinstance(own, BlockExperts):
            assert isinstance(number, int)
            gate_up, down = own.expert(number)
        else:
            gate_up, down = own.gate_up_proj[number], own.down_proj[number]
        if self.is_transposed:
            gate_up, down, biases = gate_up.mT, down.mT, [getattr(own, name)[number].to(x.dtype) for name in BIASES]
        inner = _linear(x, gate_up, biases[0])
        gate, up = (inner[..., ::2], inner[..., 1::2]) if self.is_transposed else inner.chunk(2, -1)
        if limit := self.numbers.limit:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return _linear(gate * torch.sigmoid(gate * self.numbers.alpha) * (up + 1), down, biases[1])
        return _linear(self.act(gate) * up, down, biases[1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return inputs ``x`` [n, in] times a weight [out, in], or [E, n, in] times several [E, out, in], plus biases."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return x @ weight.mT if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)
