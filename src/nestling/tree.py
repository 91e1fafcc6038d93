"""The tree that rows of names span: levels, classes and parents.

Cells of names come from ``nestling.tree_cells``, folders and files from ``nestling.tree_files``; what makes a tree
valid stands in ``nestling.tree_check``. Rows count from 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestling.errors import DataError, UsageError, listed
from nestling.tree_cells import PATH_SEPARATOR, names_of

MAX_LEVELS = 64

Integers = NDArray[np.int64]

Node = tuple[str, ...]
"""A class by its whole path, as plain names from the coarsest level down."""

Content = tuple[list[str], dict[str, list[str]], dict[str, list[int]]]
"""Levels, classes of each level, parents of each level: the arguments of ``Taxonomy``."""

_DIGITS = re.compile(r"(\d+)")


def default_levels(depth: int) -> tuple[str, ...]:
    """``coarse, fine`` · ``coarse, middle, fine`` · otherwise ``level-1``, ``level-2``, …"""
    named = {2: ("coarse", "fine"), 3: ("coarse", "middle", "fine")}
    return named.get(depth) or tuple(f"level-{i + 1}" for i in range(depth))


def natural_key(name: str) -> tuple[Any, ...]:
    """Sorts 'a2' before 'a10'."""
    parts: list[Any] = _DIGITS.split(name)
    # Digits are compared by length and text: int() refuses more than 4,300 of them, and a file may hold such a name.
    parts[1::2] = [(len(number), number) for number in (digits.lstrip("0") for digits in parts[1::2])]
    return tuple(parts), name


def some_rows(rows: Sequence[int] | Integers, limit: int = 5) -> str:
    """``row 3`` · ``rows 3, 17`` · ``rows 0, 1, 2, 3, 4 and 7 more``."""
    shown = ", ".join(str(int(row)) for row in rows[:limit])
    more = f" and {len(rows) - limit} more" if len(rows) > limit else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


def frozen(array: Integers) -> Integers:
    """``array``, made read-only."""
    array.flags.writeable = False
    return array


def from_columns(columns: Sequence[Sequence[object]], levels: Sequence[str], qualify: bool) -> Content:
    """The tree that rows of labels span; see ``Taxonomy.from_table``."""
    tables = [names_of(column, level) for column, level in zip(columns, levels)]
    cells = [[table[value] for value in column] for table, column in zip(tables, columns)]
    rows = list(zip(*cells))
    first: dict[tuple[str | None, ...], int] = {}
    for number, row in enumerate(rows):
        first.setdefault(row, number)
    nodes = _grow(rows, first, levels, qualify)
    classes: dict[str, list[str]] = {}
    parent: dict[str, list[int]] = {}
    codes: dict[Node, int] = {(): -1}
    for level, named in zip(levels, nodes):
        final = {
            path: PATH_SEPARATOR.join(path) if len(paths) > 1 else name
            for name, paths in named.items()
            for path in paths
        }
        order = sorted(final, key=lambda path: (codes[path[:-1]], natural_key(final[path])))
        classes[level] = [final[path] for path in order]
        parent[level] = [codes[path[:-1]] for path in order]
        codes = {path: code for code, path in enumerate(order)}
    return list(levels), classes, parent


def _grow(
    rows: Sequence[tuple[str | None, ...]],
    first: Mapping[tuple[str | None, ...], int],
    levels: Sequence[str],
    qualify: bool,
) -> list[dict[str, dict[Node, None]]]:
    """Per level: name -> its nodes, more than one only where ``qualify`` allows it.

    Level by level, because a row that leaves out a level ('', 'dog', 'husky') hangs where another row has put 'dog'.
    """
    ends: dict[tuple[str | None, ...], list[Node]] = {row: [()] for row in first}
    nodes: list[dict[str, dict[Node, None]]] = []
    for i, level in enumerate(levels):
        found: dict[str, dict[Node, None]] = {}
        with_gap: list[tuple[str | None, ...]] = []
        for row, reached in ends.items():
            name = row[i]
            if name is None:
                continue
            if len(reached) == 1 and len(reached[0]) == i:
                path = (*reached[0], name)
                found.setdefault(name, {})[path] = None
                ends[row] = [path]
            else:
                with_gap.append(row)
        twice = [name for name, paths in found.items() if len(paths) > 1]
        if twice and not qualify:
            raise _two_parents(rows, i, levels, twice)
        for row in with_gap:
            name = str(row[i])
            reach = [path for path in found.get(name, ()) if any(path[: len(end)] == end for end in ends[row])]
            if not reach:
                where = f"row {first[row]}: {level} {name!r}"
                if name in found:
                    above = ", ".join(repr(PATH_SEPARATOR.join(path[:-1])) for path in islice(found[name], 3))
                    raise DataError(
                        f"{where} is under {above} elsewhere, which its coarser labels contradict: correct them"
                    )
                raise DataError(f"{where} has no parent: no row gives its {levels[i - 1]} label; fill it in once")
            ends[row] = reach
        nodes.append(found)
    return nodes


def _two_parents(
    rows: Sequence[tuple[str | None, ...]], i: int, levels: Sequence[str], twice: Sequence[str]
) -> DataError:
    name = twice[0]
    under: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if row[i] == name and row[i - 1] is not None:
            under.setdefault(str(row[i - 1]), []).append(number)
    (one, its_rows), (other, other_rows) = islice(under.items(), 2)
    others = f" (and {len(under) - 2} more parents)" if len(under) > 2 else ""
    likewise = f"; so have {len(twice) - 1} more classes, {listed(twice[1:], 3)}" if len(twice) > 1 else ""
    return DataError(
        f"{levels[i]} {name!r} has two parents: {levels[i - 1]} {one!r} in {some_rows(its_rows, 3)}, "
        f"{other!r} in {some_rows(other_rows, 3)}{others}{likewise}; correct these rows, or keep the "
        f"classes apart as '{one}/{name}' and '{other}/{name}' with --qualify-names (qualify=True)"
    )


def named_levels(depth: int, levels: Sequence[str] | None) -> tuple[str, ...]:
    """``levels``, or the default names of ``depth`` of them. Raises UsageError where a path is deeper than named."""
    if levels is None:
        return default_levels(depth)
    if depth > len(levels):
        raise UsageError(f"the tree has {depth} levels, {len(levels)} are named ({listed(levels)}): name every level")
    return tuple(levels)
