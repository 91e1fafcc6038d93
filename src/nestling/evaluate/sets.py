"""Prediction sets: for each level the classes that hold the true one with a chosen probability (split conformal)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from nestling.errors import UsageError
from nestling.evaluate.answered import counted_at
from nestling.evaluate.guarantee import check_share, rows_needed_on_average, set_threshold
from nestling.evaluate.scores import Scores
from nestling.taxonomy import Taxonomy


def set_thresholds(calibration: Scores | None, risk: float) -> dict[str, float]:
    """For each level the least combined probability of a class in its set, by ``guarantee.set_threshold`` on the rows
    known there; levels with too few of them are left out. Raises UsageError where all are."""
    check_share("risk", risk)
    needed, found = rows_needed_on_average(risk), {}
    for i, level in enumerate(calibration.levels if calibration is not None else ()):
        assert calibration is not None
        known = counted_at(calibration, i)
        if known.sum() >= needed:
            found[level] = set_threshold(calibration.truth[known, i], risk)
    if not found:
        raise UsageError(
            f"sets that miss the true class in at most {100 * risk:g} % of cases need {needed} calibration rows whose "
            "label is known at a level, and this model has fewer at every level: ask for a higher risk"
        )
    return found


def classes_above(
    probabilities: Mapping[str, Tensor], taxonomy: Taxonomy, thresholds: Mapping[str, float]
) -> list[dict[str, list[str]]]:
    """For each row, by level, the names of the columns of ``probabilities`` (n, width) that reach the level's
    threshold, the most probable first."""
    rows: list[dict[str, list[str]]] = [{} for _ in range(len(next(iter(probabilities.values()))))]
    for level, least in thresholds.items():
        names, p = taxonomy.column_names(level), probabilities[level].double().cpu().numpy()
        order = np.argsort(-p, axis=1, kind="stable")
        for row, (columns, count) in enumerate(zip(order.tolist(), (p >= least).sum(1).tolist(), strict=True)):
            rows[row][level] = [names[column] for column in columns[:count]]
    return rows
