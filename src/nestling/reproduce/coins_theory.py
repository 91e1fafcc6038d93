"""The theory of search from coarse labels as figures: lambda trades alpha for beta, and what the bounds are worth.

Theorem 1 has instances known with at least alpha and coarse classes with at least beta, balanced by lambda; Lemma 1
bounds the probability of the fine class; Theorem 2 says what telling instances apart within coarse classes costs.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from nestling.evaluate.theory import theory_of
from nestling.methods.coins import Coins
from nestling.reproduce.coins import recipe
from nestling.reproduce.coins_choice import GRID, recall_of
from nestling.reproduce.measures import trained
from nestling.reproduce.rows import Rows
from nestling.reproduce.table import Cell, Claim, Floor, Place, Table, Trial, on_axis

VARIANTS = ("coins", "coins-imp")
HIGH = 5.0
"""The largest lambda of the grid."""
LABELLED = 0.5
"""Smaller ones lie too near each other to be named in the figure."""
COLUMNS = {
    "alpha": ("alpha", "mean"),
    "alpha within": ("alpha within", "mean"),
    "beta": ("beta", "mean"),
    "fine probability": ("fine", "measured"),
    "its bound": ("fine", "bound"),
    "Lemma 1": ("fine", "lemma"),
}
CONSTANT = "constant"


def by_lambda(trial: Trial, place: Place) -> list[Cell]:
    """The figures of ``Theory`` and the fine R@1 on test rows, at every lambda of ``options``' ``grid``.

    Probabilities are of training rows without augmentation, means over them; the constant is of the least ones.
    """
    assert isinstance(trial.recipe, Coins)
    cells, count = [], 0
    for weight in trial.options["grid"]:
        found = trained(replace(trial, recipe=replace(trial.recipe, instance_weight=weight)), place)
        theory = theory_of(found.run, found.train, found.runtime)
        assert theory is not None
        figures, count = theory.figures(), len(found.test)
        cells += [
            Cell(trial.row, f"{name} lambda {weight:g}", figures[group][key]) for name, (group, key) in COLUMNS.items()
        ]
        cells.append(Cell(trial.row, f"broken bounds lambda {weight:g}", figures["fine"]["violations"]))
        if figures[CONSTANT] is not None:
            cells.append(Cell(trial.row, f"{CONSTANT} lambda {weight:g}", figures[CONSTANT]))
        cells.append(Cell(trial.row, f"fine R@1 lambda {weight:g}", recall_of(found, test=True), count=count))
    return cells


def theory_trials(scale: str) -> list[Trial]:
    """The trainings of coins-imp are those of coins-choice."""
    rows, network = Rows(source="digit-pairs", validation=0.1), "conv:32/64/128"
    if scale == "smoke":
        rows, network = replace(rows, train=120, test=80), "conv:4/4"
    # Both ends, which the claims are about.
    options = {"grid": (GRID[1], HIGH) if scale == "smoke" else GRID}
    return [
        Trial(
            row=variant,
            recipe=recipe(scale, variant, 30, 64, "crop"),
            rows=rows,
            measure=by_lambda,
            options=options,
            backbone=network,
        )
        for variant in VARIANTS
    ]


def picture(table: Table, result: dict[str, Any], folder: Path) -> bytes:
    """Left alpha against beta with lambda along the curve; then the bounds, and the constant, over lambda."""
    from nestling.report.plots import PALETTE, canvas, legend, logarithmic, looks, styled
    from nestling.report.plots import place as axes_at

    lines: dict[tuple[str, str], dict[float, float]] = {}
    for entry in result["table"]:
        known = on_axis(entry["column"])
        if known is not None and entry["mean"] is not None:
            lines.setdefault((entry["row"], known[0]), {})[known[2]] = entry["mean"]
    side, gap, buffer = 2.75, 0.7, io.BytesIO()
    with styled():
        figure = canvas(side + 0.95)
        styles = looks(list(VARIANTS))
        trade, bounds, constant = (axes_at(figure, 0.65 + i * (side + gap), 0.5, side, side) for i in range(3))
        for row, look in styles.items():
            alpha, beta = lines.get((row, "alpha"), {}), lines.get((row, "beta"), {})
            weights = sorted(alpha.keys() & beta.keys())
            trade.plot([beta[w] for w in weights], [alpha[w] for w in weights], color=look.colour, marker=look.marker)
            for weight in weights:
                if weight >= LABELLED:
                    place = beta[weight], alpha[weight]
                    trade.annotate(f"{weight:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=7)
            for name, colour in zip(("fine probability", "its bound", "Lemma 1"), PALETTE[2:], strict=False):
                label = name if row == VARIANTS[0] else None
                over(bounds, lines.get((row, name), {}), colour, look.marker, label)
            over(constant, lines.get((row, CONSTANT), {}), look.colour, look.marker)
        logarithmic(trade, "y")
        for axes in (bounds, constant):
            logarithmic(axes, "x", "y")
        trade.set(xlabel="mean β, coarse classes", title="λ (by its points) trades α, upward, for β")
        bounds.set(xlabel="λ", title="probability of the fine class")
        bounds.legend(fontsize=7)
        constant.set(xlabel="λ", title="c′ that Theorem 2 needs")
        legend(figure, styles, 0.65, 6)
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def over(axes: Axes, values: dict[float, float], colour: str, marker: str, label: str | None = None) -> None:
    """A line over lambda."""
    at = sorted(values)
    axes.plot(at, [values[x] for x in at], color=colour, marker=marker, markersize=4, label=label)


def at(column: str, weight: float) -> str:
    return f"{column} lambda {weight:g}"


THEORY = Table(
    name="coins-theory",
    paper="Weakly Supervised Representation Learning with Coarse Labels, Lemma 1 and Theorems 1 and 2",
    about="digit-pairs at six lambda, on training rows. alpha: probability of a row among all rows, and within its "
    "coarse class; beta: of its coarse class; Lemma 1 with each row's own alpha (its bound) and with the least one. "
    "constant: the c' for which Theorem 2 gives the least alpha that is found. h of Theorem 1 is not printed in the "
    "paper.",
    trials=theory_trials,
    seeds={"smoke": 1, "small": 3, "paper": 3},
    floor=Floor(row="coins", column=at("fine R@1", 0.5), least=0.85),
    claims=[
        claim
        for row in VARIANTS
        for claim in (
            Claim(
                id=f"{row}-alpha-rises",
                text=f"{row}: a larger lambda knows instances better (alpha, {HIGH:g} against {GRID[1]:g})",
                more=(row, at("alpha", HIGH)),
                less=(row, at("alpha", GRID[1])),
            ),
            Claim(
                id=f"{row}-beta-falls",
                text=f"{row}: a larger lambda knows coarse classes less (beta, {GRID[1]:g} against {HIGH:g})",
                more=(row, at("beta", GRID[1])),
                less=(row, at("beta", HIGH)),
            ),
        )
    ],
    units={CONSTANT: "number", "broken": "number"},
    picture=picture,
)
