"""Generations in several threads at once, and drafters for them."""

import threading
from collections.abc import Callable
from typing import Any

from zoo import m2r2

from specdec.runtimes.target import Target
from specdec.speculation.drafter import Drafter

BF16 = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}  # what the native runtime serves
PROMPTS = [[5, 6, 7, 8, 9] * 3, [10, 11, 12, 13, 10, 11, 12], [20, 21, 22, 23, 24, 25] * 4]


def at_once(*runs: Callable[[], Any]) -> list[list[Any]]:
    """Call all ``runs`` in threads that start together, three times each; return the three results of each."""
    begin, found = threading.Barrier(len(runs)), [list[Any]() for _ in runs]

    def work(own: list[Any], each: Callable[[], Any]) -> None:
        begin.wait(60)
        for _ in range(3):
            own.append(each())

    threads = [threading.Thread(target=work, args=pair) for pair in zip(found, runs, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


def grown(target: Target) -> Drafter:
    return m2r2(target, 0, ((1, 2), (3, 4)), True, False, nodes=6, width=2)


def projecting(target: Target) -> Drafter:
    return m2r2(target, 1, ((2, 4),), False, True)
