"""Checks of labels and their parents: classes under several, slips, and rows that leave the level between out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from nestling.errors import listed
from nestling.lint.finding import Finding
from nestling.lint.table import Table
from nestling.tree import Integers, some_rows

CLEAR = 0.25
"""Below this share the rows that name another parent are taken for slips, and the other rows for the rule."""
UNORDERED = 0.5
"""Above this share of classes with several parents the columns are in doubt, not the rows."""


def two_parents(table: Table) -> list[Finding]:
    """Classes that stand under more than one parent; the rows that show it are those of all but the commonest."""
    found = []
    for level in range(1, len(table.levels)):
        several = parents(table, level)
        # Where that is the rule, the columns are no levels, or stand in another order.
        unordered = len(several) > UNORDERED * len(set(table.columns[level]) - {None})
        for name, under in several.items():
            (_, most), *others = under
            fewer = np.sort(np.concatenate([places for _, places in others]))
            tied = len(others[0][1]) == len(most)
            shown = np.sort(np.concatenate([most, fewer])) if tied else fewer
            counts = ", ".join(f"{parent!r} in {len(places):,} rows" for parent, places in under[:4])
            above, here = table.levels[level - 1], table.levels[level]
            message = (
                f"{here} {name!r} has two parents at level {above!r}: {counts}; see {some_rows(table.numbers[shown])}"
            )
            remedy = (
                f"correct {above} or {here} in these rows; where {name!r} means two classes, keep them apart with "
                "--qualify-names"
            )
            if unordered:
                remedy = (
                    f"most classes of {here!r} stand under several of {above!r}: name the columns that are levels, "
                    f"coarse to fine, with --levels a,b,c; else {remedy}"
                )
            cells = forget(table, fewer, level)
            found.append(table.finding("two-parents", shown, message, remedy, cells=cells))
    return found


def slips(table: Table) -> list[Finding]:
    """Rows whose labels contradict what nearly all other rows of the class say."""
    found = []
    for level in range(1, len(table.levels)):
        for name, under in parents(table, level).items():
            (rule, most), *others = under
            wrong = np.sort(np.concatenate([places for _, places in others]))
            if len(wrong) > CLEAR * (len(wrong) + len(most)):
                continue
            above, here = table.levels[level - 1], table.levels[level]
            said = ", ".join(repr(parent) for parent, _ in others[:3])
            message = (
                f"{some_rows(table.numbers[wrong])}: {here} {name!r} is a {rule!r} in {len(most):,} other rows, but "
                f"{above} says {said}"
            )
            remedy = f"set {above} to {rule!r} in these rows, or correct {here}"
            found.append(
                table.finding("contradicting-labels", wrong, message, remedy, cells=forget(table, wrong, level))
            )
    return found


def across_gaps(table: Table) -> list[Finding]:
    """Rows that leave a level out, and whose coarser label is not above their finer one in any full row."""
    found = []
    for level in range(2, len(table.levels)):
        names, fine = table.named[level]
        for coarser in range(level - 2, -1, -1):
            between = table.codes[:, coarser + 1 : level]
            above, coarse = table.named[coarser]
            both = (fine >= 0) & (coarse >= 0)
            gap = both & (between < 0).all(axis=1)
            full = both & (between >= 0).all(axis=1)
            known = defaultdict(set)
            for child, parent in np.unique(np.stack([fine[full], coarse[full]], axis=1), axis=0).tolist():
                known[child].add(parent)
            wrong = [
                place
                for place in np.flatnonzero(gap).tolist()
                if int(fine[place]) in known and int(coarse[place]) not in known[int(fine[place])]
            ]
            for child in sorted({int(fine[place]) for place in wrong}):
                places = [place for place in wrong if fine[place] == child]
                rule = listed(above[parent] for parent in sorted(known[child]))
                message = (
                    f"{some_rows(table.numbers[places])}: {table.levels[level]} {names[child]!r} is below {rule} in "
                    f"other rows, but {table.levels[coarser]} says {above[int(coarse[places[0]])]!r}"
                )
                remedy = f"correct {table.levels[coarser]} or {table.levels[level]} in these rows"
                cells = forget(table, places, level)
                found.append(table.finding("contradicting-labels", places, message, remedy, cells=cells))
    return found


def parents(table: Table, level: int) -> dict[str, list[tuple[str, Integers]]]:
    """The classes of a level under more than one parent: for each its parents and their rows, the commonest first."""
    names, fine = table.named[level]
    above, coarse = table.named[level - 1]
    both = np.flatnonzero((fine >= 0) & (coarse >= 0))
    pairs, which = np.unique(np.stack([fine[both], coarse[both]], axis=1), axis=0, return_inverse=True)
    which = which.reshape(-1)
    times = Counter(pairs[:, 0].tolist())
    found: dict[str, list[tuple[str, Integers]]] = {}
    for number, (child, parent) in enumerate(pairs.tolist()):
        if times[child] > 1:
            found.setdefault(names[child], []).append((above[parent], both[which == number]))
    for under in found.values():
        under.sort(key=lambda pair: -len(pair[1]))
    return found


def forget(table: Table, places: Sequence[int] | Integers, level: int) -> list[tuple[int, int, str | None]]:
    """The cells by which the rows forget their labels from this level on; what is coarser stays known."""
    return [(int(place), finer, None) for place in places for finer in range(level, len(table.levels))]
