"""Hierarchical precision, recall and F-score, for those who compare with HiClass.

Kiritchenko et al. (2006), as HiClass defines them: of every row the set of answers and the set of labels over all
levels, αᵢ and βᵢ; precision is Σ|αᵢ ∩ βᵢ| / Σ|αᵢ|, recall Σ|αᵢ ∩ βᵢ| / Σ|βᵢ|, and F their harmonic mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nestling.errors import UsageError
from nestling.taxonomy import Taxonomy
from nestling.tree import Integers


def hierarchical_scores(answers: Mapping[str, Integers], labels: Integers, taxonomy: Taxonomy) -> dict[str, Any]:
    """``precision``, ``recall``, ``f`` and ``n``, the rows that count; None without rows.

    Parameters
    ----------
    answers: per level int64 (n,) columns; a level that is not answered counts neither here nor among the labels.
    labels: int64 (n, levels). Rows that are labelled down to their leaf count, for of others the lower labels are not
        known. A pass-through column, of a leaf that ended above its level, is no class and stands in neither set.
    """
    if not answers or any(len(column) != len(labels) for column in answers.values()):
        raise UsageError(f"expected answers (n,) for {len(labels)} rows of labels, of one level at least")
    whole = taxonomy.columns(labels)[:, -1] >= 0
    right = answered = labelled = 0
    for level, column in answers.items():
        truth, said = labels[whole, taxonomy.level_index(level)], np.asarray(column)[whole]
        known, given = truth >= 0, said < taxonomy.num_classes(level)
        right += int((known & given & (truth == said)).sum())
        answered += int(given.sum())
        labelled += int(known.sum())
    if not answered or not labelled:
        return {"precision": None, "recall": None, "f": None, "n": int(whole.sum())}
    precision, recall = right / answered, right / labelled
    f = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"precision": precision, "recall": recall, "f": f, "n": int(whole.sum())}
