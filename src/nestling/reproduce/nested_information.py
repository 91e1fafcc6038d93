"""Section 3.2 of *Nested Learning*, the flow of information: bottlenecks with and without skips, by MINE."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from nestling.evaluate.attacked import pixels_of
from nestling.evaluate.bottlenecks import bottleneck_information
from nestling.evaluate.information import Mine, SaturatedWarning
from nestling.reproduce.measures import trained
from nestling.reproduce.nested_measures import robustness
from nestling.reproduce.table import Cell, Claim, Place, Trial

LOST = "information I(X; f coarse) - I(X; f fine)"
"""The column of what the paper calls "the difference in the mutual information between coarse and fine"."""
RATIO = "information lost, ratio"
"""Of that difference to the one with skips, which is 1."""
SATURATED = "information above log n"
"""How many of the estimates were: what these say is "large"."""
MISSING = "information missed"
"""By how much the estimates of I(X; f) are too low at least: see ``Bottlenecks.missing``."""


def robustness_and_information(trial: Trial, place: Place) -> list[Cell]:
    """As ``robustness``, and what the bottlenecks of the test rows hold, in nats. ``options``: ``mine``, its steps."""
    return [*robustness(trial, place), *information(trial, place)]


def information(trial: Trial, place: Place) -> list[Cell]:
    """I(X; f_i), their difference, I(f coarse; f fine), and I(f_i; Y_i) beside H(Y_i)."""
    found = trained(trial, place)
    with warnings.catch_warnings():
        # Counted in a column of its own.
        warnings.simplefilter("ignore", SaturatedWarning)
        held = bottleneck_information(
            found.run.model,
            pixels_of(found.run.preprocessing),
            found.test,
            found.runtime,
            place.seed,
            Mine(steps=trial.options["mine"]),
        )
    estimates = {
        **{f"I(X; f {level})": e for level, e in held.inputs.items()},
        "I(f coarse; f fine)": held.ends,
        **{f"I(f {level}; Y {level})": e for level, e in held.labels.items()},
    }
    values = {
        **{f"information {name}": e.value for name, e in estimates.items()},
        LOST: held.lost,
        MISSING: held.missing,
        **{f"information H(Y {level})": value for level, value in held.entropies.items()},
        SATURATED: float(sum(e.saturated for e in estimates.values())),
    }
    return [Cell(trial.row, column, value) for column, value in values.items()]


def ratios(cells: Sequence[Cell], with_skips: str) -> list[Cell]:
    """How many times as much is lost as with skips, where they lose any."""
    lost = {cell.row: cell.value for cell in cells if cell.column == LOST}
    base = lost.get(with_skips, 0.0)
    return [Cell(row, RATIO, value / base) for row, value in lost.items()] if base > 0 else []


def lost_more(without: str, with_skips: str) -> Claim:
    """Section 3.2: the difference "is doubled when SC are removed"; of how large it is the paper has no number."""
    return Claim(
        id="skips-information",
        text="without skips more information on the image is lost from the coarse bottleneck to the fine one "
        "(how many times as much, less 1)",
        more=(without, RATIO),
        less=(with_skips, RATIO),
        paper=1.0,
    )
