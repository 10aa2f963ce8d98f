"""Turn a dense Llama-like model into a mixture of experts, by splitting its MLPs: a real MoE to measure offloading on.

    python examples/moefy.py --answers answers.jsonl.gz --output smollm2-135m-moe --minutes 20

1. Run the dense model on some of its own answers. The neurons that add most to a layer's residual become a shared
   expert that every token uses; the others are clustered by co-activation into equal experts.
2. Fit by ridge regression, layer after layer: the router, from the MLP's input to how much each expert contributes, and
   the down projection, from the routed neurons to what is missing to the dense model's residual.
3. Train experts and routers by self-distillation: KL to the dense model on its answers, and the residual after every
   layer. ``--minutes`` are minutes of CPU time, so that a shared machine trains no less; ``checkpoint.pt`` in the
   output folder is picked up again after an interruption.

The result is a stock ``Qwen2MoeForCausalLM`` folder with the dense model's tokenizer. Its top-k weights sum to 1 and
its shared expert's gate is a constant 1/2, but the parts of a split MLP each count once: the factors k and 2 are folded
into the down projections. Routing then is a property of what the model learned, not of a random matrix, which caps any
predictor.

Answers: JSON lines with ``prompt_ids`` and ``response_ids`` of the dense model (``specdec train`` keeps such a file
beside what it trains). Every 32nd is held out for the figures: top-1 agreement with the dense model, and NLL.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from specdec.models import loading

HELD_OUT = 32  # every so many answers one is kept for the figures
CONTEXT = 384  # tokens of an answer, prompt included
SAMPLE, WIDTH = 16384, 256  # tokens that all is fitted to in closed form, and how many of an answer
ROUTER_SCALE = 0.3  # of standardised shares: near-uniform weights among the routed
HEAD_SHARE = 0.5  # of the answer's tokens whose distribution is compared: the head costs a fifth of a step
LAYER_WEIGHT = 2.0  # of the mean relative error of the residuals, beside the KL


class Routed(nn.Module):
    """An MLP split into S shared neurons and E experts of F: dense products, neurons of unrouted experts masked.

    gate, up: [S + E F, D]; down: [D, S + E F]; router: [E, D]. All float32.
    """

    def __init__(self, mlp: Any, order: Tensor, router: Tensor, top_k: int, shared: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(mlp.gate_proj.weight.float()[order])
        self.up = nn.Parameter(mlp.up_proj.weight.float()[order])
        self.down = nn.Parameter(mlp.down_proj.weight.float()[:, order])
        self.router = nn.Parameter(router)
        self.top_k, self.shared, self.act = top_k, shared, mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.hidden(x), self.down)

    def hidden(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., S + E F]: the neurons; routed ones weighed by k times their expert's probability, or 0."""
        logits = F.linear(x, self.router).float()  # (..., E)
        top = logits.topk(self.top_k, -1)
        weights = torch.zeros_like(logits).scatter(-1, top.indices, self.top_k * top.values.softmax(-1))
        hidden = self.act(F.linear(x, self.gate)) * F.linear(x, self.up)
        shared, routed = hidden.tensor_split([self.shared], -1)
        routed = routed.unflatten(-1, (logits.shape[-1], -1)) * weights.to(hidden.dtype)[..., None]
        return torch.cat((shared, routed.flatten(-2)), -1)


def read_answers(path: Path) -> list[dict[str, list[int]]]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def batches(rows: list[dict[str, list[int]]], tokens: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For ever: ids [B, T], padded on the right, and which of them are to be predicted from (bool [B, T])."""
    generator = random.Random(seed)
    while True:
        pool = generator.sample(rows, len(rows))
        for start in range(0, len(pool), 64):  # rows of like length go together
            part = sorted(pool[start : start + 64], key=lambda r: len(r["prompt_ids"]) + len(r["response_ids"]))
            group: list[dict[str, list[int]]] = []
            ready = []
            for row in part:
                width = min(CONTEXT, len(row["prompt_ids"]) + len(row["response_ids"]))
                if group and width * (len(group) + 1) > tokens:
                    ready.append(collate(group))
                    group = []
                group.append(row)
            ready.append(collate(group))
            generator.shuffle(ready)
            yield from ready


def collate(rows: list[dict[str, list[int]]]) -> tuple[Tensor, Tensor]:
    full = [(row["prompt_ids"] + row["response_ids"])[:CONTEXT] for row in rows]
    ids = torch.zeros(len(rows), max(map(len, full)), dtype=torch.long)
    answer = torch.zeros_like(ids, dtype=torch.bool)
    for b, (row, tokens) in enumerate(zip(rows, full, strict=True)):
        ids[b, : len(tokens)] = torch.tensor(tokens)
        answer[b, len(row["prompt_ids"]) - 1 : len(tokens) - 1] = True
    return ids, answer


def clusters(activations: Tensor, experts: int, rounds: int = 12) -> Tensor:
    """Neurons [N] in an order in which each N / E of them form an expert: balanced k-means on |activations| [T, N]."""
    x = F.normalize(activations.abs().T, dim=1)  # (N, T)
    size = x.shape[0] // experts
    centres = x[torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(0))[:experts]]
    assigned = torch.zeros(x.shape[0], dtype=torch.long)
    for _ in range(rounds):
        likeness = x @ centres.T  # (N, E)
        wishes, room = likeness.argsort(1, descending=True).tolist(), [size] * experts
        for neuron in likeness.amax(1).argsort(descending=True).tolist():
            expert = next(e for e in wishes[neuron] if room[e])
            room[expert] -= 1
            assigned[neuron] = expert
        centres = F.normalize(torch.stack([x[assigned == e].mean(0) for e in range(experts)]), dim=1)
    return assigned.argsort(stable=True)


@torch.inference_mode()
def split(model: Any, rows: list[dict[str, list[int]]], experts: int, top_k: int, shared: int) -> list[Routed]:
    """The routed form of every MLP of ``model``: neurons clustered, routers and down projections fitted in closed form.

    Layer after layer, on the residual that the routed layers below produce: the down projection is the ridge
    regression, anchored at the dense one, from the routed neurons to what is missing to the dense model's residual.
    """
    rows = [row for row in rows if len(row["prompt_ids"]) + len(row["response_ids"]) >= WIDTH][: SAMPLE // WIDTH]
    ids = torch.stack([torch.tensor((row["prompt_ids"] + row["response_ids"])[:WIDTH]) for row in rows])
    positions = torch.arange(WIDTH)[None]
    dense = routed = model.model.embed_tokens(ids)  # the residual of either model, (B, T, D)
    rotary = model.model.rotary_emb(dense, positions)
    out = []
    for i, layer in enumerate(model.model.layers):
        mlp = layer.mlp
        goal = layer(dense, position_embeddings=rotary, attention_mask=None, position_ids=positions)
        layer.mlp = kept = Last()
        middle = layer(routed, position_embeddings=rotary, attention_mask=None, position_ids=positions)
        layer.mlp, x = mlp, kept.x.flatten(0, 1)
        a = (mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)).float()  # (B T, N)
        weighed = a * mlp.down_proj.weight.float().norm(dim=0)  # what a neuron adds to the residual
        first, rest = weighed.square().mean(0).argsort(descending=True).tensor_split([shared])
        order = torch.cat((first, rest[clusters(weighed[::2, rest], experts)]))
        share = weighed[:, order[shared:]].unflatten(1, (experts, -1)).norm(dim=2)  # (B T, E)
        wish = (share - share.mean(1, keepdim=True)) / share.std(1, keepdim=True)
        router = ROUTER_SCALE * ridge(x.float(), wish, torch.zeros(x.shape[1], experts), 1e-2).T.contiguous()
        module = Routed(mlp, order, router, top_k, shared)
        hidden = module.hidden(x.float())
        missing = (goal - middle).float().flatten(0, 1)
        # A first token's residual is hundreds of times the others': each token counts by its relative error.
        unit = goal.float().flatten(0, 1).square().mean(1, keepdim=True).rsqrt()
        module.down.copy_(ridge(unit * hidden, unit * missing, module.down.T.clone(), 1e-2).T)
        routed = middle + (hidden @ module.down.T).view(middle.shape).to(middle.dtype)
        dense = goal
        error = (unit * (routed - dense).float().flatten(0, 1)).square().mean()
        print(f"layer {i}: relative error of the residual {error:.3f}", flush=True)
        out.append(module)
    return out


class Last(nn.Module):
    """An MLP that adds nothing and remembers its input."""

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return torch.zeros_like(x)


def ridge(x: Tensor, y: Tensor, anchor: Tensor, strength: float) -> Tensor:
    """argmin_W |x W - y|^2 + lambda |W - anchor|^2, lambda relative to the mean squared norm of a column of x."""
    gram = x.T @ x
    diagonal = strength * gram.diagonal().mean()
    return anchor + torch.linalg.solve(gram + diagonal * torch.eye(len(gram)), x.T @ (y - x @ anchor))


def use(model: Any, mlps: list[Any]) -> None:
    for layer, mlp in zip(model.model.layers, mlps, strict=True):
        layer.mlp = mlp


def distil(model: Any, dense: list[Any], routed: list[Routed], ids: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """KL on the answer's tokens, in nats, and the mean relative error of the residual behind each layer."""
    use(model, dense)
    some = answer & (torch.rand(answer.shape) < HEAD_SHARE)
    with torch.inference_mode():
        teacher = model.model(ids, output_hidden_states=True)
        goal = F.log_softmax(model.lm_head(teacher.last_hidden_state[some]).float(), -1)
    goals = [h[answer].clone() for h in teacher.hidden_states[1:]]
    use(model, routed)
    with torch.autocast("cpu", torch.bfloat16):
        student = model.model(ids, output_hidden_states=True)
        logits = model.lm_head(student.last_hidden_state[some])
    kl = F.kl_div(F.log_softmax(logits.float(), -1), goal.clone(), reduction="batchmean", log_target=True)
    errors = [
        (h[answer] - g).float().square().sum() / g.float().square().sum()
        for h, g in zip(student.hidden_states[1:], goals, strict=True)
    ]
    return kl, torch.stack(errors).mean()


def train(args: argparse.Namespace, model: Any, dense: list[Any], routed: list[Routed], rows: list[Any]) -> None:
    routers = [m.router for m in routed]
    experts = [p for m in routed for p in (m.gate, m.up, m.down)]
    groups = [{"params": experts, "peak": args.lr}, {"params": routers, "peak": 4 * args.lr}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    spent, step, tokens = 0.0, 0, 0
    checkpoint = args.output / "checkpoint.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        for module, saved in zip(routed, state["routed"], strict=True):
            module.load_state_dict(saved)
        optimizer.load_state_dict(state["optimizer"])
        spent, step, tokens = state["spent"], state["step"], state["tokens"]
        print(f"goes on at step {step}, after {spent / 60:.1f} minutes", flush=True)
    budget, began, saved_at = 60 * args.minutes, time.process_time() - spent, spent
    mean: dict[str, float] = {}
    if spent >= budget:
        return
    for ids, answer in batches(rows, args.batch_tokens, seed=step):
        done = min(spent / budget, 1.0)
        rise = min(1.0, (step + 1) / 20)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        kl, error = distil(model, dense, routed, ids, answer)
        optimizer.zero_grad()
        (kl + LAYER_WEIGHT * error).backward()
        nn.utils.clip_grad_norm_(experts + routers, 1.0)
        optimizer.step()
        step, tokens, spent = step + 1, tokens + ids.numel(), time.process_time() - began
        for name, value in (("kl", kl.item()), ("error", error.item())):
            mean[name] = value if name not in mean else 0.95 * mean[name] + 0.05 * value
        if step % 10 == 0 or step == 1:
            print(
                f"step {step}  {spent / 60:.1f} of {args.minutes:g} min  KL {mean['kl']:.3f}  "
                f"residual error {mean['error']:.3f}  {tokens / spent:.0f} tokens/s",
                flush=True,
            )
        if spent - saved_at > 120 or spent >= budget:
            saved_at = spent
            state = {"routed": [m.state_dict() for m in routed], "optimizer": optimizer.state_dict()}
            torch.save(state | {"spent": spent, "step": step, "tokens": tokens}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
        if spent >= budget:
            return


@torch.inference_mode()
def evaluate(model: Any, rows: list[Any], forms: dict[str, list[Any]]) -> dict[str, float]:
    """On held-out answers: NLL per token in nats under each form, and how often their top-1 tokens agree."""
    nll, agree, count = dict.fromkeys(forms, 0.0), 0, 0
    for row in rows:
        ids, answer = collate([row])
        tops = []
        for name, mlps in forms.items():
            use(model, mlps)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(ids).logits[answer].float()  # (T, V)
            nll[name] += F.cross_entropy(logits, ids[:, 1:][answer[:, :-1]], reduction="sum").item()
            tops.append(logits.argmax(-1))
        agree, count = agree + int((tops[0] == tops[1]).sum()), count + len(tops[0])
    return {f"nll_{name}": value / count for name, value in nll.items()} | {"agreement": agree / count}


def export(model: Any, routed: list[Routed]) -> Qwen2MoeForCausalLM:
    """The stock MoE: same attention, norms and embeddings; k and 2 folded into the down projections."""
    old, experts, top_k, shared = model.config, routed[0].router.shape[0], routed[0].top_k, routed[0].shared
    keep = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "max_position_embeddings rms_norm_eps pad_token_id bos_token_id eos_token_id tie_word_embeddings "
        "rope_parameters"
    )
    config = Qwen2MoeConfig(
        **{name: getattr(old, name) for name in keep.split()},
        moe_intermediate_size=(old.intermediate_size - shared) // experts,
        shared_expert_intermediate_size=shared,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        qkv_bias=False,
        dtype=torch.bfloat16,
    )
    moe = Qwen2MoeForCausalLM(config).to(torch.bfloat16)
    state = {name: value for name, value in model.state_dict().items() if ".mlp." not in name}
    for i, module in enumerate(routed):
        prefix = f"model.layers.{i}.mlp."
        (gate, gates), (up, ups) = (w.detach().tensor_split([shared]) for w in (module.gate, module.up))
        down, downs = module.down.detach().tensor_split([shared], 1)  # (D, S), (D, E F)
        state[prefix + "shared_expert.gate_proj.weight"], state[prefix + "shared_expert.up_proj.weight"] = gate, up
        state[prefix + "shared_expert.down_proj.weight"] = 2 * down
        state[prefix + "shared_expert_gate.weight"] = torch.zeros(1, old.hidden_size)
        state[prefix + "gate.weight"] = module.router.detach()
        both = [w.unflatten(0, (experts, -1)) for w in (gates, ups)]  # (E, F, D)
        state[prefix + "experts.gate_up_proj"] = torch.cat(both, 1)
        state[prefix + "experts.down_proj"] = top_k * downs.unflatten(1, (experts, -1)).transpose(0, 1)
    moe.load_state_dict({name: value.to(torch.bfloat16) for name, value in state.items()})
    moe.generation_config = model.generation_config
    return moe.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a dense Llama-like model")
    parser.add_argument("--answers", type=Path, required=True, help="JSON lines with prompt_ids and response_ids")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new model")
    parser.add_argument("--shared", type=int, default=768, help="neurons of the shared expert")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=20.0, help="CPU minutes of training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=5e-4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = loading.load(args.model, dtype="bfloat16")
    width = model.config.intermediate_size - args.shared
    if model.config.model_type != "llama" or args.shared < 1 or width < args.experts or width % args.experts:
        parser.error(f"needs a Llama model whose MLP width is {args.shared} and a multiple of {args.experts}")
    rows = read_answers(args.answers)
    held, rest = rows[::HELD_OUT], [row for i, row in enumerate(rows) if i % HELD_OUT]
    args.output.mkdir(parents=True, exist_ok=True)
    dense = [layer.mlp for layer in model.model.layers]
    if (args.output / "checkpoint.pt").is_file():  # all parameters come from it
        blank = torch.zeros(args.experts, model.config.hidden_size)
        order = torch.arange(model.config.intermediate_size)
        routed = [Routed(mlp, order, blank.clone(), args.top_k, args.shared) for mlp in dense]
    else:
        routed = split(model, rest, args.experts, args.top_k, args.shared)
        first = evaluate(model, held[:24], {"dense": dense, "moe": routed})
        print("before training, 24 held-out answers", json.dumps(first), flush=True)
    train(args, model, dense, routed, rest)
    figures = evaluate(model, held, {"dense": dense, "moe": routed})
    use(model, dense)
    export(model, routed).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "moefy.json").write_text(json.dumps({**vars(args), **figures}, default=str, indent=2) + "\n")
    print("held-out answers", json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
