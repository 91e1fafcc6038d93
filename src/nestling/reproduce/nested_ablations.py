"""The nested tables of Section 3.2: with and without skips, cascade and joint training, calibration, combination."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from nestling.engine.plan import plan
from nestling.evaluate.decide import Decisions
from nestling.methods.nested import Nested
from nestling.models.build import build_model
from nestling.models.model import Model, Outputs
from nestling.reproduce.measures import Trained, trained
from nestling.reproduce.nested import NESTED, Setting, compare, nested, paced, setting
from nestling.reproduce.nested_information import lost_more, ratios, robustness_and_information
from nestling.reproduce.nested_measures import (
    TURBULENCE,
    accuracy,
    cells_of,
    combinations,
    conditions,
    decided,
    gap,
    robustness,
)
from nestling.reproduce.table import Cell, Claim, Floor, Place, Table, Trial

LEVELS = ("coarse", "middle", "fine")
SKIPS_ROW, NO_SKIPS = "with skips", "without skips"
MINE_STEPS = {"smoke": 2, "small": 1_000, "paper": 3_000}
"""Of each critic."""


def skip_trials(scale: str) -> list[Trial]:
    """The cascade of nested-distortion, and the same without skips."""
    at = setting(scale, "mnist")
    made = [ablated(scale, at, SKIPS_ROW), ablated(scale, at, NO_SKIPS, skips=False)]
    options = {"mine": MINE_STEPS[scale]}
    return [replace(each, measure=robustness_and_information, options=options) for each in made]


def ablated(scale: str, at: Setting, row: str, **changes: Any) -> Trial:
    """The paper's cascade under another name, with other fields."""
    made = compare(scale, at, robustness, (NESTED,))[0]
    assert isinstance(made.recipe, Nested)
    return replace(made, row=row, recipe=replace(made.recipe, **changes), options={})


def skipped(level: str, paper: float) -> Claim:
    return Claim(
        id=f"skips-{level}-distorted",
        text=f"with skips the {level} accuracy under distortion is higher",
        more=(SKIPS_ROW, accuracy(level, distorted=True)),
        less=(NO_SKIPS, accuracy(level, distorted=True)),
        paper=paper,
    )


def gained(cells: Sequence[Cell]) -> list[Cell]:
    """What the skips gain in every column that has its rows, and the ratio of what is lost without them."""
    mine = {c.column: c for c in cells if c.row == SKIPS_ROW and c.samples}
    theirs = {c.column: c for c in cells if c.row == NO_SKIPS and c.samples}
    return [
        Cell(
            "gained by skips",
            column,
            mine[column].value - theirs[column].value,
            tuple((np.asarray(mine[column].samples) - np.asarray(theirs[column].samples)).tolist()),
        )
        for column in mine
        if column in theirs
    ] + ratios(cells, SKIPS_ROW)


SKIPS = Table(
    name="nested-skips",
    paper="Nested Learning for Multi-Level Classification, Section 3.2: skipped connections",
    about="mnist, the authors' network and its cascade as in nested-distortion, with the skips and without: then a "
    "finer level sees nothing but the coarser one's map. Information in nats, by MINE on the test rows: 'missed' is "
    "how far the estimates of I(X; f) are too low at least, and below it their differences say nothing.",
    trials=skip_trials,
    drawn=r"^(coarse|fine) (accuracy|overconfidence)|information",
    floor=Floor(row=SKIPS_ROW, column=accuracy("fine", strength=0), least=0.85),
    claims=[
        skipped("fine", 0.10),
        skipped("middle", 0.075),
        skipped("coarse", 0.02),
        Claim(
            id="skips-fine-clean",
            text="with skips the fine accuracy on clean rows is slightly higher",
            more=(SKIPS_ROW, accuracy("fine", strength=0)),
            less=(NO_SKIPS, accuracy("fine", strength=0)),
        ),
        Claim(
            id="skips-fine-over-coarse",
            text="the skips gain more in fine than in coarse accuracy under distortion",
            more=("gained by skips", accuracy("fine", distorted=True)),
            less=("gained by skips", accuracy("coarse", distorted=True)),
            paper=0.08,
        ),
        lost_more(NO_SKIPS, SKIPS_ROW),
    ],
    derived=gained,
    units={"information": "number"},
)


CASCADE_ROW, JOINT = "cascade", "joint"
CONVERGED, STEADY = 0.95, 0.2
"""Of its last accuracy, and the share of its last steps, by which a curve is judged."""
POINTS = 20
"""Of a curve that are shown."""
SPEED, WOBBLE = "steps to 95 % of the last accuracy", "deviation over the last fifth of the steps"


def cascade_trials(scale: str) -> list[Trial]:
    """The cascade of nested-distortion, and all levels at once on as many batches of random rows."""
    at = setting(scale, "mnist")
    joint = nested(scale, at, reading="at-least", cascade=False, calibration="temperature")
    joint = replace(joint, epochs=at.epochs[-1], optimizer=replace(joint.optimizer, lr=last(joint.optimizer.lr)))
    joint = replace(joint, **paced(scale, at, at.epochs[-1]))
    made = ablated(scale, at, CASCADE_ROW)
    also = [f"calibration: {name}" for name in CALIBRATIONS]
    also += [f"{CASCADE_ROW}: {way}" for way in WAYS]
    return [
        replace(made, measure=cascade, options={"also": also}),
        replace(made, row=JOINT, recipe=joint, measure=cascade, options={}),
    ]


def last(rate: float | tuple[float, ...]) -> float:
    return rate[-1] if isinstance(rate, tuple) else rate


CALIBRATIONS = ("none", "temperature", "rejection", "both")
WAYS = ("each level by itself", "Equation 2", "majority vote", "accuracy-weighted vote")


def cascade(trial: Trial, place: Place) -> list[Cell]:
    """Accuracy, overconfidence and calibration gap by level, and on validation rows the curves over the steps.

    Of the cascade, which ``options['also']`` tells, the calibrations and combinations too.
    """
    found = trained(trial, place)
    outputs = conditions(found, tuple(TURBULENCE))
    model = found.run.model
    cells = cells_of(trial.row, decided(model, outputs), found.test)
    cells += curves(trial, found)
    if trial.options.get("also"):
        for name in CALIBRATIONS:
            cells += cells_of(f"calibration: {name}", calibrated(model, outputs, name), found.test, ece=True)
        cells += combinations(trial.row, found, outputs)
    return cells


def calibrated(model: Model, outputs: Mapping[str, Outputs], steps: str) -> dict[str, Decisions]:
    """The answers under every condition with some of the two steps of calibration: rejection class, temperature."""
    model = copy.deepcopy(model)
    if steps not in ("temperature", "both"):
        for temperatures in (model.calibration.temperature, model.calibration.rejection_temperature):
            temperatures.fill_(1)
    return decided(model, outputs, reject=steps in ("rejection", "both"))


def curves(trial: Trial, found: Trained) -> list[Cell]:
    """Figure 3: validation accuracy by the share of all steps that are taken, and what becomes of it at the end."""
    recipe = trial.recipe
    with torch.device("meta"):
        model = build_model(
            found.train.taxonomy, found.train.image_shape, trial.backbone, recipe.method, recipe.network()
        )
    stages = [stage for stage in plan(recipe, model, found.train) if stage.chosen]
    each = {stage.name: stage.steps // stage.epochs for stage in stages}
    done, points = 0, []
    for record in found.run.history:
        if record["stage"] in each:
            done += each[record["stage"]]
            points.append((done, record["accuracy"]))
    cells = []
    for level in LEVELS:
        curve = [(step, value[level]) for step, value in points if value.get(level) is not None]
        if not curve:
            continue
        for share in np.arange(1, POINTS + 1) / POINTS:
            so_far = [value for step, value in curve if step <= share * done + 0.5]
            if so_far:
                cells.append(Cell(trial.row, f"{level} validation accuracy share {share:g}", so_far[-1]))
        reached, deviation = judged(curve, done)
        cells += [Cell(trial.row, f"{SPEED}, {level}", reached), Cell(trial.row, f"{WOBBLE}, {level}", deviation)]
    return cells


def judged(curve: list[tuple[int, float]], steps: int) -> tuple[float, float]:
    """Steps until a curve stays at 95 % of its last value or above, and its deviation over the last fifth of all."""
    threshold = CONVERGED * curve[-1][1]
    reached = curve[0][0]
    for (_, before), (step, _) in pairwise(curve):
        if before < threshold:
            reached = step
    late = [value for step, value in curve if step > (1 - STEADY) * steps]
    return float(reached), float(np.std(late))


def joined(level: str, paper: float) -> Claim:
    return Claim(
        id=f"cascade-over-joint-{level}",
        text=f"the cascade has a higher {level} accuracy than joint training",
        more=(CASCADE_ROW, accuracy(level, strength=0)),
        less=(JOINT, accuracy(level, strength=0)),
        paper=paper,
    )


CASCADE = Table(
    name="nested-cascade",
    paper="Nested Learning for Multi-Level Classification, Section 3.2: cascaded training, and Figure 3",
    about="mnist, the authors' network and its cascade as in nested-distortion, beside all levels at once in as many "
    "batches of random rows. Then, on the cascade's weights, the steps of calibration one by one, and four ways to "
    "combine the levels; votes weigh as accuracies on validation rows do. Curves are on validation rows, each by "
    "its own schedule: a stage of the cascade begins at its full rate, and its last steps have the higher one.",
    trials=cascade_trials,
    drawn=r"^(coarse|fine) (accuracy|overconfidence)|validation|steps|ECE",
    floor=Floor(row=CASCADE_ROW, column=accuracy("fine", strength=0), least=0.85),
    claims=[
        joined("fine", 0.04),
        joined("middle", 0.03),
        joined("coarse", 0.02),
        Claim(
            id="cascade-faster",
            text="the cascade converges in fewer steps (fine)",
            more=(JOINT, f"{SPEED}, fine"),
            less=(CASCADE_ROW, f"{SPEED}, fine"),
        ),
        Claim(
            id="cascade-steadier",
            text="the cascade's accuracy varies less at the end (fine)",
            more=(JOINT, f"{WOBBLE}, fine"),
            less=(CASCADE_ROW, f"{WOBBLE}, fine"),
        ),
        *(
            Claim(
                id=f"calibration-{name}",
                text=f"calibration by {what} brings fine confidence nearer to the accuracy under distortion",
                more=("calibration: none", gap("fine", distorted=True)),
                less=(f"calibration: {name}", gap("fine", distorted=True)),
            )
            for name, what in (("temperature", "temperature"), ("rejection", "a rejection class"), ("both", "both"))
        ),
        *(
            Claim(
                id=f"equation-2-over-{way.split()[0]}",
                text=f"Equation 2 has a higher fine accuracy under distortion than {way}",
                more=(f"{CASCADE_ROW}: Equation 2", accuracy("fine", distorted=True)),
                less=(f"{CASCADE_ROW}: {way}", accuracy("fine", distorted=True)),
            )
            for way in (WAYS[0], *WAYS[2:])
        ),
    ],
    units={SPEED: "number"},
)
