"""Which rows draft how deep: the tokens of a step go where they are likeliest to be accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Division(NamedTuple):
    """The depth of each row's draft, the tokens that the step is expected to yield, and its seconds."""

    depths: list[int]
    tokens: float
    seconds: float


def divide(chances: np.ndarray, seconds: Callable[[np.ndarray, np.ndarray], np.ndarray], least: int = 0) -> Division:
    """The division with the most expected tokens per second, of those that draft ``least`` tokens or more.

    chances: [rows, positions], the probability that a row's draft is accepted up to each of its tokens; it falls along
    a row. seconds: of steps, by the tokens that they score (the rows' roots among them) and the depth of their deepest
    draft. The likeliest token comes first, and so a row's tokens come in their order.
    """
    count = len(chances)
    likely = chances.T.ravel()  # position by position: of equal ones, earlier positions come first
    order = np.argsort(-likely, kind="stable")
    tokens = count + np.append(0.0, likely[order].cumsum())
    deepest = np.append(0, np.maximum.accumulate(order // count + 1))
    took = seconds(count + np.arange(len(tokens)), deepest)
    taken = least + int((tokens / took)[least:].argmax())
    depths = np.bincount(order[:taken] % count, minlength=count).tolist()
    return Division(depths, float(tokens[taken]), float(took[taken]))
