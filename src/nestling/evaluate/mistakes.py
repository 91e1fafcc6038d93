"""Labels that are probably wrong: confident learning, level by level.

Northcutt, Jiang, Chuang, *Confident Learning: Estimating Uncertainty in Dataset Labels* (2021), Section 3.1, on the
shares of a class among its siblings: at every level but the coarsest a label is judged by the probabilities given its
parent, so that a fine label which is wrong inside the right coarse class is told from a coarse one that is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nestling.taxonomy import Taxonomy


@dataclass(frozen=True)
class Mistake:
    """A label that is probably wrong."""

    row: int
    level: str
    """The coarsest level at which it is."""
    given: int
    """Code of the class it says."""
    suggested: int
    """Code of the class that is more probable."""
    score: float
    """How much more probable, given the parent: a difference of probabilities, in (0, 1]."""


def label_mistakes(
    probabilities: Mapping[str, NDArray], labels: NDArray[np.int64], taxonomy: Taxonomy
) -> dict[str, list[Mistake]]:
    """By level, coarse to fine, the labels that are probably wrong there, the surest first.

    Parameters
    ----------
    probabilities: (n, width) for each level that is judged, of rows that the model was not trained on.
    labels: (n, levels of the taxonomy) int64, -1 where not known.

    A label counts as wrong where another class of the same parent is more probable than it, and at least as probable as
    that class is on average on rows which are labelled so. What is wrong at a coarser level is not judged below it.
    """
    judged, found = np.ones(len(labels), dtype=bool), {}
    for level, p in probabilities.items():
        number = taxonomy.level_index(level)
        given = labels[:, number]
        rows = np.flatnonzero(judged & (given >= 0))
        share = _among_siblings(np.asarray(p, np.float64)[rows], given[rows], taxonomy, number)
        own = share[np.arange(len(rows)), given[rows]]
        least = np.full(share.shape[1], np.inf)
        for code in np.unique(given[rows]):
            least[code] = own[given[rows] == code].mean()
        # Rounding must not decide where a class is as probable as ever.
        rivals = np.where((share >= least - 1e-12) & (share > own[:, None]), share, -1.0)
        best = rivals.argmax(1)
        wrong = np.flatnonzero(rivals.max(1) > 0) if len(rows) else np.empty(0, np.int64)
        mistakes = [
            Mistake(int(rows[i]), level, int(given[rows[i]]), int(best[i]), float(share[i, best[i]] - own[i]))
            for i in wrong
        ]
        found[level] = sorted(mistakes, key=lambda mistake: (-mistake.score, mistake.row))
        judged[rows[wrong]] = False
    return found


def _among_siblings(p: NDArray[np.float64], given: NDArray, taxonomy: Taxonomy, number: int) -> NDArray[np.float64]:
    """(n, classes): the probability of each class given the parent that the label has; 0 outside of it."""
    level = taxonomy.levels[number]
    p = p[:, : taxonomy.num_classes(level)]
    if number == 0:
        return p
    parent = taxonomy.parent[level]
    p = np.where(parent[None, :] == parent[given][:, None], p, 0.0)
    total = p.sum(1, keepdims=True)
    return np.divide(p, total, out=np.zeros_like(p), where=total > 0)
