"""Forward passes for tests of runtimes, random adapters, models in GGUF blocks, drafts, and a recorder."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tiny_gguf
import torch
from tiny import model_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from specdec.kvcache.cache import KVCache
from specdec.models.families import mixture_of
from specdec.models.gguf.blocks import BlockEmbedding, BlockExperts, BlockLinear, Blocks, matrices_of
from specdec.runtimes.checks import routing
from specdec.runtimes.decoder_layer import Adapters
from specdec.runtimes.draft_path import DraftPath, DraftRoots
from specdec.runtimes.target import Pass, Target
from specdec.runtimes.torch.linear import UnitMap
from specdec.speculation.candidates import Candidates


def play(target: Target, routed: list[Tensor] | None = None) -> list[torch.Tensor]:
    """Run passes of all kinds: prompts of different length, single tokens, a tree, and a resumed block of layers.

    Returns the states and logits of all tokens but padding.
    routed: the routers' logits of each pass, so that tokens take the same experts as in another play. An empty list is
    filled with them; None: no routers are replaced.
    """
    torch.manual_seed(1)
    ids, cache, out = torch.randint(3, 97, (2, 30)), target.new_cache(2), []
    rows = torch.zeros(2, 1, dtype=torch.long)  # committed tokens per row
    known = iter(routed or ())

    def layers(x: Tensor, lo: int, hi: int, ctx: Pass) -> Tensor:
        if routed is None:
            return target.layers(x, lo, hi, ctx)
        if (logits := next(known, None)) is not None:
            with routing(target.model, logits, known=True):
                return target.layers(x, lo, hi, ctx)
        experts = mixture_of(target.model.config).experts
        routed.append(torch.zeros(x.shape[0] * x.shape[1], hi, experts))
        return target.layers(x, lo, hi, replace(ctx, routed=routed[-1]))

    def run(offsets: list[int], paths: list[list[int]], tree: torch.Tensor | None = None, cut: int = 2) -> None:
        nonlocal rows
        positions = rows + torch.tensor(offsets)
        taps, own = {cut: torch.empty(0), 4: torch.empty(0)}, ids.gather(1, positions)
        x = target.embed(own, positions)
        x = layers(x, 0, cut, Pass(positions, cache.register(0, positions, tree), cache, ids=own))
        mask = cache.register(cut, positions, tree)
        x = layers(x, cut, 3, Pass(positions, mask, cache, taps, ids=own))
        x = layers(x, 3, 4, Pass(positions, mask, cache, taps, ids=own))
        logits = target.readout(x)
        out.extend(t[b, path] for t in (taps[cut], taps[4], logits) for b, path in enumerate(paths))
        cache.commit(paths)
        rows = torch.tensor(cache.rows)[:, None]

    run(list(range(9)), [list(range(9)), list(range(6))])  # row 1 gets three holes
    run([0], [[0], [0]])
    tree = torch.zeros(5, 5, dtype=torch.bool)
    for node, ancestors in enumerate(([0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4])):
        tree[node, ancestors] = True
    run([0, 1, 1, 2, 2], [[0, 2, 4], [0, 1, 3]], tree, cut=3)
    run([0, 1], [[0, 1], [0]], cut=1)
    run([0], [[0], [0]])
    return out


def next_logits(target: Target, cache: KVCache, ids: torch.Tensor, keep: int | None = None) -> torch.Tensor:
    """Return the logits of the tokens ``ids`` [B, T], which follow the tokens in ``cache``.

    keep: the first tokens of each row that stay in the cache; None: all.
    """
    positions = torch.tensor(cache.rows)[:, None] + torch.arange(ids.shape[1])
    given = Pass(positions, cache.register(0, positions), cache, ids=ids)
    x = target.layers(target.embed(ids, positions), 0, target.num_layers, given)
    cache.commit([list(range(ids.shape[1] if keep is None else keep))] * cache.batch)
    return target.readout(x)


def adapted_pass(target: Target, adapters: Adapters | None, t: int) -> torch.Tensor:
    torch.manual_seed(2)
    positions = torch.arange(t)[None].expand(2, -1)
    cache = target.new_cache(2)
    ids = torch.randint(3, 97, (2, t))
    given = Pass(positions, cache.register(0, positions), cache, adapters=adapters, ids=ids)
    return target.layers(target.embed(ids, positions), 0, 3, given)


def random_adapters(target: Target, leave_out: str = "") -> Adapters:
    shapes = {i: {p: s for p, s in target.linears(i).items() if p != leave_out} for i in (0, 2)}
    adapters = Adapters(shapes, rank=3)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_(std=0.3)
    return adapters


def apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def _memory(tensor: Tensor) -> int:
    opaque = tensor.layout == torch._mkldnn  # type: ignore[attr-defined]
    return id(tensor) if opaque else tensor.untyped_storage().data_ptr()


class _Log(TorchDispatchMode):
    """Records the torch operations that run, with their arguments, and the memory of tensors that were made outside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = {_memory(t) for t in self.made}
        entry = [str(func)]
        for value in tree_flatten((args, kwargs))[0]:
            if isinstance(value, Tensor):
                own = _memory(value)
                entry.append(f"{tuple(value.shape)} {'made' if own in inside else own}")
            else:
                entry.append(str(value))
        assert "item" not in entry[0] and "nonzero" not in entry[0], "the host waits for the device"
        out = func(*args, **(kwargs or {}))
        self.made += [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        self.seen.append(entry)
        return out


class Replay:
    recorded = replayed = 0

    def __init__(self, function: Callable[[], None]) -> None:
        self.function, self.log = function, self._run(function)
        Replay.recorded += 1

    def _run(self, function: Callable[[], None]) -> list[Any]:
        with _Log() as log:
            function()
        return log.seen

    def __call__(self) -> None:
        Replay.replayed += 1
        assert self._run(self.function) == self.log, "a graph would do what was recorded"


WIDE: dict[str, object] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
SHARED: dict[str, object] = {
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "linear_value_head_dim": 64,
}
# Families whose kernels are those of others, with other numbers.
ALIKE = "granite", "olmoe", "smollm3", "qwen3", "ministral3", "gemma", "qwen3_5_moe_text"
LARGE = ("Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q5_1")
IN_BLOCKS: list[tuple[str, tuple[str, ...], dict[str, object]]] = [  # families, types of their matrices, sizes
    ("llama", ("Q4_1", "Q5_0", "Q8_0"), {}),
    ("llama", LARGE, WIDE),
    ("qwen2", LARGE, WIDE),
    ("qwen3", ("Q6_K", "Q4_K"), WIDE),
    ("mistral", LARGE, WIDE | {"sliding_window": 12}),
    ("granite", ("Q4_K", "Q6_K"), WIDE),
    ("mixtral", ("Q5_0", "Q8_0"), {}),
    ("olmoe", LARGE, WIDE | {"num_experts": 9, "num_experts_per_tok": 3}),
    ("qwen3_moe", ("Q4_K", "Q6_K"), WIDE | {"moe_intermediate_size": 256}),
    ("gpt_oss", ("MXFP4",), WIDE),
    ("olmo2", ("Q4_K", "Q6_K"), WIDE),
    ("smollm3", LARGE, WIDE),
    ("gemma2", LARGE, WIDE),
    ("qwen3_5_text", ("Q5_0", "Q8_0"), {}),
    ("qwen3_next", ("Q4_K", "Q6_K"), WIDE | SHARED),
    ("gemma3_text", ("Q5_0", "Q8_0"), WIDE | {"head_dim": 256}),
    ("phi3", LARGE, {"hidden_size": 256, "intermediate_size": 512}),
    ("ministral3", ("Q4_K", "Q6_K"), WIDE),
    ("gemma", LARGE, WIDE),
    ("gemma4_text", ("Q5_0", "Q8_0"), WIDE),
    ("qwen3_5_moe_text", ("Q4_K", "Q6_K"), WIDE | SHARED),
]


def in_blocks(
    family: str = "llama", kinds: Sequence[str] = ("Q4_1", "Q5_0", "Q8_0"), **sizes: object
) -> torch.nn.Module:
    """Return a tiny model whose linear layers have weights in GGUF blocks of ``kinds`` in turn."""
    model, each = model_of(family, **sizes), itertools.cycle(kinds)
    for name, module in [*model.named_modules()]:
        if isinstance(module, torch.nn.Linear) and ("proj" in name.rpartition(".")[2] or name == "lm_head"):
            blocks = random_blocks(next(each), *module.weight.shape)
            model.set_submodule(name, BlockLinear(blocks, module.bias, torch.bfloat16))
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            own, kind = layer.mlp.experts, next(each)
            count, (columns, inner) = len(own.down_proj), matrices_of(own, 0)[1].shape
            gate_up = [[random_blocks(kind, inner, columns, seed=2 * e + i) for i in (0, 1)] for e in range(count)]
            down = [random_blocks(kind, columns, inner, seed=e) for e in range(count)]
            layer.mlp.experts = BlockExperts(own, gate_up, down, torch.bfloat16)
    scale = getattr(model.model.embed_tokens, "embed_scale", None)
    blocks = random_blocks("Q4_0", 97, model.config.hidden_size)
    model.model.embed_tokens = BlockEmbedding(blocks, torch.bfloat16, scale)
    return model


def random_blocks(
    kind: str, out: int, inputs: int, scales: tuple[float, float] = (0.001, 0.02), seed: int = 0
) -> Blocks:
    random = np.random.default_rng(len(kind) * out + inputs + seed)
    return Blocks(torch.from_numpy(tiny_gguf.random_blocks(kind, (out, inputs), random, scales)), kind, inputs)


def after(target: Target, ids: Tensor) -> tuple[KVCache, DraftRoots]:
    """Return a cache with the tokens ``ids`` [1, T] and the draft roots after them, from which drafts can grow."""
    count, cache, taps = ids.shape[1], target.new_cache(), {1: torch.empty(0), 3: torch.empty(0)}
    positions = torch.arange(count)[None]
    given = Pass(positions, cache.register(0, positions), cache, taps, ids=ids)
    final = target.layers(target.embed(ids, positions), 0, 4, given)
    cache.commit([list(range(count))])
    return cache, DraftRoots([5], [count], final, list(taps.values()), place=count - 1)


def seeded(target: Target) -> tuple[KVCache, DraftRoots]:
    return after(target, torch.tensor([[5, 6, 7]]))


def several(cache: KVCache, roots: DraftRoots, rows: int) -> DraftRoots:
    """Make the only row of ``cache`` so many, and return the draft roots of all."""
    cache.select([0] * rows)
    final, *carried = (x[:, roots.place :][:, :1].repeat(rows, 1, 1) for x in (roots.final, *roots.carried))
    return DraftRoots(list(roots.tokens) * rows, list(roots.positions) * rows, final, carried)


def drafted(target: Target, *how: Any) -> Candidates:
    """Return what ``target`` drafts for the only row."""
    [row] = drafted_rows(target, *how)
    return row


def drafted_rows(target: Target, *how: Any) -> list[Candidates]:
    """Return what ``target`` drafts for each row. how: the arguments of ``draft_rows``."""
    found = target.draft_rows(*how)
    assert isinstance(found, list)
    return [Candidates(*nodes) for nodes in found]


def by_path(found: Candidates) -> dict[tuple[int, ...], float]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(found.tokens, found.parents, strict=True):
        paths.append((*paths[parent], token))
    return dict(zip(paths[1:], found.scores, strict=True))


def random_route(target: Target, heads: int, dtype: torch.dtype = torch.bfloat16) -> DraftPath:
    """Return a random draft path over a vocabulary of ``heads`` tokens: two segments and a final projection."""
    with torch.inference_mode(False):
        adapters = random_adapters(target).to(dtype)
    d, tokens = target.hidden_size, torch.randperm(97)[:70]
    projections = [
        UnitMap((torch.randn(d, n * d) / (n * d) ** 0.5).to(dtype), torch.randn(d).to(dtype)) for n in (3, 3, 2)
    ]
    parts = [target.reduced_head(part) for part in tokens.split([50, 20][:heads])]
    return DraftPath(projections, ((1, 2), (3, 4)), adapters, parts, tokens)
