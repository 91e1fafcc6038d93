"""How a model fares on each concept (*Hierarchically Robust Representation Learning*, Section 4.5 and Figure 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nestling.data.dataset import LabelledData
from nestling.errors import UsageError

SMALLEST = 5
"""Of the concepts with the fewest training rows, whose mean accuracy is told apart."""


def rows_of_concepts(data: LabelledData, level: str) -> dict[str, int]:
    """How many rows each concept at ``level``, or of that column, has, by name; a ragged leaf above it is one too."""
    codes, names = data.concepts_at(level)
    return dict(zip(names, np.bincount(codes[codes >= 0], minlength=len(names)).tolist(), strict=True))


def concept_accuracies(
    correct: np.ndarray,
    concepts: np.ndarray,
    names: Sequence[str],
    counts: Mapping[str, int] | None = None,
    smallest: int = SMALLEST,
) -> dict[str, Any]:
    """The accuracy on every concept, ascending, and what it comes to.

    Parameters
    ----------
    correct: (n,) bool or 0 and 1, whether each row is answered rightly.
    concepts: (n,) int, the concept of each row, -1 = none, which does not count.
    names: (k,) of the concepts. ``counts``: their training rows by name, which say which are small; by default the
        rows given say so.
    smallest: of how many small concepts the mean is taken; of all where there are fewer.

    Returns
    -------
    ``accuracy`` and ``n`` by concept, in ascending order of accuracy; ``worst``, the least of them; ``mean`` over
    concepts; ``spread``, the largest less the least; ``smallest``, the mean over the small ones, ties by name; all None
    without rows. ``UsageError`` on other shapes.
    """
    correct, concepts = np.asarray(correct, dtype=np.float64), np.asarray(concepts)
    if correct.ndim != 1 or concepts.shape != correct.shape or (concepts.size and concepts.max() >= len(names)):
        raise UsageError(
            f"expected correct and concepts (n,), of {len(names)} concepts, got {correct.shape} and {concepts.shape}"
        )
    known = concepts >= 0
    rows = np.bincount(concepts[known], minlength=len(names))
    right = np.bincount(concepts[known], correct[known], minlength=len(names))
    found = {names[k]: (right[k] / rows[k], int(rows[k])) for k in np.flatnonzero(rows).tolist()}
    order = sorted(found, key=lambda name: (found[name][0], name))
    sizes = {name: n for name, (_, n) in found.items()} if counts is None else counts
    small = sorted(found, key=lambda name: (sizes.get(name, 0), name))[:smallest]
    values = [found[name][0] for name in order]
    return {
        "accuracy": {name: float(found[name][0]) for name in order},
        "n": {name: found[name][1] for name in order},
        "worst": float(values[0]) if values else None,
        "mean": float(np.mean(values)) if values else None,
        "spread": float(values[-1] - values[0]) if values else None,
        "smallest": float(np.mean([found[name][0] for name in small])) if values else None,
    }
