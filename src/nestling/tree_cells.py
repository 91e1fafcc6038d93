"""Cells of names, as whoever has labels gives them: rows, columns, tables and paths become one list per level.

This is the border: it takes whatever a user gives, once, and every fault leaves as a DataError of one line that names
the offender and the remedy. Rows count from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nestling.errors import DataError, listed, unknown

PATH_SEPARATOR = "/"


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
