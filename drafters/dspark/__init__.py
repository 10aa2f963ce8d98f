"""DFlash (arXiv 2602.06036) and DSpark: a few decoder layers draft a block of tokens in one pass.

The block begins with the last token of the text; mask tokens stand for those to come. Its queries attend to keys and
values of the text, which the layers make of the model's states, and to the block itself. DSpark adds a Markov head,
which corrects each token's logits by the token drafted before it, and a head that knows how sure the draft is. Heads in
the ``speculators`` format are read as they are.
"""

from .drafter import DFlashDrafter, DSparkDrafter
from .network import BlockConfig, BlockHead

__all__ = ["BlockConfig", "BlockHead", "DFlashDrafter", "DSparkDrafter"]
