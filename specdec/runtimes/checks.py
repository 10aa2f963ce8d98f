"""Checks of models that no runtime supports, and of a runtime against its model."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from specdec.base.errors import NotFiniteError, SpecDecError
from specdec.models.gguf.blocks import Blocks, ExpertBlocks, dequantize, named_weights
from specdec.runtimes.target import Pass, Target


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raise SpecDecError, with the reason, for a model whose decoding state cannot be rolled back or tree-masked."""
    kind, text = model.config.model_type, model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise SpecDecError(f"model type '{kind}' is an encoder-decoder; specdec needs a decoder-only causal model")
    if model.get_output_embeddings() is None:
        raise SpecDecError(f"model type '{kind}' has no language-model head; load it as a causal language model")
    if kind in ("zamba", "zamba2") or getattr(text, "hidden_size_per_layer_input", None):
        raise SpecDecError(f"model type '{kind}' is not supported: its layers read the token embeddings again")
    if getattr(text, "num_kv_shared_layers", None):
        raise SpecDecError(f"model type '{kind}' is not supported: its layers share keys and values with others")
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise SpecDecError(
            f"attention implementation '{model.config._attn_implementation}' takes no tree masks; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )


def not_finite(model: PreTrainedModel) -> NotFiniteError:
    """The error for NaN or infinite logits of ``model``: names the first broken weight, or blames the dtype."""
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


@torch.inference_mode()
def check_logits(target: Target) -> float:
    """Compare passes of ``target`` over a prompt, one token and two, each in two pieces, with its model's own forward.

    Returns the difference of the median position, relative to the largest logit: in 16 bits, single positions of
    correct runtimes may differ much. Raises SpecDecError if it is too large.
    """
    kind, (prompt, n), device = target.model.config.model_type, (8, 11), target.device
    # Spread over the vocabulary: the first tokens are often special ones, on which models are ill-conditioned.
    ids = (torch.arange(1, n + 1, device=device)[None] * 7919) % target.vocab_size
    positions = torch.arange(n, device=device)[None]
    try:
        own = target.model(input_ids=ids, use_cache=False).logits.float()
        cache, half, ours = target.new_cache(), target.num_layers // 2, []
        for a, b in ((0, prompt), (prompt, prompt + 1), (prompt + 1, n)):
            part = positions[:, a:b]
            x, mask = target.embed(ids[:, a:b], part), cache.mask(0, part)
            x = target.layers(x, 0, half, Pass(part, mask, cache))
            ours.append(target.readout(target.layers(x, half, target.num_layers, Pass(part, mask, cache))))
            cache.commit([list(range(b - a))])
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise SpecDecError(
            f"model type '{kind}' is not supported: its layers do not run one by one ({error})"
        ) from error
    if not bool(own.isfinite().all()):
        raise not_finite(target.model)
    apart = (own - torch.cat(ours, 1).float()).abs().amax(-1)[0] / own.abs().max().clamp_min(1e-6)  # (T,)
    difference = max(apart[:prompt].median().item(), apart[prompt:].median().item())
    if not difference < (1e-4 if target.dtype == torch.float32 else 5e-2):
        raise SpecDecError(
            f"the {target.runtime} runtime gives other logits than this '{kind}' model "
            f"(relative difference {difference:.1e})"
        )
    return difference
