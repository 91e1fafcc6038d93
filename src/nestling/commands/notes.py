"""What there is to say of the data before a training, and of its confidences after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nestling.config import to_dict
from nestling.data.dataset import LabelledData
from nestling.engine.runfolder import flat
from nestling.errors import listed
from nestling.methods.recipe import Recipe

UNEVEN = 10
"""Times as many rows in the largest class as in the smallest."""
FAR, ENOUGH = 0.1, 50
"""Confidence above accuracy that is warned of, and the least test rows that it is told by."""


def scarce(train: LabelledData) -> list[str]:
    """Warnings of what can hardly be learned: data or levels of one class, classes of one row."""
    warnings = []
    seen = [np.unique(known[known >= 0]) for known in train.labels.T]
    if all(len(codes) <= 1 for codes in seen):
        warnings.append("warning: all training rows are of a single class: there is nothing to tell apart")
    for number, level in enumerate(train.taxonomy.levels):
        classes, known = train.taxonomy.classes[level], train.labels[:, number]
        if len(classes) == 1:
            warnings.append(f"warning: level {level!r} has one class, {classes[0]!r}: its answers say nothing")
        counts = np.bincount(known[known >= 0], minlength=len(classes))
        for count, what in ((0, "no labelled training row"), (1, "one labelled training row")):
            names = [classes[code] for code in np.flatnonzero(counts == count)]
            if names:
                many = "1 class has" if len(names) == 1 else f"{len(names)} classes have"
                warnings.append(f"warning: level {level!r}: {many} {what}: {listed(names, limit=5)}")
    return warnings


def idle_lines(recipe: Recipe, fields: Mapping[str, Any]) -> list[str]:
    """Warnings of fields that were set to something of their own and have no effect."""
    given, usual = flat(to_dict(recipe)), flat(to_dict(type(recipe)()))
    named = flat(fields)
    return [
        f"warning: {name} has no effect: it takes {what}"
        for name, what in recipe.idle.items()
        if name in named and given[name] != usual[name]
    ]


def imbalance(train: LabelledData) -> list[str]:
    """For each level whose largest class has ten times the rows of its smallest, by how much."""
    found = []
    for number, level in enumerate(train.taxonomy.levels):
        known = train.labels[:, number]
        counts = np.bincount(known[known >= 0], minlength=len(train.taxonomy.classes[level]))
        present = counts[counts > 0]
        if len(present) > 1 and present.max() >= UNEVEN * present.min():
            most, least = (train.taxonomy.classes[level][code] for code in (counts.argmax(), _least(counts)))
            found.append(
                f"level {level!r} is unbalanced: {most!r} has {present.max():,} labelled rows and {least!r} "
                f"{present.min():,}; look at the accuracy by class beside the accuracy, and see concept_weights"
            )
    return found


def _least(counts: np.ndarray) -> int:
    return int(np.where(counts > 0, counts, counts.max() + 1).argmin())


def notes_of(train: LabelledData, validation: LabelledData | None, test: LabelledData) -> list[str]:
    """What there is to say of the data."""
    others = {"validation": validation, "test": test}
    notes = [*train.notes, *(f"{name}: {note}" for name, part in others.items() if part for note in left_out(part))]
    return notes + scarce(train) + imbalance(train)


def unweighted(train: LabelledData, weighted: str | None) -> list[str]:
    """What becomes of the column of concepts where the method weights none, or those of a level."""
    if train.concepts is None or weighted == train.concepts.name:
        return []
    name = train.concepts.name
    if weighted is not None:
        return [f"warning: the concepts of {name!r} have no effect, since those at level {weighted!r} are weighted"]
    return [
        f"the concepts of {name!r} are scored and not weighted: --method robust weights them, and so does "
        f"--set concept_weights={name} of nested and coins"
    ]


def left_out(data: LabelledData) -> list[str]:
    """What was said of inputs that could not be read."""
    return [note for note in data.notes if note.startswith("left out")]


def overconfident(levels: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning for each level of metrics.json whose answers are far more confident than right on enough test rows."""
    return [
        f"warning: at level {level['name']!r} the answers are {100 * level['overconfidence']:.0f} points more "
        f"confident than right on {level['n']:,} test rows: "
        "trust none of its confidences; predict --risk answers what can be kept"
        for level in levels
        if level["n"] >= ENOUGH and (level.get("overconfidence") or 0) > FAR
    ]
