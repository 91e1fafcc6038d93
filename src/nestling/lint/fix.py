"""The mended copy of a source: a tree of class folders, CSV or TSV, or Parquet. The original is only read."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nestling.data.inputs import BLOCK
from nestling.data.tables import SPLITS, SUFFIXES, read_lines
from nestling.errors import UsageError, listed, missing_extra
from nestling.files import atomic_write, copy_tree, write_text
from nestling.lint.table import Table
from nestling.tree import Integers


def check_target(out: str | Path, source: str | Path) -> Path:
    """The place of a copy, which must be new, and not inside the original. Raises UsageError."""
    target = Path(out).expanduser()
    if target.exists():
        raise UsageError(f"--fix {out}: it is there already; a mended copy replaces nothing: name a new file or folder")
    original = Path(source).expanduser()
    if original.is_dir() and original.resolve() in target.resolve().parents:
        raise UsageError(f"--fix {out}: it lies inside the source, which is never touched: name a place outside it")
    return target


def check_fits(table: Table, out: Path) -> None:
    """Whether a source like this one can be copied there. Raises UsageError."""
    suffix = out.suffix.lower() if out.suffix.lower() in SUFFIXES else ""
    tables: tuple[str, ...] = () if table.folders else (".csv", ".tsv") if table.files else (".parquet",)
    if suffix not in ("", *tables):
        kind = " or ".join(["a folder", *(f"a {name} file" for name in tables[:1])])
        raise UsageError(f"--fix {out}: of this source the copy is {kind}; got {suffix!r}")
    others = sorted(set(table.splits) - {*SPLITS, ""})
    if others and not suffix and not table.folders:
        raise UsageError(f"--fix {out}: the splits {listed(others)} have no file of their own: name a file")


def write_copy(mended: Table, original: Table, out: Path) -> None:
    """``mended``, some rows of ``original`` with other labels, as a new source. Raises UsageError, StorageError."""
    check_fits(original, out)
    if original.folders:
        copy_tree(out, _placed(mended, original))
        return
    single = out.suffix.lower() in SUFFIXES
    write = _write_csv if original.files else _write_parquet
    if single:
        write(mended, original, np.arange(len(mended)), out, bool(any(mended.splits)))
        return
    of = np.array(mended.splits)
    for split in dict.fromkeys(mended.splits):
        suffix = original.files[0][1].suffix.lower() if original.files else ".parquet"
        write(mended, original, np.flatnonzero(of == split), out / f"{split or 'train'}{suffix}", False)


def _plain(table: Table, name: str | None, column: int) -> str:
    """A class as its row names it: of a path the last part."""
    if name is None or not table.qualified or not column:
        return name or ""
    return name.rsplit("/", 1)[-1]


def _placed(mended: Table, original: Table) -> Iterator[tuple[str, Path]]:
    taken: Counter[str] = Counter()
    for place in range(len(mended)):
        file = Path(original.items[int(mended.numbers[place])])
        parts = []
        for level, column in enumerate(mended.columns):
            if column[place] is None:
                break
            parts.append(_plain(mended, column[place], level))
        folder = Path(mended.splits[place], *parts)
        name = str(folder / file.name)
        taken[name] += 1
        if taken[name] > 1:
            name = str(folder / f"{file.stem}-{taken[name]}{file.suffix}")
            taken[name] += 1
        yield name, file


def _write_csv(mended: Table, original: Table, places: Integers, out: Path, with_split: bool) -> None:
    lines: list[tuple[dict[str, str], Path]] = []
    header: list[str] = []
    for _, file in original.files:
        names, found = read_lines(file, {})
        header += [name for name in names if name not in header]
        lines += [(dict(zip(names, line, strict=True)), file) for line in found]
    if with_split and "split" not in header:
        header.append("split")
    if not with_split and "split" in header:
        header.remove("split")
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter="\t" if out.suffix.lower() == ".tsv" else ",", lineterminator="\n")
    writer.writerow(header)
    for place in places.tolist():
        number = int(mended.numbers[place])
        cells, file = lines[number]
        cells = {**cells, "split": mended.splits[place]}
        for level, name in enumerate(mended.levels):
            before, now = original.columns[level][number], mended.columns[level][place]
            column = mended.column_of.get(name, mended.column_of.get("*"))
            if now != before and column is not None:
                cells[column] = _plain(mended, now, level)
        if "path" in header and cells.get("path", "").strip():
            cells["path"] = _moved(cells["path"], file, out)
        writer.writerow([cells.get(name, "") for name in header])
    write_text(out, buffer.getvalue())


def _moved(path: str, file: Path, out: Path) -> str:
    """A path that stands in ``file``, as it is to stand in ``out``."""
    if Path(path).is_absolute():
        return path
    return os.path.relpath(file.parent.resolve() / path, out.parent.resolve())


def _write_parquet(mended: Table, original: Table, places: Integers, out: Path, with_split: bool) -> None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise missing_extra("pyarrow", "hub", f"writing {out.name}") from None
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields: list[tuple[str, Any]] = [("image", picture) if mended.kind == "image" else ("text", pa.string())]
    fields += [(name, pa.string()) for name in mended.order]
    fields += [("split", pa.string())] * with_split
    schema = pa.schema(fields)
    with atomic_write(out) as file, parquet.ParquetWriter(file, schema) as table:
        for start in range(0, len(places), BLOCK):
            part = places[start : start + BLOCK]
            raws = mended.inputs.read(part)
            columns: list[Any] = [[_encoded(raw) for raw in raws] if mended.kind == "image" else raws]
            for name in mended.order:
                level = name not in mended.others
                values = mended.columns[mended.levels.index(name)] if level else mended.others[name]
                columns.append([_plain(mended, values[p], 1) or None if level else values[p] for p in part.tolist()])
            columns += [[mended.splits[place] for place in part.tolist()]] * with_split
            arrays = [pa.array(column, kind) for column, (_, kind) in zip(columns, fields, strict=True)]
            table.write_batch(pa.record_batch(arrays, schema=schema))


def _encoded(raw: Any) -> dict[str, Any] | None:
    """A picture as its cell: a file's content goes along, pixels are saved without loss."""
    if raw is None:
        return None
    if isinstance(raw, np.ndarray):
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(raw).save(buffer, format="PNG")
        raw = buffer.getvalue()
    return {"bytes": raw.read_bytes() if isinstance(raw, Path) else raw, "path": None}
