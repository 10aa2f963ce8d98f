"""The drafter that makes a tree of the heads' probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base import options
from specdec.base.devices import upload
from specdec.models import drafter_folder
from specdec.runtimes.draft_path import DeviceChoice, DeviceTree, TreeLimits, calibrated
from specdec.runtimes.target import GivenLinear, Target
from specdec.runtimes.torch.captured_draft import grow_captured
from specdec.runtimes.torch.draft import FixedHeads, Rules, Step, fixed_heads, given_of
from specdec.runtimes.torch.linear import rms_unit
from specdec.speculation.candidates import Candidates
from specdec.speculation.device_draft import DeviceDraft, choice_of
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter, Given, Traits
from specdec.speculation.state import State
from specdec.speculation.tree_builder import draft_best
from specdec.speculation.trees import MOST_NODES, Choice, likeliest_paths

from ..vocabulary import Context, DraftVocabulary, read_out
from . import public
from .network import Medusa

RANKS = 8  # number of choices of a head that a tree may have


class MedusaRow:
    """What a ``MedusaDrafter`` keeps of one row (sequence).

    context: tokens of the row's text that the drafter was not trained on, and that it drafts as well.
    final: final state of the token before the root (the last token of the text), before the final norm, [1, 1, D].
    """

    def __init__(self) -> None:
        self.context = Context()
        self.final = torch.empty(0)


class MedusaDrafter(Drafter):
    """Drafts with Medusa heads the tree with the most expected accepted tokens for its number of nodes.

    Medusa heads are small networks that read the model's final state; each predicts a token at another distance.

    network: the heads' blocks.
    nodes: number of nodes of the tree; None: as many as are worth their cost (``Prices``), or the maximum depth of a
        draft if costs are not known.
    output_heads: the heads' own output matrices, [V, D] each, of a public checkpoint, whose blocks read the final state
        after the norm; None: all heads use the model's output head.
    """

    name: ClassVar[str] = public.KIND
    summary: ClassVar[str] = "extra heads on the final state, which draft a tree; trained, or public checkpoints"
    training: ClassVar[str] = "specdec train medusa"
    needs_training: ClassVar[bool] = True

    def __init__(self, network: Medusa, nodes: int | None = None, output_heads: Sequence[Tensor] | None = None) -> None:
        self.network, self.output_heads = network, output_heads
        self.nodes = None if nodes is None else options.check_int("nodes", nodes, 1)

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> MedusaDrafter:
        """Load trained heads. Raises SpecDecError if they are missing, damaged or made for another model.

        source: a drafter folder, or public heads in a folder or a Hugging Face repository ORG/NAME[@revision]; None:
            the folder that is shipped for the model.
        kwargs: the option ``nodes`` of the constructor.
        """
        options.check_names(cls.name, kwargs, ("nodes",))
        folder, nodes = (
            drafter_folder.find(cls.name, cls.training, target, None) if source is None else public.find_folder(source),
            kwargs.get("nodes"),
        )
        if (theirs := public.read_config(folder)) is not None:
            network, own = public.read_checkpoint(folder, theirs, target)
            return cls(network, nodes, own)
        config = drafter_folder.read_config(folder, cls.name, target)
        heads, layers = public.check_sizes(config.get("heads"), config.get("layers"))
        make = lambda vocab: Medusa(target.hidden_size, heads, layers, bool(config.get("rooted")), vocab)  # noqa: E731
        return cls(drafter_folder.load(folder, target.vocab_size, make), nodes)

    def bind(self, target: Target) -> None:
        network, self.target = self.network, target
        network.freeze(target)
        self.vocabulary = DraftVocabulary(target, network.draft_vocab)
        if self.output_heads is not None:
            self.output_heads = [weight.to(target.device, target.dtype) for weight in self.output_heads]
            self.norm = final_norm(target)
        vocab, shapes = network.draft_vocab, [tuple(weight.shape) for weight in network.weights]
        cost_key = f"{shapes} {self.output_heads is not None} {None if vocab is None else len(vocab)}"
        self.traits = Traits((self.name,), taps=(target.num_layers,), has_probabilities=True, cost_key=cost_key)

    def begin(self) -> MedusaRow:
        return MedusaRow()

    def propose(self, state: State, limit: int) -> Draft:
        nodes = self.nodes or (None if state.prices else limit)
        found = self.candidates(state, limit, choice=choice_of(state, limit, nodes, RANKS))
        if isinstance(found, DeviceTree):
            return DeviceDraft(found, state, 0)
        return draft_best(found, limit, self.nodes, state)

    def candidates(
        self, state: State, limit: int, given: Given = None, choice: DeviceChoice | None = None
    ) -> list[Candidates] | DeviceTree:
        levels, prices, device = min(limit, self.network.heads), state.prices, state.cache.device
        tables = upload(prices.tables, device, torch.float32) if prices and prices.tables else None
        if self.output_heads is None:
            self.vocabulary.follow(state, [row.context for row in state.row_states])
        finals = [row.final for row in state.row_states]  # (1, 1, D) each
        final = finals[0] if len(finals) == 1 else torch.cat(finals)
        if choice is not None:
            return self._on_device(state, final, levels, tables, given, choice)
        vocabulary = self.vocabulary
        logits = self._logits(final, state.roots, state.positions, vocabulary.heads, vocabulary.forbidden)[
            :, :levels
        ].float()
        tables = None if tables is None else tables[:, 0]
        every = _best(logits, self.vocabulary.tokens, tables)  # one read
        return [
            self._likeliest(state, b, logits[b, :most], None if tables is None else tables[b : b + 1], best)
            if most
            else Candidates.none()
            for b, (most, best) in enumerate(zip(state.depths, every, strict=True))
        ]

    def _on_device(
        self,
        state: State,
        final: Tensor,
        levels: int,
        tables: Tensor | None,
        given: Given,
        choice: DeviceChoice,
    ) -> DeviceTree:
        """Build the tree on the device, and return its selected nodes. A head has the same logits after all paths.

        state: the rows. final: final states [B, 1, D] of the tokens before the roots, before the final norm.
        levels: number of levels (depths) of the tree, at most one for each head.
        tables: the rows' calibration tables of each source, [B, sources, 11] (``calibrated``); None: no calibration.
        given: candidates of n-grams for each row; None: none. choice: the rule by which nodes are selected.
        """
        vocabulary = self.vocabulary
        heads = fixed_heads(vocabulary.heads, vocabulary.tokens, vocabulary.forbidden, len(final))
        if heads is None:
            heads = FixedHeads(vocabulary.heads, vocabulary.tokens, vocabulary.forbidden)

        def step(_: Any, rows: Any) -> tuple[Step, Sequence[Tensor]]:
            final, roots, positions, forbidden = rows
            every = self._logits(final, roots, positions, heads.heads, forbidden)[:, :levels].float()
            each = iter(every.split(1, 1))
            return (lambda *_: next(each)), ()

        roots, rules = state.roots, Rules(heads.tokens, tables, given=given_of(given, final.device))
        limits, keep, rows = TreeLimits(levels, RANKS), choice.nodes, (final, roots, state.positions, heads.forbidden)
        key = "medusa", self, *heads.heads
        found, _ = grow_captured(state.target, key, step, roots, limits, rules, choice, keep, (), rows)
        assert isinstance(found, DeviceTree)
        return found

    def _likeliest(
        self, state: State, row: int, logits: Tensor, table: Tensor | None, best: list[list[list[float]]]
    ) -> Candidates:
        """Return the likeliest paths of the row of index ``row`` as candidates, at most ``nodes`` nodes.

        state: the rows of the batch. logits: the row's draft logits of K heads, [K, V'].
        table: calibration table of probabilities (``calibrated``), [1, 11]; None: they are not calibrated.
        best: what ``_best`` returns for the row.
        """
        constraint, vocab = state.sampler.rows[row].constraint, self.vocabulary.tokens

        def after(path: Sequence[int]) -> Iterable[Choice]:
            depth = len(path)
            if depth == len(logits):
                return ()
            own, likely, ids = best[depth]
            if constraint is not None:
                scores = constraint.masked([*state.ids[row], *path], logits[depth : depth + 1], vocab)
                [[[own, likely, ids]]] = _best(scores[None], vocab, table)
            return zip(map(int, ids), own, likely, strict=True)

        return likeliest_paths(after, self.nodes or MOST_NODES)

    def _logits(
        self,
        final: Tensor,
        roots: Tensor,
        positions: Tensor,
        heads: Sequence[nn.Linear | None],
        forbidden: Tensor | None,
    ) -> Tensor:
        """Return the logits of all K heads over the draft vocabulary, [B, K, V'].

        final: final states [B, 1, D] of the tokens before the roots.
        roots, positions: tokens and their positions, int64 [B, 1] each.
        heads: the output heads, whose logits are concatenated; None: the model's own.
        forbidden: outputs of the second head that a row may not draft, bool [B, outputs]; None: all are allowed.
        """
        target = self.target
        if self.output_heads is not None:
            y = self.network(target.readout(final, self.norm)[:, 0])  # (B, K, D)
            return torch.stack([F.linear(y[:, k], weight) for k, weight in enumerate(self.output_heads)], 1)
        root = rms_unit(target.embed(roots, positions)[:, 0]) if self.network.rooted else None
        return read_out(target, self.network(rms_unit(final)[:, 0], root), heads, forbidden)

    def observe(self, row_states: list[Any], paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        states = taps[self.traits.taps[0]]
        for number, (row, path) in enumerate(zip(row_states, paths, strict=True)):
            if path:
                row.final = states[number : number + 1, path[-1] : path[-1] + 1]


def final_norm(target: Target) -> nn.Linear:
    """Return an identity layer as output head, with which ``target.readout`` computes the model's final norm alone."""
    return GivenLinear(torch.eye(target.hidden_size, device=target.device, dtype=target.dtype))


def _best(logits: Tensor, vocab: Tensor | None, tables: Tensor | None) -> list[list[list[list[float]]]]:
    """Return the k = ``RANKS`` best tokens of each head of each row: a list [B][K][3][k].

    The three lists are the tokens' softmax probabilities, best first, their calibrated probabilities, and their ids.

    logits: [B, K, V']; NaN: nothing is allowed, and probabilities are 0.
    vocab: the token id of each logit, int64 [V']; None: its index.
    tables: each row's calibration table (``calibrated``), [B, 11]; None: probabilities are not calibrated.
    """
    p, found = logits.softmax(-1).nan_to_num(0.0).topk(min(RANKS, logits.shape[-1]))  # NaN: nothing is allowed
    sure = calibrated(p, tables)
    ids = found if vocab is None else vocab[found]
    read: list[list[list[list[float]]]] = torch.stack((p, sure, ids.float()), 2).tolist()  # float32 holds 2^24 tokens
    return read
