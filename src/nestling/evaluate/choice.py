"""How lambda is chosen where fine labels are not to be had: rules over the coarse R@1 of validation rows.

The paper's rule takes the highest. Where the coarse task is saturated, that says nothing: instance classification
costs a little of it while it finds the fine classes. The rules beyond the paper take the largest lambda that loses
little. ``nestling sweep`` chooses by ``DEFAULT``; ``nestling reproduce coins-choice`` compares all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from nestling.evaluate.retrieval import recall_at_k
from nestling.models.model import Outputs

Rule = Callable[[Mapping[float, float], int], float]
"""Coarse R@1 by lambda, and of how many rows it is, to the lambda that is chosen."""


def coarse_recall(outputs: Outputs, labels: Tensor, level: int) -> float:
    """R@1 of one level, labels (n, levels), by the features that search compares; NaN without a labelled row."""
    return recall_at_k(outputs.embedding, labels[:, level], ks=(1,))[1]


def highest(recalls: Mapping[float, float], rows: int) -> float:
    """The paper's: the best, the smallest of equals."""
    return max(sorted(recalls), key=lambda weight: recalls[weight])


def within(recalls: Mapping[float, float], loss: float) -> float:
    """The largest lambda that loses no more than ``loss`` to the best."""
    # A point of a hundred rows is 0.01 up to rounding.
    return max(weight for weight, recall in recalls.items() if recall >= max(recalls.values()) - loss - 1e-9)


def within_a_point(recalls: Mapping[float, float], rows: int) -> float:
    """One row among a hundred may be lost."""
    return within(recalls, 0.01)


def within_a_standard_error(recalls: Mapping[float, float], rows: int) -> float:
    """What the best one's R@1 is known to."""
    best = max(recalls.values())
    return within(recalls, math.sqrt(best * (1 - best) / max(rows, 1)))


PAPER, DEFAULT = "the paper's rule", "within a point"
RULES: Mapping[str, Rule] = {
    PAPER: highest,
    DEFAULT: within_a_point,
    "within a standard error": within_a_standard_error,
}
