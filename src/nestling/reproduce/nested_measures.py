"""What the nested tables measure on test rows: accuracy and overconfidence by level, clean and under turbulence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nestling.data.dataset import LabelledData
from nestling.evaluate.decide import Decisions, decide_levels, decide_votes
from nestling.evaluate.measure import CLEAN, decisions_of, outputs_of
from nestling.models.model import Model, Outputs
from nestling.objectives.calibration import expected_calibration_error
from nestling.reproduce.measures import Trained, trained
from nestling.reproduce.nested import CRM, REJECTION
from nestling.reproduce.table import Cell, Place, Trial

STRENGTHS = (0.5, 1.0, 1.5, 2.0)
"""The four levels of Figure 2: turbulence of 2 pixels' width and so many pixels' strength."""
TURBULENCE = {f"turbulence:2,{strength:g}": strength for strength in STRENGTHS}
By = Mapping[str, Decisions]
"""By condition."""


def accuracy(level: str, *, strength: float | None = None, distorted: bool = False) -> str:
    """A column: on rows distorted at a strength, 0 being clean ones, or the mean over the four levels of distortion."""
    return column("accuracy", level, strength, distorted)


def overconfidence(level: str, *, strength: float | None = None, distorted: bool = False) -> str:
    """A column: mean confidence less accuracy."""
    return column("overconfidence", level, strength, distorted)


def gap(level: str, *, strength: float | None = None, distorted: bool = False) -> str:
    """A column: how far mean confidence and accuracy lie apart, whichever is the higher, strength by strength."""
    return column("calibration gap", level, strength, distorted)


def column(kind: str, level: str, strength: float | None, distorted: bool) -> str:
    """Without either, of clean rows in a table that has no others."""
    return f"{level} {kind}" + (", distorted" if distorted else "" if strength is None else f" strength {strength:g}")


def robustness(trial: Trial, place: Place) -> list[Cell]:
    """Of every level, clean, at each strength of the distortion, and over the four of them.

    ``options``: ``also`` names the rows that are measured beside: flat + marginal's decided by least expected distance,
    or the cascade's with its rejection class, which leaves it out itself; ``clean`` leaves the distortions out.
    """
    found = trained(trial, place)
    outputs = conditions(found, () if trial.options.get("clean") else tuple(TURBULENCE))
    cells = cells_of(trial.row, decided(found.run.model, outputs), found.test)
    for row in trial.options.get("also", ()):
        other = decided(found.run.model, outputs, reject=row.endswith(REJECTION), least_distance=row.endswith(CRM))
        cells += cells_of(row, other, found.test)
    return cells


def conditions(found: Trained, distortions: Sequence[str]) -> dict[str, Outputs]:
    """Outputs on the test rows, clean first."""
    return outputs_of(found.run.model, found.run.preprocessing, found.test, found.runtime, distortions)


def decided(
    model: Model, outputs: Mapping[str, Outputs], *, reject: bool = False, least_distance: bool = False
) -> dict[str, Decisions]:
    """Combined answers under every condition."""
    return {
        name: decisions_of(model, model.answers(output, reject), least_distance) for name, output in outputs.items()
    }


def cells_of(row: str, by: By, data: LabelledData, *, ece: bool = False) -> list[Cell]:
    """Accuracy, overconfidence and calibration gap of every level; ``ece`` adds the calibration error on clean rows."""
    cells = []
    for number, level in enumerate(data.taxonomy.levels):
        labels = data.labels[:, number]
        known = labels >= 0
        right = {name: (d.columns[level] == labels)[known].astype(float) for name, d in by.items()}
        over = {name: d.confidence[level][known] - right[name] for name, d in by.items()}
        apart = {name: each * (1 if each.mean() >= 0 else -1) for name, each in over.items()}
        for name_of, samples in ((accuracy, right), (overconfidence, over), (gap, apart)):
            distorted = {TURBULENCE[name]: samples[name] for name in TURBULENCE if name in samples}
            if not distorted:
                cells.append(cell(row, name_of(level), samples[CLEAN]))
                continue
            cells.append(cell(row, name_of(level, strength=0), samples[CLEAN]))
            cells.append(cell(row, name_of(level, distorted=True), np.mean(list(distorted.values()), axis=0)))
            cells += [
                Cell(row, name_of(level, strength=strength), float(each.mean()), count=len(each))
                for strength, each in distorted.items()
            ]
        if ece:
            confidence = by[CLEAN].confidence[level][known]
            cells.append(Cell(row, f"{level} ECE", expected_calibration_error(confidence, right[CLEAN] == 1)))
    return cells


def cell(row: str, column: str, samples: np.ndarray) -> Cell:
    """A mean over rows, which remembers them: to four digits, which says enough of how rows differ."""
    return Cell(row, column, float(samples.mean()), tuple(np.round(samples, 4).tolist()))


def combinations(row: str, found: Trained, outputs: Mapping[str, Outputs]) -> list[Cell]:
    """The levels' answers by themselves, combined by Equation 2, by majority, and by votes that weigh as accuracies do.

    These accuracies are those of the validation rows.
    """
    model, taxonomy = found.run.model, found.test.taxonomy
    kept = model.answers(found.outputs(found.validation)[0], reject=False)
    alone = decide_levels(kept, combined=False)
    weights = []
    for number, level in enumerate(taxonomy.levels):
        labels = found.validation.labels[:, number]
        weights.append(float((alone.columns[level] == labels)[labels >= 0].mean()))
    answers = {name: model.answers(output, reject=False) for name, output in outputs.items()}
    ways: dict[str, By] = {
        "each level by itself": {name: decide_levels(a, combined=False) for name, a in answers.items()},
        "Equation 2": {name: decide_levels(a) for name, a in answers.items()},
        "majority vote": {name: decide_votes(a, taxonomy) for name, a in answers.items()},
        "accuracy-weighted vote": {name: decide_votes(a, taxonomy, weights) for name, a in answers.items()},
    }
    return [made for name, by in ways.items() for made in cells_of(f"{row}: {name}", by, found.test)]
