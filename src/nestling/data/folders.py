"""A tree of class folders as ``Rows``: ``[train/]coarse/…/fine/picture.png``."""

from __future__ import annotations

from pathlib import Path

from nestling.data.images import walk_images
from nestling.data.inputs import Packed
from nestling.data.rows import Rows
from nestling.data.tables import split_name
from nestling.errors import DataError, StorageError, listed
from nestling.tree import default_levels


def read_folder(root: Path) -> tuple[dict[str, Rows], tuple[str, ...]]:
    """The rows of every split ("" where the folder has none), and notes.

    The top-level folders are splits where ``train`` and ``test`` are among them, or all are named as splits. Levels
    are named by depth, the same for all splits. A picture above a class folder is one without that label.
    Raises ``DataError`` for a folder without pictures or without class folders.
    """
    try:
        top = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))
    except OSError as error:
        raise StorageError(f"cannot read the folder {root}: {error.strerror or error}") from error
    folders = {entry: split_name(entry.name) for entry in top}
    splits = {split: entry for entry, split in folders.items() if split}
    notes: list[str] = []
    if len(splits) < sum(map(bool, folders.values())):
        raise DataError(f"{root}: two of the folders {listed(entry.name for entry in top)} name the same split")
    if {"train", "test"} <= splits.keys() or (splits and all(folders.values())):
        others = [entry.name for entry, split in folders.items() if not split]
        if others:
            notes.append(f"only the split folders of {root} are read; left alone: {listed(others)}")
        starts = splits
    else:
        starts = {"": root}
    found = {split: sorted(walk_images(start)) for split, start in starts.items()}
    if not any(found.values()):
        raise DataError(
            f"{root}: the folder holds no pictures (expected class folders, {root.name}/coarse/…/fine/picture.png) "
            "and no table named train.parquet, train.csv or train.tsv"
        )
    hollow = [str(starts[split]) for split, paths in found.items() if not paths]
    if hollow:
        notes.append(f"without pictures, and left out: {listed(hollow)}")
    classes = {split: [path.relative_to(starts[split]).parts[:-1] for path in paths] for split, paths in found.items()}
    depth = max(len(parts) for rows in classes.values() for parts in rows)
    if depth == 0:
        raise DataError(f"{root}: its pictures lie in no class folders (expected {root.name}/class/picture.png)")
    bare = sum(not parts for rows in classes.values() for parts in rows)
    if bare:
        notes.append(f"{bare:,} pictures lie in no class folder: they are rows without a label")
    levels = default_levels(depth)

    def rows(split: str) -> Rows:
        paths = found[split]
        return Rows(
            columns={
                level: [parts[place] if place < len(parts) else None for parts in classes[split]]
                for place, level in enumerate(levels)
            },
            items=[str(path) for path in paths],
            kind="image",
            inputs=Packed(paths),
        )

    return {split: rows(split) for split in starts if found[split]}, tuple(notes)


def hollow_folders(root: Path) -> tuple[str, ...]:
    """The class folders at or above no picture at all, as paths below ``root``; of one inside another the outer."""
    full = {folder for path in walk_images(root) for folder in path.relative_to(root).parents}
    found: list[Path] = []
    for path in sorted(root.rglob("*")):
        below = path.relative_to(root)
        hidden = any(part.startswith((".", "__")) for part in below.parts)
        if path.is_dir() and not hidden and below not in full and not any(above in below.parents for above in found):
            found.append(below)
    return tuple(map(str, found))
