"""What the robust tables measure on test rows: every concept, and rows moved along the model's own gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nestling.data.dataset import LabelledData
from nestling.evaluate.concepts import SMALLEST, rows_of_concepts
from nestling.evaluate.measure import by_concept as accuracies_by_concept
from nestling.evaluate.measure import decisions_of
from nestling.evaluate.moved import STEPS, accuracy_by_step
from nestling.methods.robust import Robust
from nestling.reproduce.measures import SINGLE, Trained, share, trained
from nestling.reproduce.table import Cell, Place, Trial

WORST, FIVE, MEAN, SPREAD = "worst concept", "five smallest", "mean of concepts", "spread"
ETA = "eta, by validation"


def concepts(trial: Trial, place: Place) -> list[Cell]:
    """Accuracy over all rows and by concept, sorted, and on moved rows.

    ``options``: ``steps``, how far rows are moved; ``sorted`` = False leaves the sorted accuracies out; ``eta``, step
    sizes of group DRO, of which the validation rows choose by their worst concept.
    """
    etas = trial.options.get("eta", ())
    eta, found = by_validation(trial, place, etas) if etas else (None, trained(trial, place))
    cells = [*by_concept(trial, found), *moved(trial.row, found, trial.options.get("steps", STEPS))]
    if eta is not None:
        cells.append(Cell(trial.row, ETA, eta))
    return cells if trial.options.get("sorted", True) else [c for c in cells if not c.column.startswith("sorted")]


def by_validation(trial: Trial, place: Place, etas: Sequence[float]) -> tuple[float, Trained]:
    """The step size of the rival whose worst concept fares best on the validation rows, as epochs are chosen."""
    assert isinstance(trial.recipe, Robust)
    every = {eta: trained(replace(trial, recipe=replace(trial.recipe, eta=eta)), place) for eta in etas}

    def worst(eta: float) -> tuple[float, float]:
        accuracies, _ = accuracies_of(trial, every[eta], every[eta].validation)
        return accuracies["worst"], accuracies["mean"]

    best = max(every, key=worst)
    return best, every[best]


def accuracies_of(trial: Trial, found: Trained, data: LabelledData) -> tuple[dict[str, Any], Cell]:
    """What metrics.json says of concepts, on some rows; and the accuracy over all of them."""
    assert isinstance(trial.recipe, Robust)
    level = trial.recipe.concepts_at(data)
    outputs, labels = found.outputs(data)
    every = share(trial.row, SINGLE, outputs.logits[found.level].cpu(), labels[:, -1].cpu())
    decisions = decisions_of(found.run.model, found.run.model.answers(outputs))
    about = {"level": level, "rows": rows_of_concepts(found.train, level)}
    return {**accuracies_by_concept(decisions, data, about), "rows": about["rows"]}, every


def by_concept(trial: Trial, found: Trained) -> list[Cell]:
    """Of each row's finest label, on the test rows of every concept; the small ones are those of few training rows."""
    accuracies, every = accuracies_of(trial, found, found.test)
    shares = {name: (value, accuracies["n"][name]) for name, value in accuracies["accuracy"].items()}
    names = list(shares)
    small = sorted(names, key=lambda name: (accuracies["rows"].get(name, 0), name))[:SMALLEST]
    # Each is a weighted sum of some concepts' accuracies.
    figures = {
        WORST: (accuracies["worst"], {names[0]: 1.0}),
        FIVE: (accuracies["smallest"], {name: 1 / len(small) for name in small}),
        MEAN: (accuracies["mean"], {name: 1 / len(names) for name in names}),
        SPREAD: (accuracies["spread"], {names[0]: -1.0, names[-1]: 1.0}),
    }
    cells = [
        Cell(trial.row, column, float(value), count=rows_worth(value, [(*shares[name], by) for name, by in of.items()]))
        for column, (value, of) in figures.items()
    ]
    ordered = [
        Cell(trial.row, f"sorted rank {rank}", value, count=count)
        for rank, (value, count) in enumerate(shares.values(), 1)
    ]
    return [every, *cells, *ordered]


def rows_worth(value: float, parts: Sequence[tuple[float, int, float]]) -> int:
    """Of how many rows a share ``value`` would be as uncertain as the sum of shares that it is; 0 where it is certain.

    ``parts``: of each its share, the rows that it is of, and its factor in the sum.
    """
    variance = sum(factor**2 * share * (1 - share) / count for share, count, factor in parts)
    return round(value * (1 - value) / variance) if variance > 0 else 0


def moved(row: str, found: Trained, steps: Sequence[float]) -> list[Cell]:
    """Accuracy where every test row is moved along the unit gradient of its own loss."""
    accuracies = accuracy_by_step(found.run.model, found.run.preprocessing, found.test, found.runtime, steps)
    return [
        Cell(row, f"moved step {step:g}", value, count=len(found.test))
        for step, value in accuracies.items()
        if value is not None
    ]
