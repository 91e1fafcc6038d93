"""From what a SOURCE names to ``Rows`` for each of its splits: catalogue, folders, tables, hub."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nestling.data.catalogue import CATALOGUE, Entry
from nestling.data.folders import read_folder
from nestling.data.hub import hub_files
from nestling.data.made import MADE
from nestling.data.rows import Rows, concatenate
from nestling.data.tables import SPLITS, SUFFIXES, read_table, split_files, split_name
from nestling.errors import DataError, StorageError, UsageError, unknown
from nestling.seeds import derive

ENVIRONMENT = "NESTLING_DATA"


@dataclass(frozen=True, eq=False)
class Source:
    """What a SOURCE resolves to."""

    name: str
    """For the user: of a file its stem, of a folder its last part."""
    place: str
    """For messages: the whole path."""
    splits: dict[str, Rows]
    """Rows by split; by "" where the source has no splits."""
    levels: tuple[str, ...] | None = None
    """Its level columns, where the catalogue knows them."""
    qualify: bool = False
    """Whether one name under two parents means two classes, as in a folder tree."""
    notes: tuple[str, ...] = ()

    @property
    def cut_from(self) -> str | None:
        """The split that train and test are cut from; None where the source has its own test split."""
        return next((split for split in ("", "train") if split in self.splits and "test" not in self.splits), None)

    @property
    def available(self) -> tuple[str, ...]:
        made = {"train", "test"} if self.cut_from is not None else set()
        every = made | {split for split in self.splits if split}
        return (*(split for split in SPLITS if split in every), *sorted(every - set(SPLITS)))


def resolve(source: str | Path, data_dir: str | Path | None = None, seed: int = 0) -> Source:
    """What a SOURCE names, its labels read and its inputs not; ``seed`` is of sets made. Raises as ``load_data``."""
    text = str(source)
    if not text:
        raise UsageError("the source is empty: give a name, a folder, a file or hf:owner/name")
    if isinstance(source, str) and text.startswith("hf:"):
        repository = text[3:]
        files = hub_files(repository, "or fetch it by other means and give its folder as the source")
        return _tables(files, repository)
    if isinstance(source, str) and text in CATALOGUE:
        return _known(text, data_dir, seed)
    path = Path(source).expanduser()
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise UsageError(f"no source {text!r:.200}: {error}") from None
    if is_folder:
        return _folder(path)
    if is_file:
        return _single_table(path)
    if os.sep in text or path.suffix.lower() in SUFFIXES or isinstance(source, Path):
        raise UsageError(f"no source {text!r:.200}: there is no such file or folder")
    error = unknown("source", text, CATALOGUE)
    raise UsageError(f"{error} Or give a folder, a CSV, TSV or Parquet file, or hf:owner/name")


def place_of(source: str) -> str:
    """A SOURCE as it is found from any folder: a file's or folder's whole path, links left as they are, any other as it
    is."""
    if source.startswith("hf:") or source in CATALOGUE:
        return source
    return str(Path(source).expanduser().absolute())


def _known(name: str, data_dir: str | Path | None, seed: int) -> Source:
    entry = CATALOGUE[name]
    if name in MADE:
        return Source(name, name, MADE[name](seed), entry.levels)
    asked = [Path(place).expanduser() for place in (data_dir, os.environ.get(ENVIRONMENT)) if place]
    stored = entry.of or name
    for place in asked:
        if (place / stored).is_dir():
            files = split_files(place / stored, (".parquet",))
            if files:
                return _tables(files, name, entry=entry)
    remedy = f"pass --data-dir DIR, or set {ENVIRONMENT}=DIR, where DIR holds {stored}/train.parquet"
    if asked:
        remedy = f"{' and '.join(map(str, asked))} lack {stored}/train.parquet: {remedy}"
    if entry.hub is None:
        raise StorageError(f"the set {name!r} has no source on the hub; {remedy}")
    ours = entry.hub_splits or {split: split for split in SPLITS}
    files = hub_files(entry.hub, remedy, entry.hub_folder, tuple(ours))
    files = {ours[split]: paths for split, paths in files.items()}
    return _tables(files, name, entry=entry, notes=(f"read from the hub: {entry.hub}",))


def _tables(
    files: Mapping[str, list[Path]], name: str, *, entry: Entry | None = None, notes: tuple[str, ...] = ()
) -> Source:
    """One table per split; of a known set, with the hub's columns renamed and the levels above its labels filled in."""
    if entry is None:
        splits = {split: read_table(paths, f"{name}/{split}") for split, paths in files.items()}
    else:
        finest = entry.levels[-1]
        names = {finest: [path[-1] for path in entry.paths]} if entry.paths else {}
        splits = {
            split: read_table(paths, f"{name}/{split}", entry.hub_columns, names) for split, paths in files.items()
        }
        above = {path[-1]: path for path in entry.paths}
        for rows in splits.values():
            if above and finest in rows.columns and not set(entry.levels[:-1]) & set(rows.columns):
                paths = [above.get(label or "") for label in rows.columns[finest]]
                for place, level in enumerate(entry.levels[:-1]):
                    rows.columns[level] = [path[place] if path else None for path in paths]
    if len({rows.kind for rows in splits.values()}) > 1:
        raise DataError(f"{name}: some of its splits hold pictures and some texts")
    if entry is not None and entry.num_train is not None:
        splits = _drawn_anew(splits, name, entry.levels[-1], entry.num_train)
    return Source(name, name, splits, None if entry is None else entry.levels, notes=notes)


def _drawn_anew(splits: Mapping[str, Rows], name: str, finest: str, num_train: int) -> dict[str, Rows]:
    """``num_train`` of all rows to train, drawn at random, always the same; of the others those whose class has two."""
    every = concatenate(list(splits.values()))
    if len(every) <= num_train:
        raise DataError(f"{name}: it has {len(every):,} rows, too few to draw {num_train:,} to train from them")
    order = np.random.default_rng(derive(0, name)).permutation(len(every))
    classes = every.columns.get(finest, [None] * len(every))
    others = Counter(classes[row] for row in order[num_train:].tolist())
    test = np.sort([row for row in order[num_train:].tolist() if others[classes[row]] > 1]).astype(np.int64)
    return {"train": every.select(np.sort(order[:num_train])), "test": every.select(test)}


def _folder(path: Path) -> Source:
    name = path.resolve().name or str(path)
    files = split_files(path)
    if files:
        return _tables(files, name)
    splits, notes = read_folder(path)
    return Source(name, str(path), splits, qualify=True, notes=notes)


def _single_table(path: Path) -> Source:
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"no source {str(path)!r}: a file must be one of {', '.join(SUFFIXES)}; got {path.suffix!r}")
    rows = read_table([path], path.name)
    if rows.splits is None:
        return Source(path.stem, str(path), {"": rows})
    splits = [split_name(value or "") or (value or "").strip() for value in rows.splits]
    if "all" in splits:
        raise DataError(f"{path}: the split 'all' stands for every row: name the split in the column otherwise")
    order = [split for split in SPLITS if split in splits]
    order += sorted(set(splits) - set(order))
    return Source(
        path.stem,
        str(path),
        {split: rows.select(np.array([row for row, of in enumerate(splits) if of == split])) for split in order},
    )
