"""How lambda is chosen where fine labels are not to be had: what each rule's choice costs beside the best of the grid.

The rules are those of ``evaluate.choice``, by which ``nestling sweep`` chooses too.
"""

from __future__ import annotations

from dataclasses import replace

from nestling.evaluate.choice import RULES, coarse_recall
from nestling.methods.coins import LAMBDAS, Coins
from nestling.reproduce.coins import recipe
from nestling.reproduce.measures import Trained, trained
from nestling.reproduce.rows import Rows
from nestling.reproduce.table import Cell, Claim, Floor, Place, Table, Trial

GRID = tuple(sorted(LAMBDAS))
BEST = "the best of the grid"


def choose(trial: Trial, place: Place) -> list[Cell]:
    """Fine R@1 on test rows and coarse R@1 on validation rows by lambda; the fine R@1 of each rule's choice.

    ``options``: ``grid``. The best of the grid is the best on test rows: what somebody who knew the fine labels would
    have had.
    """
    assert isinstance(trial.recipe, Coins)
    fine, coarse, count = {}, {}, 0
    for weight in trial.options["grid"]:
        found = trained(replace(trial, recipe=replace(trial.recipe, instance_weight=weight)), place)
        count = len(found.test)
        fine[weight] = recall_of(found, test=True)
        coarse[weight] = recall_of(found, test=False)
    kept = len(found.validation)
    cells = [Cell(trial.row, f"fine R@1 lambda {weight:g}", value, count=count) for weight, value in fine.items()]
    cells += [
        Cell(trial.row, f"coarse R@1 on validation rows lambda {weight:g}", value, count=kept)
        for weight, value in coarse.items()
    ]
    for name, rule in RULES.items():
        weight = rule(coarse, kept)
        cells += [Cell(trial.row, name, fine[weight], count=count), Cell(trial.row, f"lambda, {name}", weight)]
    return [*cells, Cell(trial.row, BEST, max(fine.values()), count=count)]


def recall_of(found: Trained, *, test: bool) -> float:
    """R@1 of the finest level among test rows, or of the coarse one among validation rows."""
    outputs, labels = found.outputs(found.test if test else found.validation)
    return coarse_recall(outputs, labels, -1 if test else 0)


def choice_trials(scale: str) -> list[Trial]:
    sets = {
        "digit-pairs": (Rows(source="digit-pairs", validation=0.1), "conv:32/64/128", 30, "crop"),
        "mnist": (Rows(source="mnist", train=3000, test=4000, validation=0.1), "conv:16/32/64", 30, "crop"),
        "fashion_mnist": (
            Rows(source="fashion_mnist", train=3000, test=4000, validation=0.1), "conv:16/32/64", 30, "crop",
        ),
        "grocery": (Rows(source="grocery", image_size=32, validation=0.1), "conv:32/64/128-128", 10, "crop-mirror"),
    }  # fmt: skip
    found = []
    for name, (rows, network, epochs, augmentation) in sets.items():
        if scale == "smoke":
            rows, network = replace(rows, train=120, test=80), "conv:4/4"
        options = {"grid": GRID[3:5] if scale == "smoke" else GRID}
        made = recipe(scale, "coins-imp", epochs, 64, augmentation)
        found.append(Trial(row=name, recipe=made, rows=rows, measure=choose, options=options, backbone=network))
    return found


CHOICE = Table(
    name="coins-choice",
    paper="Weakly Supervised Representation Learning with Coarse Labels, Section 4.1: the search for lambda",
    about="coins-imp at six lambda: the fine R@1 of what each rule picks by coarse labels of validation rows alone. "
    "The rules were fixed before, in view of digit-pairs; fashion_mnist and grocery judge them. The sizes are "
    "those of the small scale at every scale. Lambda alone is chosen: the rest is the recipe's.",
    trials=choice_trials,
    seeds={"smoke": 1, "small": 3, "paper": 3},
    floor=Floor(row="digit-pairs", column=BEST, least=0.85),
    claims=[
        *(
            Claim(
                id=f"{source.replace('_', '-')}-{slug}",
                text=f"{source}: {name} picks a lambda that is no more than 2 points below the best",
                more=(source, name),
                less=(source, BEST),
                least=-0.02,
            )
            for source in ("digit-pairs", "mnist", "fashion_mnist", "grocery")
            for slug, name in zip(("paper", "point", "error"), RULES, strict=True)
        ),
    ],
    units={"lambda": "number"},
)
