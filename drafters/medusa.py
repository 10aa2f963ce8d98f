"""Medusa: further heads on the final state of the last verified token draft a tree at once (Cai, arXiv 2401.10774).

Head k predicts the token k positions after the root. Each is one or more residual blocks, x + SiLU(W x + b) (equation 1
of the paper), and an output head. Ours share the model's final norm and output head, over a reduced vocabulary, and
their first block may also read the root's embedding (as in Hydra, arXiv 2402.05109). Public checkpoints, with an output
head for each, are read in the format of their authors and in vLLM's; their blocks read the normalised state.

The tree's shape follows from the heads' own probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.models import drafter_folder, hub
from specdec.runtimes.target import GivenLinear, Target
from specdec.runtimes.torch.linear import Linear, for_drafting, rms_unit
from specdec.speculation.candidates import Candidates, calibrated
from specdec.speculation.draft import Draft, Drafter, State
from specdec.speculation.tree_builder import draft_best
from specdec.speculation.trees import MOST_NODES, grow_best_first

from .vocabulary import Context, DraftVocabulary

RANKS = 8  # number of choices of a head that a tree may have
HEADS, BLOCKS = 64, 16  # maximum numbers of heads, and of blocks of each
KIND = "medusa"
PUBLIC, PICKLE = "medusa_lm_head.safetensors", "medusa_lm_head.pt"
VLLM_COUNTS = {"num_heads": "num_heads", "num_layers": "num_hidden_layers"}  # with or without "medusa_" before them


class Medusa(nn.Module):
    """The residual blocks of ``heads`` heads, ``layers`` each, on states of ``width`` D. Zero blocks change nothing.

    rooted: whether the first block also reads the root's embedding.
    draft_vocab: int32 [V'], or None: the full vocabulary.
    inference_maps: the first block's map in its fastest format, once nothing is trained any more.
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
        """States [..., D], and their roots' embeddings if ``rooted`` -> inputs of the output heads [..., K, D]."""
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
        """Prepare for drafting: parameters in the target's dtype and place, the largest map in its fastest format."""
        self.to(target.device, target.dtype).requires_grad_(False).eval()
        self.inference_maps = for_drafting(self.weights[0].flatten(0, 1), self.biases[0].flatten())


class MedusaRow:
    """The state of a row. final: final state of the last verified token, [1, 1, D]."""

    def __init__(self) -> None:
        self.context = Context()
        self.final = torch.empty(0)


class MedusaDrafter(Drafter):
    """Drafts the tree with the most expected accepted tokens for its number of nodes.

    Raises SpecDecError if no trained heads fit the target.

    nodes: nodes of the tree; None: those that are worth their price (``Prices``), or as many as the draft may be deep.
    output_heads: output heads of a public checkpoint, [V, D] each, whose blocks read the normalised state; None: the
        model's.
    """

    name: ClassVar[str] = KIND
    summary: ClassVar[str] = "extra heads on the final state, which draft a tree; trained, or public checkpoints"
    training: ClassVar[str] = "specdec train medusa"
    needs_training: ClassVar[bool] = True
    has_probabilities = True

    def __init__(self, network: Medusa, nodes: int | None = None, output_heads: Sequence[Tensor] | None = None) -> None:
        self.network, self.output_heads = network, output_heads
        self.nodes = None if nodes is None else options.check_int("nodes", nodes, 1)

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> MedusaDrafter:
        """From a folder, public heads ORG/NAME[@revision] on Hugging Face, or the folder shipped for the model.

        Raises SpecDecError for anything missing, broken or made for another model.
        """
        options.check_names(cls.name, kwargs, ("nodes",))
        folder, nodes = cls.find(target, None) if source is None else _folder(source), kwargs.get("nodes")
        if (public := _public_config(folder)) is not None:
            network, own = _read_public(folder, public, target)
            return cls(network, nodes, own)
        config = drafter_folder.read_config(folder, cls.name, target)
        heads, layers = _check_sizes(config.get("heads"), config.get("layers"))
        make = lambda vocab: Medusa(target.hidden_size, heads, layers, bool(config.get("rooted")), vocab)  # noqa: E731
        return cls(drafter_folder.load(folder, target.vocab_size, make), nodes)

    def bind(self, target: Target) -> None:
        self.taps = (target.num_layers,)
        network = self.network
        network.freeze(target)
        self.vocabulary = DraftVocabulary(target, network.draft_vocab)
        if self.output_heads is not None:
            self.output_heads = [weight.to(target.device, target.dtype) for weight in self.output_heads]
            self.norm = final_norm(target)
        vocab, shapes = network.draft_vocab, [tuple(weight.shape) for weight in network.weights]
        self.path = f"{shapes} {self.output_heads is not None} {None if vocab is None else len(vocab)}"
        self.start()

    def start(self) -> None:
        self.vocabulary.start()

    def begin(self) -> MedusaRow:
        return MedusaRow()

    def propose(self, state: State, limit: int) -> Draft:
        return draft_best(self.candidates(state, limit), limit, self.nodes, state)

    def candidates(self, state: State, limit: int, given: Sequence[Candidates] | None = None) -> list[Candidates]:
        logits = self._logits(state)[:, : min(limit, self.network.heads)].float()  # (B, K, V')
        tables = [
            state.prices.tables[b][0] if state.prices and state.prices.tables else None for b in range(len(logits))
        ]
        every = _best(logits, self.vocabulary.tokens, tables)  # one read
        return [self._likeliest(state, b, logits[b], *own) for b, own in enumerate(zip(tables, every, strict=True))]

    def _likeliest(
        self, state: State, row: int, logits: Tensor, table: Sequence[float] | None, best: list[list[list[float]]]
    ) -> Candidates:
        """A row's likeliest paths, from its logits [K, V'], under the masks of its constraint.

        best: as ``_best`` returns it, for a row without one.
        """
        constraint, vocab = state.sampler.rows[row].constraint, self.vocabulary.tokens
        tokens: dict[tuple[int, ...], int] = {(): state.ids[row][-1]}  # by the ranks on a node's path
        said: dict[tuple[int, ...], float] = {}

        def after(path: tuple[int, ...]) -> list[float]:
            depth = len(path)
            if depth == len(logits):
                return []
            own, likely, ids = best[depth]
            if constraint is not None:
                text = [tokens[path[:n]] for n in range(1, depth + 1)]
                scores = constraint.masked(state.ids[row] + text, logits[depth : depth + 1].clone(), vocab)
                [[[own, likely, ids]]] = _best(scores[None], vocab, [table])
            tokens.update({(*path, rank): int(token) for rank, token in enumerate(ids)})
            said.update({(*path, rank): p for rank, p in enumerate(own)})
            return likely

        tree = grow_best_first(after, self.nodes or MOST_NODES)
        chosen, own = [tokens[path] for path in tree.paths], [said[path] for path in tree.paths]
        return Candidates([math.log(value) for value in tree.values], chosen, tree.parents, [own])

    def _logits(self, state: State) -> Tensor:
        """Each head's logits [B, K, V'], over the vocabulary's tokens."""
        finals = [row.final for row in state.row_states]  # (1, 1, D) each
        final = finals[0] if len(finals) == 1 else torch.cat(finals)
        target = state.target
        if self.output_heads is not None:
            y = self.network(target.readout(final, self.norm)[:, 0])  # (B, K, D)
            return torch.stack([F.linear(y[:, k], weight) for k, weight in enumerate(self.output_heads)], 1)
        root = rms_unit(target.embed(state.roots, state.positions)[:, 0]) if self.network.rooted else None
        self.vocabulary.follow(state, [row.context for row in state.row_states])
        return self.vocabulary.logits(self.network(rms_unit(final)[:, 0], root))

    def observe(self, row_states: list[Any], paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        states = taps[self.taps[0]]
        for number, (row, path) in enumerate(zip(row_states, paths, strict=True)):
            if path:
                row.final = states[number : number + 1, path[-1] : path[-1] + 1]


def _best(
    logits: Tensor, vocab: Tensor | None, tables: Sequence[Sequence[float] | None]
) -> list[list[list[list[float]]]]:
    """The best of logits [B, K, V'] as lists [B][K]: their probabilities, also calibrated, and the tokens."""
    p, found = logits.softmax(-1).nan_to_num(0.0).topk(min(RANKS, logits.shape[-1]))  # NaN: nothing is allowed
    sure = torch.stack([calibrated(own, table) for own, table in zip(p, tables, strict=True)])
    ids = found if vocab is None else vocab[found]
    read: list[list[list[list[float]]]] = torch.stack((p, sure, ids.float()), 2).tolist()  # float32 holds 2^24 tokens
    return read


def final_norm(target: Target) -> nn.Linear:
    """The identity: a readout with this head is only the model's final norm."""
    return GivenLinear(torch.eye(target.hidden_size, device=target.device, dtype=target.dtype))


def _check_sizes(heads: Any, layers: Any) -> tuple[int, int]:
    """The numbers of heads, and of blocks of each, if they are in range. Raises SpecDecError otherwise."""
    what = "of the Medusa drafter"
    return options.check_int(f"heads {what}", heads, 1, HEADS), options.check_int(f"layers {what}", layers, 1, BLOCKS)


# --- public checkpoints --------------------------------------------------------------------------------------------


def _folder(source: str) -> Path:
    """The folder ``source``, or that of ORG/NAME[@revision] on Hugging Face (no pickle is fetched)."""
    named = hub.parse_repo_id(source)
    if named is None or Path(source).is_dir():
        return Path(source)
    files = [drafter_folder.CONFIG, drafter_folder.WEIGHTS, PUBLIC]
    return hub.fetch("drafter", *named, files, "; name a folder or a Hugging Face id")


def _public_config(folder: Path) -> dict[str, Any] | None:
    """The config.json of a public checkpoint; None if it is another."""
    if not (folder / drafter_folder.CONFIG).is_file():
        return None
    config = drafter_folder.read_json(folder / drafter_folder.CONFIG)
    if not isinstance(config, dict):
        return None
    return config if "medusa_num_heads" in config or config.get("model_type") == KIND else None


def _read_public(folder: Path, config: dict[str, Any], target: Target) -> tuple[Medusa, list[Tensor]]:
    """Blocks and output heads of a public checkpoint. Raises SpecDecError if a tensor is missing or does not fit.

    Its authors' tensors are ``HEAD.BLOCK.linear.weight`` [D, D] and ``.bias`` [D], and ``HEAD.LAYERS.weight`` [V, D].
    vLLM's are ``blocks.HEAD.layers.BLOCK.weight``, with ``medusa_fc_bias`` also ``.bias``, and
    ``lm_heads.HEAD.weight``, the first alone with ``original_lm_head``. ``token_map`` [V'] names the tokens of a
    reduced vocabulary (``truncated_vocab_size``).
    """
    d, v, vllm = target.hidden_size, target.vocab_size, config.get("model_type") == KIND
    path = folder / (drafter_folder.WEIGHTS if vllm else PUBLIC)
    if vllm:
        heads, layers = _check_sizes(
            *(config.get(f"medusa_{name}", config.get(own)) for name, own in VLLM_COUNTS.items())
        )
        block, head = "blocks.{k}.layers.{n}", "lm_heads.{k}.weight"
    elif path.is_file():
        heads, layers = _check_sizes(config["medusa_num_heads"], config.get("medusa_num_layers", 1))
        block, head = "{k}.{n}.linear", f"{{k}}.{layers}.weight"
    else:
        pickled = f"{PICKLE} is a pickle, which may run code and is not read" if (folder / PICKLE).exists() else ""
        raise SpecDecError(
            f"'{folder}' has no {PUBLIC}; {pickled or 'get the whole checkpoint'}; "
            "save its tensors with safetensors.torch.save_file"
        )
    shared, biased = vllm and bool(config.get("original_lm_head")), not vllm or bool(config.get("medusa_fc_bias"))
    blocks = {(k, n): block.format(k=k, n=n) for k, n in product(range(heads), range(layers))}
    with drafter_folder.open_tensors(path) as stored:
        names = {name.removeprefix("medusa_heads.") if vllm else name: name for name in stored.header}
        vocab = None
        if vllm and "token_map" in names and config.get("truncated_vocab_size") != v:
            vocab = drafter_folder.draft_vocabulary(folder, stored, v, names["token_map"])
        first = stored.header.get(names.get(head.format(k=0), ""))
        full = vocab is None or (first is not None and first.shape[:1] == (v,))  # of which the tokens' rows are taken
        rows = v if vocab is None or full else len(vocab)
        wanted: dict[str, tuple[int, ...]] = {head.format(k=k): (rows, d) for k in range(1 if shared else heads)}
        own_heads = list(wanted)
        for name in blocks.values():
            wanted |= {f"{name}.weight": (d, d)} | ({f"{name}.bias": (d,)} if biased else {})
        needed = {name: torch.empty(shape, device="meta") for name, shape in wanted.items()}
        drafter_folder.check_fit(folder, needed, {name: stored.header[names[name]] for name in wanted if name in names})
        network = Medusa(d, heads, layers, draft_vocab=None if vocab is None else vocab.int())
        for (k, n), name in blocks.items():
            network.weights[n].data[k] = stored.read(names[f"{name}.weight"])
            if biased:
                network.biases[n].data[k] = stored.read(names[f"{name}.bias"])
        own = [stored.read(names[name]) for name in own_heads]
        own = [weight[vocab] if vocab is not None and full else weight for weight in own]
        return network, own * (heads if shared else 1)
