"""Training of what leaves the model early: modules at exits (early-exit, deed) and depth routers (mixture-of-depths).

Exits begin as closed-form maps onto the base's final states and learn with deep supervision: KL at every exit. All of
their inputs are exact states, so no layer is run.
Routers learn with hard gates whose gradient is the soft gate's (straight-through), and a penalty that keeps the share
of layers run at the capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from specdec.base.errors import SpecDecError
from specdec.drafters.exits import ExitHeads, check_exits
from specdec.drafters.mixture_of_depths import Routers
from specdec.runtimes.cache import Mask
from specdec.runtimes.layer_pass import Pass
from specdec.runtimes.linear_maps import rms_unit
from specdec.runtimes.target import Target
from specdec.train.batches import Batch
from specdec.train.evaluate import acceptance_lengths, accepted_shares
from specdec.train.fit import Moments
from specdec.train.method import Method
from specdec.train.settings import Positive, TrainSettings
from specdec.train.states import Wanted
from specdec.train.student import Teacher

STEPS = 4  # drafts a step in evaluation
SURE = 0.5  # confidence at which evaluation has a token leave, as the drafter's own default


class ExitSettings(TrainSettings):
    """Where the exits are and how large their modules."""

    exits: tuple[int, ...] = ()
    layers_of: int | None = None  # depth of the model the exits were chosen on: scaled to others; None: as they are
    width: Positive = 96  # hidden size of an exit's module


class DeedMethod(Method):
    """KL to the base at each exit, equally weighted."""

    name: ClassVar[str] = "deed"
    settings_class: ClassVar[type[TrainSettings]] = ExitSettings
    settings: ExitSettings

    def __init__(self, settings: ExitSettings, target: Target) -> None:
        super().__init__(settings, target)
        scale = target.num_layers / (settings.layers_of or target.num_layers)
        self.exits = check_exits([max(round(layer * scale), 1) for layer in settings.exits], target.num_layers)

    def wanted(self) -> Wanted:
        return Wanted((), (*self.exits, self.target.num_layers))

    def build(self, vocab: Tensor | None) -> ExitHeads:
        self.teacher = Teacher(self.target, vocab, self.settings.sharpen)
        return ExitHeads(self.exits, self.settings.width, self.target, vocab)

    @torch.no_grad()
    def fit(self, network: nn.Module, batches: Callable[[], Iterable[Batch]]) -> None:
        """Each exit's map in closed form, onto the final state."""
        assert isinstance(network, ExitHeads)
        names = [str(layer) for layer in self.exits]
        moments = Moments([([name], "final") for name in names])
        for batch in batches():
            parts = {name: rms_unit(batch.hidden[int(name)]) for name in names}
            parts["final"] = batch.hidden[self.target.num_layers]
            moments.add({name: part[batch.valid] for name, part in parts.items()})
        for name, straight in zip(names, network.map, strict=True):
            assert isinstance(straight, nn.Linear)
            for parameter, found in zip((straight.weight, straight.bias), moments.solve([name], "final"), strict=True):
                parameter.copy_(found)

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        self.teacher.begin(batch)
        count, figures = batch.valid.sum(), dict[str, float]()
        loss = torch.zeros((), device=self.target.device)
        for index, layer in enumerate(self.exits):
            logits = self.teacher.logits(network(index, batch.hidden[layer]))
            loss = loss + (self.teacher.loss(logits) * batch.valid).sum() / (count * len(self.exits))
            agree = self.teacher.hits(logits)[batch.valid].float().mean()
            figures["agree" if index == 0 else f"agree{index + 1}"] = float(agree)
        return loss, figures

    def evaluate(self, network: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        """``agreement`` per exit; the rest as the drafter drafts: each token at the first exit that is sure of it.

        ``top1``: agreement then. ``layers``: run per token. ``chain`` and ``score``: as for other drafters.
        """
        assert isinstance(network, ExitHeads)
        teacher = Teacher(self.target, network.draft_vocab)
        sums = torch.zeros(len(self.exits) + 3, dtype=torch.float64)  # per exit, chosen, layers, positions
        lengths: list[int] = []
        for batch in batches:
            teacher.begin(batch)
            known = teacher.known(batch)
            chosen, layers, left = torch.zeros_like(known), torch.zeros_like(batch.ids), torch.zeros_like(known)
            for index, layer in enumerate(self.exits):
                logits = teacher.logits(network(index, batch.hidden[layer])).float()
                hit = teacher.hits(logits) & known & batch.valid
                sure = torch.exp(logits.amax(-1) - logits.logsumexp(-1)) >= SURE
                leaves = ~left & (sure | (layer == self.exits[-1]))
                chosen, layers, left = chosen | (hit & leaves), layers + layer * leaves, left | leaves
                sums[index] += hit.sum().cpu()
            found = chosen.sum(), (layers * batch.valid).sum(), batch.valid.sum()
            sums[len(self.exits) :] += torch.stack(found).double().cpu()
            # All inputs are exact states, so every draft of a chain is the same.
            for row, count in zip(chosen.tolist(), batch.valid.sum(1).tolist(), strict=True):
                lengths += acceptance_lengths([row] * STEPS, count)
        shares, chain = (sums / sums[-1].clamp_min(1)).tolist(), accepted_shares(lengths, STEPS)
        return {
            "agreement": [round(x, 4) for x in shares[: len(self.exits)]],
            "top1": [round(shares[-3], 4)],
            "layers": round(shares[-2], 2),
            "chain": chain,
            "score": round(1 + sum(chain), 3),
            "positions": int(sums[-1]),
        }

    @staticmethod
    def describe(figures: dict[str, Any]) -> str:
        exits = ", ".join(f"{x:.3f}" for x in figures["agreement"])
        return (
            f"mean acceptance length {figures['score']:.2f} with {STEPS} drafts (agreement at the exits {exits}; "
            f"leaving where sure {figures['top1'][0]:.3f} after {figures['layers']:.1f} layers)"
        )

    def config(self, network: nn.Module) -> dict[str, Any]:
        assert isinstance(network, ExitHeads)
        return {"drafter": self.name, **network.config()}


class EarlyExitMethod(DeedMethod):
    """The same with a single exit."""

    name: ClassVar[str] = "early-exit"

    def __init__(self, settings: ExitSettings, target: Target) -> None:
        super().__init__(settings, target)
        if len(self.exits) != 1:
            raise SpecDecError(
                f"early-exit has one exit; setting 'exits' names {len(self.exits)}: train 'deed' for more"
            )


class DepthSettings(TrainSettings):
    """Which layers are routed, and how many of them may run."""

    first: int = 3  # layers below are always run
    capacity: float = Field(0.5, gt=0, lt=1)  # share of the routed layers that a token runs
    pressure: float = 20.0  # weight of the squared distance of that share from the capacity


class MixtureOfDepthsMethod(Method):
    """KL to the base of one draft through the layers that the routers choose, on exact keys and values before it.

    The keys and values of all layers would be large to keep, so the base runs over each row's text again.
    """

    name: ClassVar[str] = "mixture-of-depths"
    settings_class: ClassVar[type[TrainSettings]] = DepthSettings
    settings: DepthSettings

    def wanted(self) -> Wanted:
        return Wanted((), (self.target.num_layers,))

    def build(self, vocab: Tensor | None) -> Routers:
        self.teacher = Teacher(self.target, vocab, self.settings.sharpen)
        return Routers(self.settings.first, self.target, vocab)

    def _draft(self, network: Routers, batch: Batch) -> tuple[Tensor, Tensor]:
        """The state to read out [B, T, D], and the share of routed layers run [B, T], with the soft gates' gradient."""
        target, first = self.target, network.first
        width = max(len(text) for text in batch.texts)
        ids = torch.zeros(len(batch.ids), width, dtype=torch.long, device=batch.ids.device)
        for b, text in enumerate(batch.texts):
            ids[b, : len(text)] = text
        keys = torch.arange(width, device=ids.device).expand(len(ids), -1)
        cache, taps = target.new_cache(len(ids)), {first: torch.empty(0)}
        with torch.no_grad():
            whole = Mask(keys, keys, keys[:, None] <= keys[:, :, None])
            target.layers(target.embed(ids, keys), 0, target.num_layers, Pass(keys, whole, cache, taps))
        at = batch.positions.clamp_max(width - 1)
        x = taps[first].gather(1, at[..., None].expand(-1, -1, taps[first].shape[2]))  # (B, T, D)
        exact = keys[:, None] < at[:, :, None]  # (B, T, S)
        own = torch.eye(at.shape[1], dtype=torch.bool, device=ids.device).expand(len(ids), -1, -1)
        mask = Mask(at, torch.cat((keys, at), 1), torch.cat((exact, own), 2))
        share = torch.zeros(at.shape, device=ids.device)
        for layer in range(first, target.num_layers):
            y, score = target.layers(x, layer, layer + 1, Pass(at, mask, cache)), network.score(layer, x)
            soft = torch.sigmoid(score) - torch.sigmoid(score).detach()  # zero, with a gradient
            share = share + ((score > 0) + soft)[..., 0].float()
            x = torch.where(score > 0, y, x) + soft * (y - x).detach()
        return x, share / (target.num_layers - first)

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(network, Routers)
        self.teacher.begin(batch)
        x, share = self._draft(network, batch)
        logits = self.teacher.logits(x)
        count = batch.valid.sum()
        mean = (share * batch.valid).sum() / count
        agree = self.teacher.hits(logits)[batch.valid].float().mean()
        loss = (self.teacher.loss(logits) * batch.valid).sum() / count + self.settings.pressure * (
            mean - self.settings.capacity
        ) ** 2
        return loss, {"agree": float(agree), "share": float(mean.detach())}

    def evaluate(self, network: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        """``top1``: agreement of a first draft. ``share``: of the routed layers it ran. ``score`` heeds both."""
        assert isinstance(network, Routers)
        teacher, positions, hits, ran = Teacher(self.target, network.draft_vocab), 0, 0, 0.0
        for batch in batches:
            teacher.begin(batch)
            x, shares = self._draft(network, batch)
            hit = teacher.hits(teacher.logits(x)) & teacher.known(batch) & batch.valid
            positions, hits = positions + int(batch.valid.sum()), hits + int(hit.sum())
            ran += float((shares * batch.valid).sum())
        agreement, share = hits / max(positions, 1), ran / max(positions, 1)
        over = max(share - self.settings.capacity - 0.02, 0.0)
        return {
            "top1": [round(agreement, 4)],
            "share": round(share, 4),
            "score": round(agreement - 10 * over, 4),
            "positions": positions,
        }

    @staticmethod
    def describe(figures: dict[str, Any]) -> str:
        return f"agreement {figures['top1'][0]:.3f} with {figures['share']:.0%} of the routed layers run"

    def config(self, network: nn.Module) -> dict[str, Any]:
        return {"drafter": self.name, "first": self.settings.first, "capacity": self.settings.capacity}
