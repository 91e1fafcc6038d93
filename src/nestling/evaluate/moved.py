"""Accuracy on rows moved along the model's own gradient (*Hierarchically Robust Representation Learning*, Figure 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from nestling.data.dataset import LabelledData
from nestling.data.loader import DeviceData
from nestling.data.text import AnyPreprocessing
from nestling.engine.predict import concatenate
from nestling.engine.runtime import Runtime
from nestling.errors import UsageError
from nestling.evaluate.attacked import still
from nestling.models.model import Model, Outputs
from nestling.objectives.robust import adversarial_direction

STEPS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
"""L2 norms in the normalised space of inputs, where an image's own norm is tens (the papers' README)."""


def moved_outputs(
    model: Model, preprocessing: AnyPreprocessing, data: LabelledData, runtime: Runtime, steps: Sequence[float] = STEPS
) -> dict[float, Outputs]:
    """Outputs of the model in evaluation mode on x + step * z, for each step.

    z is the unit gradient of each row's own loss at its finest level (Theorem 2), at the image as it is; a row that is
    not labelled there stays in place. Raises UsageError for a step below 0.
    """
    for step in steps:
        if not 0 <= step < float("inf"):
            raise UsageError(f"a step must be at least 0, got {step!r}")
    runtime.prepare(model)
    rows = DeviceData(data, preprocessing, runtime.device)
    parts: dict[float, list[Outputs]] = {step: [] for step in steps}
    head = model.outputs[-1]
    level = head if head in data.taxonomy.levels else data.taxonomy.levels[-1]
    with still(model):
        for batch in rows.batches():
            labels = batch.at(level)
            with torch.enable_grad():
                inputs = batch.inputs.detach().requires_grad_()
                loss = F.cross_entropy(model(inputs).logits[head].float(), labels, ignore_index=-1, reduction="sum")
                direction = adversarial_direction(loss, inputs)
            with torch.no_grad():
                for step in steps:
                    parts[step].append(model(inputs + step * direction))
    return {step: concatenate(found) for step, found in parts.items()}


@torch.no_grad()
def accuracy_by_step(
    model: Model,
    preprocessing: AnyPreprocessing,
    data: LabelledData,
    runtime: Runtime,
    steps: Sequence[float] = STEPS,
    level: str | None = None,
) -> dict[float, float | None]:
    """The share of rows known at ``level``, by default the finest, that are answered rightly after each step."""
    level = level or data.taxonomy.levels[-1]
    labels = data.labels[:, data.taxonomy.level_index(level)]
    known = labels >= 0
    found: dict[float, float | None] = {}
    for step, outputs in moved_outputs(model, preprocessing, data, runtime, steps).items():
        answers = model.answers(outputs).combined[level].argmax(1).cpu().numpy()
        found[step] = float(np.mean(answers[known] == labels[known])) if known.any() else None
    return found
