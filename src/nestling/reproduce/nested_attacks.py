"""Section 3.1 of *Nested Learning* under attack: Table 3, and how much FGSM it takes to reach an error.

The attack is aimed at the fine head and grows for each test row until that head is wrong; then the coarse and middle
answers are read, each head by itself, of a flat model as the ancestors of its fine answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch

from nestling.data.dataset import LabelledData
from nestling.evaluate.attacked import base_decisions, outputs_by_epsilon, strength_at_error, under_attack
from nestling.evaluate.decide import Decisions
from nestling.evaluate.measure import decisions_of
from nestling.models.model import Outputs
from nestling.reproduce.measures import Trained, trained
from nestling.reproduce.nested import MARGINAL, NESTED, TWIN, compare, setting
from nestling.reproduce.table import Cell, Claim, Floor, Place, Table, Trial

SETS = ("mnist", "cifar10")
LEVELS = ("coarse", "middle", "fine")
ATTACKS = {"FGSM": "fgsm:flip", "DeepFool": "deepfool", "saliency": "saliency:1"}
"""Each until the fine answer is wrong: the saliency map may change the whole image."""
SMOKE = {"FGSM": "fgsm:flip", "DeepFool": "deepfool:1", "saliency": "saliency:0.005"}
EPSILONS = (
    *(0.0, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.0075, 0.01, 0.02),
    *(0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5),
)
ERRORS = (0.6, 0.75)
"""At which strengths are compared: above the clean error on both sets, at small 52 % of cifar10, and below what FGSM
reaches."""
NUM_ROWS: Mapping[str, int | None] = {"smoke": 8, "small": 1_000, "paper": None}
"""The first test rows, which are attacked."""
PRINTED = {
    (NESTED, "FGSM"): (0.868, 0.609, 0.0),
    (TWIN, "FGSM"): (0.252, 0.156, 0.0),
    (NESTED, "DeepFool"): (0.572, 0.357, 0.0),
    (TWIN, "DeepFool"): (0.445, 0.275, 0.0),
    (NESTED, "saliency"): (0.822, 0.715, 0.0),
    (TWIN, "saliency"): (0.274, 0.172, 0.0),
}
"""Table 3, which does not say of which set it is."""


def accuracy(level: str, attack: str, *, combined: bool = False) -> str:
    """A column: accuracy of a level, by its own head or combined, where the fine head was attacked."""
    return f"{attack} {level}" + (", combined" if combined else "")


def epsilon_at(error: float, *, combined: bool = False) -> str:
    """A column: how much FGSM against the fine head takes its answer, or the combined one, to an error."""
    return f"epsilon at {100 * error:.0f} % error" + (", combined" if combined else "")


def ratio_at(error: float, *, combined: bool = False) -> str:
    """A column: that epsilon over end-to-end's."""
    return f"ratio of {epsilon_at(error, combined=combined)}"


def flipped(attack: str) -> str:
    """A column: the share of the attacked rows whose fine answer is wrong in the end."""
    return f"{attack} flipped"


def turned(level: str, attack: str) -> str:
    """A column: as ``accuracy``, over the rows whose fine answer was right before."""
    return f"{accuracy(level, attack)}, fine right before"


def attacks(trial: Trial, place: Place) -> list[Cell]:
    """Accuracies on clean rows and under each attack, what it took, and the error of the fine head by epsilon.

    Under an attack accuracies are over the rows whose fine answer is wrong in the end, as Table 3's are: those that
    were wrong on the clean image among them, untouched, and beside it without those.

    ``options``: ``attacks`` by name, and ``attacked``, how many of the test rows.
    """
    found = trained(trial, place)
    rows = found.test.subset(np.arange(len(found.test))[: trial.options["attacked"]])
    where = (found.run.model, found.run.preprocessing, rows, found.runtime)
    curve = outputs_by_epsilon(*where, EPSILONS)
    before = fine_right(found, curve[0], rows, combined=False)
    cells = []
    for name, spec in trial.options["attacks"].items():
        moved = under_attack(*where, spec)
        wrong = moved.flipped
        cells.append(Cell(trial.row, flipped(name), float(wrong.mean()), tuple(wrong.astype(float).tolist())))
        if wrong.any():
            cells += accuracies(trial.row, name, found, moved.outputs, rows, wrong)
        fooled = wrong & before
        if fooled.any():
            cells += [
                replace(cell, column=turned(level, name))
                for level, cell in zip(LEVELS[:2], accuracies(trial.row, name, found, moved.outputs, rows, fooled))
            ]
            cells.append(Cell(trial.row, f"strength of {name}", float(np.median(moved.strength[fooled]))))
    cells = [*accuracies(trial.row, "clean", found, curve[0], rows, np.ones(len(rows), dtype=bool)), *cells]
    for combined in (False, True):
        errors = [float(1 - fine_right(found, outputs, rows, combined=combined).mean()) for outputs in curve]
        name = "fine error, combined" if combined else "fine error"
        cells += [
            Cell(trial.row, f"{name} epsilon {epsilon:g}", error, count=len(rows))
            for epsilon, error in zip(EPSILONS, errors)
        ]
        for error in ERRORS:
            strength = strength_at_error(EPSILONS, errors, error)
            # An error that the clean rows have already takes nothing to reach, and compares nothing.
            if strength:
                cells.append(Cell(trial.row, epsilon_at(error, combined=combined), strength))
    return cells


@torch.no_grad()
def accuracies(
    row: str, attack: str, found: Trained, outputs: Outputs, rows: LabelledData, among: np.ndarray
) -> list[Cell]:
    """Of each level's own head, and of the fine answer combined by Equation 2, among some of the rows (bool, (n,))."""
    model = found.run.model
    own = base_decisions(model, outputs)
    combined = decisions_of(model, model.answers(outputs, reject=False))
    cells = [right(row, accuracy(level, attack), own, level, rows, among) for level in LEVELS]
    return [*cells, right(row, accuracy("fine", attack, combined=True), combined, "fine", rows, among)]


def right(row: str, column: str, decisions: Decisions, level: str, rows: LabelledData, among: np.ndarray) -> Cell:
    """How often a level's decision is right; of as many rows as the models were fooled on, which are not paired."""
    labels = rows.labels[:, rows.taxonomy.level_index(level)]
    each = (decisions.columns[level] == labels)[among & (labels >= 0)].astype(float)
    return Cell(row, column, float(each.mean()), count=len(each))


@torch.no_grad()
def fine_right(found: Trained, outputs: Outputs, rows: LabelledData, *, combined: bool) -> np.ndarray:
    """bool (n,): whether the fine head is right, or the fine answer combined by Equation 2."""
    model = found.run.model
    by = decisions_of(model, model.answers(outputs, reject=False)) if combined else base_decisions(model, outputs)
    return by.columns["fine"] == rows.labels[:, -1]


def trials(scale: str) -> list[Trial]:
    """The cascade, its twin and flat + marginal, trained as for the tables of distortions."""
    options: dict[str, Any] = {"attacks": SMOKE if scale == "smoke" else ATTACKS, "attacked": NUM_ROWS[scale]}
    return [
        replace(made, options=options)
        for source in SETS
        for made in compare(scale, setting(scale, source), attacks, (NESTED, TWIN, MARGINAL), f"{source}: ")
    ]


def ratios(cells: Sequence[Cell]) -> list[Cell]:
    """Of the epsilons at which two rows reach the same error, to end-to-end's, which is 1."""
    by = {(cell.row, cell.column): cell.value for cell in cells}
    found = []
    for source, error, combined in product(SETS, ERRORS, (False, True)):
        rival = by.get((f"{source}: {TWIN}", epsilon_at(error, combined=combined)))
        for row in (NESTED, TWIN, MARGINAL):
            ours = by.get((f"{source}: {row}", epsilon_at(error, combined=combined)))
            if ours is not None and rival:
                found.append(Cell(f"{source}: {row}", ratio_at(error, combined=combined), ours / rival))
    return found


def spared(source: str, attack: str, level: str, rival: str, paper: float | None = None) -> Claim:
    """An attack on the fine head leaves a coarser level of the nested network in place more often."""
    return Claim(
        id="-".join(f"{source} {attack} {level} over {rival}".lower().replace("+ ", "").split()),
        text=f"{source}: where {attack} makes the fine answer wrong, nested's {level} one is right more often than "
        f"that of {rival}",
        more=(f"{source}: {NESTED}", accuracy(level, attack)),
        less=(f"{source}: {rival}", accuracy(level, attack)),
        paper=paper,
    )


def harder(source: str, error: float, combined: bool) -> Claim:
    """More than twice as much noise, as a ratio less end-to-end's own, which is 1."""
    whose = "nested's combined answer" if combined else "nested"
    return Claim(
        id=f"{source}-twice-the-noise-at-{100 * error:.0f}" + ("-combined" if combined else ""),
        text=f"{source}: for {100 * error:.0f} % error FGSM needs more than twice as much noise against {whose} as "
        "against end-to-end (the ratio of epsilons, less 1)",
        more=(f"{source}: {NESTED}", ratio_at(error, combined=combined)),
        less=(f"{source}: {TWIN}", ratio_at(error, combined=combined)),
        paper=1.0,
        least=1.0,
    )


ABOUT = (
    "mnist and cifar10, the authors' networks and label rates in disjoint subsets, as in nested-distortion and "
    "nested-budget, whose trainings these are. The attack grows for each test row until the fine head is wrong, by the "
    "head's own logits in pixels' units; accuracies are each head's own, 'combined' are by Equation 2. Under an attack "
    "they are over the rows whose fine answer is wrong in the end ('flipped'), those that needed no attack among them, "
    "or without these ('fine right before'). The paper does "
    "not say of which set its Table 3 is: its numbers stand beside both."
)

ATTACKS_TABLE = Table(
    name="nested-attacks",
    paper="Nested Learning for Multi-Level Classification, Section 3.1, Table 3",
    about=f"{ABOUT} At small 6,000 training rows of each set, a network half as wide on cifar10, and the first 1,000 "
    "test rows.",
    trials=trials,
    derived=ratios,
    drawn=r"^(FGSM|DeepFool|saliency) (coarse|middle|fine, combined)$|flipped|strength|error",
    seeds={"smoke": 1, "small": 3, "paper": 3},
    floor=Floor(row=f"mnist: {TWIN}", column=accuracy("fine", "clean"), least=0.85),
    printed={
        (f"{source}: {row}", accuracy(level, attack)): value
        for source in SETS
        for (row, attack), values in PRINTED.items()
        for level, value in zip(LEVELS, values, strict=True)
    },
    units={"strength": "number", "epsilon": "number", "ratio": "number"},
    claims=[
        *(harder(*each) for each in product(SETS, ERRORS, (False, True))),
        *(
            spared(source, attack, level, TWIN, PRINTED[NESTED, attack][number] - PRINTED[TWIN, attack][number])
            for source in SETS
            for attack in ATTACKS
            for number, level in enumerate(LEVELS[:2])
        ),
        *(spared(source, attack, "coarse", MARGINAL) for source in SETS for attack in ATTACKS),
    ],
    scales={"paper": {"about": f"{ABOUT} All rows and the authors' settings."}},
)
