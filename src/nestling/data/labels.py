"""From the names in a source's columns to a taxonomy and codes: which columns are levels, and what they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nestling.data.rows import Rows, concatenate
from nestling.errors import DataError, UsageError, listed, unknown
from nestling.taxonomy import Taxonomy
from nestling.tree import default_levels

MIN_ROWS_TO_REFUSE = 20
"""A table of no more rows may well have a class for every row."""

_REMEDY = "name the level columns, coarse to fine, with --levels a,b,c"

Names = tuple[str | None, ...]


def encode(
    splits: Mapping[str, Rows],
    name: str,
    taxonomy: Taxonomy | None = None,
    levels: Sequence[str] | None = None,
    qualify: bool = False,
) -> tuple[Taxonomy, dict[str, np.ndarray], tuple[str, ...]]:
    """The taxonomy of a source, the same for all of its splits, for every split int64 codes (n, levels), and notes.

    Raises ``UsageError`` for a level that is no column, ``DataError`` for a column that cannot be a level, and, naming
    rows, for labels that contradict each other or are not in the taxonomy.
    """
    everything = concatenate(list(splits.values()))
    columns = level_columns(everything, name, taxonomy, levels)
    notes = by_position(columns) if taxonomy is not None else ()
    if taxonomy is None:
        notes += hollow_columns(everything, columns, levels)
    elif levels is None:
        notes += left_out(everything, columns)
    order = tuple(columns) if taxonomy is None else taxonomy.levels
    tables = {split: _table(rows, columns, order, taxonomy) for split, rows in splits.items()}
    if taxonomy is None:
        try:
            taxonomy = _grow(tables, name, order, qualify)
        except DataError as error:
            if "has two parents" not in str(error):
                raise
            raise DataError(f"{error}; where the columns {listed(order)} are not in order, {_REMEDY}") from None
    labels = {}
    for split, table in tables.items():
        try:
            codes = taxonomy.complete(taxonomy.encode(table.distinct))
        except DataError:
            try:
                taxonomy.complete(taxonomy.encode(table.rows()))
            except DataError as error:
                raise DataError(f"{_place(name, split)}: {error}") from None
            raise
        labels[split] = codes[table.which]
    return taxonomy, labels, notes


class _Table(NamedTuple):
    """Rows of names by their distinct ones: trees and codes are made of few rows, not of all."""

    distinct: list[Names]
    which: np.ndarray
    """int64 (n,): the distinct row that each row equals."""

    def rows(self) -> list[Names]:
        return [self.distinct[number] for number in self.which.tolist()]


def _place(name: str, split: str) -> str:
    return f"{name}/{split}" if split else name


def _grow(tables: Mapping[str, _Table], name: str, levels: tuple[str, ...], qualify: bool) -> Taxonomy:
    try:
        return Taxonomy.from_table(
            [row for table in tables.values() for row in table.distinct], levels, qualify=qualify
        )
    except DataError as fault:
        # Once more with all rows of each split, so that the message counts them as the source does.
        for split, table in tables.items():
            try:
                Taxonomy.from_table(table.rows(), levels, qualify=qualify)
            except DataError as error:
                raise DataError(f"{_place(name, split)}: {error}") from None
        rows = [row for table in tables.values() for row in table.rows()]
        try:
            Taxonomy.from_table(rows, levels, qualify=qualify)
        except DataError as error:
            raise DataError(f"{name} (rows of {', then '.join(tables)}): {error}") from None
        raise fault


def by_position(columns: Mapping[str, str]) -> tuple[str, ...]:
    """What to say where columns are levels of other names by their order alone."""
    pairs = [f"{column!r} as {level!r}" for level, column in columns.items() if level not in ("*", column)]
    return (f"columns taken as levels by their position: {', '.join(pairs)}",) if pairs else ()


def hollow_columns(rows: Rows, columns: Mapping[str, str], levels: Sequence[str] | None) -> tuple[str, ...]:
    """What to say of columns without a label: of ``levels``, or where none are named of any that would be one."""
    asked = rows.columns if levels is None else (levels,) if isinstance(levels, str) else levels
    empty = [column for column in asked if column in rows.columns and column and column not in columns.values()]
    empty = [column for column in empty if not any(rows.columns[column])]
    if not empty:
        return ()
    if levels is not None:
        return (f"no row is labelled at {listed(empty)} yet: these classes are not learned",)
    order = ",".join((*columns, *empty))
    return (
        f"empty in every row, so no level: {listed(empty)}; --levels {order} makes a level of it that labels are to "
        "come for, and --taxonomy FILE names its classes",
    )


def left_out(rows: Rows, columns: Mapping[str, str]) -> tuple[str, ...]:
    """What to say of columns that could be levels and are none of a given taxonomy's."""
    others = [column for column in rows.columns if column not in columns.values()]
    return (f"not read, for no level of the taxonomy is called so: {listed(others)}",) if others else ()


def level_columns(
    rows: Rows, name: str, taxonomy: Taxonomy | None = None, levels: Sequence[str] | None = None
) -> dict[str, str]:
    """From level to the column that holds it, coarse to fine; ``"*"`` to a column whose classes may be of any level."""
    if levels is None:
        chosen = {level: level for level in rows.columns}
        if taxonomy is not None:
            named = {level: level for level in taxonomy.levels if level in chosen}
            return named or _fitted(chosen, taxonomy, name)
        _refuse_columns(rows, name)
        if not chosen:
            raise DataError(f"{name}: there is no column of labels beside the inputs")
        named = {level: level for level, values in rows.columns.items() if any(value is not None for value in values)}
        if not named:
            raise DataError(f"{name}: no row is labelled: the columns {listed(chosen)} are empty")
        return named
    levels = filled(rows, (levels,) if isinstance(levels, str) else tuple(levels), taxonomy)
    if not levels or len(set(levels)) < len(levels):
        raise UsageError(f"levels must be different names, coarse to fine; got {listed(levels)}")
    for level in levels:
        if level in rows.refused:
            raise DataError(f"{name}: column {level!r} cannot be a level: {rows.refused[level]}")
    missing = [level for level in levels if level not in rows.columns]
    depth = len(rows.columns)
    if len(missing) == len(levels) == depth and tuple(rows.columns) == default_levels(depth):
        # The levels of a folder tree have no names of their own, so these become theirs.
        chosen = dict(zip(levels, rows.columns, strict=True))
    elif missing:
        raise unknown(f"level of {name}", missing[0], rows.columns)
    else:
        chosen = {level: level for level in levels}
    if taxonomy is None or set(chosen) <= set(taxonomy.levels):
        return chosen
    return _fitted(chosen, taxonomy, name)


def filled(rows: Rows, levels: tuple[str, ...], taxonomy: Taxonomy | None) -> tuple[str, ...]:
    """The levels that were named, without the finest ones that have no label yet and that no taxonomy has."""
    known = () if taxonomy is None else taxonomy.levels
    while len(levels) > 1 and levels[-1] not in known and not any(rows.columns.get(levels[-1], ["?"])):
        levels = levels[:-1]
    return levels


def _fitted(chosen: Mapping[str, str], taxonomy: Taxonomy, name: str) -> dict[str, str]:
    """Columns under other names than the taxonomy's levels: one per level in its order, or a single one for all."""
    if len(chosen) == len(taxonomy.levels):
        return dict(zip(taxonomy.levels, chosen.values(), strict=True))
    if len(chosen) == 1:
        return {"*": next(iter(chosen.values()))}
    raise UsageError(
        f"{name}: the columns {listed(chosen)} do not fit the levels {listed(taxonomy.levels)} of the taxonomy: "
        "name one column per level, coarse to fine, with --levels a,b,c"
    )


def _refuse_columns(rows: Rows, name: str) -> None:
    for column, reason in rows.refused.items():
        raise DataError(f"{name}: column {column!r} cannot be a level: {reason}; {_REMEDY}")
    if len(rows) <= MIN_ROWS_TO_REFUSE:
        return
    for column, values in rows.columns.items():
        counts = Counter(value for value in values if value is not None)
        single = sum(count == 1 for count in counts.values())
        if single > len(rows) / 2:
            raise DataError(
                f"{name}: column {column!r} cannot be a level: {single:,} of {len(rows):,} rows have a value of their "
                f"own there; {_REMEDY}"
            )


def _table(rows: Rows, columns: Mapping[str, str], levels: Sequence[str], taxonomy: Taxonomy | None) -> _Table:
    nothing: list[str | None] = [None] * len(rows)
    if "*" in columns and taxonomy is not None:
        home = {name: level for level in taxonomy.levels for name in taxonomy.classes[level]}
        values = rows.columns.get(columns["*"], nothing)
        cells = [[name if home.get(name or "", levels[-1]) == level else None for name in values] for level in levels]
    else:
        cells = [rows.columns.get(columns[level], nothing) if level in columns else nothing for level in levels]
    numbers: dict[Names, int] = {}
    codes = (numbers.setdefault(row, len(numbers)) for row in zip(*cells, strict=True))
    which = np.fromiter(codes, np.int64, len(rows))
    return _Table(list(numbers), which)
