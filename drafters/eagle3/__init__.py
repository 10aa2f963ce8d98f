"""EAGLE-3 (arXiv 2503.01840): one decoder layer over the states of three layers drafts a chain, or a tree of tokens.

The head runs pairs: a token's embedding, and the features of the token before it, which are made of the tapped layers'
states, or for a drafted token the head's own output. It has its own keys and values of each pair. Heads in the
``speculators`` format are read as they are.
"""

from .drafter import Eagle3Drafter
from .network import Eagle3, Eagle3Config

__all__ = ["Eagle3", "Eagle3Config", "Eagle3Drafter"]
