"""Parquet files as ``Rows``: labels at once, inputs for the rows asked for, row group by row group."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nestling.data.inputs import Inputs, Raw
from nestling.data.rows import INPUTS, Rows, class_name, table_rows
from nestling.errors import DataError, StorageError, listed, missing_extra, read_as_data

MAX_GROUP_BYTES = 256 << 20
"""Where rows are read on demand, each may cost a whole row group: larger ones are refused."""
CACHE_BYTES = 128 << 20
"""Of row groups that each process keeps, since rows of one batch, or of the next, may lie in the same."""


def read_parquet(
    files: Sequence[Path],
    name: str,
    rename: Mapping[str, str] | None = None,
    class_names: Mapping[str, Sequence[str]] | None = None,
) -> Rows:
    """The shards of one table as ``Rows``; see ``tables.read_table``."""
    ours: list[str] = []
    source, stored = "", ""
    columns: dict[str, list[str | None]] = {}
    refused: dict[str, str] = {}
    groups: list[_Group] = []
    for place, path in enumerate(files):
        with _parquet(path) as parquet:
            schema = parquet.schema_arrow
            names = _renamed(schema.names, rename or {}, path)
            if not ours:
                ours, source = names, _input_column(path, schema, names)
                stored = schema.names[names.index(source)]
            elif names != ours:
                raise DataError(f"{path}: its columns {listed(names)} differ from {files[0].name}'s {listed(ours)}")
            known = {**_feature_names(schema), **(class_names or {})}
            for column, theirs in zip(names, schema.names, strict=True):
                if column == source or column in INPUTS:
                    continue
                reason = _not_a_label(schema.field(theirs).type)
                if reason:
                    refused[column] = reason
                    continue
                cells = parquet.read(columns=[theirs]).column(0)
                if len(cells) != parquet.metadata.num_rows:
                    raise ValueError(f"{len(cells)} cells in column {theirs!r}, {parquet.metadata.num_rows} rows")
                given = known.get(column, known.get(theirs))
                columns.setdefault(column, []).extend(_label_cells(cells, given, path, column))
            groups += _groups(parquet.metadata, place, stored)
    num_rows = sum(group.num_rows for group in groups)
    if not num_rows:
        raise DataError(f"{files[0]}: the table has no rows")
    items = [f"{name} row {row}" for row in range(num_rows)]
    kind = "text" if source == "text" else "image"
    return table_rows(columns, items, kind, ParquetInputs(files, stored, source, groups), refused)


class _Group(NamedTuple):
    file: int
    number: int
    """In its file."""
    num_rows: int
    num_bytes: int
    """Of the column of inputs, not compressed."""


def _groups(metadata: Any, file: int, stored: str) -> list[_Group]:
    found = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(place) for place in range(group.num_columns)]
        num_bytes = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == stored)
        found.append(_Group(file, number, group.num_rows, num_bytes))
    if sum(group.num_rows for group in found) != metadata.num_rows or any(min(group) < 0 for group in found):
        raise ValueError(f"impossible row groups {listed(found, limit=3)}")
    return found


class ParquetInputs(Inputs):
    """Final. The column of inputs of a table in one or more files, read when asked for.

    Another process is given the index alone: of every row group its file, its rows and its bytes.
    """

    def __init__(self, files: Sequence[Path], stored: str, source: str, groups: Sequence[_Group]) -> None:
        self.files, self.stored, self.source = list(files), stored, source
        self.index = np.array(groups, dtype=np.int64).reshape(-1, 4)
        self.ends = np.cumsum(self.index[:, 2])
        self.kept: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "kept": OrderedDict()}

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def in_memory(self) -> bool:
        return False

    def read(self, rows: np.ndarray) -> list[Raw]:
        import pyarrow

        found: list[Raw] = [None] * len(rows)
        owner = np.searchsorted(self.ends, rows, side="right")
        for group in np.unique(owner).tolist():
            places = np.flatnonzero(owner == group)
            path = self.files[self.index[group, 0]]
            inside = rows[places] - (self.ends[group] - self.index[group, 2])
            column = self._column(group)
            with read_as_data(f"{path}: damaged, or no Parquet file"):
                raws = _raw_inputs(column.take(pyarrow.array(inside)), self.source, path)
            for place, raw in zip(places.tolist(), raws, strict=True):
                found[place] = raw
        return found

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Of each row the mean of its row group."""
        means = self.index[:, 3] // np.maximum(self.index[:, 2], 1)
        return means[np.searchsorted(self.ends, rows, side="right")]

    def obstacle(self) -> str | None:
        for file, number, _, num_bytes in self.index.tolist():
            if num_bytes > MAX_GROUP_BYTES:
                return (
                    f"{self.files[file]}: its row group {number} holds {num_bytes >> 20:,} MiB of pictures, too many "
                    f"to read for each single row (at most {MAX_GROUP_BYTES >> 20}): write the file anew in smaller "
                    "row groups, with pyarrow.parquet.write_table(table, path, row_group_size=100)"
                )
        return None

    def _column(self, group: int) -> Any:
        """The inputs of one row group, as pyarrow has them; the last ones used are kept."""
        if group in self.kept:
            self.kept.move_to_end(group)
            return self.kept[group]
        file, number = self.index[group, :2].tolist()
        # The file is opened anew each time: processes that share an open file would share its position too.
        with _parquet(self.files[file]) as parquet:
            column = parquet.read_row_group(number, columns=[self.stored], use_threads=False).column(0)
        self.kept[group] = column
        while len(self.kept) > 1 and self.index[list(self.kept), 3].sum() > CACHE_BYTES:
            self.kept.popitem(last=False)
        return column


def _renamed(names: Sequence[str], rename: Mapping[str, str], path: Path) -> list[str]:
    # A file that has the column under our name already is left as it is.
    ours = [rename[name] if name in rename and rename[name] not in names else name for name in names]
    for name, count in Counter(ours).items():
        if count > 1:
            raise DataError(f"{path}: the column {name!r} stands in it {count} times")
    return ours


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """The open file; whatever is wrong inside it leaves as a ``DataError`` that names it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow", "hub", f"reading {path.name}") from None
    try:
        file = path.open("rb")
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    with file, read_as_data(f"{path}: damaged, or no Parquet file"):
        yield pyarrow.parquet.ParquetFile(file)


def _input_column(path: Path, schema: Any, names: Sequence[str]) -> str:
    for column in INPUTS:
        if column in names:
            return column
    import pyarrow

    pictures = [
        column
        for column, field in zip(names, schema, strict=True)
        if pyarrow.types.is_struct(field.type) and {"bytes", "path"} <= {child.name for child in field.type}
    ]
    if len(pictures) == 1:
        return pictures[0]
    raise DataError(f"{path}: there is no column 'image' or 'text'; its columns are {listed(names)}")


def _feature_names(schema: Any) -> dict[str, list[str]]:
    """The names behind integer class labels, which the hub keeps in the schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    # Anybody may write anything there, and a table reads well without it.
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _not_a_label(kind: Any) -> str | None:
    from pyarrow import types

    if types.is_nested(kind):
        return f"it holds {kind}, no names"
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return "it holds bytes, no names"
    return None


def _label_cells(column: Any, names: Sequence[str] | None, path: Path, what: str) -> list[str | None]:
    """A column as names of classes; every distinct value is converted once."""
    import pyarrow
    import pyarrow.compute

    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pyarrow.types.is_floating(column.type) or pyarrow.types.is_integer(column.type)):
        column = column.cast(pyarrow.string())
    coded = column.combine_chunks().dictionary_encode()
    values = coded.dictionary.to_pylist()
    if names is not None and pyarrow.types.is_integer(column.type):
        wrong = [value for value in values if not -1 <= value < len(names)]
        if wrong:
            raise DataError(f"{path}: label {wrong[0]} of column {what!r} has no name among the {len(names)} given")
        converted = [names[value] if value >= 0 else None for value in values]
    else:
        converted = [class_name(value) for value in values]
    return [None if code is None else converted[code] for code in coded.indices.to_pylist()]


def _raw_inputs(column: Any, source: str, path: Path) -> list[Raw]:
    from pyarrow import types

    if source == "text":
        return column.cast("string").to_pylist()
    if types.is_struct(column.type):
        parts = {field.name: part.to_pylist() for field, part in zip(column.type, column.flatten(), strict=True)}
        places = parts.get("path") or [None] * len(column)
        return [
            encoded if encoded is not None else path.parent / place if place else None
            for encoded, place in zip(parts.get("bytes") or [None] * len(column), places, strict=True)
        ]
    values = column.to_pylist()
    if types.is_string(column.type) or types.is_large_string(column.type):
        return [path.parent / value if value else None for value in values]
    if types.is_binary(column.type) or types.is_large_binary(column.type):
        return values
    raise DataError(f"{path}: column {source!r} must hold encoded pictures (bytes) or paths; it holds {column.type}")
