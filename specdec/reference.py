"""Speculative decoding in one sitting: draft, score, verify and commit, in plain PyTorch over a model of transformers.

The engine does the same with caches, batches and kernels. Its tests compare it with this module, which shares no code
with it. Here each step computes the whole text again, for one text at a time. docs/how-it-works.md walks through it.
All layers of a model attend to every earlier token. M2R2 knows the names of Llama's parts, which Qwen2 and Qwen3 share.

Shapes: T tokens of text, M drafted tokens, S tokens of a pass, D hidden size, V vocabulary.
N is the number of layers, E the exit layer. The *root* is the last token of the text; a draft begins after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Processor = Callable[[Tensor, Tensor], Tensor]  # as in transformers: ids [1, T], logits [1, V] -> logits [1, V]


@dataclass(frozen=True)
class Tree:
    """Drafted tokens. Node 0 is the root, and nodes 1 .. M are the tokens; a chain is a tree without branches."""

    tokens: Sequence[int] = ()  # of the nodes 1 .. M
    parents: Sequence[int] = ()  # the node before each of them, [M]; a parent comes before its children

    def path(self, node: int) -> list[int]:
        """Return the nodes from the root to ``node``, both included."""
        return [*self.path(self.parents[node - 1]), node] if node else [0]

    def text(self, path: Sequence[int]) -> list[int]:
        """Return the tokens of the nodes in ``path``, without the root's."""
        return [self.tokens[node - 1] for node in path[1:]]

    def child(self, parent: int, token: int) -> int | None:
        """Return the first child of ``parent`` that has ``token``; None if there is none."""
        nodes = enumerate(zip(self.parents, self.tokens, strict=True), start=1)
        return next((node for node, own in nodes if own == (parent, token)), None)


class Step(NamedTuple):
    """The draft and the result of one step of decoding."""

    tree: Tree  # what was drafted
    path: list[int]  # the accepted nodes, the root first
    tokens: list[int]  # the new tokens: those of the path and the bonus token, up to where the text ends


@dataclass(frozen=True)
class Sampling:
    """The rule by which a token is chosen from logits."""

    seed: int | None = None  # of the noise; None: greedy
    stream: int = 0  # differs between texts with one seed
    processors: Sequence[Processor] = ()  # change the logits first, in this order (penalties, temperature, top-k, ...)


@torch.no_grad()
def decode(
    model: Any,
    prompt: Sequence[int],
    count: int,
    draft: Callable[[list[int], int], Tree] = lambda text, depth: Tree(),
    sampling: Sampling = Sampling(),
    depth: int = 4,
    ends: frozenset[int] = frozenset(),
) -> list[Step]:
    """Decode at most ``count`` tokens after ``prompt``, and return the steps.

    draft: takes the text and the largest depth; returns a tree. By default nothing is drafted.
    depth: largest depth. The number of tokens that may still come bounds it, too.
    sampling: how tokens are chosen; by default greedily. ends: tokens that end the text.
    """
    text, end, steps = list(prompt), len(prompt) + count, list[Step]()
    while len(text) < end and not (steps and text[-1] in ends):
        most = min(depth, end - len(text) - 1) if steps else 0  # the first step is the prefill: it drafts nothing
        tree = draft(text, most) if most else Tree()
        logits = score(model, text, tree)  # (1 + M, V)
        chosen = [choose(own, text + tree.text(tree.path(node)), sampling) for node, own in enumerate(logits)]
        path = verify(tree, chosen)
        tokens = [*tree.text(path), chosen[path[-1]]]
        tokens = tokens[: next((place for place, token in enumerate(tokens, start=1) if token in ends), None)]
        text += tokens  # commit
        steps.append(Step(tree, path, tokens))
    return steps


def score(model: Any, text: Sequence[int], tree: Tree) -> Tensor:
    """Return logits [1 + M, V] after the root and after each drafted token, in one pass over ``text`` and ``tree``."""
    before, count = len(text) - 1, 1 + len(tree.tokens)
    sees = torch.ones(before + count, before + count, dtype=torch.bool).tril()  # (S, S): row i sees column j
    sees[before:, before:] = False
    positions = torch.arange(before + count)  # (S,)
    for node in range(count):
        path = tree.path(node)
        sees[before + node, [before + each for each in path]] = True  # a token sees the text and its own branch
        positions[before + node] = before + len(path) - 1  # it stands where it would stand in the text
    given = {"attention_mask": mask(sees, model.dtype), "position_ids": positions[None]}
    logits: Tensor = model(torch.tensor([[*text, *tree.tokens]]), **given).logits  # (1, S, V)
    return logits[0, before:]


def mask(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``sees``, bool [S, S], as an attention mask of ``dtype``, [1, 1, S, S], that is added to the scores."""
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[None, None]


def choose(logits: Tensor, before: Sequence[int], sampling: Sampling) -> int:
    """Return the token after the tokens ``before``, prompt included, chosen from its logits [V] by ``sampling``.

    The largest of logits plus Gumbel noise is an exact draw from their softmax.
    """
    scores = logits.float()[None]  # (1, V)
    for processor in sampling.processors:
        scores = processor(torch.tensor([list(before)]), scores)
    if sampling.seed is not None:
        scores = scores - scores.amax() + gumbel(sampling.seed, sampling.stream, len(before), scores.shape[-1])
    return int(scores.argmax())


def gumbel(seed: int, stream: int, position: int, size: int) -> Tensor:
    """Return standard Gumbel noise [V = ``size``] for the token at ``position``, made of seed, stream and position."""
    key, counter = np.array([seed, stream], np.uint64), np.array([0, 0, position, 0], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw((size + 1) // 2)  # 64 random bits in each
    bits = torch.from_numpy((words.view(np.uint32)[:size] >> 1).astype(np.int32))
    uniform = ((bits.float() + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def verify(tree: Tree, chosen: Sequence[int]) -> list[int]:
    """Return the nodes of the accepted path, the root first. chosen: the model's choice after each node, [1 + M]."""
    path = [0]
    while (node := tree.child(path[-1], chosen[path[-1]])) is not None:
        path.append(node)
    return path


DraftLogits = Callable[[list[int], list[int]], Tensor]  # text, drafted tokens after it -> logits [V] of the next token


def draft_chain(logits: DraftLogits, text: list[int], depth: int, sampling: Sampling = Sampling()) -> Tree:
    """Return a chain of ``depth`` tokens after ``text``, chosen from draft ``logits`` as the model's are from its own.

    By ``sampling`` both add the same Gumbel noise at a position, so similar logits mostly give the same token.
    """
    tokens = list[int]()
    for _ in range(depth):
        tokens.append(choose(logits(text, tokens), [*text, *tokens], sampling))
    return Tree(tokens, range(depth))


def draft_tree(logits: DraftLogits, text: list[int], depth: int, width: int, nodes: int) -> Tree:
    """Return the likeliest ``nodes`` nodes of a tree of ``depth`` levels after ``text`` (EAGLE-2, arXiv 2406.16858).

    width: number of nodes of a level that get children, and number of children of each, the likeliest by ``logits``.
    """
    level, found = [(0.0, list[int]())], list[tuple[float, list[int]]]()  # paths: log-probability, tokens
    for _ in range(depth):
        children = list[tuple[float, list[int]]]()
        for log, path in level:
            logs, tokens = logits(text, path).log_softmax(-1).topk(width)
            children += [(log + own, [*path, token]) for own, token in zip(logs.tolist(), tokens.tolist(), strict=True)]
        level, found = sorted(children, key=lambda child: -child[0])[:width], found + children
    likeliest = sorted(range(len(found)), key=lambda index: -found[index][0])[:nodes]
    paths = [found[index][1] for index in sorted(likeliest)]  # parents before children
    return Tree([path[-1] for path in paths], [0 if len(path) == 1 else 1 + paths.index(path[:-1]) for path in paths])


@dataclass(frozen=True)
class M2R2:
    """Drafts with the accelerated residual p (arXiv 2502.02040), an estimate of the final state from fewer layers.

    The slow residual h is the model's: h[k + 1] = h[k] + f_k(h[k]). p begins as h[0] and runs the layers of ``path``.
    Equations have the numbers of docs/how-it-works.md, as the paper's abstract was at hand, not its text: (1), (2) and
    (6) are the paper's idea; the projections (3) and (5), and the segments (4), are an extension of this project.

    path, tensors: as in config.json and model.safetensors of a drafter with one exit, whose MLPs run all neurons.
    """

    model: Any
    path: Mapping[str, Any]  # exit_layer E; segments [[lo, hi], ..]; final_projection; adapters, names by layer
    tensors: Mapping[str, Tensor]  # projections.*, adapters.* and, if the vocabulary is reduced, draft_vocab

    def logits(self, text: list[int], drafted: list[int]) -> Tensor:
        """Return the draft logits [V] of the token after ``text`` and the tokens ``drafted`` after it."""
        parts, segments, last = self.model.model, self.path["segments"], self.model.config.num_hidden_layers
        root, count = len(text) - 1, len(text) + len(drafted)
        causal, positions = torch.ones(count, count, dtype=torch.bool).tril(), torch.arange(count)
        h = self.run(parts.embed_tokens(torch.tensor([[*text, *drafted]])), causal, positions, 0, last)

        # (1) p[0] = h[0]    (2) p[k + 1] = p[k] + f_k(p[k]) with adapters, k < E
        # h and p are two halves of one pass. p reads the keys and values of h; nothing reads those of p.
        both, sees = torch.cat((h[0], h[0]), 1), torch.cat((causal, torch.zeros_like(causal)), 1).repeat(2, 1)
        early = self.run(both, sees, positions.repeat(2), 0, self.path["exit_layer"], count)[-1][:, count:]  # (1, S, D)

        before = {layer: h[layer][:, root - 1 : root] for layer in (*(lo for lo, _ in segments), last)}
        inputs = {lo: h[lo][:, :root] for lo, _ in segments}  # of a segment: h of the text, then p from the root on
        for end in range(root + 1, count + 1):
            p, states = early[:, end - 1 : end], dict[int, Tensor]()  # (1, 1, D) each
            for number, (lo, hi) in enumerate(segments):
                # (3) p[lo] = A [p; g[N]; g[lo]] + b, where g are the states of the token before: h if it is verified
                states[lo] = self.project(number, p, before[last], before[lo])
                inputs[lo] = torch.cat((inputs[lo], states[lo]), 1)  # (1, end, D)
                # (4) p[k + 1] = p[k] + f_k(p[k]) with adapters, lo <= k < hi
                p = self.run(inputs[lo], causal[:end, :end], positions[:end], lo, hi, end - root)[-1][:, -1:]
            # (5) p[N] = A [p; g[N]] + b
            states[last] = self.project(len(segments), p, before[last]) if self.path["final_projection"] else p
            before = states

        # (6) draft logits = head(norm(p[N]))
        logits: Tensor = self.model.lm_head(parts.norm(before[last]))[0, 0]
        trained = self.tensors.get("draft_vocab", torch.arange(len(logits)))
        known = torch.cat((trained, torch.tensor(text))).long()  # rare words recur in the texts that use them
        return torch.full_like(logits, float("-inf")).index_copy(0, known, logits[known])

    def project(self, number: int, *states: Tensor) -> Tensor:
        """Apply projection ``number`` to states [1, 1, D], each of which is divided by its root mean square."""
        units = torch.cat([F.rms_norm(state, state.shape[-1:], eps=1e-6) for state in states], -1)  # (1, 1, 2 or 3 D)
        weight, bias = (self.tensors[f"projections.{number}.{name}"].to(units.dtype) for name in ("weight", "bias"))
        return F.linear(units, weight, bias)

    def run(self, x: Tensor, sees: Tensor, positions: Tensor, lo: int, hi: int, adapted: int = 0) -> list[Tensor]:
        """Return the residuals before each of the layers [lo, hi) and after the last, from ``x`` [1, S, D].

        sees: which tokens each sees, [S, S]. positions: [S]. Adapters act on the last ``adapted`` tokens.
        """
        residuals, parts = [x], self.model.model
        rotary = parts.rotary_emb(x, positions[None])
        with ExitStack() as hooks:
            for layer, names in self.path["adapters"].items() if adapted else ():
                for name in names:
                    key = f"adapters.{layer}/{name.replace('.', '/')}"
                    down, up = (self.tensors[f"{key}/{part}"].to(x.dtype) for part in ("down", "up"))
                    module = parts.layers[int(layer)].get_submodule(name)
                    hooks.enter_context(module.register_forward_hook(partial(add_adapter, adapted, down, up)))
            for layer in parts.layers[lo:hi]:
                residuals.append(layer(residuals[-1], attention_mask=mask(sees, x.dtype), position_embeddings=rotary))
        return residuals


def add_adapter(count: int, down: Tensor, up: Tensor, module: nn.Module, given: tuple[Tensor], y: Tensor) -> None:
    """Add up(down(x)) to the output y of ``module`` for the last ``count`` tokens. given: its input x."""
    y[:, -count:] += given[0][:, -count:] @ down.T @ up.T
