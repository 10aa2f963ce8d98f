"""The parameters of an M2R2 and their forward pass, for drafting and for training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specdec.base.errors import SpecDecError
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import Mask
from specdec.models import drafter_folder
from specdec.runtimes.decoder_layer import Adapters
from specdec.runtimes.narrow import GatedMLP, gated_mlp
from specdec.runtimes.native.linear import rounded_for_drafts
from specdec.runtimes.target import Pass, Target
from specdec.runtimes.torch.linear import UnitMap, rms_unit

from .path import M2R2Path

NEURONS = 32  # their number is a multiple of it, for the kernels


@dataclass
class Carry:
    """The deep states g of one token, which the projections of the next token read.

    For a token that the model has scored, they are its own hidden states h; for a drafted one, the states p that M2R2
    computes in their place. A segment is a range [lo, hi) of later layers that drafts run.

    final: g[N], the last layer's output before the final norm, [B, T, D].
    inputs: g[lo], the input of layer lo, for each segment that was run, in order, [B, T, D] each.
    """

    final: Tensor
    inputs: list[Tensor]


class Router(nn.Module):
    """Predicts at an exit of the draft path whether the draft's best token is the model's (ARLA).

    Accelerated residual latent attention (arXiv 2502.02040): the hidden state p of a draft at each layer is projected
    to a small vector, a latent, and the exit attends over the latents. Only the paper's abstract was at hand.
    The log-odds of the draft's own softmax are added, and are all that an untrained router returns; that is an addition
    of this project.

    count: number of hidden states that are read; the last one is the exit's.
    size: D, the size of a hidden state. width: the size of a latent.
    """

    def __init__(self, count: int, size: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.latent = nn.Parameter(torch.randn(count, size, width).mul_(size**-0.5))
        self.place = nn.Parameter(torch.zeros(count, width))
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.mix = nn.Linear(2 * width, width)
        self.out = nn.Linear(width, 1)
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, residuals: Sequence[Tensor], logits: Tensor) -> Tensor:
        """Return the log-odds that the best token of ``logits`` is the model's choice, float32 [B, T].

        residuals: the ``count`` hidden states of the draft on its way to the exit, in order, [B, T, D] each.
        logits: draft logits at the exit, [B, T, V'], which get no gradients.
        """
        unit = F.rms_norm(torch.stack(tuple(residuals), 2), residuals[0].shape[-1:], eps=1e-6)  # (B, T, L, D)
        z = torch.einsum("btld,ldw->btlw", unit, self.latent) + self.place
        exit_ = z[..., -1:, :]  # (B, T, 1, w)
        weight = (self.query(exit_) @ self.key(z).transpose(-1, -2) * self.width**-0.5).softmax(-1)  # (B, T, 1, L)
        both = torch.cat((exit_, weight @ z), -1)[..., 0, :]
        learned = self.out(F.silu(self.mix(both)))[..., 0].float()
        x = logits.detach().float()
        best, total = x.amax(-1), x.logsumexp(-1)
        # log p - log(1 - p) of the draft's best token.
        odds = best - total - torch.log(-torch.expm1((best - total).clamp_max(-1e-6)))
        return learned + self.scale.float() * odds


class M2R2(nn.Module):
    """The parameters of an accelerated residual p, and its computation: a short run of the model that drafts tokens.

    p stands in for the hidden state h of the model's own pass; h[k] is the input of layer k. For a token it begins as
    the embedding h[0] and runs layers [0, E), E being ``path.exit_layer``; before each further segment of layers [lo,
    hi), a projection estimates h[lo] from p and from the states of the token before; at each exit (a layer at which a
    token may leave, the end of the path among them), if ``path`` has final projections, another one estimates the final
    state h[N], which the final norm and the output head read. Adapters change the layers. ``docs/how-it-works.md`` has
    this as equations (1) to (6).

    path: the draft path, which says what p runs: E, the segments, the exits and the adapted linear layers.
    target (argument): the model, whose sizes the parameters get; raises SpecDecError if the path does not fit it.
    draft_vocab: the tokens that are drafted, int32 [V']; None: all.
    router (argument): size of the vectors to which a router projects the states that it reads; 0: no routers.
    num_layers: N, the model's number of layers.
    adapters: the low-rank adapters of the path's layers.
    projections: the linear layers that estimate h[lo] of each segment (equation 3), then h[N] at each exit (5).
    routers: for each exit, the module that predicts whether the draft made there is right (``Router``); None: there
        are none.
    inference_maps: the projections in their fastest format, made by ``freeze``; empty while they are trained.
    errors: in training, what rounding the projections' weights for drafts adds to them; empty: nothing.
    """

    def __init__(self, path: M2R2Path, target: Target, draft_vocab: Tensor | None = None, router: int = 0) -> None:
        super().__init__()
        path.check(target.num_layers)
        self.path, self.num_layers = path, target.num_layers
        shapes, narrow = {}, {layer: narrow_mlp(target, layer, path.neurons) for layer in path.narrow_layers}
        for layer, names in path.adapters.items():
            if not 0 <= layer < target.num_layers:
                raise SpecDecError(f"the drafter has adapters on layer {layer}; the model has {target.num_layers}")
            linears = target.linears(layer)
            if layer in narrow:
                linears |= narrow[layer].shapes(path.neurons)
            if missing := [name for name in names if name not in linears]:
                raise SpecDecError(f"the drafter has adapters on '{missing[0]}', which layer {layer} does not have")
            shapes[layer] = {name: linears[name] for name in names}
        self.adapters = Adapters(shapes, path.rank, dict.fromkeys(narrow, path.neurons))
        d = target.hidden_size
        # One to each segment, of [p; previous final state; previous state where the segment begins]. Then, if the path
        # has final projections, one to the final state at each exit, of [p; previous final state].
        widths = [3 * d] * len(path.segments) + [2 * d] * (path.final_projection * len(path.stages_to_exit))
        self.projections: Sequence[nn.Linear] = nn.ModuleList(nn.Linear(width, d) for width in widths)  # type: ignore[assignment]
        counts = [path.num_residuals(index) for index in range(len(path.stages_to_exit))]
        self.routers = nn.ModuleList(Router(count, d, router) for count in counts) if router else None
        self.inference_maps: list[UnitMap] = []
        self.errors: list[Tensor] = []
        self.register_buffer("draft_vocab", draft_vocab)
        self.draft_vocab: Tensor | None

    def projection_inputs(self, index: int, x: Tensor, carry: Carry) -> list[Tensor]:
        """Return the 2 or 3 inputs, [B, T, D] each, that projection ``index`` reads for ``x``, before normalization.

        They are ``x``, ``carry.final`` and, for a segment's projection, ``carry.inputs[index]``.

        index: number of the projection: one for each segment of the draft path, then one for each exit.
        carry: the deep states of the token before each.
        """
        inputs = [carry.inputs[index]] if index < len(self.path.segments) else []
        return [x, carry.final, *inputs]

    def features(self, index: int, x: Tensor, carry: Carry) -> Tensor:
        """Return the normalized input of projection ``index`` for ``x`` [B, T, D]: [B, T, 2 D or 3 D].

        Each of ``projection_inputs`` is divided by its root mean square, and all are concatenated.

        index: number of the projection: one for each segment of the draft path, then one for each exit.
        carry: the deep states of the token before each.
        """
        return torch.cat([rms_unit(part) for part in self.projection_inputs(index, x, carry)], -1)

    def project(self, index: int, x: Tensor, carry: Carry) -> Tensor:
        """Return the output [B, T, D] of projection ``index`` for the accelerated residual ``x`` [B, T, D].

        A projection is a linear layer of 2 D or 3 D inputs: ``x`` and states of the token before, each divided by its
        root mean square, side by side.

        index: 0 .. number of segments - 1: the projection whose output enters that segment of later layers, in place
            of the base model's state there; after these, the projection of each exit, whose output is the estimate of
            the base model's final state.
        carry: the deep states of the token before: its final state, and its input of each segment, [B, T, D] each.
        """
        if self.inference_maps:
            return self.inference_maps[index](self.projection_inputs(index, x, carry))
        layer = self.projections[index]
        features = self.features(index, x, carry)
        weight = layer.weight + self.errors[index] if self.errors else layer.weight
        return F.linear(features, weight.to(x.dtype), layer.bias.to(x.dtype))

    def estimate(self, exit: int, p: Tensor, carry: Carry) -> Tensor:
        """Return the estimate of the last layer's output h[N], before the final norm, [B, T, D], at an exit.

        exit: number of the exit, from 0, in the order of the path. p: the draft's hidden state there, [B, T, D], which
            is returned as it is without final projections.
        carry: the deep states of the token before each.
        """
        return self.project(len(self.path.segments) + exit, p, carry) if self.path.final_projection else p

    @torch.no_grad()
    def round(self, target: Target) -> None:
        """Let training see the weights as drafts on a CPU read them, rounded to 4 or 8 bits.

        Gradients pass through the rounding unchanged. Call it again after the parameters have changed.
        """
        target.round_adapted(self.adapters)
        weights = [each.weight.detach() for each in self.projections]
        self.errors = [rounded_for_drafts(each.bfloat16()).to(each.dtype) - each for each in weights]

    def freeze(self, target: Target, maps: list[UnitMap] | None = None) -> None:
        """Prepare for drafting: move the parameters to the target's dtype and device, and set ``inference_maps``.

        The parameters get no gradients any more.
        maps: what ``inference_maps`` becomes, one for each projection; None: they are made here.
        """
        self.to(target.device, target.dtype).requires_grad_(False).eval()
        self.inference_maps = maps or [UnitMap(each.weight, each.bias) for each in self.projections]

    def run_segment(
        self,
        target: Target,
        index: int,
        x: Tensor,
        positions: Tensor,
        ids: Tensor,
        mask: Mask,
        cache: KVCache,
        watched: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the layers [lo, hi) of segment ``index``, with adapters, on T tokens of each row.

        This is p[k + 1] = p[k] + f_k(p[k]), lo <= k < hi, where p is the hidden state of the draft.

        target: the model, whose layers run. index: number of the segment in ``path.segments``, from 0.
        x: p[lo], which a projection has made, [B, T, D].
        positions, ids: positions and token ids of the tokens, int64 [B, T] each.
        mask: which entries of ``cache`` each token sees, including the T that are added.
        cache: the model's keys and values. Those of the T tokens are added to layers [lo, hi), uncommitted.
        watched: whether to collect the states that a router (``Router``) reads.

        Returns a pair: p[hi], [B, T, D]; and the states p[lo], p[lo + 1], .. p[hi], [B, T, D] each, [] unless
        ``watched``.
        """
        lo, hi = self.path.segments[index]
        taps = router_taps(lo, hi) if watched else None
        p = target.layers(x, lo, hi, Pass(positions, mask, cache, taps=taps, adapters=self.adapters, ids=ids))
        return p, list((taps or {}).values())

    def run_shared(
        self,
        target: Target,
        x: Tensor,
        lo: int,
        hi: int,
        positions: Tensor,
        ids: Tensor,
        cache: KVCache,
        watched: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run layers [lo, hi) with adapters on the last n tokens of each row's chain.

        The model's own pass runs these layers, too, without adapters, and has run them before.

        This is p[k + 1] = p[k] + f_k(p[k]), lo <= k < hi, with p[lo] = h[lo], where h is the hidden state of the
        model's own pass and p that of the draft. p attends to the keys and values of h.

        target: the model, whose layers run.
        x: h[lo] of the n tokens, [B, n, D].
        positions, ids: positions and token ids of these tokens, int64 [B, n] each.
        cache: must have the keys and values of h for these tokens, uncommitted; the call adds none.
        watched: whether to collect the states that a router (``Router``) reads.

        Returns a pair: p[hi], [B, n, D]; and the states p[lo + 1], .. p[hi], [B, n, D] each, [] unless ``watched``.
        """
        n = x.shape[1]
        old = cache.lengths[lo] - cache.committed - n
        # p sees h's keys (shared KV), also at its own position; no token sees p's.
        chain = torch.ones(n, old + n, dtype=torch.bool).tril(old)
        mask = cache.register(lo, positions, torch.cat((chain, torch.zeros(n, n, dtype=torch.bool)), 1))
        taps = router_taps(lo + 1, hi) if watched else None
        p = target.layers(x, lo, hi, Pass(positions, mask, cache, taps=taps, adapters=self.adapters, ids=ids))
        cache.trim(n, lo, hi)
        return p, list((taps or {}).values())


def narrow_mlp(target: Target, layer: int, neurons: int) -> GatedMLP:
    """Return the MLP of layer ``layer``. Raises SpecDecError if it cannot run with only ``neurons`` of its neurons.

    ``neurons`` must be a multiple of ``NEURONS``, and no more than the MLP has.
    """
    mlp = gated_mlp(target.block(layer))
    if mlp is None or not 0 < neurons <= mlp.size or neurons % NEURONS:
        size = "none" if mlp is None else mlp.size
        raise SpecDecError(
            f"the drafter runs {neurons} neurons of layer {layer}'s MLP, which has {size} to choose from; need a "
            f"multiple of {NEURONS}"
        )
    return mlp


def router_taps(lo: int, hi: int) -> dict[int, Tensor]:
    """Return a dict to pass as ``Pass.taps``: keys lo .. hi, whose values the pass replaces by hidden states [B, T, D].

    These are the inputs of layers [lo, hi) and, as value of hi, the output of the last one.
    """
    return {layer: torch.empty(0) for layer in range(lo, hi + 1)}


def load_network(target: Target, folder: Path, dtype: torch.dtype = torch.float32) -> M2R2:
    """Return the network in a drafter folder, in ``dtype``, on the CPU and not frozen yet (``M2R2.freeze``).

    Raises SpecDecError if the folder is missing or broken, or the network does not fit the target.
    """
    config = drafter_folder.read_config(folder, "m2r2", target)
    path, router = M2R2Path.from_json(config.get("path", {})), config.get("router", 0)
    drafter_folder.check_inner_size("the rank", path.rank, target.hidden_size)
    router = router and drafter_folder.check_inner_size("the router's width", router, target.hidden_size)
    network = drafter_folder.load(
        folder, target.vocab_size, lambda vocab: M2R2(path, target, vocab, router).to(dtype), current_name
    )
    for layer in path.narrow_layers:
        kept, mlp = network.adapters.kept(layer), narrow_mlp(target, layer, path.neurons)
        if kept is None or not bool((kept.diff() > 0).all()) or int(kept[0]) < 0 or int(kept[-1]) >= mlp.size:
            raise SpecDecError(f"the neurons of layer {layer} in '{folder}' are not rising numbers below {mlp.size}")
    return network


def current_name(name: str) -> str:
    """Return the parameter's name in ``M2R2`` of a stored tensor; ``name`` may be from a file of an earlier version."""
    return re.sub(r"^leaps\.", "projections.", name)
