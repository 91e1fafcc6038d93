"""What a taxonomy is read from: rows of names become levels, classes and parents, and these are checked.

This is the border: it takes whatever a user gives, once, and every fault leaves as a DataError of one line that names
the offender and the remedy. Rows count from 0. Folders and files stand in ``nestling.tree_files``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestling.errors import DataError, UsageError, listed, unknown

MAX_LEVELS = 64
MAX_NAME = 1000
PATH_SEPARATOR = "/"

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


def _name(value: object) -> str | None:
    """The class name that a cell stands for; None where it is not labelled. Raises TypeError for what is no name."""
    if value is None:
        return None
    if isinstance(value, str):
        return str(value) if value.strip() else None
    item = getattr(value, "item", None)  # NumPy's scalars
    if callable(item):
        value = item()
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas' own: they do not compare
        return None
    if isinstance(value, float):
        # A column of whole numbers with a hole in it comes as floats.
        return None if value != value else str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, int):
        return str(value)
    raise TypeError(f"{value!r:.80} is no class name: give text, a number, or nothing")


def _is_empty(value: object) -> bool:
    try:
        return _name(value) is None
    except TypeError:
        return False  # names_of will say what it is and where


def names_of(column: Sequence[object], level: str) -> dict[object, str | None]:
    """Every distinct value of ``column`` with its class name, None where it is not labelled."""
    try:
        return {value: _name(value) for value in dict.fromkeys(column)}
    except TypeError:
        for row, value in enumerate(column):
            try:
                _name(value)
                hash(value)
            except TypeError:
                raise DataError(
                    f"row {row}, level {level!r}: {value!r:.80} is no class name: give text, a number, or nothing"
                ) from None
        raise


def label_columns(source: object, levels: Sequence[str], every_level: bool) -> list[list[object]]:
    """One list of cells per level, of equal length.

    ``source``: an iterable of mappings or sequences (coarse to fine; those that end early are not labelled below), a
    mapping of columns, or anything with ``to_pylist()`` (pyarrow) or ``to_dict(orient="records")`` (pandas).
    ``every_level``: whether a level that no row mentions is an error, or merely not labelled.
    """
    if isinstance(source, str | bytes):
        raise DataError(f"rows were expected, got the text {source!r:.80}: give a list of rows")
    if isinstance(source, Mapping):
        return _columns_of_mapping(source, levels, every_level)
    for method, options in (("to_pylist", {}), ("to_dict", {"orient": "records"})):
        convert = getattr(source, method, None)
        if callable(convert):
            source = convert(**options)
            break
    if not isinstance(source, Iterable):
        raise DataError(f"rows were expected, got {type(source).__name__}: give mappings, sequences or a table")
    columns: list[list[object]] = [[] for _ in levels]
    keys: dict[object, None] = {}
    last_keys: object = None
    sequences = False
    for number, row in enumerate(source):
        if isinstance(row, dict | Mapping):
            if row.keys() != last_keys:
                last_keys = row.keys()
                keys.update(dict.fromkeys(last_keys))
            cells = [row.get(level) for level in levels]
        elif isinstance(row, Iterable) and not isinstance(row, bytes):
            sequences = True
            cells = row.split(PATH_SEPARATOR) if isinstance(row, str) else list(row)
            if len(cells) > len(levels):
                raise DataError(
                    f"row {number} has {len(cells)} labels, the taxonomy {len(levels)} levels ({listed(levels)}): "
                    "give one label per level, coarse to fine"
                )
            cells += [None] * (len(levels) - len(cells))
        else:
            raise DataError(f"row {number} is {row!r:.80}: give a mapping or a sequence of names, coarse to fine")
        for column, cell in zip(columns, cells):
            column.append(cell)
    if keys and not sequences:
        _require_columns(levels, keys, every_level)
    return columns


def _columns_of_mapping(source: Mapping[Any, Any], levels: Sequence[str], every_level: bool) -> list[list[object]]:
    _require_columns(levels, source, every_level)
    columns: dict[str, list[object]] = {}
    for level in levels:
        if level in source:
            column: Any = source[level]
            if isinstance(column, str | bytes) or not isinstance(column, Iterable):
                raise DataError(
                    f"column {level!r} is {column!r:.80}: a mapping must hold columns, a row goes in a list"
                )
            convert: Any = getattr(column, "to_pylist", None) or getattr(column, "tolist", None)
            columns[level] = convert() if convert else list(column)
    lengths = {level: len(column) for level, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"the columns differ in length ({lengths}): give every column one cell per row")
    size = max(lengths.values(), default=0)
    return [columns.get(level, [None] * size) for level in levels]


def _require_columns(levels: Sequence[str], keys: Iterable[object], every_level: bool) -> None:
    present = dict.fromkeys(keys)
    absent = [level for level in levels if level not in present]
    if absent and (every_level or len(absent) == len(levels)):
        raise unknown("column", absent[0], (str(key) for key in present), DataError)


def columns_of_paths(paths: Iterable[object]) -> list[list[object]]:
    """Paths (sequences of names or ``"a/b/c"``) as one column per level, the short ones filled with None."""
    if isinstance(paths, str | bytes) or not isinstance(paths, Iterable):
        raise DataError(f"paths were expected, got {paths!r:.80}: give a list of paths")
    rows: list[list[object]] = []
    for number, path in enumerate(paths):
        if isinstance(path, str):
            cells: list[object] = list(path.strip(PATH_SEPARATOR).split(PATH_SEPARATOR))
        elif isinstance(path, Iterable) and not isinstance(path, bytes):
            cells = list(path)
        else:
            raise DataError(f"path {number} is {path!r:.80}: give 'a/b/c' or a sequence of names")
        empty = [_is_empty(cell) for cell in cells]
        while empty and empty[-1]:
            cells.pop()
            empty.pop()
        if not cells or any(empty):
            raise DataError(
                f"path {number}, {path!r:.80}, has an empty name: write every name from the coarsest level on"
            )
        rows.append(cells)
    depth = max(map(len, rows), default=0)
    return [[row[i] if i < len(row) else None for row in rows] for i in range(depth)]


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


def check(
    levels: Sequence[str], classes: Mapping[str, Sequence[str]], parent: Mapping[str, ArrayLike]
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]], dict[str, Integers]]:
    """The arguments of ``Taxonomy`` as what it keeps. Raises DataError for everything that is no tree."""
    levels = tuple(levels)
    _check_names("level", levels)
    if len(levels) > MAX_LEVELS:
        raise DataError(f"the taxonomy has {len(levels)} levels: at most {MAX_LEVELS} are supported")
    for what, given in (("classes", classes), ("parent", parent)):
        for level in given:
            if level not in levels:
                raise unknown(f"level in {what!r} of the taxonomy:", level, levels, DataError)
        for level in levels:
            if level not in given:
                raise DataError(f"{what!r} of the taxonomy lacks the level {level!r}: give one list for every level")
    names: dict[str, tuple[str, ...]] = {}
    codes: dict[str, Integers] = {}
    above = 0
    for level in levels:
        names[level] = tuple(classes[level])
        if not names[level]:
            raise DataError(f"level {level!r} has no classes: leave it out of the levels, or label rows with it")
        _check_names(f"class at level {level!r}", names[level])
        codes[level] = _check_parents(level, names[level], parent[level], above)
        above = len(names[level])
    return levels, names, codes


def frozen(array: Integers) -> Integers:
    """``array``, made read-only."""
    array.flags.writeable = False
    return array


def _check_names(what: str, names: Sequence[str]) -> None:
    if not names:
        raise DataError(f"there is no {what}: a taxonomy needs at least one")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"a {what} is named {name!r:.80}: names must be text and not empty")
        if len(name) > MAX_NAME:
            raise DataError(f"a {what} is named {name:.40}…, {len(name)} characters: at most {MAX_NAME} are supported")
        if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
            raise DataError(f"the name {name!r:.80} of a {what} is no valid Unicode: rename it")
    if len(set(names)) < len(names):
        name, times = Counter(names).most_common(1)[0]
        raise DataError(f"the {what} {name!r} stands {times} times: give every {what} its own name")


def _check_parents(level: str, names: Sequence[str], parents: ArrayLike, above: int) -> Integers:
    """``parents`` as read-only int64; ``above`` is the number of classes of the next coarser level, 0 without one."""
    try:
        given = np.asarray(parents)
    except (ValueError, OverflowError):
        given = np.asarray(None)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise DataError(f"the parents of level {level!r} must be a list of integers, got {parents!r:.80}")
    if len(given) != len(names):
        raise DataError(f"level {level!r} has {len(names)} classes but {len(given)} parents: give one per class")
    low, high = (0, above - 1) if above else (-1, -1)
    wrong = np.flatnonzero((given < low) | (given > high))
    if wrong.size:
        expected = f"0 to {high}" if above else "−1 at the coarsest level"
        raise DataError(f"the parent of {level} {names[wrong[0]]!r} is {given[wrong[0]]}: expected {expected}")
    return frozen(given.astype(np.int64))
