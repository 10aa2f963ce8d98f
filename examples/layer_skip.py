"""Searches the layers, and parts of layers, without which drafting is fastest on this machine and these prompts.

    python examples/layer_skip.py --prompts prompts.jsonl --minutes 5 --output skips.yaml
    specdec generate "Why is the sky blue?" --drafter layer-skip=skips.yaml --compare

What a candidate would bring is predicted from measured costs (of a layer, of each of its parts, of scoring) and from
how often its choice is the model's own, teacher-forced at every token of the model's answers at once: each token sees
the exact keys and values of those before it, as the first token of a draft does. Candidates of the most promising kind
are then timed in real decoding. On the default model the best set that it finds is as fast as plain decoding (0.99 x).
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from specdec.api.decoder import SpecDecoder
from specdec.api.text import encode
from specdec.base.errors import SpecDecError
from specdec.base.files import write_atomically as write_whole
from specdec.base.terminal import print_table, say, status
from specdec.bench.prompts import evenly_spaced, load_prompts
from specdec.drafters.layer_skip import LayerSkipDrafter, run_step, steps_without
from specdec.engine.measure import CONTEXT, time_scoring
from specdec.models import source
from specdec.models.catalogue import DEFAULT_MODEL
from specdec.runtimes.target import CHUNK, Pass, Target, prefill

MOST_DRAFTED = 8
REPEATS = 7  # timings of each price
FINALISTS = 3
ANSWER = 48  # tokens of the model's answer to each prompt
TIMED = 4  # prompts on which the finalists are timed
SEARCHED = 0.7  # share of the time for the search; then the finalists are timed
READ = 64  # positions read out at once: bounds the memory of logits

Unit = tuple[str, int]  # "layer", "attn" or "mlp", and which


@dataclass(frozen=True)
class Prices:
    """Seconds, for one token: a layer, its attention alone, its MLP alone, embedding and readout; ``score[n]``: a pass
    over n tokens."""

    layer: float
    attention: float
    mlp: float
    ends: float
    score: dict[int, float]


@dataclass(frozen=True)
class Skips:
    """A candidate: layers without attention and without MLP, and what was found out about it.

    agreement: share of the tokens that it drafts right. tokens: expected per step of ``depth`` drafts. predicted and
    measured: speed relative to plain decoding.
    """

    attn: frozenset[int] = frozenset()
    mlp: frozenset[int] = frozenset()
    loss: float = field(default=0.0, compare=False)
    agreement: float = field(default=0.0, compare=False)
    tokens: float = field(default=1.0, compare=False)
    depth: int = field(default=1, compare=False)
    predicted: float = field(default=0.0, compare=False)
    measured: float | None = field(default=None, compare=False)

    def toggled(self, unit: Unit) -> Skips:
        """With ``unit`` left out too, or back in if nothing of it is there."""
        kind, layer = unit
        attn = {layer} if kind in ("layer", "attn") else set()
        mlp = {layer} if kind in ("layer", "mlp") else set()
        if attn <= self.attn and mlp <= self.mlp:
            return Skips(self.attn - attn, self.mlp - mlp)
        return Skips(self.attn | attn, self.mlp | mlp)


@torch.inference_mode()
def measure_prices(target: Target) -> Prices:
    """Time one token through a layer, through its parts and through what comes before and after all layers."""
    cache, middle = target.new_cache(), target.num_layers // 2
    context = min(CONTEXT, target.context - 1)
    ids = torch.arange(context + 1, device=target.device)[None] % target.vocab_size
    positions = torch.arange(context + 1, device=target.device)[None]
    prefill(target, cache, [ids[0, :-1].tolist()])
    token, place = ids[:, -1:], positions[:, -1:]
    x = target.embed(token, place)

    def ends() -> None:
        target.readout(target.embed(token, place)).argmax(-1)

    def layers() -> None:
        target.layers(x, 0, target.num_layers, Pass(place, cache.mask(0, place), cache))
        cache.trim(1)

    def attention() -> None:
        target.sublayer(x, middle, "attention", Pass(place, cache.mask(middle, place), cache))
        cache.trim(1, middle, middle + 1)

    def mlp() -> None:
        target.sublayer(x, middle, "mlp", Pass(place, cache.mask(middle, place), cache))

    every, a, m, e = (_median(what, target.device) for what in (layers, attention, mlp, ends))
    return Prices(every / target.num_layers, a, m, e, time_scoring(target))


def _median(what: Callable[[], None], device: torch.device) -> float:
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        what()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


class Search:
    """Looks for the fastest skips of ``target`` on texts (prompt and the model's own greedy answer, as token ids).

    Raises SpecDecError if no answer has a token.
    """

    def __init__(self, target: Target, texts: Sequence[tuple[list[int], list[int]]], prices: Prices) -> None:
        self.target, self.prices = target, prices
        texts = [(prompt, answer) for prompt, answer in texts if answer]
        if not texts:
            raise SpecDecError("the model's answers to these prompts are empty; give other prompts")
        width = max(len(answer) for _, answer in texts)
        read = [[prompt[-1], *answer[:-1]] for prompt, answer in texts]  # the tokens at which the answer is predicted
        device = target.device

        def table(rows: Iterable[Sequence[int]]) -> Tensor:
            return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)

        self.ids, self.next = table(read), table(answer for _, answer in texts)  # (B, T)
        self.valid = table([1] * len(answer) for _, answer in texts).bool()
        self.positions = table(range(len(p) - 1, len(p) - 1 + len(a)) for p, a in texts)
        whole = [prompt + answer[:-1] for prompt, answer in texts]
        longest = max(map(len, whole))
        self.cache, every = target.new_cache(len(texts)), torch.arange(longest, device=device).expand(len(texts), -1)
        padded = torch.tensor([[*text, *[0] * (longest - len(text))] for text in whole], device=device)
        with torch.inference_mode():
            for start in range(0, longest, CHUNK):  # nothing is committed: what is seen of it differs by token
                ids, at = padded[:, start : start + CHUNK], every[:, start : start + CHUNK]
                target.layers(target.embed(ids, at), 0, target.num_layers, Pass(at, self.cache.mask(0, at), self.cache))
            self.x = target.embed(self.ids, self.positions)
        before = every[:, None] < self.positions[:, :, None]  # (B, T, S)
        own = torch.eye(width, dtype=torch.bool, device=device).expand(len(texts), -1, -1)
        self.tree = torch.cat((before, own), 2)
        self.seen: dict[Skips, Skips] = {}

    def measure(self, skips: Skips) -> Skips:
        """The candidate with its figures. One that leaves out everything or nothing is worth nothing."""
        if skips not in self.seen:
            self.seen[skips] = self._measure(skips)
        return self.seen[skips]

    @torch.inference_mode()
    def _measure(self, skips: Skips) -> Skips:
        target, cache, count = self.target, self.cache, self.target.num_layers
        steps = steps_without(skips.attn, skips.mlp, count)
        if not steps or steps == [("layers", 0, count)]:
            return skips
        x, mask = self.x, cache.mask(0, self.positions, self.tree)
        for step in steps:
            x = run_step(target, step, x, self.positions, mask, cache)
            if step[0] != "mlp":
                cache.trim(self.ids.shape[1], step[1], step[2])
        hits, losses = [], []
        for start in range(0, x.shape[1], READ):
            right = self.next[:, start : start + READ]
            logits = target.readout(x[:, start : start + READ])
            hits.append(logits.argmax(-1) == right)
            losses.append(logits.float().logsumexp(-1) - logits.float().gather(2, right[..., None])[..., 0])
        hit, loss = torch.cat(hits, 1) & self.valid, torch.cat(losses, 1)
        total = int(self.valid.sum())
        figures: dict[str, Any] = {"loss": float(loss[self.valid].sum()) / total, "agreement": int(hit.sum()) / total}
        plain = 1 / self.prices.score[1]
        rows = [row[:n] for row, n in zip(hit.tolist(), self.valid.sum(1).tolist(), strict=True)]
        best = (0.0, 1, 1.0)
        for depth in range(1, MOST_DRAFTED + 1):
            tokens = expected_tokens(rows, depth)
            best = max(best, (tokens / self.seconds(skips, depth) / plain, depth, tokens))
        return replace(skips, predicted=best[0], depth=best[1], tokens=best[2], **figures)

    def seconds(self, skips: Skips, depth: int) -> float:
        """Of a step that drafts ``depth`` tokens and scores them. Layers before the first skip run once."""
        prices, count = self.prices, self.target.num_layers
        both = len(skips.attn & skips.mlp)
        alone = {"mlp": len(skips.attn) - both, "attention": len(skips.mlp) - both}
        whole = count - both - sum(alone.values())
        draft = prices.ends + whole * prices.layer + alone["mlp"] * prices.mlp + alone["attention"] * prices.attention
        shared = min(skips.attn | skips.mlp)
        score = _between(prices.score, 1 + depth)
        score -= (score - prices.ends) * shared / count  # those layers are not run again, but for the last token
        return depth * draft + score + shared * prices.layer

    # -- the search ---------------------------------------------------------------------------------------------

    def units(self) -> list[Unit]:
        """What can be left out with a gain: layers, and parts where running the other part alone is cheaper."""
        count, prices = self.target.num_layers, self.prices
        kinds = ["layer"] if prices.layer > 0 else []
        kinds += ["attn"] if prices.mlp < prices.layer else []
        kinds += ["mlp"] if prices.attention < prices.layer else []
        return [(kind, layer) for layer in range(count) for kind in kinds]

    def saved(self, unit: Unit) -> float:
        prices = self.prices
        return prices.layer - {"layer": 0.0, "attn": prices.mlp, "mlp": prices.attention}[unit[0]]

    def run(self, seconds: float, progress: Callable[[str], None], seed: int = 0) -> list[Skips]:
        """Search for so long; all candidates, the fastest (as predicted) first.

        First each unit alone; then sets that grow by the units that hurt least for what they save; then random changes
        to the best set so far, kept if they are predicted to be faster.
        """
        start, rng = time.monotonic(), random.Random(seed)

        def left() -> bool:
            used = time.monotonic() - start
            best = max(self.seen.values(), key=lambda s: s.predicted, default=Skips())
            progress(f"{len(self.seen)} sets, best {best.predicted:.2f}x, {max(seconds - used, 0):.0f} s left")
            return used < seconds

        units = self.units()
        rng.shuffle(units)  # whatever time allows is spread over the depth
        ranked: list[tuple[float, Unit]] = []
        for unit in units:
            if ranked and not left():
                break
            ranked.append((self.measure(Skips().toggled(unit)).loss / self.saved(unit), unit))
        grown = best = Skips()
        for _, (kind, layer) in sorted(ranked):
            wider = grown.toggled((kind, layer))
            if not (grown.attn <= wider.attn and grown.mlp <= wider.mlp) or not left():
                continue  # nothing of it was there any more
            grown = self.measure(wider)
            best = max(best, grown, key=lambda s: s.predicted)
        while left() and units:
            changed = best
            for unit in rng.sample(units, rng.choice((1, 1, 2, 3)) if len(units) > 2 else 1):
                changed = changed.toggled(unit)
            if changed in self.seen and len(self.seen) >= 2 ** min(len(units), 20) - 2:
                break  # a model so small that everything has been tried
            if changed.attn | changed.mlp:
                best = max(best, self.measure(changed), key=lambda s: s.predicted)
        return sorted((s for s in self.seen.values() if s.predicted), key=lambda s: -s.predicted)


def expected_tokens(rows: Sequence[Sequence[bool]], depth: int) -> float:
    """Mean acceptance length when decoding along rows of hits with drafts of ``depth``."""
    steps = tokens = 0
    for hits in rows:
        at = 0
        while at < len(hits):
            accepted = 0
            while accepted < depth and at + accepted < len(hits) and hits[at + accepted]:
                accepted += 1
            if at + accepted >= len(hits) and accepted < depth:
                break  # the text ends within the draft: how much of it would be accepted is unknown
            steps, tokens, at = steps + 1, tokens + accepted + 1, at + accepted + 1
    return tokens / steps if steps else 1.0


def time_in_decoding(
    decoder: SpecDecoder, prompts: Sequence[list[int]], finalists: Sequence[Skips], max_new_tokens: int
) -> list[Skips]:
    """The finalists with their measured speed relative to plain decoding, the fastest first; they take turns."""
    plain = decoder.with_drafter("none")
    skipping = [decoder.with_drafter(LayerSkipDrafter(attn=sorted(s.attn), mlp=sorted(s.mlp))) for s in finalists]
    ratios: list[list[float]] = [[] for _ in finalists]
    for prompt in prompts:
        own = _seconds_per_token(plain, prompt, max_new_tokens, 1)
        for other, skips, ratio in zip(skipping, finalists, ratios, strict=True):
            ratio.append(own / _seconds_per_token(other, prompt, max_new_tokens, skips.depth))
    timed = [replace(s, measured=statistics.median(r)) for s, r in zip(finalists, ratios, strict=True)]
    return sorted(timed, key=lambda s: -(s.measured or 0))


def _seconds_per_token(decoder: SpecDecoder, prompt: list[int], max_new_tokens: int, depth: int) -> float:
    out = decoder.generate(prompt, max_new_tokens=max_new_tokens, num_speculative_tokens=depth, ignore_eos=True)
    return out.metrics.decode_seconds / max(out.metrics.num_new_tokens - 1, 1)


def _between(seconds: dict[int, float], rows: int) -> float:
    """Seconds for ``rows`` tokens: known, or between those of the sizes around it."""
    below, above = max(n for n in seconds if n <= rows), min((n for n in seconds if n >= rows), default=max(seconds))
    if below == above:
        return seconds[below]
    return seconds[below] + (rows - below) / (above - below) * (seconds[above] - seconds[below])


def _ranges(layers: frozenset[int]) -> str:
    """Layers as ranges: 3-5, 8."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(f"{lo}-{hi}" if hi > lo else str(lo) for lo, hi in parts) or "-"


def _show(best: list[Skips]) -> None:
    header = (
        "without attention",
        "without MLP",
        "agreement",
        "depth",
        "acceptance length",
        "predicted x",
        "measured x",
    )
    rows = []
    for s in best:
        speeds = [f"{value:.2f}" for value in (s.tokens, s.predicted, s.measured)]
        rows.append((_ranges(s.attn), _ranges(s.mlp), f"{s.agreement:.3f}", str(s.depth), *speeds))
    print_table(header, rows)


def _write(path: Path, skips: Skips, base: dict[str, Any]) -> None:
    measured = {"depth": skips.depth, "agreement": round(skips.agreement, 4), "speedup": round(skips.measured or 0, 3)}
    data = {"drafter": "layer-skip", "base": base, "attn": sorted(skips.attn), "mlp": sorted(skips.mlp)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump(data | {"measured": measured}, sort_keys=False, default_flow_style=None).encode())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default="own", help="file or name of a prompt set; first turns count")
    parser.add_argument("--output", type=Path, default=Path("layer-skip.yaml"), help="YAML file for the best set")
    parser.add_argument("--minutes", type=float, default=5.0, help="time for the search")
    parser.add_argument("--limit", type=int, default=12, help="prompts, spread over the file")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    decoder = SpecDecoder.from_pretrained(args.model, "none")
    target = decoder.target
    with status("measuring"):
        found = evenly_spaced(load_prompts(args.prompts).conversations, args.limit)
        ids = [encode(decoder.tokenizer, conversation.turns[0]) for conversation in found]
        ids = [row for row in ids if len(row) + ANSWER < target.context]
        if not ids:
            raise SpecDecError(f"no prompt leaves room for {ANSWER} tokens in the model's context of {target.context}")
        answers = [out.token_ids for out in decoder.generate_batch(ids, max_new_tokens=ANSWER)]
        prices = measure_prices(target)
        search = Search(target, list(zip(ids, answers, strict=True)), prices)
    with status("searching") as spinner:
        best = search.run(60 * args.minutes * SEARCHED, lambda text: spinner.update(f"searching: {text}"), args.seed)
    with status("timing"):
        best = time_in_decoding(decoder, ids[:TIMED], best[:FINALISTS], ANSWER)
    _show(best)
    _write(args.output, best[0], {"name": source.public_name(args.model), "fingerprint": target.fingerprint})
    say(f"{args.output}: {best[0].measured:.2f}x plain decoding, of {len(search.seen)} sets tried")


if __name__ == "__main__":
    try:
        main()
    except SpecDecError as error:
        sys.exit(f"error: {error}")
