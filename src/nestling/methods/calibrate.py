"""The calibration that every method ends with: temperatures on validation rows, and how epochs are chosen."""

from __future__ import annotations

import torch

from nestling.data.dataset import LabelledData
from nestling.methods.recipe import Context, Optimizer, Select, Stage
from nestling.models.model import Model
from nestling.objectives.calibration import fit_temperature, negative_log_likelihood
from nestling.objectives.terms import CrossEntropy


def select_by_likelihood(levels: tuple[str, ...]) -> Select:
    """Keep the epoch whose answers, over every level known, have the highest likelihood on the validation rows."""
    return Select(negative_log_likelihood, "validation loss", "min", levels)


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
        fit = fit_temperature(outputs.logits[head], target)
        context.note(f"temperature of {head}", round(fit.temperature, 4), fit.reason)
        rejection = 1.0
        if head in calibration.rejection:
            scores = calibration.rejection_logits(head, outputs.features[head])
            with_rejection = fit_temperature(scores, target, num_real=calibration.sizes[head][1])
            rejection = with_rejection.temperature
            context.note(f"temperature of {head} with rejection", round(rejection, 4), with_rejection.reason)
        calibration.set_temperatures(head, fit.temperature, rejection)


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
