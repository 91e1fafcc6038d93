"""The files of a source's splits, and CSV and TSV as ``Rows``. All of them are untrusted."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

from nestling.data.inputs import Raw, inputs_of
from nestling.data.parquet import read_parquet
from nestling.data.rows import Rows, class_name, table_rows
from nestling.errors import DataError, StorageError, UsageError, listed

SPLITS = ("train", "validation", "test")
SUFFIXES = (".parquet", ".csv", ".tsv")
MAX_CSV_BYTES = 1 << 30

_ALIASES = {"training": "train", "testing": "test", "val": "validation", "valid": "validation", "dev": "validation"}
_SPLIT_FILE = re.compile(r"(?P<split>[A-Za-z]+)(?:-(?P<shard>\d{5})-of-(?P<shards>\d{5}))?(?P<suffix>\.\w+)")


def split_name(name: str) -> str | None:
    """``train``, ``validation`` or ``test`` for any usual spelling, None for another name."""
    name = name.strip().lower()
    name = _ALIASES.get(name, name)
    return name if name in SPLITS else None


def split_files(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> dict[str, list[Path]]:
    """The files of every split: ``<split>.parquet``, ``<split>-00000-of-00003.parquet`` …, or CSV and TSV.

    Raises ``StorageError`` where a shard is missing or the folder cannot be read, ``DataError`` where a split stands
    there twice.
    """
    found: dict[str, dict[tuple[str, int], list[Path]]] = {}
    try:
        entries = sorted(entry for entry in folder.iterdir() if entry.is_file())
    except OSError as error:
        raise StorageError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    for path in entries:
        match = _SPLIT_FILE.fullmatch(path.name)
        split = match and split_name(match["split"])
        if match and split and match["suffix"].lower() in suffixes:
            kind = (match["suffix"].lower(), int(match["shards"] or 0))
            found.setdefault(split, {}).setdefault(kind, []).append(path)
    files: dict[str, list[Path]] = {}
    for split in SPLITS:
        kinds = found.get(split, {})
        if len(kinds) > 1:
            names = listed(path.name for paths in kinds.values() for path in paths)
            raise DataError(f"{folder} holds the split {split!r} more than once ({names}): leave one of them")
        for (_, shards), paths in kinds.items():
            if shards and len(paths) != shards:
                raise StorageError(f"{folder} holds {len(paths)} of the {shards} files of {split!r}: fetch the others")
            files[split] = paths
    return files


def read_table(
    files: Sequence[Path],
    name: str,
    rename: Mapping[str, str] | None = None,
    class_names: Mapping[str, Sequence[str]] | None = None,
    ragged: dict[int, int] | None = None,
) -> Rows:
    """One table, or the shards of one, as ``Rows``; items are called ``<name> row 17``, counted from 0.

    ``rename``: from columns of the file to ours. ``class_names``: for (renamed) integer columns, the name of each code.
    ``ragged``: where given, lines of a CSV with another number of cells than the header are cut or filled up, and
    noted there: row -> cells.
    """
    if files[0].suffix.lower() == ".parquet":
        return read_parquet(files, name, rename or {}, class_names or {})
    if len(files) > 1:
        raise UsageError(f"{files[0].parent}: shards of tables must be Parquet")
    return _read_csv(files[0], name, ragged)


def _read_csv(path: Path, name: str, ragged: dict[int, int] | None = None) -> Rows:
    header, lines = read_lines(path, ragged)
    twice = [column for column, count in Counter(header).items() if count > 1]
    if twice:
        raise DataError(f"{path}: the column {twice[0]!r} stands in the header twice")
    kind = next((column for column in ("path", "text") if column in header), None)
    if kind is None:
        similar = [column for column in header if column.strip().lower() in ("path", "text")]
        hint = f": rename {similar[0]!r} to {similar[0].strip().lower()!r}" if similar else ""
        raise DataError(
            f"{path}: there is no column 'path' (of pictures, relative to the file) or 'text'; "
            f"its columns are {listed(header)}{hint}"
        )
    if not lines:
        raise DataError(f"{path}: the table has a header and no rows")
    cells = {column: [line[place] for line in lines] for place, column in enumerate(header)}
    for row in ragged or ():
        # A line that ends before its split would be refused for that.
        if "split" in cells and not cells["split"][row].strip():
            cells["split"][row] = "train"
    inputs: list[Raw] = [*cells[kind]]
    if kind == "path":
        inputs = [path.parent / value if value.strip() else None for value in cells[kind]]
        items = [f"{name} row {row}" if file is None else str(file) for row, file in enumerate(inputs)]
    else:
        items = [f"{name} row {row}" for row in range(len(lines))]
    return table_rows(
        {column: [class_name(value) for value in values] for column, values in cells.items()},
        items,
        "image" if kind == "path" else "text",
        inputs_of(inputs),
        {},
    )


def read_lines(path: Path, ragged: dict[int, int] | None = None) -> tuple[list[str], list[list[str]]]:
    """The header of a CSV or TSV, and its other lines, all as wide. Raises ``DataError`` and ``StorageError``.

    ``ragged``: as in ``read_table``.
    """
    try:
        size = path.stat().st_size
        if size > MAX_CSV_BYTES:
            raise DataError(f"{path}: {size:,} bytes, above the limit of {MAX_CSV_BYTES:,} for CSV: use Parquet")
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{path}: line {line} is not UTF-8: save the table as UTF-8") from None
    if not text.strip():
        raise DataError(f"{path}: the table is empty")
    lines: list[list[str]] = []
    width = None
    try:
        with _long_fields(len(text)):
            reader = csv.reader(
                StringIO(text, newline=""), delimiter=_delimiter(path, text), strict=True, skipinitialspace=True
            )
            for line in reader:
                if not line:
                    continue
                width = width or len(line)
                if len(line) != width:
                    if ragged is None:
                        raise DataError(f"{path}: line {reader.line_num} has {len(line)} cells, the header {width}")
                    ragged[len(lines) - 1] = len(line)
                    line = [*line, *[""] * width][:width]
                lines.append(line)
    except csv.Error as error:
        raise DataError(f"{path}: no proper table: {error}") from error
    return [column.strip() for column in lines[0]], lines[1:]


def _delimiter(path: Path, text: str) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    header = text.lstrip().split("\n", 1)[0]
    # Spreadsheets write semicolons where the comma is the decimal point.
    return "," if "," in header or not (";" in header or "\t" in header) else ";" if ";" in header else "\t"


@contextmanager
def _long_fields(size: int) -> Iterator[None]:
    # The limit is the process's: 131,072 characters unless raised, and an article may be longer.
    before = csv.field_size_limit(max(size, csv.field_size_limit()))
    try:
        yield
    finally:
        csv.field_size_limit(before)
