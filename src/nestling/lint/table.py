"""``Table``: the names of a source's labels as they stand there, faults included, for the checks to look at.

Training reads a source strictly and stops at the first fault; here the same readers are asked to go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from nestling.data.folders import hollow_folders
from nestling.data.inputs import Inputs
from nestling.data.labels import hollow_columns, level_columns
from nestling.data.resolve import resolve
from nestling.data.rows import Rows, concatenate
from nestling.data.tables import SUFFIXES, read_table, split_files, split_name
from nestling.lint.finding import Finding
from nestling.taxonomy import Taxonomy
from nestling.tree import Integers
from nestling.tree_check import no_classes

Names = list[str | None]


@dataclass(frozen=True, eq=False, kw_only=True)
class Table:
    """``n`` rows of a source. A *place* is a row's number here; ``numbers`` has its number in the source."""

    name: str
    levels: tuple[str, ...]
    columns: list[Names]
    """Of every level, coarse to fine, n names; None where not labelled."""
    items: list[str]
    splits: list[str]
    """The split of every row, "" where the source has none."""
    inputs: Inputs
    kind: str
    """image or text."""
    numbers: Integers
    """int64 (n,): rows of the source, counted from 0 over all of its files."""
    files: tuple[tuple[str, Path], ...] = ()
    """(split, file) of a source of CSV or TSV, in the order of the rows."""
    column_of: dict[str, str] = field(default_factory=dict)
    """From level to the column of the file that holds it; ``"*"`` to one whose classes may be of any level."""
    others: dict[str, Names] = field(default_factory=dict)
    """The columns that are no levels, id and group among them; numbers with a point are none."""
    order: tuple[str, ...] = ()
    """Of the levels and of ``others``, as they stand in the source."""
    folders: bool = False
    """Whether it is a tree of class folders."""
    qualified: bool = False
    """Whether the names in ``columns`` are whole paths, a/b/c."""
    ragged: dict[int, int] = field(default_factory=dict)
    """Of lines as long as no other: place -> cells."""
    hollow: tuple[str, ...] = ()
    """Class folders without a picture."""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def named(self) -> list[tuple[list[str], Integers]]:
        """For every level its names, sorted, and int64 (n,) codes into them, -1 where not labelled."""
        found = []
        for column in self.columns:
            names = sorted({name for name in column if name is not None})
            code = {name: number for number, name in enumerate(names)} | {None: -1}
            found.append((names, np.fromiter((code[name] for name in column), np.int64, len(self))))
        return found

    @cached_property
    def codes(self) -> Integers:
        """int64 (n, levels)."""
        return np.stack([codes for _, codes in self.named], axis=1)

    def select(self, places: Integers) -> Table:
        """The given rows, in that order."""
        chosen = places.tolist()
        now = {place: number for number, place in enumerate(chosen)}
        return replace(
            self,
            columns=[[column[place] for place in chosen] for column in self.columns],
            items=[self.items[place] for place in chosen],
            splits=[self.splits[place] for place in chosen],
            others={name: [values[place] for place in chosen] for name, values in self.others.items()},
            inputs=self.inputs.select(places),
            numbers=self.numbers[places],
            ragged={now[place]: cells for place, cells in self.ragged.items() if place in now},
        )

    def finding(
        self,
        kind: str,
        places: Sequence[int] | Integers,
        message: str,
        remedy: str,
        *,
        items: Sequence[str] | None = None,
        drop: Sequence[int] | Integers = (),
        cells: Sequence[tuple[int, int, str | None]] = (),
    ) -> Finding:
        """A fault that the rows at ``places`` show; ``items`` by default their names."""
        shown = sorted(int(place) for place in places)
        return Finding(
            kind=kind,
            rows=tuple(self.numbers[shown].tolist()),
            items=tuple(self.items[place] for place in shown) if items is None else tuple(items),
            message=message,
            remedy=remedy,
            drop=tuple(int(place) for place in drop),
            cells=tuple(cells),
        )


def read_source(
    source: str | Path,
    data_dir: str | Path | None = None,
    taxonomy: Taxonomy | None = None,
    levels: Sequence[str] | None = None,
    qualify: bool = False,
) -> Table:
    """The rows of all splits of a source. Raises as ``load_data`` where the source cannot be read as a whole."""
    path = Path(source).expanduser()
    files = _csv_files(path) if not str(source).startswith("hf:") else ()
    ragged: dict[int, int] = {}
    hollow: tuple[str, ...] = ()
    folders, qualified, place, notes = False, qualify, str(source), ()
    if files:
        parts: dict[str, Rows] = {}
        start = 0
        for split, file in files:
            found: dict[int, int] = {}
            parts[split] = read_table([file], f"{path.name}/{split}" if split else file.name, ragged=found)
            ragged |= {start + row: cells for row, cells in found.items()}
            start += len(parts[split])
    else:
        resolved = resolve(source, data_dir)
        parts, place, notes = resolved.splits, resolved.place, resolved.notes
        folders = qualified = resolved.qualify
        levels = levels or (None if taxonomy else resolved.levels)
        hollow = hollow_folders(path) if folders else ()
    rows = concatenate(list(parts.values()))
    splits = [split for split, part in parts.items() for _ in range(len(part))]
    if len(parts) == 1 and rows.splits is not None:
        splits = [split_name(value or "") or (value or "").strip() for value in rows.splits]
    column_of = level_columns(rows, place, taxonomy, levels)
    order = tuple(column_of) if taxonomy is None else taxonomy.levels
    for level in order if taxonomy is None else ():
        # Of columns that were named; others that are empty are no levels.
        if all(value is None for value in rows.columns[column_of[level]]):
            raise no_classes(level)
    if taxonomy is None:
        notes += hollow_columns(rows, column_of, levels)
    more = {"id": rows.ids, "group": rows.groups, **rows.columns}
    taken = {*order, *column_of.values()}
    others = {name: values for name, values in more.items() if values and name not in taken}
    return Table(
        name=place,
        levels=order,
        columns=_columns(rows, column_of, order, taxonomy, qualified),
        items=rows.items,
        splits=splits,
        inputs=rows.inputs,
        kind=rows.kind,
        numbers=np.arange(len(rows)),
        files=files,
        column_of=column_of,
        others=others,
        order=_order(order, others, column_of, list(rows.columns)),
        folders=folders,
        qualified=qualified and taxonomy is None,
        ragged=ragged,
        hollow=hollow,
        notes=notes,
    )


def _order(
    levels: Sequence[str], others: Iterable[str], column_of: Mapping[str, str], columns: Sequence[str]
) -> tuple[str, ...]:
    """Levels and other columns as the source has them; a level without a column stands before the next finer one."""
    place = {name: number for number, name in enumerate(columns)}
    places = {name: float(place.get(name, len(columns))) for name in others}
    after = float(place.get(column_of.get("*", ""), len(columns)))
    for level in reversed(levels):
        after = place.get(column_of.get(level, ""), after - 1 / (2 * len(levels)))
        places[level] = after
    return tuple(sorted(places, key=lambda name: places[name]))


def _csv_files(path: Path) -> tuple[tuple[str, Path], ...]:
    """The CSV and TSV files of a source that is made of them."""
    try:
        if path.is_file() and path.suffix.lower() in SUFFIXES[1:]:
            return (("", path),)
        found = split_files(path) if path.is_dir() else {}
    except (OSError, ValueError):
        # Whoever resolves the source says what is wrong with it.
        return ()
    single = [(split, files[0]) for split, files in found.items() if files[0].suffix.lower() in SUFFIXES[1:]]
    return tuple(single) if len(single) == len(found) else ()


def _columns(
    rows: Rows, column_of: dict[str, str], levels: Sequence[str], taxonomy: Taxonomy | None, qualified: bool
) -> list[Names]:
    nothing: Names = [None] * len(rows)
    if "*" in column_of and taxonomy is not None:
        home = {name: level for level in taxonomy.levels for name in taxonomy.classes[level]}
        values = rows.columns.get(column_of["*"], nothing)
        return [[name if home.get(name or "", levels[-1]) == level else None for name in values] for level in levels]
    columns = [
        list(rows.columns.get(column_of[level], nothing)) if level in column_of else list(nothing) for level in levels
    ]
    if taxonomy is not None or not qualified:
        return columns
    paths: Names = list(columns[0])
    found = [columns[0]]
    for column in columns[1:]:
        # A class is known by its whole path: one name under two parents means two classes.
        paths = [
            None if name is None else name if above is None else f"{above}/{name}"
            for above, name in zip(paths, column, strict=True)
        ]
        found.append(paths)
    return found
