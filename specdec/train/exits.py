"""Training of exit modules (deed) and depth routers (mixture-of-depths).

Exit modules start as linear layers that closed-form regression fits to the base model's final states. They learn with
deep supervision: KL at every exit. Their inputs are the base model's stored states, so training runs no layer.
Routers learn with hard gates that have the gradient of soft gates (straight-through), and with a penalty that keeps
the share of layers that run at the capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from specdec.base.ridge import Sums
from specdec.drafters.exits import ExitHeads, Routers, check_exits
from specdec.kvcache.mask import Mask
from specdec.runtimes.target import Pass, Target
from specdec.runtimes.torch.linear import rms_unit
from specdec.train.batches import TrainingBatch
from specdec.train.evaluate import acceptance_lengths, chain_figures
from specdec.train.method import TrainingMethod, agreement_name
from specdec.train.settings import Positive, TrainSettings
from specdec.train.states import StateSelection, whole_pass
from specdec.train.student import Teacher

STEPS = 4  # drafted tokens per step in evaluation
THRESHOLD = 0.5  # probability of the best token at which a token leaves in evaluation, the drafter's default


class ExitSettings(TrainSettings):
    """Settings of ``specdec train deed``, in addition to ``TrainSettings``.

    exits: for each exit, the number of layers that a token has run when it may leave the model there, rising, each in
        1 .. N - 1 for a model of N layers. At least one is needed.
    layers_of: number of layers of the model that ``exits`` was written for; ``exits`` is scaled by N / ``layers_of``
        and rounded. None: ``exits`` is used as it is.
    width: size of the hidden layer in the small network (module) that each exit has.
    """

    exits: tuple[int, ...] = ()
    layers_of: int | None = None
    width: Positive = 96


class DeedMethod(TrainingMethod[ExitHeads]):
    """Trains exit modules (``ExitHeads``) with the KL divergence from the base model, averaged over the exits.

    An exit is a layer after which a drafted token may stop; its module estimates the final state from the state there.
    """

    name = "deed"
    settings_class = ExitSettings

    def __init__(self, settings: ExitSettings, target: Target) -> None:
        super().__init__(settings, target)
        scale = target.num_layers / (settings.layers_of or target.num_layers)
        self.exits = check_exits([max(round(layer * scale), 1) for layer in settings.exits], target.num_layers)

    def teacher_states(self) -> StateSelection:
        return StateSelection((), (*self.exits, self.target.num_layers))

    def build(self, vocab: Tensor | None) -> ExitHeads:
        self.teacher = Teacher(self.target, vocab, self.settings.sharpen)
        return ExitHeads(self.exits, self.settings.width, self.target, vocab)

    @torch.no_grad()
    def fit(self, network: ExitHeads, batches: Callable[[], Iterable[TrainingBatch]]) -> None:
        """Set the linear layer of each exit by ridge regression from the state at the exit to the final state.

        network: its exits' parameters are overwritten. batches: a function; each call returns a new iterator over the
        batches.
        """
        width, last = self.target.hidden_size, self.target.num_layers
        regressions = [Sums(width, width) for _ in self.exits]
        for batch in batches():
            for layer, sums in zip(self.exits, regressions, strict=True):
                sums.add(rms_unit(batch.hidden[layer][batch.valid]), batch.hidden[last][batch.valid])
        for sums, linear in zip(regressions, network.map, strict=True):
            assert isinstance(linear, nn.Linear)
            sums.fit(linear)

    def loss(self, network: ExitHeads, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        self.teacher.begin(batch)
        loss, figures = torch.zeros((), device=self.target.device), dict[str, float]()
        for index, layer in enumerate(self.exits):
            final = network(index, batch.hidden[layer])
            away, figures[agreement_name(index)], _ = self.teacher.compare(final, batch.valid)
            loss = loss + away / len(self.exits)
        return loss, figures

    def evaluate(self, network: ExitHeads, batches: Iterable[TrainingBatch]) -> dict[str, Any]:
        """Return the figures of drafting in which a token leaves at the first exit that is sure of it, by these keys.

        An exit is sure if the likeliest draft token has at least the probability ``THRESHOLD`` there; the last exit
        counts as sure.
        agreement: for each exit, the share of tokens that are the base model's choice if all leave there.
        top1: a list with the same share if each token leaves at its own exit. layers: mean number of layers run per
            token.
        chain, score: those of ``specdec.train.evaluate.evaluate``, for ``STEPS`` drafted tokens. positions: number of
            tokens.
        """
        teacher, layers = self.teacher, torch.tensor(self.exits, device=self.target.device)
        # Right at each exit, right at the token's own exit, layers, positions:
        sums = torch.zeros(len(self.exits) + 3, dtype=torch.float64)
        lengths: list[int] = []
        for batch in batches:
            teacher.begin(batch)
            known, valid = teacher.known(batch), batch.valid
            logits = [teacher.logits(network(n, batch.hidden[layer])).float() for n, layer in enumerate(self.exits)]
            right = torch.stack([teacher.hits(each) & known & valid for each in logits])  # (exits, B, T)
            sure = torch.stack([each.softmax(-1).amax(-1) >= THRESHOLD for each in logits])
            sure[-1] = True
            leaves = sure.int().argmax(0)  # the first exit that is sure
            chosen = right.gather(0, leaves[None])[0]
            counts = *right.sum((1, 2)), chosen.sum(), layers[leaves][valid].sum(), valid.sum()
            sums += torch.stack(counts).double().cpu()
            # Inputs are exact states, so all drafts of a chain are equal.
            lengths += acceptance_lengths([chosen] * STEPS, valid)
        shares = (sums / sums[-1].clamp_min(1)).tolist()
        return {
            "agreement": [round(x, 4) for x in shares[: len(self.exits)]],
            "top1": [round(shares[-3], 4)],
            "layers": round(shares[-2], 2),
            **chain_figures(lengths, [shares[-3]] * STEPS),
            "positions": int(sums[-1]),
        }

    @staticmethod
    def describe(figures: dict[str, Any]) -> str:
        exits = ", ".join(f"{x:.3f}" for x in figures["agreement"])
        return (
            f"mean acceptance length {figures['score']:.2f} with {STEPS} drafts (agreement at the exits {exits}; "
            f"leaving where sure {figures['top1'][0]:.3f} after {figures['layers']:.1f} layers)"
        )

    def config(self, network: ExitHeads) -> dict[str, Any]:
        return {"drafter": self.name, **network.config()}


class DepthSettings(TrainSettings):
    """Settings of ``specdec train mixture-of-depths``, in addition to ``TrainSettings``.

    first: index of the first layer that has a router; the layers before it always run.
    capacity: wanted share of the layers with routers that a token runs, between 0 and 1.
    pressure: weight in the loss of the squared difference between the actual share and the capacity.
    """

    first: int = 3
    capacity: float = Field(0.5, gt=0, lt=1)
    pressure: float = 20.0


class MixtureOfDepthsMethod(TrainingMethod[Routers]):
    """Trains depth routers with the KL divergence between the base model and one draft of each token.

    A draft runs the layers that the routers choose and attends to the base model's keys and values. The base model runs
    over each text again, because stored keys and values of all layers would be too large.
    A router at each layer from the setting ``first`` on decides for each token whether the layer runs or is skipped.
    """

    name = "mixture-of-depths"
    settings_class = DepthSettings

    def teacher_states(self) -> StateSelection:
        return StateSelection((), (self.target.num_layers,))

    def build(self, vocab: Tensor | None) -> Routers:
        self.teacher = Teacher(self.target, vocab, self.settings.sharpen)
        return Routers(self.settings.first, self.target, vocab)

    def _draft(self, network: Routers, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Draft the token after each position of ``batch``, with the layers that the routers ``network`` choose.

        Returns the final states [B, T, D], before the final norm, and the share of the layers with routers that ran, 0
        to 1, float32 [B, T]. Both have gradients for the routers. The base model runs over the texts here, too.
        """
        target, first = self.target, network.first
        ids = pad_sequence([text.long() for text in batch.texts], batch_first=True).to(target.device)
        cache, taps = target.new_cache(len(ids)), {first: torch.empty(0)}
        with torch.no_grad():
            whole_pass(target, ids, cache, taps)
        keys = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        at = batch.positions.clamp_max(ids.shape[1] - 1)
        x = taps[first].gather(1, at[..., None].expand(-1, -1, taps[first].shape[2]))  # (B, T, D)
        exact = keys[:, None] < at[:, :, None]  # (B, T, S)
        own = torch.eye(at.shape[1], dtype=torch.bool, device=ids.device).expand(len(ids), -1, -1)
        mask = Mask(at, torch.cat((keys, at), 1), torch.cat((exact, own), 2))
        share = torch.zeros(at.shape, device=ids.device)
        for layer in range(first, target.num_layers):
            y = target.layers(x, layer, layer + 1, Pass(at, mask, cache, ids=batch.ids))
            score = network.score(layer, x)
            soft = torch.sigmoid(score) - torch.sigmoid(score).detach()  # zero, with a gradient
            share = share + ((score > 0) + soft)[..., 0].float()
            x = torch.where(score > 0, y, x) + soft * (y - x).detach()
        return x, share / (target.num_layers - first)

    def loss(self, network: Routers, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        self.teacher.begin(batch)
        x, share = self._draft(network, batch)
        loss, agree, _ = self.teacher.compare(x, batch.valid)
        mean = share[batch.valid].mean()
        loss = loss + self.settings.pressure * (mean - self.settings.capacity) ** 2
        return loss, {"agree": agree, "share": float(mean.detach())}

    def evaluate(self, network: Routers, batches: Iterable[TrainingBatch]) -> dict[str, Any]:
        """Return the figures of drafting one token, by these keys.

        top1: a list with the share of drafts that are the base model's choice.
        share: share of the layers with routers that ran.
        score: that of ``top1``, less a penalty for a ``share`` above the setting ``capacity``.
        positions: number of drafts.
        """
        teacher, positions, right, ran = self.teacher, 0, 0, 0.0
        for batch in batches:
            teacher.begin(batch)
            x, shares = self._draft(network, batch)
            hits = teacher.hits(teacher.logits(x)) & teacher.known(batch) & batch.valid
            positions, right = positions + int(batch.valid.sum()), right + int(hits.sum())
            ran += float(shares[batch.valid].sum())
        agreement, share = right / max(positions, 1), ran / max(positions, 1)
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

    def config(self, network: Routers) -> dict[str, Any]:
        return {"drafter": self.name, "first": self.settings.first, "capacity": self.settings.capacity}
