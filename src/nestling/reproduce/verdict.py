"""From cells over seeds to means and verdicts: pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np
from scipy import stats

from nestling.evaluate.accuracy import paired_interval
from nestling.reproduce.table import Cell, Claim, Floor

LEAST_SEEDS = 3
LEVEL = 0.95

Measured = Mapping[tuple[str, str], Mapping[int, Cell]]
"""By row and column, then by seed."""


def gather(cells: Mapping[int, Sequence[Cell]]) -> dict[tuple[str, str], dict[int, Cell]]:
    """Cells by seed, as ``Measured``."""
    found: dict[tuple[str, str], dict[int, Cell]] = {}
    for seed, several in cells.items():
        for cell in several:
            found.setdefault((cell.row, cell.column), {})[seed] = cell
    return found


def summary(measured: Measured, printed: Mapping[tuple[str, str], float]) -> list[dict[str, Any]]:
    """The ``table`` of a result: mean and sample standard deviation over seeds; what the paper prints alone is None."""
    entries = []
    for row, column in dict.fromkeys([*measured, *printed]):
        values = [cell.value for cell in measured.get((row, column), {}).values()]
        entries.append(
            {
                "row": row,
                "column": column,
                "paper": printed.get((row, column)),
                "mean": mean(values) if values else None,
                "std": stdev(values) if len(values) > 1 else None,
                "n": len(values),
            }
        )
    return entries


Difference = tuple[float, float | None, float | None]
"""Of means, and the ends of its interval, or None for both where nothing says how sure it is."""


def difference(more: Mapping[int, Cell], less: Mapping[int, Cell]) -> Difference | None:
    """more - less over their common seeds, with its 95 % interval; None where there is no common seed.

    From three seeds on a paired t interval over seeds. Below, what the test rows say of one training: a bootstrap over
    the pairs of samples, else the normal approximation of two shares; no interval where it is of no rows.
    """
    seeds = sorted(more.keys() & less.keys())
    if not seeds:
        return None
    gaps = [more[seed].value - less[seed].value for seed in seeds]
    middle = mean(gaps)
    if len(seeds) >= LEAST_SEEDS:
        half = float(stats.t.ppf((1 + LEVEL) / 2, len(seeds) - 1)) * stdev(gaps) / math.sqrt(len(seeds))
        return middle, middle - half, middle + half
    pairs = [[np.asarray(side[seed].samples, dtype=float) for seed in seeds] for side in (more, less)]
    lengths = {len(samples) for side in pairs for samples in side}
    if lengths == {0} or len(lengths) > 1:
        halves = [unpaired(more[seed], less[seed]) for seed in seeds]
        if None in halves:
            return middle, None, None
        half = max(halves)  # type: ignore[type-var]
        return middle, middle - half, middle + half
    _, lo, hi = paired_interval(np.stack(pairs[0]), np.stack(pairs[1]), LEVEL)
    return middle, lo, hi


def unpaired(more: Cell, less: Cell) -> float | None:
    """Half of the 95 % interval of the difference of two shares of rows, taken as independent; None of no rows."""
    if not (more.count or less.count):
        return None
    spread = [cell.value * (1 - cell.value) / cell.count for cell in (more, less) if cell.count]
    return float(stats.norm.ppf((1 + LEVEL) / 2)) * math.sqrt(sum(spread))


def verdict(claim: Claim, found: Difference | None, num_seeds: int, reached: bool) -> str:
    """holds, does not hold, within noise or underpowered; ``reached``: whether the table's floor was."""
    if found is None or num_seeds < LEAST_SEEDS or not reached:
        return "underpowered"
    _, lo, hi = found
    if lo is None or hi is None:
        return "underpowered"
    if lo > claim.least:
        return "holds"
    if hi < claim.least:
        return "does not hold"
    fine = claim.paper is not None and (hi - lo) / 2 <= abs(claim.paper) / 2
    return "within noise" if fine else "underpowered"


def reaches(measured: Measured, floor: Floor) -> bool:
    """Whether the floor's row reaches it, on the mean over seeds."""
    cells = measured.get((floor.row, floor.column), {})
    return bool(cells) and mean(cell.value for cell in cells.values()) >= floor.least


def decide(measured: Measured, claims: Sequence[Claim], floor: Floor) -> list[dict[str, Any]]:
    """The ``claims`` of a result."""
    reached = reaches(measured, floor)
    decided = []
    for claim in claims:
        more, less = measured.get(claim.more, {}), measured.get(claim.less, {})
        found = difference(more, less)
        decided.append(
            {
                "id": claim.id,
                "text": claim.text,
                "paper": claim.paper,
                "ours": None if found is None else found[0],
                "interval": [None, None] if found is None else [found[1], found[2]],
                "verdict": verdict(claim, found, len(more.keys() & less.keys()), reached),
            }
        )
    return decided
