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
        raised = alarm(held.get("calibration"), held.get("validation"), FALSE_ALARM if rate is None else rate)
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
