"""Cutting labelled rows into parts, class by class.

Rows are stratified by the class of their finest known level; groups are never divided.
What each part may be used for stands in the interface, under "What training rows are for".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nestling.errors import UsageError, listed
from nestling.seeds import derive
from nestling.taxonomy import Taxonomy

if TYPE_CHECKING:
    from nestling.data.dataset import LabelledData


def cut(data: LabelledData, fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0) -> tuple[LabelledData, ...]:
    """``data`` cut into ``len(fractions)`` parts, each class of the finest known level by these fractions.

    The shares hold over all rows, and within every class up to one row (groups: up to one group). Every class has
    a row in the first part, so a class with one example goes there. Rows keep their order.
    Raises ``UsageError`` where the fractions do not sum to 1 or the first one is 0.
    """
    pairs = strata(data.labels, data.taxonomy)
    part = assign(pairs, fractions, seed, data.groups)
    parts = [data.subset(np.flatnonzero(part == number)) for number in range(len(fractions))]
    distinct, counts = np.unique(pairs, axis=0, return_counts=True)
    single = [pair for pair in distinct[counts == 1].tolist() if pair[0] >= 0]
    if single and len(fractions) > 1:
        names = [data.taxonomy.column_names(data.taxonomy.levels[level])[code] for level, code in single]
        many = "1 class has" if len(single) == 1 else f"{len(single)} classes have"
        note = f"{many} one example each, kept for training: {listed(names, limit=5)}"
        parts[0] = replace(parts[0], notes=(*parts[0].notes, note))
    return tuple(parts)


def cut_parts(
    data: LabelledData, validation: LabelledData | None = None, seed: int = 0
) -> tuple[LabelledData, LabelledData, LabelledData]:
    """Training, validation and calibration rows: 80/10/10, or 90/10 where the source has validation rows of its own.

    Calibration rows serve the guarantee of ``nestling predict --risk`` alone: nothing is learned from them or chosen.
    Raises ``UsageError`` where there is no row to train on.
    """
    if validation is None:
        train, validation, calibration = cut(data, (0.8, 0.1, 0.1), seed)
    else:
        train, calibration = cut(data, (0.9, 0.1), seed)
    if len(train) == 0:
        raise UsageError("there is no row to train on: the data are empty")
    return train, validation, calibration


def strata(labels: np.ndarray, taxonomy: Taxonomy) -> np.ndarray:
    """For labels (n, levels): int64 (n, 2), the finest known level and the column there; (-1, -1) without a label.

    A row at a ragged leaf is known at the finest level: its column there is the pass-through column of the leaf.
    """
    columns = taxonomy.columns(labels)
    known = columns >= 0
    finest = np.where(known.any(axis=1), known.shape[1] - 1 - np.argmax(known[:, ::-1], axis=1), -1)
    column = np.where(finest >= 0, columns[np.arange(len(columns)), finest], -1)
    return np.stack([finest, column], axis=1).astype(np.int64)


def assign(pairs: np.ndarray, fractions: Sequence[float], seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """The part of every row, int64 (n,), from its stratum ``pairs`` (n, 2) and group (n,).

    One pass over all units (rows, or groups), stratum by stratum, finest level first: each goes to the part that
    lacks most of its share so far. A part other than the first takes no more of a stratum than its share, rounded up.
    """
    shares = _checked(fractions)
    rng = np.random.default_rng(derive(seed, "cut"))
    distinct, stratum = np.unique(pairs, axis=0, return_inverse=True)
    stratum = stratum.reshape(-1)
    unit = np.arange(len(pairs)) if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)
    home = stratum if groups is None else _majority(unit, stratum)
    sizes = np.bincount(unit, minlength=len(home))
    volume = np.bincount(home, weights=sizes, minlength=len(distinct)).tolist()

    # Levels stay together, finest first, so that the shares hold within the few rows of the finest level as well.
    rank = np.empty(len(distinct), dtype=np.int64)
    rank[np.lexsort((rng.random(len(distinct)), -distinct[:, 0]))] = np.arange(len(distinct))
    order = np.lexsort((rng.random(len(home)), rank[home]))

    part = np.zeros(len(home), dtype=np.int64)
    given = [0.0] * len(shares)
    seen, current, taken = 0.0, -1, [0.0] * len(shares)
    for number, of, size in zip(order.tolist(), home[order].tolist(), sizes[order].tolist(), strict=True):
        seen += size
        best = 0
        if of != current:
            # The first unit of a stratum trains: a class that training never sees cannot be learned.
            current, taken = of, [0.0] * len(shares)
        else:
            lack = shares[0] * seen - given[0]
            for other in range(1, len(shares)):
                lacking = shares[other] * seen - given[other]
                if lacking > lack + 1e-9 and taken[other] < shares[other] * volume[of] - 1e-9:
                    best, lack = other, lacking
        part[number] = best
        given[best] += size
        taken[best] += size
    return part[unit]


def _majority(unit: np.ndarray, stratum: np.ndarray) -> np.ndarray:
    """The stratum that holds most rows of every unit; of equals, the first."""
    pairs, counts = np.unique(np.stack([unit, stratum], axis=1), axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], -counts, pairs[:, 0]))
    units, first = np.unique(pairs[order, 0], return_index=True)
    home = np.zeros(len(units), dtype=np.int64)
    home[units] = pairs[order, 1][first]
    return home


def _checked(fractions: Sequence[float]) -> list[float]:
    shares = [float(share) for share in fractions]
    if not shares or not all(0 <= share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6 or shares[0] == 0:
        raise UsageError(
            f"the fractions of a cut must lie in [0, 1], sum to 1 and start above 0; got {tuple(fractions)}"
        )
    return shares


def one_of_each_group(data: LabelledData | None) -> LabelledData | None:
    """One row of every group, drawn at random with a fixed seed; all rows where there are no groups."""
    if data is None or data.groups is None:
        return data
    order = np.random.default_rng(0).permutation(len(data))
    _, first = np.unique(data.groups[order], return_index=True)
    return data.subset(np.sort(order[first]))
