"""Medusa heads in vLLM's format: ``config.json`` of model type ``medusa`` and ``model.safetensors``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.base.errors import SpecDecError
from specdec.drafters.medusa import KIND, MedusaDrafter
from specdec.models import drafter_folder
from specdec.runtimes.target import Target

PATHS, CHOICES = 64, 10  # entries of vLLM's config without effect: it drafts chains


def export(source: str, target: Target, output: Path) -> None:
    """Write the Medusa heads of ``source``, a folder or a Hugging Face id, in vLLM's format.

    Raises SpecDecError if vLLM's Medusa differs from these heads, or if the files do not load with equal tensors.
    """
    drafter = MedusaDrafter.load(target, source)
    if not drafter.normed:
        raise SpecDecError(
            f"the Medusa heads in '{source}' read the state before the final norm, but vLLM's read the one after it; "
            "train them with --set normed=true"
        )
    config, tensors = _config(drafter, target), _tensors(drafter, target)
    drafter_folder.write(output, config, tensors)
    try:
        loaded = MedusaDrafter.load(target, str(output))
        read = _tensors(loaded, target)
        same = _config(loaded, target) == config and read.keys() == tensors.keys()
        why = "" if same and all(torch.equal(read[name], tensors[name]) for name in read) else "its tensors differ"
    except SpecDecError as error:
        why = str(error)
    if why:
        raise SpecDecError(f"what was written to '{output}' loads as other heads ({why}); delete the folder")


def _config(drafter: MedusaDrafter, target: Target) -> dict[str, Any]:
    network, vocab = drafter.network, drafter.network.draft_vocab
    return {
        "model_type": KIND,
        "architectures": ["MedusaModel"],
        "hidden_size": network.width,
        "vocab_size": target.vocab_size,
        "truncated_vocab_size": target.vocab_size if vocab is None else len(vocab),
        "num_heads": network.heads,
        "num_hidden_layers": network.layers,
        "medusa_fc_bias": True,
        "original_lm_head": len(_output_heads(drafter, target)) == 1,
        "max_paths": PATHS,
        "topk": CHOICES,
        "torch_dtype": str(target.dtype).removeprefix("torch."),
        "accuracy": drafter.accuracy,
    }


def _tensors(drafter: MedusaDrafter, target: Target) -> dict[str, Tensor]:
    network, vocab, tensors = drafter.network, drafter.network.draft_vocab, dict[str, Tensor]()
    for n, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        for k in range(network.heads):
            tensors[f"blocks.{k}.layers.{n}.weight"] = weight[k].to(target.dtype)
            tensors[f"blocks.{k}.layers.{n}.bias"] = bias[k].to(target.dtype)
    heads = _output_heads(drafter, target)
    tensors |= {f"lm_heads.{k}.weight": head.to(target.dtype) for k, head in enumerate(heads)}
    return tensors if vocab is None or len(vocab) == target.vocab_size else tensors | {"token_map": vocab.long()}


def _output_heads(drafter: MedusaDrafter, target: Target) -> Sequence[Tensor]:
    """The output matrix [V', D] of each head, or the shared one, with all tokens in order of their ids."""
    own, vocab = drafter.output_heads, drafter.network.draft_vocab
    if vocab is not None and len(vocab) == target.vocab_size:  # vLLM reads no token map then
        own = None if own is None else [head[vocab.long().argsort()] for head in own]
        vocab = None
    if own is None:
        tokens = torch.arange(target.vocab_size) if vocab is None else vocab.long()
        return [target.reduced_head(tokens).weight]
    return own[:1] if all(head is own[0] for head in own) else own
