"""Checks whether any runtime supports a model, and whether a runtime computes the logits of the model's own forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from specdec.base.errors import NotFiniteError, SpecDecError, out_of_memory
from specdec.models.families import FAMILIES, mixture_of
from specdec.models.gguf.blocks import Blocks, ExpertBlocks, dequantize, named_weights
from specdec.models.native_model import AnyModel, NativeModel
from specdec.runtimes.decoder_layer import has_experts, router
from specdec.runtimes.target import Pass, Target
from specdec.runtimes.torch.model import logits_of


def refuse_unsupported(model: AnyModel) -> None:
    """Raise SpecDecError with the reason if no runtime supports ``model``.

    A supported model is a decoder-only causal language model with an output head. Its attention implementation is
    "sdpa" or "eager", because others take no tree masks. If its ``config.model_type`` is not in
    ``models.families.FAMILIES``, each layer reads only the output of the layer before it (``refuse_tangled``).
    """
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        raise SpecDecError(f"model type '{kind}' is an encoder-decoder; specdec needs a decoder-only causal model")
    if model.get_output_embeddings() is None:
        raise SpecDecError(f"model type '{kind}' has no language-model head; load it as a causal language model")
    if kind not in FAMILIES:
        refuse_tangled(model)
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise SpecDecError(
            f"attention implementation '{model.config._attn_implementation}' takes no tree masks; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )


def refuse_tangled(model: AnyModel) -> None:
    """Raise SpecDecError if a layer of ``model`` reads anything but the output of the layer before it.

    Such layers read the token embeddings again, or the keys and values of another layer. This is decided by the
    model's config.
    """
    kind, text = model.config.model_type, model.config.get_text_config()
    if kind in ("zamba", "zamba2") or getattr(text, "hidden_size_per_layer_input", None):
        raise SpecDecError(f"model type '{kind}' is not supported: its layers read the token embeddings again")
    if getattr(text, "num_kv_shared_layers", None):
        raise SpecDecError(f"model type '{kind}' is not supported: its layers share keys and values with others")


def not_finite(model: AnyModel) -> NotFiniteError:
    """Return, for the caller to raise, the error that explains why the logits of ``model`` are NaN or infinite.

    The message names the first weight that has NaN or infinite values. If all weights are finite, it names the dtype
    and suggests another one. Reads all weights.
    """
    name = f"'{model.config._name_or_path}'" if model.config._name_or_path else "this model"
    for key, found in named_weights(model):
        parts = found.matrices if isinstance(found, ExpertBlocks) else (found,)
        weights = (dequantize(part, None, model.dtype) if isinstance(part, Blocks) else part for part in parts)
        if not all(weight.is_meta or bool(weight.isfinite().all()) for weight in weights):
            return NotFiniteError(
                f"the weights of {name} are broken: '{key}' holds NaN or infinite values; get it again"
            )
    dtype = str(model.dtype).removeprefix("torch.")
    return NotFiniteError(f"{name} gives NaN or infinite logits in {dtype}; load it in bfloat16 or float32")


def _apart(found: Tensor, expected: Tensor) -> Tensor:
    """Return each token's largest absolute difference, relative to the largest absolute value of ``expected``.

    found, expected: the values to compare, such as logits, [T, n] each.
    Returns float32 [T].
    """
    return (found.float() - expected.float()).abs().amax(-1) / expected.float().abs().max().clamp_min(1e-6)


def _of_router(expected: Tensor, found: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Compare the output of a mixture's router, the linear layer that chooses a token's experts, with an earlier run.

    expected: the earlier run's logits of all E experts, [T, E].
    found: the router's logits, [T, E].
    experts: the k experts that the router chose for each token, int64 [T, k].

    Returns two relative differences, float32 [T] each: between ``expected`` and ``found``; and between the logits of
    the chosen experts and the k largest logits in ``found``, 0 if the choice is right.
    """
    largest = found.topk(experts.shape[1]).values
    return _apart(expected, found), _apart(found.gather(1, experts), largest)


def _largest(logits: Tensor, count: int) -> Tensor:
    """Return the indices of each token's largest logits, int64 [T, count], the largest first.

    Of equal logits, the one with the lowest index comes first.

    logits: router logits of E experts, [T, E].
    count: number of experts that a token uses.
    """
    return logits.sort(stable=True, descending=True).indices[:, :count]


@contextmanager
def routing(model: Any, logits: Tensor, known: bool) -> Iterator[list[Tensor]]:
    """Let tokens use the experts with the largest ``logits`` in the modules of ``model``, in the ``with`` block.

    Rounding decides between experts whose logits nearly tie, and another expert gives another result. So two runs are
    compared with the same experts for each token, and by the logits of their routers.

    model: the causal language model, whose modules run in the block.
    logits: router logits of all T tokens, float32 [T, layers, experts]; with 0 experts, the block has no effect.
    known: whether ``logits`` are given. If not, each router writes its own logits there and chooses by them.

    Yields a list, empty at first. If ``known``, each router that runs in the block appends the two differences [T] that
    ``_of_router`` returns.
    """
    differences = list[Tensor]()

    def route(layer: int, _router: nn.Module, _args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        found, shares, experts = output
        if known:
            differences.extend(_of_router(logits[:, layer], found, experts))
        else:
            logits[:, layer] = found
        return found, shares, _largest(logits[:, layer], experts.shape[1])

    with ExitStack() as hooks:
        for n, layer in enumerate(model.model.layers) if logits.shape[2] else ():
            if has_experts(layer):
                hooks.callback(router(layer.mlp).register_forward_hook(partial(route, n)).remove)
        yield differences


@torch.inference_mode()
def check_logits(target: Target) -> float:
    """Compare the logits of ``target`` with those of its model's own forward, and raise SpecDecError if they differ.

    The target runs 11 tokens in passes of 8, 1 and 2 tokens, each of which is split into two ranges of layers. The
    model runs all 11 in one forward, in which each token uses the same experts.

    Returns a relative difference, 0 if all logits are equal. A position's difference is the largest one of its logits,
        relative to the largest logit of all positions. The result is the larger of two medians, one over the first 8
        and one over the other positions, and the largest such value of the output head and all routers. A single
        position may differ much in 16 bits, also in a correct runtime.

    Raises SpecDecError if the result is 1e-4 or more in float32, or 5e-2 or more in 16 bits, or if the layers do not
    run one by one; NotFiniteError if the model's own logits are not finite.
    """
    model, kind = target.model, target.model.config.model_type
    (prompt, n), device, layers = (8, 11), target.device, target.num_layers
    # Spread over the vocabulary: the first tokens are often special ones, on which models are ill-conditioned.
    ids = (torch.arange(1, n + 1, device=device)[None] * 7919) % target.vocab_size
    positions = torch.arange(n, device=device)[None]
    # Other families' routers choose by more than their logits, and their modules run in all runtimes.
    experts, taken, _ = mixture_of(model.config) if kind in FAMILIES else (0, 0, False)
    routed = torch.zeros(n, layers, experts, device=device)
    try:
        cache, ours = target.new_cache(), []
        for a, b in ((0, prompt), (prompt, prompt + 1), (prompt + 1, n)):
            part = positions[:, a:b]
            x, mask = target.embed(ids[:, a:b], part), cache.register(0, part)
            for lo, hi in ((0, layers // 2), (layers // 2, layers)):
                found = torch.zeros(b - a, hi, experts, device=device)
                with routing(model, found, known=False):
                    x = target.layers(x, lo, hi, Pass(part, mask, cache, routed=found, ids=ids[:, a:b]))
                routed[a:b, lo:hi] = found[:, lo:hi]
            ours.append(target.readout(x))
            cache.commit([list(range(b - a))])
        if isinstance(model, NativeModel):
            differences = list[Tensor]()

            def choose(layer: int, found: Tensor) -> Tensor:
                differences.extend(_of_router(routed[:, layer], found, found.topk(taken).indices))
                return _largest(routed[:, layer], taken)

            own = logits_of(model, ids[0], target.windows, choose)[None]
        else:
            with routing(model, routed, known=True) as differences:
                own = model(input_ids=ids, use_cache=False).logits
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        if out_of_memory(error):  # says nothing of the model, and another runtime needs no less
            raise
        raise SpecDecError(
            f"model type '{kind}' is not supported: its layers do not run one by one ({error})"
        ) from error
    if not bool(own.isfinite().all()):
        raise not_finite(target.model)
    apart = torch.stack([_apart(torch.cat(ours, 1)[0], own[0]), *differences])  # (1 + 2 layers with experts, T)
    medians = [part.median(-1).values for part in (apart[:, :prompt], apart[:, prompt:])]
    difference = torch.cat(medians).max().item()  # NaN if any is
    if not difference < (1e-4 if target.dtype == torch.float32 else 5e-2):
        raise SpecDecError(
            f"the {target.runtime} runtime gives other logits than this '{kind}' model "
            f"(relative difference {difference:.1e})"
        )
    return difference
