"""Outputs of a model for every row of a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestling.data.distortions import Distortion
from nestling.data.loader import DeviceData
from nestling.engine.features import Features
from nestling.engine.runtime import Runtime
from nestling.models.model import Model, Outputs
from nestling.taxonomy import Taxonomy

PIXELS_AT_ONCE = 1 << 23
"""Of a batch: its feature maps are many times as large."""


@torch.no_grad()
def predict(
    model: Model,
    data: DeviceData | Features,
    runtime: Runtime,
    until: str | None = None,
    batch_size: int | None = None,
    distortion: Distortion | None = None,
    *,
    rows: np.ndarray | None = None,
    since: int = 0,
    obey: Callable[[], object] = lambda: None,
) -> tuple[Outputs, Tensor]:
    """Outputs in evaluation mode, in fp32, and the targets (n, levels). The model's modes are left as they were.

    ``rows``: of these alone; ``since``: ``data`` holds maps that so many modules made; ``obey`` is called after every
    batch, and may raise.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    parts, labels = [], []
    height, width = data.preprocessing.height, data.preprocessing.width
    batch_size = batch_size or max(32, min(1024, PIXELS_AT_ONCE // (height * width)))
    rows = np.arange(len(data)) if rows is None else rows
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    options: dict[str, Any] = {"until": until, **({"since": since} if since else {})}
    try:
        with data.ahead(batches, runtime.workers) as ahead:
            for numbers, images in zip(batches, ahead):
                batch = data.batch(numbers, distortion=distortion, images=images)
                with runtime.autocast():
                    parts.append(model(batch.inputs, **options))
                labels.append(batch.labels)
                obey()
    finally:
        for module, training in modes:
            module.training = training
    return concatenate(parts), torch.cat(labels)


def concatenate(parts: list[Outputs]) -> Outputs:
    """The outputs of several batches as one, in fp32."""
    first = parts[0]
    return Outputs(
        {k: torch.cat([p.logits[k] for p in parts]).float() for k in first.logits},
        {k: torch.cat([p.features[k] for p in parts]).float() for k in first.features},
        torch.cat([p.embedding for p in parts]).float(),
    )


def accuracy_per_level(probabilities: dict[str, Tensor], labels: Tensor, taxonomy: Taxonomy) -> dict[str, float | None]:
    """The share of rows known at a level whose most probable column is the target; None where no row is known.

    A row that ends above the level, whose target (n, levels) is a pass-through column there, does not count.
    """
    result: dict[str, float | None] = {}
    for level, p in probabilities.items():
        target = labels[:, taxonomy.level_index(level)]
        known = (target >= 0) & (target < taxonomy.num_classes(level))
        result[level] = float((p.argmax(1) == target)[known].float().mean()) if known.any() else None
    return result
