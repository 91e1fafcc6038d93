"""The nested tables of Section 3.1 under distortion: coarse labels beside fine ones, and a budget spent on either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nestling.reproduce.nested import (
    CRM,
    MARGINAL,
    MORE,
    MORE_FINE,
    NESTED,
    OURS,
    REJECTION,
    TWIN,
    Setting,
    compare,
    setting,
    steps_of,
)
from nestling.reproduce.nested_measures import accuracy, gap, overconfidence, robustness
from nestling.reproduce.table import Cell, Claim, Floor, Table, Trial

FINE, OVER, GAP = (kind("fine", distorted=True) for kind in (accuracy, overconfidence, gap))


def wins(prefix: str, ours: str, theirs: str, gain: float | None = None, calmer: float | None = None) -> list[Claim]:
    """Under distortion: the fine accuracy of one row is above that of another, and its confidence nearer to it.

    Nearer, not lower: confidence below the accuracy would lower an overconfidence for the wrong reason.
    """
    slug = "-".join(f"{prefix}{ours} over {theirs}".replace(",", "").replace(":", "").replace("+ ", "").split())
    return [
        Claim(
            id=f"{slug}-accuracy",
            text=f"{prefix}{ours} has a higher fine accuracy under distortion than {theirs}",
            more=(f"{prefix}{ours}", FINE),
            less=(f"{prefix}{theirs}", FINE),
            paper=gain,
        ),
        Claim(
            id=f"{slug}-gap",
            text=f"{prefix}{ours} has a smaller gap of confidence and accuracy under distortion than {theirs}",
            more=(f"{prefix}{theirs}", GAP),
            less=(f"{prefix}{ours}", GAP),
            paper=calmer,
        ),
    ]


def clean(ours: str, theirs: str) -> Claim:
    """The fine accuracy on clean rows, of which the paper has no number."""
    return Claim(
        id="-".join(f"clean {ours} over {theirs}".replace(",", "").replace("+ ", "").split()),
        text=f"{ours} has a higher fine accuracy on clean rows than {theirs}",
        more=(ours, accuracy("fine", strength=0)),
        less=(theirs, accuracy("fine", strength=0)),
    )


MIX = "Labels at the authors' rates: coarse for 0.8, middle for 0.5, fine for f = 0.2 of the rows, in disjoint subsets"
TURBULENT = (
    "Distorted is the mean over turbulence of 2 pixels' width and strength 0.5, 1, 1.5 and 2 (Figure 2). "
    "Overconfidence is signed; the calibration gap is its size at each strength, and is what the paper's 'gap between "
    "the predicted confidence and the actual accuracy' is compared by."
)

DISTORTION = Table(
    name="nested-distortion",
    paper="Nested Learning for Multi-Level Classification, Section 3.1",
    about=f"mnist and the authors' network. {MIX} (exact). End-to-end has the same fine labels alone, or half as many "
    f"again. '{OURS}' is our default reading, where the paper's cascade sees each subset in its stage alone. "
    f"{TURBULENT} All have the same temperature step; the rejection class stands apart. At small 6,000 rows, as many "
    "steps and one rate, 3e-3, which was not searched, for all, and 4,000 test rows; at the paper's scale each has the "
    "authors' epochs on its own rows. The paper's effects are means over three sets, of which mnist is one.",
    trials=lambda scale: compare(scale, setting(scale, "mnist"), robustness),
    seeds={"smoke": 1, "small": 3, "paper": 3},
    floor=Floor(row=TWIN, column=accuracy("fine", strength=0), least=0.85),
    claims=[
        *wins("", NESTED, TWIN, 0.02, 0.07),
        *wins("", NESTED, MORE, 0.021, 0.075),
        clean(NESTED, TWIN),
        *wins("", NESTED, MARGINAL),
        *wins("", NESTED, CRM),
        *wins("", REJECTION, TWIN),
        *wins("", OURS, TWIN),
        *wins("", OURS, MARGINAL),
        clean(OURS, MARGINAL),
    ],
    scales={
        "paper": {
            "about": f"mnist and the authors' network, all rows and settings. {MIX} (exact). End-to-end has the same "
            f"fine labels alone, or half as many again. {TURBULENT}"
        }
    },
)

SETS = ("mnist", "fashion_mnist", "cifar10")
ALL = "all sets"
SHARES: dict[str, tuple[float, ...]] = {"smoke": (0.0,), "small": (0.0, 0.5), "paper": (0.0, 0.25, 0.5, 0.75)}
"""How much of the way from f to 1.5 f fine labels; the coarser ones fall to none on it."""


def spent(at: Setting, share: float) -> Setting:
    """A label mix between many coarse labels with f fine ones (0), and 1.5 f fine ones with none (1)."""
    fine = round((1 + (MORE_FINE - 1) * share) * at.known[-1])
    return replace(at, known=(*(round((1 - share) * count) for count in at.known[:-1]), fine))


def as_long(at: Setting, whole: Setting) -> Setting:
    """``at`` with the epochs of every stage stretched alike, so that all steps together are about ``whole``'s."""
    stretch = steps_of(whole.known, whole.epochs) / steps_of(at.known, at.epochs)
    return replace(at, epochs=tuple(max(round(stretch * epochs), 1) for epochs in at.epochs))


def mixed(share: float) -> str:
    """The row of a mix."""
    return f"{NESTED}, {1 + (MORE_FINE - 1) * share:g} f"


def budget_trials(scale: str) -> list[Trial]:
    """On each set the ends of the curve, end-to-end and flat + marginal among them, and what lies between."""
    found = []
    for source in SETS:
        at, prefix = setting(scale, source), f"{source}: "
        for share in SHARES[scale]:
            some = spent(at, share)
            # The paper's own rule says when to stop at its scale.
            made = compare(scale, as_long(some, at) if scale == "small" else some, robustness, (NESTED,))
            found += [replace(t, row=f"{prefix}{mixed(share)}", options={}) for t in made]
        found += compare(scale, at, robustness, (TWIN, MORE, MARGINAL), prefix)
    return found


def over_sets(cells: Sequence[Cell]) -> list[Cell]:
    """The mean over the sets of every row and column that all of them have; and the mixes as a curve."""
    by: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        source, _, row = cell.row.partition(": ")
        if source in SETS:
            by.setdefault((row, cell.column), []).append(cell)
    found = [
        Cell(f"{ALL}: {row}", column, float(np.mean([cell.value for cell in each])), *together(each))
        for (row, column), each in by.items()
        if len(each) == len(SETS)
    ]
    return [*found, *curve([*cells, *found])]


def together(cells: Sequence[Cell]) -> tuple[tuple[float, ...], int]:
    """The samples of a mean over sets, whose test rows are as many: row by row; else none, and the fewest rows."""
    lengths = {len(cell.samples) for cell in cells}
    if len(lengths) == 1 and lengths != {0}:
        return tuple(np.mean([cell.samples for cell in cells], axis=0).tolist()), 0
    return (), min(max(cell.count, len(cell.samples)) for cell in cells)


def curve(cells: Sequence[Cell]) -> list[Cell]:
    """Fine accuracy, overconfidence and gap under distortion by how many fine labels there are, in units of f.

    Its end is end-to-end learning of 1.5 f: a cascade without coarser labels has nothing else to learn.
    """
    shares = {**{mixed(share): share for share in SHARES["paper"]}, MORE: 1.0}
    found = []
    for cell in cells:
        source, _, row = cell.row.partition(": ")
        if cell.column in (FINE, OVER, GAP) and row in shares:
            place = 1 + (MORE_FINE - 1) * shares[row]
            found.append(Cell(f"{source}: {NESTED}, by mix", f"{cell.column} share {place:g}", cell.value))
    return found


BUDGET = Table(
    name="nested-budget",
    paper="Nested Learning for Multi-Level Classification, Section 3.1: the two questions of a budget",
    about=f"{MIX} (exact), and mixes between f fine labels with all coarser ones and 1.5 f with none. On the authors' "
    f"networks, at small half as wide on cifar10 and the epochs of a mix stretched, so that all take as many steps. "
    f"{TURBULENT} 'all sets' is the mean over the three.",
    trials=budget_trials,
    drawn=r"^fine (accuracy|overconfidence)",
    derived=over_sets,
    floor=Floor(row=f"{ALL}: {TWIN}", column=accuracy("fine", strength=0), least=0.6),
    claims=[
        claim
        for source in (*SETS, ALL)
        for claim in [
            *wins(f"{source}: ", mixed(0.0), TWIN, *((0.02, 0.07) if source == ALL else (None, None))),
            *wins(f"{source}: ", mixed(0.0), MORE, *((0.021, 0.075) if source == ALL else (None, None))),
            *wins(f"{source}: ", mixed(0.0), MARGINAL),
        ]
    ],
)
