"""Rows of no known class, measured for ``train --hold-out`` and ``evaluate --false-alarm``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nestling.data.dataset import LabelledData
from nestling.data.text import AnyPreprocessing
from nestling.engine.runtime import Runtime
from nestling.errors import UsageError
from nestling.evaluate.measure import CLEAN, outputs_of
from nestling.evaluate.scores import Scores
from nestling.evaluate.unknowns import FALSE_ALARM, alarm, novelty, unknown_metrics, unknown_since
from nestling.models.model import Model

HELD_OUT = "held out"
"""The name under which classes that training never saw are measured."""
SCORES = {"path": "ours", "rejection": "rejection", "softmax": "softmax", "energy": "energy"}
"""Of a score: its title in a table."""


def measure_unknown(
    model: Model,
    preprocessing: AnyPreprocessing,
    held: Mapping[str, Scores],
    known: LabelledData,
    others: Mapping[str, LabelledData],
    runtime: Runtime,
    rate: float | None = None,
) -> dict[str, Any]:
    """``unknown_metrics`` of these rows; rows under any other name than ``HELD_OUT`` are unknown throughout.

    Without a ``rate`` it is ``FALSE_ALARM``, and where the calibration rows are too few for it, the entry ``needs``
    says so in place of the figures.
    """
    try:
        raised = alarm(held.get("calibration"), FALSE_ALARM if rate is None else rate)
    except UsageError as error:
        if rate is not None:
            raise
        return {"needs": str(error)}
    found = {
        name: (
            novelty(model, outputs_of(model, preprocessing, data, runtime)[CLEAN]),
            unknown_since(data.labels) if name == HELD_OUT else np.zeros(len(data), np.int64),
        )
        for name, data in others.items()
    }
    scores = novelty(model, outputs_of(model, preprocessing, known, runtime)[CLEAN])
    return unknown_metrics(raised, scores, found, FALSE_ALARM if rate is None else rate)


def unknown_lines(metrics: Mapping[str, Any]) -> list[str]:
    """The entry ``unknown`` of metrics.json in lines; none where there is none."""
    found = metrics.get("unknown")
    if not found:
        return []
    if "needs" in found:
        return [found["needs"]]
    from nestling.commands.words import aligned

    levels = ", ".join(f"{level['name']} {100 * level['false_alarms']:.1f} %" for level in found["levels"])
    lines = [f"unknown, at a false-alarm rate of {100 * found['rate']:g} % per level; false alarms: {levels}"]
    rows = []
    for name in found["sets"]:
        for level in found["levels"]:
            if name not in level:
                continue
            entry = level[name]
            rows.append(
                [
                    name,
                    level["name"],
                    f"{entry['n']:,}",
                    f"{100 * entry['detected']:.1f}",
                    *(
                        f"{100 * entry['auroc'][kind]:.1f} / {100 * entry['fpr95'][kind]:.1f}"
                        if kind in entry["auroc"]
                        else "-"
                        for kind in SCORES
                    ),
                ]
            )
    if rows:
        titles = [f"{title}: AUROC / FPR95" for title in SCORES.values()]
        lines += aligned([["unknown", "level", "rows", "detected %", *titles], *rows], 2)
    lines += [
        f"{name}: {100 * share:.1f} % are called unknown at just their level" for name, share in found["placed"].items()
    ]
    return lines
