"""The calibration that every method ends with: temperatures on validation rows, and how epochs are chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.data.dataset import LabelledData
from nestling.errors import unknown
from nestling.methods.recipe import Context, Optimizer, Select, Stage
from nestling.models.heads import Calibration
from nestling.models.model import Model, Outputs
from nestling.objectives import robust
from nestling.objectives.calibration import (
    TemperatureFit,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
)
from nestling.objectives.terms import CrossEntropy

SELECTIONS = ("last", "likelihood")


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """The field of a recipe that says which epoch of a stage is kept."""

    selection: str = "last"
    """last, or likelihood: the epoch whose answers are the likeliest on validation rows."""

    def check_selection(self) -> None:
        """Raise UsageError for an unknown one."""
        if self.selection not in SELECTIONS:
            raise unknown("selection", self.selection, SELECTIONS)

    @property
    def keeps_best(self) -> bool:
        """Whether epochs are compared to keep the best one."""
        return self.selection == "likelihood"

    def idle_selection(self) -> dict[str, str]:
        """As ``Recipe.idle``, of what waits for a better epoch."""
        return {} if self.keeps_best else {"patience": "selection = 'likelihood'"}


def select_by_likelihood(levels: tuple[str, ...], keeps: bool = True) -> Select:
    """Keep the epoch whose answers, over every level known, have the highest likelihood on the validation rows."""
    return Select(negative_log_likelihood, "validation loss", "min", levels, keeps=keeps)


def select_by_worst_concept(level: str) -> Select:
    """Keep the epoch whose worst concept at ``level``, or of that column, is the most accurate on validation rows."""
    return Select(robust.worst_concept_accuracy, "worst concept's accuracy", "max", concepts=level)


@torch.no_grad()
def fit_temperatures(context: Context) -> None:
    """Divide each head's logits by the temperature of least validation loss (Guo et al.; papers' README).

    A row that ends above a head's level does not count there.
    """
    calibration, taxonomy = context.model.calibration, context.model.taxonomy
    if context.validation is None or len(context.validation) == 0:
        return
    outputs, labels = context.predict(context.validation)
    for head in calibration.heads:
        target = labels[:, taxonomy.level_index(head)]
        target = target.masked_fill(target >= taxonomy.num_classes(head), -1)
        fit, rows = fit_temperature(outputs.logits[head], target), int((target >= 0).sum())
        context.note(f"temperature of {head}", round(fit.temperature, 4), explain(fit, rows))
        rejection = 1.0
        if head in calibration.rejection:
            scores = calibration.rejection_logits(head, outputs.features[head])
            with_rejection = fit_temperature(scores, target, num_real=calibration.sizes[head][1])
            rejection = with_rejection.temperature
            context.note(f"temperature of {head} with rejection", round(rejection, 4), explain(with_rejection, rows))
        calibration.set_temperatures(head, fit.temperature, rejection)
        if head in calibration.rejection:
            before, after = (
                calibration_error(calibration, head, outputs, target, reject=reject) for reject in (False, True)
            )
            if after > before:
                context.note(
                    f"rejection class of {head}",
                    "kept",
                    "warning: it takes the calibration error on validation rows from "
                    f"{100 * before:.1f} to {100 * after:.1f} %; calibration=temperature leaves it out",
                )


def explain(fit: TemperatureFit, rows: int) -> str:
    """What the temperature does, in words; ``rows``: the validation rows that it was fitted on."""
    if fit.nll_before is None:
        return "confidences stay as they are: no validation row is labelled"
    if fit.temperature == 1:
        return f"confidences stay as they are, by {rows} validation rows: {fit.reason.removeprefix('T = 1: ')}"
    way = "lowers" if fit.temperature > 1 else "raises"
    before, after = (100 * (error or 0) for error in (fit.ece_before, fit.ece_after))
    return (
        f"{way} confidences, which on {rows} validation rows takes the log loss from {fit.nll_before:.3f} to "
        f"{fit.nll_after:.3f} and the calibration error from {before:.1f} to {after:.1f} %"
    )


def calibration_error(calibration: Calibration, head: str, outputs: Outputs, target: Tensor, *, reject: bool) -> float:
    """The expected calibration error of a head by itself on the rows with a ``target`` (n,), -1 = does not count."""
    probabilities, _, _ = calibration(head, outputs.logits[head], outputs.features[head], reject)
    confidence, column = probabilities[target >= 0].max(1)
    return expected_calibration_error(confidence, column == target[target >= 0])


def temperature_stage(model: Model, data: LabelledData, optimizer: Optimizer) -> Stage:
    """A stage without training, whose hook fits the temperatures."""
    return Stage(
        name="temperature",
        data=data,
        objective=CrossEntropy(model.outputs[-1]),
        trainable=[],
        optimizer=optimizer,
        lr=0.0,
        epochs=0,
        batch_size=1,
        at_end=fit_temperatures,
    )
