"""Parquet files as ``Rows``: labels at once, inputs for the rows asked for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nestling.data.rows import INPUTS, Raw, Rows, class_name, table_rows
from nestling.errors import DataError, NestlingError, StorageError, listed, missing_extra


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
    counts: list[int] = []
    for path in files:
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
                given = known.get(column, known.get(theirs))
                columns.setdefault(column, []).extend(_label_cells(cells, given, path, column))
            counts.append(parquet.metadata.num_rows)
    if not sum(counts):
        raise DataError(f"{files[0]}: the table has no rows")
    starts = np.cumsum([0, *counts])

    def read(numbers: np.ndarray) -> list[Raw]:
        found: list[Raw] = [None] * len(numbers)
        for path, start, count in zip(files, starts.tolist(), counts, strict=False):
            places = np.flatnonzero((numbers >= start) & (numbers < start + count))
            if len(places):
                cells = _input_cells(path, stored, source, numbers[places] - start)
                for place, cell in zip(places.tolist(), cells, strict=True):
                    found[place] = cell
        return found

    items = [f"{name} row {row}" for row in range(sum(counts))]
    return table_rows(columns, items, "text" if source == "text" else "image", read, refused)


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
    with file:
        try:
            yield pyarrow.parquet.ParquetFile(file)
        except NestlingError:
            raise
        # Damaged pages surface as ArrowInvalid, OSError, UnicodeDecodeError, MemoryError and others.
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{path}: damaged, or no Parquet file: {reason:.200}") from error


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


def _input_cells(path: Path, stored: str, source: str, numbers: np.ndarray) -> list[Raw]:
    """The inputs of the given rows (of this file), row group by row group: the file may be larger than memory."""
    import pyarrow

    wanted = np.sort(numbers)
    cells: dict[int, Raw] = {}
    start = 0
    with _parquet(path) as parquet:
        for batch in parquet.iter_batches(columns=[stored], batch_size=256):
            inside = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, start + batch.num_rows)]
            column = batch.column(0)
            if len(inside):
                taken = column.take(pyarrow.array(inside - start))
                cells |= zip(inside.tolist(), _raw_inputs(taken, source, path), strict=True)
            start += batch.num_rows
    return [cells[number] for number in numbers.tolist()]


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
