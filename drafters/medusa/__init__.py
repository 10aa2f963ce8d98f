"""Medusa: further heads on the final state of the last verified token draft a tree at once (Cai, arXiv 2401.10774).

Head k predicts the token k positions after the root. Each is one or more residual blocks, x + SiLU(W x + b) (equation 1
of the paper), and an output head. Ours share the model's final norm and output head, over a reduced vocabulary, and
their first block may also read the root's embedding (as in Hydra, arXiv 2402.05109). Public checkpoints, with an output
head for each, are read in the format of their authors and in vLLM's; their blocks read the normalised state.

The tree's shape follows from the heads' own probabilities.
"""

from .drafter import MedusaDrafter
from .network import Medusa

__all__ = ["Medusa", "MedusaDrafter"]
