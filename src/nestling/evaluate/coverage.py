"""How deep the answers go at which risk: the hierarchical risk-coverage curve, and what guarantees make of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nestling.errors import UsageError
from nestling.evaluate.answered import Backoff, fixed, known_to, outcome
from nestling.evaluate.backoff import DELTA, GUARANTEES, back_off, counts_of
from nestling.evaluate.decide import CONFIDENT
from nestling.evaluate.scores import Scores

RISKS = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Those that a report speaks of."""
POINTS = 100
"""Of the curve."""


def backoff_metrics(held: Mapping[str, Scores], test: Scores) -> dict[str, Any]:
    """The entry ``backoff`` of metrics.json: on test rows, what came of each risk, of the fixed threshold, and of all
    thresholds.

    Of every way to answer ``answered`` (share of rows), ``depth`` (mean number of levels answered, 0 for none),
    ``error`` (wrong answers among those that count; None without any) and ``n`` (answers that count). A risk that the
    calibration rows are too few for has ``needs`` in their place, which says so.
    """
    found: dict[str, Any] = {
        "calibration": {level: int(n) for level, n in zip(test.levels, _known(held.get("calibration"), test))},
        "delta": DELTA,
        "fixed": {"threshold": CONFIDENT} | figures(fixed(test.taxonomy, test.levels, CONFIDENT), test),
    }
    for guarantee in GUARANTEES:
        found[guarantee] = [{"risk": risk} | _at(held, test, risk, guarantee) for risk in RISKS]
    return found | {"curve": curve(test)}


def figures(backoff: Backoff, test: Scores) -> dict[str, Any]:
    """What came of answering rows so. An answer counts where the label is known as deep as any may go: of rows known
    only coarsely no deep answer could be checked, and coarse ones are right more often."""
    result = outcome(test, backoff.depth_of(test))
    cap = sum(bool(np.isfinite(threshold).any()) for threshold in backoff.thresholds)
    checked = known_to(test, max(cap, 1))
    judged = outcome(checked, backoff.depth_of(checked))
    return {"answered": result.answered, "depth": result.depth, "error": judged.risk, "n": judged.counted}


def curve(test: Scores) -> dict[str, list[float]]:
    """One point for each threshold, from the strictest: ``threshold``, ``answered``, ``depth`` and ``error`` as above.

    Points without an answer whose label is known are left out.
    """
    values = test.confidence[test.named]
    if not len(values):
        return {"threshold": [], "answered": [], "depth": [], "error": []}
    steps = sorted(set(np.quantile(values, np.linspace(0, 1, POINTS), method="nearest").tolist()), reverse=True)
    points = [(step, figures(fixed(test.taxonomy, test.levels, step), test)) for step in [*steps, 0.0]]
    points = [(step, point) for step, point in points if point["n"]]
    return {
        "threshold": [step for step, _ in points],
        **{name: [point[name] for _, point in points] for name in ("answered", "depth", "error")},
    }


def _at(held: Mapping[str, Scores], test: Scores, risk: float, guarantee: str) -> dict[str, Any]:
    try:
        chosen = back_off(held.get("calibration"), held.get("validation"), risk, guarantee=guarantee)
    except UsageError as error:
        return {"needs": str(error)}
    least = min(float(threshold.min()) for threshold in chosen.thresholds)
    return {"threshold": least if np.isfinite(least) else None} | figures(chosen, test)


def _known(calibration: Scores | None, test: Scores) -> np.ndarray:
    return np.zeros(len(test.levels)) if calibration is None else np.array(counts_of(calibration))
