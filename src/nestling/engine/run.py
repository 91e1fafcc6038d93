"""``Run``: what a training gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nestling.data.dataset import LabelledData
from nestling.data.text import AnyPreprocessing
from nestling.models.model import Model
from nestling.objectives.terms import Objective


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model, and how it came about."""

    model: Model
    metrics: dict[str, Any]
    """On validation rows: loss and accuracy per level of the epoch kept."""
    path: Path | None
    preprocessing: AnyPreprocessing
    history: list[dict[str, Any]]
    """One record per epoch: stage, epoch, training and validation loss, accuracy per level."""
    decisions: list[tuple[str, object, str]]
    """What was chosen automatically: name, value, reason."""
    seconds: float
    objectives: dict[str, Objective] = field(default_factory=dict)
    """As they ended, those of the stages whose terms have rows of their own, by stage."""
    validation: LabelledData | None = None
    """The rows that chose the epoch and the temperatures."""
    calibration: LabelledData | None = None
    """The rows that nothing was learned from or chosen by: what a risk is guaranteed on."""

    def save_pretrained(self, path: Path | str) -> None:
        """Write the bundle: weights, taxonomy, preprocessing, calibration, and the scores of the calibration rows."""
        from nestling.bundle import held_scores, save_bundle

        save_bundle(path, self.model, self.preprocessing, scores=held_scores(self))
