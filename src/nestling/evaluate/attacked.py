"""Models under attack: aimed at the head of one level, read at all of them (*Nested Learning*, Section 3.1, Table 3).

An attack sees the logits of that level's own head, before calibration and combination, as a function of pixels in
[0, 1]. A row that is not labelled at the level is attacked as what the model takes it for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nestling.data.dataset import LabelledData
from nestling.data.loader import DeviceData
from nestling.data.text import AnyPreprocessing, TextEncoding
from nestling.data.transforms import Preprocessing
from nestling.engine.predict import concatenate
from nestling.engine.runtime import Runtime
from nestling.errors import UsageError, listed, unknown
from nestling.evaluate.attack_specs import parse_attack
from nestling.evaluate.attacks import Attacked, Classify, loss_signs, step
from nestling.evaluate.decide import Decisions, decide_leaf, decide_levels
from nestling.evaluate.measure import decisions_of, entries
from nestling.models.model import Model, Outputs

PIXELS_AT_ONCE = 1 << 18
"""Of a batch, whose maps are kept for the way back."""


@dataclass(frozen=True, eq=False)
class UnderAttack:
    """What a model makes of rows that an attack moved."""

    outputs: Outputs
    level: str
    """Whose head was attacked."""
    measure: str
    """What the strength is: epsilon, L2 norm, or the share of numbers that were changed."""
    strength: np.ndarray
    """(n,)."""
    flipped: np.ndarray
    """(n,) bool: the attacked head's answer is wrong, or was from the start."""


def attackable_level(model: Model, level: str | None) -> str:
    """The level that is attacked, the model's finest by default.

    Raises UsageError for a level without a head of its own, and for one with a single class, which nothing flips.
    """
    heads, levels = model.calibration.heads, model.taxonomy.levels
    if level is None:
        level = heads[-1]
    if level not in levels:
        raise unknown("--attack-level", level, heads)
    if level not in heads:
        raise UsageError(
            f"--attack-level {level}: this model has no head at that level that an attack could be aimed at; expected "
            f"{listed(heads)}"
        )
    if model.taxonomy.width(level) < 2:
        raise UsageError(f"--attack-level {level}: it has a single class, and no attack flips that")
    return level


def pixels_of(preprocessing: AnyPreprocessing) -> Preprocessing:
    """That of images; UsageError for a model that reads texts."""
    if isinstance(preprocessing, TextEncoding):
        raise UsageError("an attack moves pixels, and this model reads texts: leave --attack out")
    return preprocessing


def under_attack(
    model: Model,
    preprocessing: AnyPreprocessing,
    data: LabelledData,
    runtime: Runtime,
    spec: str,
    level: str | None = None,
) -> UnderAttack:
    """Attack every row, and read all levels of the model in evaluation mode, in fp32.

    Raises UsageError for an unknown or impossible attack, a level that the model has no head for, and texts.
    """
    attack, level, preprocessing = parse_attack(spec), attackable_level(model, level), pixels_of(preprocessing)
    parts: list[Outputs] = []
    found: list[Attacked] = []
    for pixels, labels, classify in _batches(model, preprocessing, data, runtime, level):
        made = attack(classify, pixels, labels)
        found.append(made)
        with torch.no_grad():
            parts.append(model(_inputs(preprocessing, made.pixels)))
    return UnderAttack(
        concatenate(parts),
        level,
        attack.measure,
        torch.cat([part.strength for part in found]).double().cpu().numpy(),
        torch.cat([part.flipped for part in found]).cpu().numpy(),
    )


def outputs_by_epsilon(
    model: Model,
    preprocessing: AnyPreprocessing,
    data: LabelledData,
    runtime: Runtime,
    epsilons: Sequence[float],
    level: str | None = None,
) -> list[Outputs]:
    """Outputs under FGSM at each of ``epsilons``, whose gradient is taken once: what the error curve is made of.

    Raises UsageError for an epsilon outside [0, 1], and as ``under_attack``.
    """
    for epsilon in epsilons:
        parse_attack(f"fgsm:{epsilon}")
    level, preprocessing = attackable_level(model, level), pixels_of(preprocessing)
    parts: list[list[Outputs]] = [[] for _ in epsilons]
    for pixels, labels, classify in _batches(model, preprocessing, data, runtime, level):
        signs = loss_signs(classify, pixels, labels)
        with torch.no_grad():
            for found, epsilon in zip(parts, epsilons):
                found.append(model(_inputs(preprocessing, step(pixels, signs, epsilon))))
    return [concatenate(found) for found in parts]


def strength_at_error(epsilons: Sequence[float], errors: Sequence[float], error: float) -> float | None:
    """The least epsilon at which the error is reached, between two measured ones by a straight line; None if none is.

    ``epsilons`` rise from 0; ``errors`` are those of one level there.
    """
    for place, found in enumerate(errors):
        if found < error:
            continue
        if place == 0:
            return float(epsilons[0])
        before = errors[place - 1]
        share = (error - before) / (found - before)
        return float(epsilons[place - 1] + share * (epsilons[place] - epsilons[place - 1]))
    return None


@torch.no_grad()
def attack_metrics(model: Model, found: UnderAttack, data: LabelledData) -> dict[str, Any]:
    """The entry of one attack in metrics.json.

    ``levels`` are those served, calibrated and combined; ``levels_uncombined`` each base head by itself.
    """
    own = base_decisions(model, found.outputs)
    served = decisions_of(model, model.answers(found.outputs))
    reached = found.strength[found.flipped]
    return {
        "levels": entries(served, data),
        "levels_uncombined": entries(own, data),
        "level": found.level,
        "flipped": float(found.flipped.mean()) if len(found.flipped) else None,
        "measure": found.measure,
        "strength": {
            "mean": float(reached.mean()) if len(reached) else None,
            "median": float(np.median(reached)) if len(reached) else None,
        },
    }


def base_decisions(model: Model, outputs: Outputs) -> Decisions:
    """The answers of each head by itself, without its rejection layer: of a flat model, its head's and the ancestors.

    The attacked head's are the most probable columns of the very logits that were attacked.
    """
    answers = model.answers(outputs, reject=False)
    return decide_leaf(answers, model.taxonomy) if model.flat else decide_levels(answers, combined=False)


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in evaluation mode and its weights take no gradient; then all is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training


def _batches(
    model: Model, preprocessing: Preprocessing, data: LabelledData, runtime: Runtime, level: str
) -> Iterator[tuple[Tensor, Tensor, Classify]]:
    """Pixels, the columns that they are to be moved away from, and the level's own head; the model stands still."""
    if isinstance(data.inputs, list):
        raise UsageError("an attack moves pixels, and the source has texts: give images")
    runtime.prepare(model)
    rows = DeviceData(data, preprocessing, runtime.device)
    number = data.taxonomy.level_index(level)
    # A model of layers names its outputs otherwise, and needs all of them for a level.
    until = level if level in model.outputs else None

    def classify(pixels: Tensor) -> Tensor:
        return model(_inputs(preprocessing, pixels), until=until).logits[level].float()

    size = max(8, min(256, PIXELS_AT_ONCE // (preprocessing.height * preprocessing.width)))
    batches = [np.arange(start, min(start + size, len(data))) for start in range(0, len(data), size)]
    with still(model), rows.ahead(batches, runtime.workers) as ahead:
        for numbers, images in zip(batches, ahead):
            pixels = preprocessing.pixels(rows.pictures(numbers, images))
            labels = rows.labels[torch.from_numpy(numbers).to(runtime.device), number]
            if (labels < 0).any():
                with torch.no_grad():
                    labels = torch.where(labels < 0, classify(pixels).argmax(1), labels)
            yield pixels, labels, classify


def _inputs(preprocessing: Preprocessing, pixels: Tensor) -> Tensor:
    return preprocessing.normalise(pixels).contiguous(memory_format=torch.channels_last)
