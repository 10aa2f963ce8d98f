"""Random models of about 0.3 billion weights in Q4_K, gpt-oss in MXFP4: the native runtime beside another one.

    python benchmarks/families.py                        # all families
    python benchmarks/families.py gemma3_text olmoe --threads 2
    python benchmarks/families.py --experts              # what passes over drafts cost by number of experts

The other one is the fused runtime where it knows the family, else the reference runtime, with the same weights in 16
bits. Times are medians of passes after 64 cached tokens, the runtimes in turn; "8 / 1" is a pass over 8 different
tokens over one over a single token. Weights are random, as large as trained ones. "Depth" are the draft lengths that
the policy chooses by these passes where tokens are accepted with a probability of 0.6 and 0.8, and drafting one takes
5 % of a pass. "Apart" is the self-check's.

"Bits": whether a token's logits are bit-equal over one pass, passes of 1, 5, 16 and the remaining tokens, and beside
another row. "Float32": how many of the tokens that ``model.generate`` returns in float32 the native runtime chooses
after those before; how many the model itself chooses in bfloat16; and how far the native ones are below the largest
logit in float32 at most, with the same experts, in percent of the largest number.

With ``--experts``, a Qwen3-MoE of 4 layers of width 2048 runs natively with 8 to 64 experts, of which a token takes 2
to 8. These have 2048 neurons in all, so a pass over one token reads equally much. "Read" is the number of experts that
a layer reads for 8 tokens over that for one, if each token takes any at random.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from typing import Any

import gguf
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig

from specdec.base.errors import SpecDecError
from specdec.engine.depth.costs import Costs
from specdec.engine.depth.policy import MAX_DEPTH, AutoDepth
from specdec.models import families
from specdec.models.gguf.blocks import BIASES, BlockEmbedding, BlockExperts, BlockLinear, Blocks, densify, matrices_of
from specdec.models.gguf.model import empty_model
from specdec.runtimes.checks import routing
from specdec.runtimes.native.target import FAMILIES
from specdec.runtimes.select import make_target
from specdec.runtimes.target import Pass, Target

CACHED, ROUNDS, SPREAD, MANY = 64, 11, 0.02, (2, 4, 8, 16)  # SPREAD: standard deviation of weights
PROMPT, ANSWER, PIECES = 8, 56, (1, 5, 16)  # tokens; of passes
SIZES = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000, "head_dim": 64}
DENSE = SIZES | {"intermediate_size": 2816, "num_hidden_layers": 20}
MIXED = SIZES | {"intermediate_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 6}
MIXED |= {"num_experts": 64, "num_local_experts": 64, "num_experts_per_tok": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096}


def config_of(family: str, **changes: int) -> Any:
    known = families.FAMILIES[family].fields
    sizes = MIXED if families.FAMILIES[family].fields >= families.EXPERTS else DENSE
    sizes = {
        key: value for key, value in sizes.items() if key != "moe_intermediate_size" or "moe_intermediate_size" in known
    }
    own = {"granite": {"attention_multiplier": 0.125, "residual_multiplier": 0.22}}.get(family, {})
    if families.FAMILIES[family].mixer:  # recurrent heads as in Qwen3.5-0.8B
        own = {f"linear_num_{kind}_heads": 16 for kind in ("key", "value")}
        own |= (
            {"shared_expert_intermediate_size": 256} if families.FAMILIES[family].shared else {"num_hidden_layers": 16}
        )
    if family.startswith("gemma") and family != "gemma":
        own = {"query_pre_attn_scalar": 64, "sliding_window": 512}
    return AutoConfig.for_model(family, **(sizes | SPECIAL | own | changes))


def random_blocks(rows: int, columns: int, kind: str = "Q4_K") -> Blocks:
    """A matrix whose weights have the mean 0 and about the standard deviation ``SPREAD``."""
    elements, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = torch.randint(0, 256, (rows, columns // elements, width), dtype=torch.uint8)
    step = SPREAD / (31.5 * 7.5)  # of scales up to 63 and codes up to 15
    if kind == "MXFP4":
        data[..., 0] = 120  # 2 to -7
    else:
        data[..., :4] = torch.tensor([step, 7.5 * step], dtype=torch.float16).view(torch.uint8)
    return Blocks(data.view(rows, -1), kind, columns)


def model_of(family: str, config: Any = None) -> nn.Module:
    torch.manual_seed(0)
    model: Any = empty_model(config or config_of(family), torch.bfloat16)
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear):
            blocks = random_blocks(*module.weight.shape)
            bias = None if module.bias is None else torch.zeros(module.bias.shape)
            model.set_submodule(name, BlockLinear(blocks, bias, torch.bfloat16))
        elif isinstance(module, nn.Embedding):
            scale = getattr(module, "embed_scale", None)
            model.set_submodule(name, BlockEmbedding(random_blocks(*module.weight.shape), torch.bfloat16, scale))
        elif hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            count, (columns, inner) = len(module.down_proj), matrices_of(module, 0)[1].shape
            kind = "MXFP4" if family == "gpt_oss" else "Q4_K"
            for key in BIASES if module.is_transposed else ():
                zeros = torch.zeros(getattr(module, key).shape, dtype=torch.bfloat16)
                setattr(module, key, nn.Parameter(zeros, requires_grad=False))
            gate_up = [[random_blocks(inner, columns, kind) for _ in range(2)] for _ in range(count)]
            down = [random_blocks(columns, inner, kind) for _ in range(count)]
            model.set_submodule(name, BlockExperts(module, gate_up, down, torch.bfloat16))
        else:
            for key, value in module.named_parameters(recurse=False):
                fill = SPREAD * torch.randn(value.shape) if value.dim() > 1 else torch.ones(value.shape)
                fill = fill / (2 * SPREAD) if name.endswith("conv1d") else fill
                around_zero = families.FAMILIES[family].around_zero and not name.endswith("linear_attn.norm")
                fill = fill - 1 if around_zero and value.dim() == 1 else fill
                setattr(module, key, nn.Parameter(fill.bfloat16(), requires_grad=False))
    return model.eval()  # type: ignore[no-any-return]


@torch.inference_mode()
def pass_ms(target: Target, tokens: int, cache: Any, first: int = 0) -> float:
    """first: number of the first token; each is another one."""
    positions = torch.arange(CACHED, CACHED + tokens)[None]
    begin = time.perf_counter()
    x = target.embed(((positions + first) * 7919) % target.vocab_size, positions)
    x = target.layers(x, 0, target.num_layers, Pass(positions, cache.mask(0, positions), cache))
    target.choose(x)
    cache.commit([[]])
    return 1e3 * (time.perf_counter() - begin)


@torch.inference_mode()
def primed(target: Target) -> Any:
    cache, positions = target.new_cache(), torch.arange(CACHED)[None]
    ids = (torch.arange(1, CACHED + 1)[None] * 7919) % target.vocab_size
    target.layers(target.embed(ids, positions), 0, target.num_layers, Pass(positions, cache.mask(0, positions), cache))
    cache.commit([list(range(CACHED))])
    return cache


def depth(passes: dict[int, float], chance: float) -> int:
    """The draft length for tokens that are accepted with a probability of ``chance``, by the ms of passes."""
    each, known = passes[1] / 20, ((chance, 999.0),) * MAX_DEPTH
    policy = AutoDepth(Costs(passes, ((each, each),), (known,)))
    return policy.choose([policy.begin()]).depth


@torch.inference_mode()
def logits_of(target: Target, ids: Tensor, pieces: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] of ``ids`` [B, T] in passes over so many tokens, and those of routers [T, layers, experts]."""
    cache, start, found, routed = target.new_cache(len(ids)), 0, list[Tensor](), list[Tensor]()
    experts = families.mixture_of(target.model.config).experts
    for count in (*pieces, ids.shape[1] - sum(pieces)):
        positions = torch.arange(start, start + count).expand(len(ids), -1)
        routed.append(torch.zeros(positions.numel(), target.num_layers, experts))
        given = Pass(positions, cache.mask(0, positions), cache, routed=routed[-1])
        x = target.layers(target.embed(ids[:, start : start + count], positions), 0, target.num_layers, given)
        found.append(target.readout(x))
        cache.commit([list(range(count))] * len(ids))
        start += count
    return torch.cat(found, 1), torch.cat(routed)


def compare(native: Target, family: str) -> list[str]:
    """With other passes, and with the same model in float32."""
    wide: Any = model_of(family).float()
    densify(wide)
    wide.generation_config.eos_token_id = None
    ids = wide.generate(
        torch.arange(1, PROMPT + 1)[None] * 7919 % native.vocab_size, max_new_tokens=ANSWER, do_sample=False
    )
    logits, routed = logits_of(native, ids, ())
    others = logits_of(native, ids, PIECES)[0], logits_of(native, torch.cat((ids, ids.flip(1))), ())[0][:1]
    with torch.inference_mode(), routing(wide, routed, known=True):
        exact = wide(input_ids=ids).logits[0, PROMPT - 1 : -1]
        rough = native.model(input_ids=ids).logits[0, PROMPT - 1 : -1]
    chosen, expected = logits[0, PROMPT - 1 : -1].argmax(-1), ids[0, PROMPT:]
    same, own = (int((each == expected).sum()) for each in (chosen, rough.argmax(-1)))
    below = (exact.amax(-1) - exact.gather(1, chosen[:, None])[:, 0]) / exact.abs().max()
    bits = "equal" if all(torch.equal(logits, other) for other in others) else "DIFFER"
    return [bits, f"{same}, {own} of {ANSWER}, {100 * float(below.max()):.1f}"]


def measure(family: str) -> list[str]:
    model = model_of(family)
    native, targets = make_target(model, "native")[0], dict[str, Target]()
    for name in ("fused", "reference"):  # with the same weights in 16 bits
        try:
            targets[name] = make_target(model, name)[0]
            break
        except SpecDecError:
            continue
    [(name, other)] = targets.items()
    times: dict[tuple[str, int], list[float]] = {}
    caches = {key: primed(target) for key, target in (("native", native), (name, other))}
    for _ in range(ROUNDS):
        for key, target, tokens in (*(("native", native, n) for n in (1, *MANY)), (name, other, 1)):
            times.setdefault((key, tokens), []).append(pass_ms(target, tokens, caches[key]))
    found = {key: statistics.median(each) for key, each in times.items()}
    one, theirs = found["native", 1], found[name, 1]
    ratios = [f"{found['native', count] / one:.2f}" for count in MANY]
    depths = [depth({count: found["native", count] for count in (1, *MANY)}, chance) for chance in (0.6, 0.8)]
    return [
        family,
        f"{one:.1f}",
        f"{theirs:.1f} {name}",
        f"{theirs / one:.1f}",
        *ratios,
        f"{depths[0]}, {depths[1]}",
        f"{native.logit_difference:.3f}",
        *compare(native, family),
    ]


def measure_experts(count: int, taken: int) -> list[str]:
    sizes = {"num_experts": count, "num_experts_per_tok": taken, "moe_intermediate_size": 2048 // taken}
    config = config_of("qwen3_moe", hidden_size=2048, num_hidden_layers=4, vocab_size=8192, **sizes)
    target, times = make_target(model_of("qwen3_moe", config), "native")[0], dict[int, list[float]]()
    cache = primed(target)
    for first in range(4 * ROUNDS):
        for tokens in (1, *MANY):
            times.setdefault(tokens, []).append(pass_ms(target, tokens, cache, 16 * first))
    found = {tokens: statistics.median(each) for tokens, each in times.items()}
    read = count * (1 - (1 - taken / count) ** 8) / taken
    depths = [depth(found, chance) for chance in (0.6, 0.8)]
    ratios = [f"{found[tokens] / found[1]:.2f}" for tokens in MANY]
    return [f"{taken} of {count}", f"{found[1]:.1f}", *ratios, f"{read:.1f}", f"{depths[0]}, {depths[1]}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--experts", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ratios = [f"{count} / 1" for count in MANY]
    table = Table("family", "native, ms", "other, ms", "times", *ratios, "depth", "apart", "bits", "float32")
    if args.experts:
        table = Table("experts", "one token, ms", *ratios, "read, 8", "depth")
    mixtures = [(count, taken) for taken in (2, 4, 8) for count in (8, 16, 32, 64) if count > taken]
    for each in mixtures if args.experts else args.families:
        table.add_row(*(measure_experts(*each) if args.experts else measure(each)))
        gc.collect()
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
