"""Concepts that a user names: a column of the source that is no level, or a CSV ``class,concept``, one more level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nestling.data.resolve import Source
from nestling.data.rows import concatenate
from nestling.data.tables import read_lines
from nestling.errors import DataError, UsageError, listed, unknown

LEVEL = "concept"


def read_pairs(path: str | Path, name: str, value: str) -> dict[str, str]:
    """A CSV with the columns ``name`` and ``value`` alone, as a mapping. Raises UsageError, StorageError, DataError."""
    if not Path(path).is_file():
        raise UsageError(f"there is no file {str(path)!r}: expected a CSV with the columns {name},{value}")
    header, lines = read_lines(Path(path))
    if header != [name, value]:
        raise DataError(f"{path}: expected the columns {name},{value}; got {','.join(header)!s:.80}")
    found: dict[str, str] = {}
    for key, content in ((key.strip(), content.strip()) for key, content in lines):
        if key in found:
            raise DataError(f"{path}: the class {key!r} stands there twice: leave one of them")
        if not key or not content:
            raise DataError(f"{path}: the {name} {key!r} has the {value} {content!r}: neither may be empty")
        found[key] = content
    if not found:
        raise DataError(f"{path}: the table has a header and no rows")
    return found


def is_file(given: str | Path) -> bool:
    """Whether a CSV is meant, and no column."""
    return Path(given).suffix.lower() == ".csv" or Path(given).is_file()


def with_column(source: Source, column: str, levels: Sequence[str] | None) -> Source:
    """The source with one of its columns taken as concepts, and as a level no longer.

    ``levels``: those that the user or a taxonomy names. Raises ``UsageError`` for a column that is not there, or is a
    level as well, and ``DataError`` for one of numbers.
    """
    every = concatenate(list(source.splits.values()))
    if column not in every.columns:
        if column in every.refused:
            raise DataError(
                f"{source.place}: {column!r} cannot tell concepts: {every.refused[column]}; name another column"
            )
        raise unknown("file or column of concepts", column, every.columns)
    if column in ((levels,) if isinstance(levels, str) else levels or ()):
        raise UsageError(
            f"{column!r} is a level, whose classes are concepts as they are: name another column of concepts, or none"
        )
    splits = {
        split: replace(
            rows,
            columns={name: values for name, values in rows.columns.items() if name != column},
            concepts=rows.columns.get(column, [None] * len(rows)),
        )
        for split, rows in source.splits.items()
    }
    known = None if source.levels is None else tuple(level for level in source.levels if level != column)
    count = len({value for value in every.columns[column] if value is not None})
    notes = (*source.notes, f"{count} concepts from the column {column!r}, which is no level")
    return replace(source, splits=splits, levels=known, notes=notes)


def with_concepts(source: Source, path: str | Path) -> Source:
    """The source with a column ``concept`` before all others, from the CSV's classes, which are those of one column.

    Raises ``DataError`` for a class that the CSV does not name, and for a name that is no class.
    """
    concept_of = read_pairs(path, "class", LEVEL)
    every = concatenate(list(source.splits.values()))
    if LEVEL in every.columns:
        raise UsageError(f"{source.place} has a column {LEVEL!r} already: leave --concepts out, or rename the column")
    classes = {column: {value for value in values if value is not None} for column, values in every.columns.items()}
    if not classes:
        raise DataError(f"{source.place}: there is no column of classes to which {path} could give concepts")
    # The finest of those that fit best: classes of several levels may share a name.
    column = max(reversed(classes), key=lambda name: len(classes[name] & concept_of.keys()))
    for name in concept_of:
        if name not in classes[column]:
            raise unknown(f"class of the column {column!r} in {path}", name, sorted(classes[column]), DataError)
    nameless = sorted(classes[column] - concept_of.keys())
    if nameless:
        raise DataError(
            f"{path} names no concept for {listed(nameless, 5)} of the column {column!r}: name them, or drop their rows"
        )
    splits = {
        split: replace(
            rows,
            columns={
                LEVEL: [None if value is None else concept_of[value] for value in rows.columns[column]]
                if column in rows.columns
                else [None] * len(rows),
                **rows.columns,
            },
        )
        for split, rows in source.splits.items()
    }
    count = len(np.unique(list(concept_of.values())))
    notes = (*source.notes, f"{count} concepts of {column!r} from {path}, as the coarsest level")
    levels = None if source.levels is None else (LEVEL, *source.levels)
    return replace(source, splits=splits, levels=levels, notes=notes)
