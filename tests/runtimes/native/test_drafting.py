"""Native drafts with another source's tree and tables of calibrated probabilities: those of a plain loop."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from passes import after, by_path, drafted, drafted_rows, random_route, seeded, several
from targets import needs_native
from tiny import model_of
from torch import Tensor

from specdec.runtimes import target as target_module
from specdec.runtimes.draft_path import KNOTS, DraftPath, DraftRoots, TreeLimits, calibrated
from specdec.runtimes.native import drafting
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.target import Target
from specdec.runtimes.torch.draft import Step
from specdec.speculation.candidates import Candidates

pytestmark = [needs_native, pytest.mark.usefixtures("two_threads", "kernels")]
Tables = Sequence[Sequence[float]]
LOW, HIGH = [0.05] * len(KNOTS), [0.9] * len(KNOTS)


def sharp_target() -> NativeTarget:
    """One with few near ties."""
    model = model_of("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6)
    return NativeTarget(model)


def given(*nodes: tuple[int, int, float]) -> Candidates:
    """The token, the parent and the probability of each node."""
    tokens, parents, said = (list(part) for part in zip(*nodes, strict=True))
    return Candidates([0.0] * len(tokens), tokens, parents, [said])


def route_of(target: Target, seed: int = 0) -> tuple[DraftPath, list[int]]:
    """A draft path, and the tokens that its heads do not have."""
    torch.manual_seed(seed)
    route = random_route(target, heads=2)
    return route, sorted(set(range(97)) - set(route.tokens.tolist()))


def by_loop(roots: DraftRoots, limits: TreeLimits, vocab: Tensor | None, step: Step) -> Candidates:
    """What the kernel and ``grow`` do, written plainly. step: as of ``grow``."""
    heads, alone, beside = roots.tables[0] if roots.tables else (None, None, None)
    tree = roots.given[0] if roots.given else Candidates.none()
    found = Candidates.none()
    level = [
        (0, 0, 0.0, 0)
    ]  # of each node: its place here, in the other tree, its score, its parent in the level before
    tokens, paths = torch.tensor([roots.tokens]), torch.ones(1, 1, dtype=torch.bool)
    for number in range(limits.levels):
        p = step(tokens, torch.tensor([[parent for *_, parent in level]]), paths[None])[0].float().softmax(-1)
        begun = len(found.tokens)
        origins, places = list[int](), list[int]()
        for row, (node, place, score, _) in enumerate(level):
            best = p[row].topk(limits.width)
            ids = best.indices if vocab is None else vocab[best.indices]
            own = {
                token: [raw, sure_of(raw, heads), -1]
                for token, raw in zip(ids.tolist(), best.values.tolist(), strict=True)
            }
            for n, (token, parent, said) in enumerate(zip(tree.tokens, tree.parents, tree.raw[0], strict=True)):
                if parent == place >= 0:
                    other = sure_of(said, alone if token in own else beside)
                    entry = own.setdefault(token, [0.0, 0.0, -1])
                    entry[1:] = [max(entry[1], other), n + 1]
            total, most = sum(entry[1] for entry in own.values()), max(own, key=lambda token: own[token][1])
            for token, entry in own.items():
                if total > 1 and token != most:
                    entry[1] *= (1 - own[most][1]) / (total - own[most][1])
            for token, (raw, sure, at) in sorted(own.items(), key=lambda item: -item[1][1]):
                found.scores.append(score + math.log(max(sure, 1e-9)))
                found.tokens.append(token)
                found.parents.append(node)
                found.raw[0].append(raw)
                origins.append(row)
                places.append(int(at))
        chosen = sorted(range(begun, len(found.tokens)), key=lambda i: -found.scores[i])[: limits.width]
        worth = [limits.rate(number + 1) * math.exp(found.scores[i]) - limits.node for i in chosen]
        if sum(max(each, 0.0) for each in worth) < limits.level:
            break
        chosen = [i for at, i in enumerate(chosen) if at == 0 or worth[at] > 0]
        level = [(i + 1, places[i - begun], found.scores[i], origins[i - begun]) for i in chosen]
        tokens = torch.tensor([[found.tokens[i] for i in chosen]])
        paths = torch.cat((paths[[parent for *_, parent in level]], torch.eye(len(level), dtype=torch.bool)), 1)
    return found


def sure_of(p: float, table: Sequence[float] | None) -> float:
    return float(calibrated(torch.tensor([p]), None if table is None else torch.tensor([table])))


class Plain(NamedTuple):
    """``by_loop`` in the place of ``grow``."""

    found: Candidates

    def lists(self) -> list[Candidates]:
        return [self.found]


def tables_of(rng: random.Random) -> Tables:
    return [sorted(rng.random() for _ in KNOTS) for _ in range(3)]


@torch.inference_mode()
def test_drafts_with_another_tree_and_tables_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    target = sharp_target()
    cache, roots = seeded(target)
    total = same = 0
    for seed in range(9):
        rng, (route, others) = random.Random(seed), route_of(target, seed)
        first = drafted(target, cache, roots, route, TreeLimits(1, 4)).tokens
        tree = given(
            (rng.choice(first), 0, rng.random()),
            (rng.choice(others), 0, rng.random()),
            (rng.choice(others), 1, rng.random()),
            (rng.randrange(97), 2, rng.random()),
            (rng.randrange(97), 4, rng.random()),
        )
        own = replace(roots, given=[tree], tables=[tables_of(rng)] if seed % 3 else None)
        limits = TreeLimits(4, 4, rng.choice([0.0, 0.3]), rng.choice([0.0, 0.05]), [0.9, 0.8, 0.6, 0.5])
        with monkeypatch.context() as patched:
            patched.setattr(
                target_module,
                "grow",
                lambda step, roots, limits, rules, own=own, **_: Plain(by_loop(own, limits, rules.vocab, step)),
            )
            [nodes] = Target.draft_rows(target, cache, own, route, limits)
            expected = Candidates(*nodes)
        [nodes] = Target.draft_rows(target, cache, own, route, limits)
        for found in drafted(target, cache, own, route, limits), Candidates(*nodes):
            assert len(set(by_path(found))) == len(found.tokens)  # a token of both sources is one node
            ours, theirs = by_path(found), by_path(expected)
            both = ours.keys() & theirs.keys()
            assert all(abs(math.exp(ours[path]) - math.exp(theirs[path])) < 0.03 for path in both)
            raw = [by_path(each._replace(scores=each.raw[0])) for each in (found, expected)]
            assert all(abs(raw[0][path] - raw[1][path]) < 0.05 for path in raw[0].keys() & raw[1].keys())
            total, same = total + len(theirs), same + len(both)
    assert same > 0.85 * total  # near ties may fall either way


@torch.inference_mode()
def test_chains_of_several_rows_go_on_along_the_likelier_of_both_sources() -> None:
    target = sharp_target()
    cache, roots = seeded(target)
    route, (other, behind, *_) = route_of(target)
    rows = several(cache, roots, 2)
    limits = TreeLimits(3, 1)
    plain = drafted_rows(target, cache, rows, route, limits)
    assert plain is not None and plain[0] == plain[1]
    trees = [given((other, 0, 0.99), (behind, 1, 0.99)), given((plain[1].tokens[0], 0, 0.01))]
    found = drafted_rows(target, cache, replace(rows, given=trees), route, limits)
    assert found[1].tokens == plain[1].tokens and found[1].raw == plain[1].raw
    assert {(other,), (other, behind)} <= by_path(found[0]).keys()
    chain = max(by_path(found[0]), key=len)
    assert chain[:2] == (other, behind) and len(chain) == 3
    low = [[LOW] * 3, [HIGH, LOW, LOW]]
    ended = drafted_rows(target, cache, replace(rows, tables=low), route, replace(limits, level=0.5))
    assert ended is not None and [max(each.depths()) for each in ended] == [3, 3]  # the second row pays for both
    scores = [math.exp(each.scores[0]) for each in ended]
    assert scores == pytest.approx([0.05, 0.9], rel=1e-3)


@torch.inference_mode()
def test_a_path_whose_vocabulary_changes_drafts_as_a_new_one() -> None:
    target = sharp_target()
    cache, roots = seeded(target)
    route, _ = route_of(target)
    both, limits = (route.heads, route.tokens), TreeLimits(3, 3)
    one = route.heads[:1], route.tokens[:50]
    for heads, tokens in (both, one, both):
        route.heads, route.tokens = heads, tokens.clone()
        found = drafted(target, cache, roots, route, limits)
        assert found == drafted(target, cache, roots, replace(route, made={}), limits)
        assert set(found.tokens) <= set(tokens.tolist())


@pytest.mark.parametrize("rows", [1, 2])
@torch.inference_mode()
def test_a_draft_reads_the_first_keys_and_the_last_ones(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "NEAR", 40)
    target = NativeTarget(model_of("llama", max_position_embeddings=512))
    route, limits = random_route(target, heads=2), TreeLimits(4, 2)
    cache, roots = after(target, torch.randint(3, 97, (1, 200)))
    roots = several(cache, roots, rows)

    def draft() -> list[Candidates] | None:
        return drafted_rows(target, cache, roots, route, limits)

    expected = draft()
    for far in range(64, 160):  # the root and its draft are at 200 to 203
        cache.data[0][..., far, :] = torch.nan
    assert draft() == expected
    for near in 20, 170:
        kept = cache.data[0][..., near, :].clone()
        cache.data[0][..., near, :] = 3
        assert draft() != expected
        cache.data[0][..., near, :] = kept
