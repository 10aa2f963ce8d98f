"""M2R2: the model drafts for itself through an accelerated residual (arXiv 2502.02040)."""

from .drafter import M2R2Drafter, PaperM2R2Drafter
from .network import M2R2, load_network
from .path import M2R2Path

__all__ = ["M2R2", "M2R2Drafter", "M2R2Path", "PaperM2R2Drafter", "load_network"]
