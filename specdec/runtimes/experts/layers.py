"""The mixture-of-experts layers of a Hugging Face model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from specdec.base.errors import SpecDecError
from specdec.models.checkpoint import FUSED, StoredExperts


@dataclass(frozen=True)
class MoELayer:
    """One layer with E experts of width F over a residual of width D.

    block: the module with ``gate`` (the router) and ``experts``.
    norm: the norm before the router.
    entry: the norm at the beginning of the layer.
    """

    index: int
    block: Any
    norm: Any
    entry: Any

    @property
    def experts(self) -> Any:
        return self.block.experts

    @property
    def router(self) -> Tensor:
        """[E, D]"""
        weight: Tensor = self.block.gate.weight
        return weight.detach()

    @property
    def top_k(self) -> int:
        return int(self.block.gate.top_k)

    def read(self, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """Copy the weights of one expert, from memory or the checkpoint, into gate_up [2 F, D] and down [D, F]."""
        if isinstance(self.experts, StoredExperts):
            self.experts.read(expert, gate_up, down)
        else:
            gate_up.copy_(self.experts.gate_up_proj[expert])
            down.copy_(self.experts.down_proj[expert])


def moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    """The layers of ``model`` that hold experts as fused tensors ``gate_up_proj`` [E, 2 F, D], ``down_proj`` [E, D, F].

    Raises SpecDecError for a model without experts, and for experts held in any other way.
    """
    found, kind = [], model.config.model_type
    for index, layer in enumerate(getattr(model.base_model, "layers", ())):
        block = next((m for m in layer.children() if hasattr(m, "experts")), None)
        if block is None:
            continue
        experts, router = block.experts, getattr(getattr(block, "gate", None), "weight", None)
        shapes = [tuple(getattr(getattr(experts, n, None), "shape", ())) for n in FUSED]
        norms = [getattr(layer, name, None) for name in ("post_attention_layernorm", "input_layernorm")]
        known = [len(shape) for shape in shapes] == [3, 3] and router is not None and None not in norms
        if not known or getattr(experts, "is_transposed", False) or getattr(experts, "has_bias", False):
            raise SpecDecError(
                f"model type '{kind}' holds the experts of layer {index} in a way not known here; known are Mixtral, "
                "OLMoE, Qwen2-MoE and Qwen3-MoE as transformers 5 holds them"
            )
        found.append(MoELayer(index, block, *norms))
    if not found:
        raise SpecDecError(
            f"model type '{kind}' has no experts; use one that has, such as a Mixtral, or no expert options"
        )
    return found
