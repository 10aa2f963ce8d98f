"""The blocks of Medusa's heads, and their forward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.runtimes.target import Target
from specdec.runtimes.torch.linear import Linear, for_drafting


class Medusa(nn.Module):
    """The residual blocks of Medusa's heads, which draft several tokens at once from the model's final state.

    Each block is x + silu(W x + b); blocks with weights of zero return their input.

    width: D, the size of a state.
    heads: K, number of heads; head k drafts the token k + 1 positions after the root, k from 0.
    layers: number of blocks of each head.
    rooted: whether the first block also reads the root's embedding.
    draft_vocab: the tokens that are drafted, int32 [V']; None: all.
    weights, biases: for each block, those of all heads, [K, D, D or 2 D] and [K, D].
    inference_maps: the first block's linear layer in its fastest format, made by ``freeze``; None while it is trained.
    """

    def __init__(
        self, width: int, heads: int, layers: int = 1, rooted: bool = False, draft_vocab: Tensor | None = None
    ) -> None:
        super().__init__()
        self.width, self.heads, self.layers, self.rooted = width, heads, layers, rooted
        ins = [2 * width if rooted and n == 0 else width for n in range(layers)]
        self.weights = nn.ParameterList(torch.zeros(heads, width, n) for n in ins)
        self.biases = nn.ParameterList(torch.zeros(heads, width) for _ in ins)
        self.inference_maps: Linear | None = None
        self.register_buffer("draft_vocab", draft_vocab)
        self.draft_vocab: Tensor | None

    def forward(self, x: Tensor, root: Tensor | None = None) -> Tensor:
        """Return the inputs of the K output heads, [..., K, D], from states ``x`` [..., D].

        x: final states of the token before the root: before the final norm, each divided by its root mean square;
            for public checkpoints instead the output of the model's final norm, not divided.
        root: embeddings of the roots (the last tokens of the texts), likewise divided, [..., D], which ``rooted``
            blocks need; None for others.
        """
        seen = x if root is None else torch.cat((x, root), -1)
        y = x.unsqueeze(-2)
        for n, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if n:
                inner = torch.einsum("...ki,koi->...ko", y, weight) + bias
            else:  # all heads have one input: one product
                both = (
                    self.inference_maps(seen)
                    if self.inference_maps
                    else F.linear(seen, weight.flatten(0, 1), bias.flatten())
                )
                inner = both.unflatten(-1, bias.shape)
            y = y + F.silu(inner)
        return y

    def freeze(self, target: Target) -> None:
        """Prepare for drafting: move the parameters to the target's dtype and device, and set ``inference_maps``.

        Parameters get no gradients any more. ``forward`` then runs the first block in this format, which may be
        quantized.
        """
        self.to(target.device, target.dtype).requires_grad_(False).eval()
        self.inference_maps = for_drafting(self.weights[0].flatten(0, 1), self.biases[0].flatten())
