"""Every drafter, small and with random weights, for chains and trees, and functions that run them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import tiny_model

from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.dspark import BlockConfig, BlockHead, DFlashDrafter, DSparkDrafter
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.eagle3.network import Eagle3, Eagle3Config, default_taps
from specdec.drafters.exits import (
    DeedDrafter,
    EarlyExitDrafter,
    ExitHeads,
    MixtureOfDepthsDrafter,
    Routers,
    SkipDecodeDrafter,
)
from specdec.drafters.joined import JoinedDrafter
from specdec.drafters.layer_skip import LayerSkipDrafter
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.m2r2 import M2R2, M2R2Drafter, M2R2Path, PaperM2R2Drafter
from specdec.drafters.medusa import Medusa, MedusaDrafter
from specdec.drafters.mtp import MTPDrafter, MTPHead
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.none import NoDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.engine.depth import DepthChoice, FixedDepth, History
from specdec.engine.engine import Engine
from specdec.engine.metrics import RequestMetrics
from specdec.engine.request import Request, TokenLogprob
from specdec.models import drafter_folder
from specdec.runtimes.target import Target
from specdec.runtimes.torch.target import TorchTarget
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter
from specdec.speculation.sampling import RowSampler, SamplingParams, streams
from specdec.speculation.state import State
from specdec.speculation.verifier import Verifier
from specdec.verifiers.exact import ExactVerifier

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [3]]
EOS = 2


def run(
    target: Target,
    drafter: Drafter,
    prompts: list[list[int]],
    count: int,
    depth: int = 4,
    eos: int | None = EOS,
    verifier: Verifier | None = None,
    exit: int | None = None,
    **sampling: float,
) -> tuple[list[list[int]], Ran]:
    """Bind ``drafter``, and generate as ``decode`` does."""
    drafter.bind(target)
    return decode(target, drafter, prompts, count, depth, eos, verifier, exit, **sampling)


def decode(
    target: Target,
    drafter: Drafter,
    prompts: list[list[int]],
    count: int,
    depth: int = 4,
    eos: int | None = EOS,
    verifier: Verifier | None = None,
    exit: int | None = None,
    **sampling: float,
) -> tuple[list[list[int]], Ran]:
    """Generate at most ``count`` tokens after each prompt in one batch; return new tokens and requests.

    drafter: bound to ``target``. depth: draft length. exit: exit of the drafter; None: its default.
    sampling: as ``SamplingParams``.
    """
    params, ends = SamplingParams(**sampling), frozenset() if eos is None else frozenset([eos])  # type: ignore[arg-type]
    requests = [
        Request(prompt, count, RowSampler(params, stream=stream, start=len(prompt)), eos=ends)
        for prompt, stream in zip(prompts, streams(prompts), strict=True)
    ]
    together(target, drafter, requests, FixedExit(depth, exit), verifier)
    return [new_tokens(request) for request in requests], Ran(requests)


class FixedExit(FixedDepth):
    """Always the same depth and exit."""

    def __init__(self, depth: int, exit: int | None) -> None:
        super().__init__(depth)
        self.exit = exit

    def choose(self, rows: Sequence[History], caps: Sequence[int], contexts: Sequence[int] = ()) -> DepthChoice:
        return super().choose(rows, caps, contexts)._replace(exit=self.exit)


class Ran(NamedTuple):
    """Finished requests, with their metrics."""

    requests: list[Request]

    @property
    def metrics(self) -> list[RequestMetrics]:
        return [request.metrics for request in self.requests]


def new_tokens(request: Request) -> list[int]:
    return request.ids[len(request.prompt) :]


def alike(found: list[TokenLogprob], expected: list[TokenLogprob]) -> None:
    """The same tokens, as likely but for rounding, with as many others."""
    assert [(each.token_id, len(each.top)) for each in found] == [(each.token_id, len(each.top)) for each in expected]
    assert [each.logprob for each in found] == pytest.approx([each.logprob for each in expected], abs=1e-3)


def together(
    target: Target,
    drafter: Drafter,
    requests: Sequence[Request],
    policy: FixedDepth,
    verifier: Verifier | None = None,
    **options: Any,
) -> Engine:
    """Run requests that start together until all have ended, and return the engine.

    Raises the first error of a request.
    """
    engine = Engine(target, drafter, verifier or ExactVerifier(), policy, **options)
    for request in requests:
        engine.submit(request)
    for _ in engine.steps():
        if error := next((request.error for request in requests if request.error is not None), None):
            raise error
    return engine


def plain_engine(target: Target, **options: Any) -> Engine:
    """Return an engine that decodes plainly. options: of the engine."""
    return Engine(target, NoDrafter(), ExactVerifier(), FixedDepth(0), **options)


def step(engine: Engine) -> list[tuple[Request, list[int]]]:
    """Run one step of an engine that has something to do, and return the new tokens of its rows."""
    return next(engine.steps(), [])


def finish(engine: Engine, *requests: Request) -> None:
    """Submit requests, and run the engine until nothing is left to do."""
    for request in requests:
        engine.submit(request)
    for _ in engine.steps():
        pass


def watched(drafter: Drafter) -> list[tuple[list[list[int]], Draft]]:
    """Return a list to which each draft that ``drafter`` proposes is added, with the texts of its rows."""
    seen, own = list[tuple[list[list[int]], Draft]](), drafter.propose

    def spy(state: State, limit: int) -> Draft:
        draft = own(state, limit)
        rows = [list(row) for row in draft.lists()]  # what a row may not have goes later
        seen.append(([list(ids) for ids in state.ids], Draft(rows, draft.parents)))
        return draft

    drafter.propose = spy  # type: ignore[method-assign]
    return seen


def layers_run(target: Target, drafter: Drafter, count: int = 6, exit: int | None = None) -> list[tuple[int, int, int]]:
    """Return a list to which (first layer, end, number of tokens) of every pass after the prompt is added."""
    calls, layers = list[tuple[int, int, int]](), target.layers

    def spy(x: torch.Tensor, lo: int, hi: int, *given: Any) -> torch.Tensor:
        if lo < hi:
            calls.append((lo, hi, x.shape[1]))
        return layers(x, lo, hi, *given)

    target.layers = spy  # type: ignore[method-assign]
    run(target, drafter, PROMPTS[:1], count, exit=exit)
    target.layers = layers  # type: ignore[method-assign]
    return calls[1:]


def half(target: Target) -> torch.Tensor:
    """Return a draft vocabulary of every second token id, int32 [V'], the last token included."""
    return torch.arange((target.vocab_size - 1) % 2, target.vocab_size, 2, dtype=torch.int32)


def m2r2(
    target: Target,
    exit_layer: int,
    segments: tuple[tuple[int, int], ...],
    projection: bool,
    early: bool,
    nodes: int | None = None,
    *,
    exits: tuple[int, ...] = (),
    router: int = 0,
    kind: type[M2R2Drafter] = M2R2Drafter,
    **options: int,
) -> M2R2Drafter:
    """Return an M2R2 drafter with random weights and a vocabulary of every second token.

    early: whether early layers have adapters. router: size of the routers; 0: none. options: of the drafter.
    """
    torch.manual_seed(1)
    layers = [layer for lo, hi in segments for layer in range(lo, hi)] + (list(range(exit_layer)) if early else [])
    adapters = {layer: list(target.linears(layer)) for layer in layers}
    network = M2R2(M2R2Path(exit_layer, segments, projection, 4, adapters, exits), target, half(target), router)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for each in network.routers or ():
        torch.nn.init.normal_(each.out.weight, std=2.0)  # unsure of some, sure of others
    return kind(network, nodes=nodes, **options)


def heads(target: Target, *exits: int) -> ExitHeads:
    """Return random exit modules after the layers ``exits``, with a vocabulary of every second token."""
    torch.manual_seed(2)
    network = ExitHeads(exits, 8, target, half(target))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def routers(target: Target, first: int = 1) -> Routers:
    """Return random depth routers that run about half of the layers from ``first`` on."""
    torch.manual_seed(3)
    network = Routers(first, target, half(target))
    torch.nn.init.normal_(network.weight)
    torch.nn.init.zeros_(network.bias)
    return network


def medusa(target: Target, nodes: int | None = None, rooted: bool = False) -> MedusaDrafter:
    torch.manual_seed(3)
    network = Medusa(target.hidden_size, 3, 1, rooted, half(target))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return MedusaDrafter(network, nodes)


def save_medusa(folder: Path, model: Any) -> None:
    """Write a folder of a random Medusa drafter for ``model``, as training does."""
    target = TransformersTarget(model)
    drafter = medusa(target)
    base = {"name": "org/base", "num_layers": target.num_layers, "hidden_size": target.hidden_size}
    base["fingerprint"] = target.fingerprint
    config = {"drafter": "medusa", "heads": 3, "layers": 1, "rooted": False, "base": base}
    drafter_folder.write(folder, config, dict(drafter.network.state_dict()))


def eagle3(target: Target, has_embedding: bool = False, **options: Any) -> Eagle3Drafter:
    """Return a random Eagle3 drafter with a vocabulary of every second token.

    has_embedding: whether it has an embedding of its own, and then states of another size.
    """
    torch.manual_seed(4)
    tokens = half(target).long()
    width = 24 if has_embedding else target.hidden_size
    config = Eagle3Config(
        default_taps(target.num_layers), width, 4, 2, 8, 40, len(tokens), norm_first=not has_embedding
    )
    network = Eagle3(config, target, tokens - torch.arange(len(tokens)), has_embedding)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return Eagle3Drafter(network, **options)


def dspark(target: Target, kind: type[DSparkDrafter] = DSparkDrafter, /, **changes: Any) -> DSparkDrafter:
    """Return a random DSpark or DFlash drafter with a vocabulary of every second token.

    changes: of its config; ``nodes`` and ``width`` are options of the drafter.
    """
    torch.manual_seed(5)
    tokens, options = half(target).long(), {key: changes.pop(key) for key in ("nodes", "width") if key in changes}
    heads = {"markov": "vanilla", "rank": 6, "sure": target.hidden_size + 6} if kind is DSparkDrafter else {}
    sizes = {"depth": 2, "block": 5, "mask_token": 1, "windows": (None, 3), "first": int(kind is DFlashDrafter)}
    given: dict[str, Any] = {"vocab": len(tokens), **sizes, **heads, **changes}
    config = BlockConfig(default_taps(target.num_layers), target.hidden_size, 4, 2, 8, 40, **given)
    d2t = tokens - torch.arange(len(tokens)) if config.vocab == len(tokens) else None
    network = BlockHead(config, target, d2t)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return kind(network, **options)


def mtp(target: Target) -> MTPDrafter:
    """Return an MTP drafter whose layer is random, in place of the layer that a checkpoint has."""
    d, place = target.hidden_size, (target.device, target.dtype)
    model = second(target, num_hidden_layers=1, hidden_size=d).model.to(*place)
    own = target.beside(model) if isinstance(target, TorchTarget) else TransformersTarget(model)
    torch.manual_seed(4)
    norms = [torch.nn.LayerNorm(d, elementwise_affine=False) for _ in range(4)]
    join = torch.nn.Linear(2 * d, d).requires_grad_(False).to(*place)
    return MTPDrafter(MTPHead(own, join, *norms))


@functools.cache
def other_model(vocab: int = 97, noise: float = 0.1, **changes: int | None) -> Target:
    """Return a second model: the weights of the tiny Llama with noise, so that both often choose the same token."""
    model = tiny_model("llama", vocab_size=vocab, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * parameter.std() * torch.randn(parameter.shape) if parameter.dim() > 1 else 0)
    return TransformersTarget(model)


def second(target: Target, **changes: int | None) -> Target:
    """Return a second model with the vocabulary of ``target``."""
    few = target.vocab_size < 10
    ends = dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id")) if few else {}
    return other_model(target.vocab_size, 1.0 if few else 0.1, **ends, **changes)


# Every drafter as a chain, of those that can be one, and as a tree; what follows ": " tells variants apart.
CHAINS: dict[str, Callable[[Target], Drafter]] = {
    "none": lambda target: NoDrafter(),
    "prompt-lookup": lambda target: PromptLookupDrafter(),
    "m2r2: projection": lambda target: m2r2(target, 1, ((2, 3),), True, False),
    "m2r2: projection to the end, adapters everywhere": lambda target: m2r2(target, 1, ((2, 4),), False, True),
    "m2r2: two projections, no early layer": lambda target: m2r2(target, 0, ((1, 2), (3, 4)), True, False),
    "m2r2: three early exits": lambda target: m2r2(target, 3, (), False, True, exits=(1, 2), router=4),
    "m2r2: exits that need no adapter": lambda target: m2r2(target, 2, ((2, 4),), True, False, exits=(1, 2)),
    "m2r2: an early exit, one behind a projection": lambda target: m2r2(
        target, 1, ((1, 2), (3, 4)), True, True, exits=(1, 2), router=4
    ),
    "m2r2-paper": lambda target: m2r2(target, 2, (), False, True, kind=PaperM2R2Drafter),
    "medusa": lambda target: medusa(target, rooted=True),
    "eagle3": lambda target: eagle3(target),
    "dspark": lambda target: dspark(target),
    "dspark: a recurrent Markov head, windows in both directions": lambda target: dspark(
        target, markov="rnn", causal=False, first=1
    ),
    "dflash": lambda target: dspark(target, DFlashDrafter),
    "mtp": lambda target: mtp(target),
    "draft-model": lambda target: DraftModelDrafter(second(target)),
    "draft-model: a short context": lambda target: DraftModelDrafter(second(target, max_position_embeddings=16)),
    "early-exit": lambda target: EarlyExitDrafter(),
    "deed": lambda target: DeedDrafter(heads(target, 1, 2, 3), 0.2),
    "skip-decode": lambda target: SkipDecodeDrafter(3, 1, horizon=9),
    "mixture-of-depths": lambda target: MixtureOfDepthsDrafter(routers(target)),
    "layer-skip": lambda target: LayerSkipDrafter(),
    "layer-skip: two ranges": lambda target: LayerSkipDrafter([1, 3]),
}
TREES: dict[str, Callable[[Target], Drafter]] = {
    "prompt-lookup": lambda target: PromptLookupDrafter(continuations=3),
    "lookahead": lambda target: LookaheadDrafter(),
    "ngram": lambda target: NgramDrafter(),
    "ngram+m2r2": lambda target: JoinedDrafter(
        NgramDrafter(9), m2r2(target, 0, ((1, 2), (3, 4)), True, False, width=3)
    ),
    "ngram+medusa": lambda target: JoinedDrafter(NgramDrafter(9), medusa(target, 9)),
    "m2r2": lambda target: m2r2(target, 0, ((1, 2), (3, 4)), True, False, nodes=9, width=3),
    "medusa": lambda target: medusa(target, 9),
    "eagle3": lambda target: eagle3(target, nodes=7),
    "eagle3: with an embedding of its own": lambda target: eagle3(target, True, nodes=9, width=3),
    "dspark": lambda target: dspark(target, nodes=9, width=3),
    "dspark: a gated Markov head": lambda target: dspark(target, markov="gated", biased=True, nodes=7),
    "ngram+dspark": lambda target: JoinedDrafter(NgramDrafter(9), dspark(target)),
    "ngram+early-exit": lambda target: JoinedDrafter(NgramDrafter(9), EarlyExitDrafter(3)),
    "ngram+draft-model": lambda target: JoinedDrafter(NgramDrafter(), DraftModelDrafter(second(target))),
    "ngram+eagle3": lambda target: JoinedDrafter(NgramDrafter(), eagle3(target)),
}
EVERY = CHAINS | {f"{name} (tree)": make for name, make in TREES.items()}


def every(target: Target) -> dict[str, Drafter]:
    return {name: make(target) for name, make in EVERY.items()}
