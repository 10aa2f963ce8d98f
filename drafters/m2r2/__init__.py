"""M2R2: the model drafts for itself through an accelerated residual (arXiv 2502.02040).

The idea. A layer adds to a residual: h[k + 1] = h[k] + f_k(h[k]). This slow residual h reaches its final direction at
the last of N layers. A second, accelerated residual p goes through some of the layers with low-rank adapters, attends
to the keys and values of h, and points to h[N] earlier. What the model's own head reads of p is the draft.

    (1) p[0] = h[0]
    (2) p[k + 1] = p[k] + f_k(p[k]) with adapters, k < E              exit layer E: h is exact, scoring resumes
    (3) p[lo] = A [p; g[N]; g[lo]] + b                                a projection to a later segment of layers [lo, hi)
    (4) p[k + 1] = p[k] + f_k(p[k]) with adapters, lo <= k < hi       the segment
    (5) p[N] = A [p; g[N]] + b                                        the projection to the final state
    (6) draft logits = head(norm(p[N]))

g is the *carry*: the deep states of the token before, h of a verified token and p of a drafted one. All parts of
[...; ...] have unit RMS. (1), (2) and (6) are the paper's; only its abstract was at hand. Segments, projections and
the carry are an extension of this project; A and b have a closed form (ridge regression). A path may have several
exits: a token leaves at the first exit whose router (ARLA) is confident. ``specdec/reference.py`` has the same in
plain PyTorch, and the numbers are those of docs/how-it-works.md.

    path.py       the draft path: E, segments, exits, adapters; no tensors
    network.py    A, b, adapters and routers, and each equation as a function; for drafting and for training
    path_pass.py  a draft token by token along the path, each token as far as its exit
    drafter.py    the drafter: chains by ``path_pass``, trees and batches in one call of the runtime
    learning.py   the drafter teaches itself from finished texts: ``replay.py`` runs them again, ``fits.py`` fits A and
                  b to sums over their states, ``learned.py`` keeps the sums between processes
"""

from .drafter import M2R2Drafter, PaperM2R2Drafter
from .network import M2R2, load_network
from .path import M2R2Path

__all__ = ["M2R2", "M2R2Drafter", "M2R2Path", "PaperM2R2Drafter", "load_network"]
