"""A mixture-of-experts layer: the router, the experts that it chooses for each token, and the shared expert."""

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
    """Runs the mixture of experts of one decoder layer. The number of experts is E; each token uses k of them.

    mlp: the model's mixture module, with its router and experts.
    mixture: how the router chooses: k, and whether the chosen experts' weights are scaled to sum to 1.
    numbers: constants of the model, such as the limit at which the experts' gates are clamped.
    act: activation of the experts' gates.
    shared: MLP that all tokens run besides the chosen experts; None: there is none.
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

        routed: tensor [B T, E] that is filled with the router's logits; None: the logits are not needed.
        choose: function from these logits [B T, E] to the experts that each token uses, int64 [B T, k]; None: the k
            largest logits decide.
        together: whether to run the experts without the CPU reading which ones tokens use, as CUDA graphs require; this
            suits few tokens. False: the CPU reads them, and each used expert runs once.
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
        """Run each used expert once, on its tokens; return each token's weighted sum of expert outputs, [n, D].

        Waits for the device, because the CPU reads ``taken``.

        x: inputs of n tokens, [n, D]. taken: the k experts of each token, int64 [n, k].
        shares: weights of these experts' outputs in the sum, [n, k].
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
        """Return for each token the weighted sum of its experts' outputs, [n, D], without waiting for the device.

        With few tokens, the weights of each token's experts are gathered; with more, all E experts run on all tokens.

        x: inputs of n tokens, [n, D]. taken: the k experts of each token, int64 [n, k].
        shares: weights of these experts' outputs in the sum, [n, k].
        """
        (count, top_k), every = taken.shape, self.router.weight.shape[0]
        if COPIES * count * top_k < every:
            made = self._run(taken.flatten(), x.repeat_interleave(top_k, 0)[:, None]).view(count, top_k, -1)
            return (made.float() * shares[..., None]).sum(1)
        made = self._run(slice(None), x.expand(every, -1, -1)).float()  # (E, n, D)
        weights = shares.new_zeros(count, every).scatter_(1, taken, shares)
        return (made * weights.mT[..., None]).sum(0)

    def _run(self, number: int | slice | Tensor, x: Tensor) -> Tensor:
        """Return the outputs of one expert, or of several at once, for inputs ``x``.

        number: index of one expert; then ``x`` and the result are [n, D] for n tokens. A slice or a tensor of indices
            selects E' experts; then both are [E', n, D], with the inputs and outputs of each expert.
        """
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
    """Return ``x @ weight.T + bias`` for one linear layer or, in a batch, for E linear layers.

    x: inputs [n, in] or [E, n, in]. weight: [out, in] or [E, out, in]. bias: [out] or [E, out]; None: no bias.
    """
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return x @ weight.mT if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)
