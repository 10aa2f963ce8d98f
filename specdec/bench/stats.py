"""Estimates with bootstrap intervals. Knows numbers only.

The intervals are percentiles of a cluster bootstrap (Efron 1979; Davison and Hinkley 1997, 3.8): conversations are
drawn with replacement, each with all its turns and repetitions, because what one conversation yields hangs together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
TAIL = 2.5  # per cent on each side

Estimate = dict[str, float | None]  # {"value", "low", "high"}; no interval for a single cluster


def median(values: Sequence[float], clusters: Sequence[int]) -> Estimate | None:
    """The median of ``values``, value i belonging to ``clusters[i]``. None if there are none."""
    if not values:
        return None
    order = np.argsort(values, kind="stable")
    ordered, index = np.asarray(values, float)[order], np.unique(clusters, return_inverse=True)[1][order]
    weights = _counts(int(index.max()) + 1)[:, index].cumsum(1)  # (resamples, values)
    half = weights[:, -1:] / 2
    below, above = (weights < half).sum(1), (weights <= half).sum(1)
    # The last value is the middle of a resample that holds nothing above it.
    draws = (ordered[below] + ordered[np.minimum(above, len(ordered) - 1)]) / 2
    return _estimate(float(np.median(ordered)), draws, int(index.max()) + 1)


def ratio(above: Sequence[float], below: Sequence[float], clusters: Sequence[int]) -> Estimate | None:
    """The pooled ratio sum(above) / sum(below). None if there is nothing below."""
    if not sum(below):
        return None
    index = np.unique(clusters, return_inverse=True)[1]
    sums = [np.bincount(index, np.asarray(part, float)) for part in (above, below)]
    counts = _counts(len(sums[0]))
    top, bottom = (counts @ part for part in sums)
    draws = top[bottom > 0] / bottom[bottom > 0]
    return _estimate(float(sum(above) / sum(below)), draws, len(sums[0]))


def percentiles(values: Sequence[float], at: Sequence[float]) -> list[float]:
    """The percentiles ``at`` of ``values``, linear between neighbours."""
    return [float(value) for value in np.percentile(values, at)]


def _counts(clusters: int) -> Any:
    """How often each cluster is drawn, [RESAMPLES, clusters]; the same for all estimates of a run."""
    return np.random.default_rng(0).multinomial(clusters, np.full(clusters, 1 / clusters), RESAMPLES)


def _estimate(value: float, draws: Any, clusters: int) -> Estimate:
    if clusters < 2:
        return {"value": value, "low": None, "high": None}
    low, high = np.percentile(draws, (TAIL, 100 - TAIL))
    return {"value": value, "low": float(low), "high": float(high)}
