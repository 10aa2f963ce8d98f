"""Training of EAGLE-3 heads: distillation on the head's own drafts, several steps ahead ("training-time test").

Step s at position t drafts s tokens past the last verified one: from exact pairs up to t - s + 1, then from the head's
own outputs. The head attends to the whole text, so the inputs of the tapped layers are also stored for prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specdec.base.errors import SpecDecError
from specdec.drafters.eagle3_network import KIND, Eagle3, Eagle3Config, default_taps
from specdec.drafters.medusa import final_norm
from specdec.models import drafter_folder, source
from specdec.runtimes.target import Target
from specdec.train.batches import TrainingBatch
from specdec.train.evaluate import acceptance_lengths, chain_figures
from specdec.train.method import TrainingMethod, agreement_name
from specdec.train.settings import Positive, TrainSettings
from specdec.train.states import StateSelection
from specdec.train.student import Teacher, shift_right, step_mask

EVALUATED = 4  # draft steps in evaluation


class Eagle3Settings(TrainSettings):
    """The layers that the head reads, its sizes (None: the model's own), and its draft steps in training."""

    layers: tuple[int, ...] = ()  # their inputs are read; empty: an early, a middle and a late layer
    inner: Positive | None = None  # of the MLP
    heads: Positive | None = None  # of attention
    kv_heads: Positive | None = None
    draft_steps: Positive = 3
    focus: float = 1.0  # weight of a step after a wrong earlier step


class Eagle3Method(TrainingMethod[Eagle3]):
    """KL to the base at each of the head's own steps."""

    name = KIND
    settings_class = Eagle3Settings

    def __init__(self, settings: Eagle3Settings, target: Target) -> None:
        super().__init__(settings, target)
        config = target.model.config.get_text_config()
        self.layers = settings.layers or default_taps(target.num_layers)
        if max(self.layers) > target.num_layers or min(self.layers) < 0:
            raise SpecDecError(f"setting 'layers' names {max(self.layers)}; the model has {target.num_layers}")
        self.heads = settings.heads or int(config.num_attention_heads)
        self.kv_heads = settings.kv_heads or int(getattr(config, "num_key_value_heads", None) or self.heads)
        if self.heads % self.kv_heads:
            raise SpecDecError(f"settings 'heads' ({self.heads}) must be a multiple of 'kv_heads' ({self.kv_heads})")
        self.head_dim = int(getattr(config, "head_dim", None) or target.hidden_size // self.heads)
        self.inner = settings.inner or int(getattr(config, "intermediate_size", None) or 4 * target.hidden_size)
        rope = getattr(config, "rope_parameters", None) or {}
        self.rope = {"rope_theta": float(getattr(config, "rope_theta", None) or rope.get("rope_theta", 10000.0))}

    def teacher_states(self) -> StateSelection:
        return StateSelection((), (self.target.num_layers,), tuple(sorted(set(self.layers))))

    def build(self, vocab: Tensor | None) -> Eagle3:
        target, width = self.target, self.target.hidden_size
        if self.settings.init:  # its output head fixes the vocabulary
            vocab = _vocabulary(Path(self.settings.init), target.device)
        self.teacher = Teacher(target, vocab, self.settings.sharpen, extra=0)
        size = target.vocab_size if vocab is None else len(vocab)
        config = Eagle3Config(
            self.layers, width, self.heads, self.kv_heads, self.head_dim, self.inner, size, rope=self.rope
        )
        d2t = None if vocab is None else vocab.long() - torch.arange(size, device=vocab.device)
        network = Eagle3(config, target, d2t)
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                torch.nn.init.zeros_(parameter)
        with torch.no_grad():  # initially the head reads out the last tapped layer like the base
            network.get_parameter("fc.weight").zero_()[:, -width:].fill_diagonal_(1)
            network.get_parameter("norm.weight").copy_(self._final_norm())
            tokens = torch.arange(size) if vocab is None else vocab.long()
            network.get_parameter("lm_head.weight").copy_(target.reduced_head(tokens).weight)
        return network

    def _final_norm(self) -> Tensor:
        """The weight [D] of the base's final norm: its output for a state of ones and minus ones, without signs."""
        signs = torch.ones(self.target.hidden_size, device=self.target.device)
        signs[1::2] = -1
        return (
            self.target.readout(signs.to(self.target.dtype)[None, None], final_norm(self.target))[0, 0].float() * signs
        )

    def parameter_scale(self, name: str, parameter: Tensor) -> float:
        """The RMS of the first values; for maps that begin at zero, the default."""
        return float(parameter.detach().square().mean().sqrt()) or super().parameter_scale(name, parameter)

    def loss(self, network: Eagle3, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        settings, teacher = self.settings, self.teacher
        teacher.begin(batch)
        loss, figures = torch.zeros((), device=self.target.device), dict[str, float]()
        right = batch.valid  # where the head's earlier steps equal the text
        for s, (features, valid) in enumerate(draft_steps(network, self.target, batch, settings.draft_steps)):
            reached = shift_right(right) if s else valid
            logits = network.logits(features)
            away, figures[agreement_name(s)] = teacher.compare(logits, valid, torch.where(reached, 1.0, settings.focus))
            loss = loss + away
            right = teacher.hits(logits, teacher.next) & reached
        return loss, figures

    def evaluate(self, network: Eagle3, batches: Iterable[TrainingBatch]) -> dict[str, Any]:
        """``top1``, ``top3`` per draft step, over the head's vocabulary; others: ``chain_figures``."""
        teacher, lengths = self.teacher, list[int]()
        sums = torch.zeros(3, EVALUATED, dtype=torch.float64)  # positions, top1, top3
        for batch in batches:
            teacher.begin(batch)
            hits: list[Tensor] = []
            for s, (features, valid) in enumerate(draft_steps(network, self.target, batch, EVALUATED)):
                rank = teacher.ranks(network.logits(features))
                for row, figure in enumerate((torch.ones_like(rank), rank == 0, rank < 3)):
                    sums[row, s] += (figure * valid).sum().double().cpu()
                hits.append((rank == 0) & valid)
            lengths += acceptance_lengths(hits, batch.valid)
        top1, top3 = (sums[1:] / sums[0].clamp_min(1)).tolist()
        shares = {"top1": [round(x, 4) for x in top1], "top3": [round(x, 4) for x in top3]}
        return {**shares, **chain_figures(lengths, EVALUATED), "positions": int(sums[0, 0])}

    @staticmethod
    def describe(figures: dict[str, Any]) -> str:
        chain = ", ".join(f"{x:.3f}" for x in figures["top1"])
        return f"mean acceptance length {figures['score']:.2f} with {len(figures['top1'])} drafts (agreement {chain})"

    def config(self, network: Eagle3) -> dict[str, Any]:
        name = source.public_name(self.settings.model, self.settings.adapter)
        return {"drafter": KIND, **network.config.to_json(self.target, name, self.settings.draft_steps)}

    def tensors(self, masters: Eagle3) -> dict[str, Tensor]:
        stored, tokens = masters.state_dict(), masters.tokens
        if tokens is None:
            return stored
        marked = torch.zeros(self.target.vocab_size, dtype=torch.bool, device=tokens.device)
        return stored | {"t2d": marked.index_fill(0, tokens, True)}


def _vocabulary(folder: Path, device: torch.device) -> Tensor | None:
    """The draft vocabulary of a trained head; None: the full one."""
    d2t = drafter_folder.read_tensors(folder).get("d2t")
    return None if d2t is None else (d2t + torch.arange(len(d2t))).to(device)


def draft_steps(network: Eagle3, target: Target, batch: TrainingBatch, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the head's outputs [B, T, D'] and valid positions (bool [B, T]) of steps 1 .. ``steps``."""
    texts = pad_sequence([text.long() for text in batch.texts], batch_first=True)
    texts = F.pad(texts, (0, batch.slots - texts.shape[1])).to(batch.ids.device)  # (B, S)
    places = torch.arange(batch.slots, device=texts.device).expand_as(texts)
    fused = network.fuse([batch.context[layer] for layer in network.config.layers])
    features = shift_right(fused)  # (B, S, D'): of the token before each
    _, keys, values = network.qkv(target.embed(texts, places), features, places)
    at = batch.positions.clamp_max(batch.slots - 1)
    features = features.gather(1, at[..., None].expand(-1, -1, features.shape[2]))  # (B, T, D')
    embedded, valid = target.embed(batch.ids, batch.positions), batch.valid
    for step in range(1, steps + 1):
        seen = step_mask(batch, step).bool_mask()
        assert seen is not None
        seen[..., 0] = False  # the first token has no predecessor, and so no pair

        def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor = seen) -> Tensor:
            nonlocal keys, values
            keys, values = torch.cat((keys, k), 2), torch.cat((values, v), 2)
            return F.scaled_dot_product_attention(q, keys, values, seen, enable_gqa=True)

        out = network.layer(embedded, features, batch.positions, attend)
        yield out, valid
        features, valid = shift_right(out), valid & shift_right(valid)
