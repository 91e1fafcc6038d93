"""``load_data``: from whatever a SOURCE names to ``LabelledData``.

A source is resolved to ``Rows`` for each split, its levels and taxonomy are settled on the names of all splits, then
the rows asked for are chosen, and only these are decoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from nestling.data.concepts import LEVEL, is_file, with_column, with_concepts
from nestling.data.dataset import Concepts, LabelledData
from nestling.data.images import load_images
from nestling.data.labels import encode
from nestling.data.resolve import Source, resolve
from nestling.data.rows import Rows, concatenate
from nestling.data.sides import NEITHER, TEST, TRAIN, Sides, cut_alike, marks_of
from nestling.data.split import strata
from nestling.data.tables import split_name
from nestling.errors import DataError, UsageError, listed, unknown
from nestling.seeds import derive
from nestling.taxonomy import Taxonomy

TEST_SHARE = 0.2


def load_data(
    source: str | Path,
    split: str = "train",
    data_dir: str | Path | None = None,
    taxonomy: Taxonomy | str | Path | None = None,
    levels: Sequence[str] | None = None,
    *,
    qualify_names: bool = False,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    seed: int = 0,
    first: int | None = None,
    concepts: str | Path | None = None,
    sides: Sides | None = None,
) -> LabelledData:
    """The rows of one split of a source.

    Parameters
    ----------
    source: a name of the catalogue, a folder tree, a folder of ``<split>.parquet``, a CSV, TSV or Parquet file, or
        ``hf:owner/name``.
    split: 'train', 'validation', 'test', another value of the ``split`` column, or 'all' for every row, uncut.
    data_dir: the folder that holds ``<name>/<split>.parquet``; then NESTLING_DATA is asked, then the hub.
    taxonomy: the tree, or a file of it; by default the tree that the labels of all splits span.
    levels: the columns of labels, coarse to fine; by default all that are not reserved, in file order.
    qualify_names: whether a class name under two parents means two classes (in a folder tree it always does).
    image_size: pixels; one number for a square. By default from the data, see ``load_images``.
    channels: 1 or 3; by default 1 where every picture is grey.
    on_bad_image: 'error', or 'skip' to leave out what cannot be read, which is said in the notes.
    seed: of the stratified 80/20 cut, where the source has no test split, and of sets made at random.
    first: so many rows of the split alone, the first ones; no other is decoded.
    concepts: a CSV ``class,concept``, whose concepts become the coarsest level, named 'concept'; or a column that is
        no level, by which robust training weights the rows.
    sides: of a run, whose cut into training and test rows is kept where the source has no test split.

    Raises ``UsageError`` for an unknown source, split or level, ``DataError`` for what is wrong inside, and
    ``StorageError`` for what cannot be read or fetched.
    """
    if on_bad_image not in ("error", "skip"):
        raise unknown("way to treat bad images", on_bad_image, ("error", "skip"))
    if channels not in (None, 1, 3):
        raise UsageError(f"channels must be 1 or 3; got {channels}")
    found, taxonomy, (rows, labels, marks, notes) = _named(
        source, split, data_dir, taxonomy, levels, qualify_names, seed, concepts, sides, mark=True
    )
    if first is not None and first < len(rows):
        rows, labels, marks = rows.select(np.arange(first)), labels[:first], None if marks is None else marks[:first]
    items = rows.items
    groups, told = _group_codes(rows.groups), _concepts(found, rows, concepts)
    skip = on_bad_image == "skip"
    if rows.kind == "text":
        inputs, kept, more = _texts(rows.inputs.read(np.arange(len(rows))), items, skip)
    else:
        inputs, kept, more = load_images(rows.inputs, items, image_size=image_size, channels=channels, skip_bad=skip)
    return LabelledData(
        inputs=inputs,
        labels=labels[kept],
        index=np.arange(len(kept)),
        taxonomy=taxonomy,
        items=tuple(items[row] for row in kept.tolist()),
        groups=None if groups is None else groups[kept],
        marks=None if marks is None else marks[kept],
        concepts=None if told is None else replace(told, codes=told.codes[kept]),
        name=found.name,
        notes=(*notes, *more),
    )


def load_labels(
    source: str | Path,
    split: str = "train",
    data_dir: str | Path | None = None,
    taxonomy: Taxonomy | str | Path | None = None,
    levels: Sequence[str] | None = None,
    *,
    qualify_names: bool = False,
    seed: int = 0,
    concepts: str | Path | None = None,
) -> LabelledData:
    """What ``load_data`` gives, with an empty pixel for every input: no picture is decoded. Raises as it does."""
    found, taxonomy, (rows, labels, _, notes) = _named(
        source, split, data_dir, taxonomy, levels, qualify_names, seed, concepts
    )
    return LabelledData(
        inputs=torch.empty((len(rows), 1, 1, 1), dtype=torch.uint8),
        labels=labels,
        taxonomy=taxonomy,
        items=tuple(rows.items),
        groups=_group_codes(rows.groups),
        concepts=_concepts(found, rows, concepts),
        name=found.name,
        notes=notes,
    )


def _named(
    source: str | Path,
    split: str,
    data_dir: str | Path | None,
    taxonomy: Taxonomy | str | Path | None,
    levels: Sequence[str] | None,
    qualify_names: bool,
    seed: int,
    concepts: str | Path | None,
    sides: Sides | None = None,
    mark: bool = False,
) -> tuple[Source, Taxonomy, _Chosen]:
    """The source, its taxonomy, and the rows of a split; ``mark``: whether these are marked, where that may serve."""
    found = resolve(source, data_dir, seed)
    if isinstance(taxonomy, str | Path):
        taxonomy = Taxonomy.load(taxonomy)
    if concepts is not None and not is_file(concepts):
        found = with_column(found, str(concepts), levels if taxonomy is None else taxonomy.levels)
    elif concepts is not None:
        if taxonomy is not None:
            raise UsageError("concepts come from one file: from --concepts, or as a level of the --taxonomy")
        found = with_concepts(found, concepts)
        levels = levels if levels is None else (LEVEL, *((levels,) if isinstance(levels, str) else levels))
    if levels is None and taxonomy is None:
        levels = found.levels
    taxonomy, codes, fitted = encode(found.splits, found.place, taxonomy, levels, qualify_names or found.qualify)
    chosen = _choose(found, codes, taxonomy, split, seed, sides, mark)
    return found, taxonomy, chosen._replace(notes=(*found.notes, *fitted, *_twice(found), *chosen.notes))


def available_splits(source: str | Path, data_dir: str | Path | None = None) -> tuple[str, ...]:
    """The splits that ``load_data`` gives, cut ones included; nothing is decoded. Raises as ``load_data``."""
    return resolve(source, data_dir).available


def has_split(source: str | Path, split: str, data_dir: str | Path | None = None) -> bool:
    """Whether the source has this split; most often asked of 'validation'. Raises as ``load_data``."""
    return split in available_splits(source, data_dir)


def has_own_test_rows(source: str | Path, data_dir: str | Path | None = None) -> bool:
    """Whether the source has a test split of its own, none that is cut off. Raises as ``load_data``."""
    found = resolve(source, data_dir)
    return found.cut_from is None and "test" in found.available


def has_column(source: str | Path, column: str, data_dir: str | Path | None = None, seed: int = 0) -> bool:
    """Whether any split of the source has such a column. Raises as ``load_data``."""
    return any(column in rows.columns for rows in resolve(source, data_dir, seed).splits.values())


class _Chosen(NamedTuple):
    rows: Rows
    labels: np.ndarray
    """int64 (n, levels)."""
    marks: np.ndarray | None
    """int64 (n,), where they were asked for, and the source is cut or the sides of a run are known."""
    notes: tuple[str, ...]
    """What there is to say of the choice."""


def _choose(
    found: Source,
    codes: dict[str, np.ndarray],
    taxonomy: Taxonomy,
    split: str,
    seed: int,
    sides: Sides | None,
    mark: bool,
) -> _Chosen:
    """The rows of a split."""
    typed, split, whole = split, split_name(split) or split, found.cut_from
    if split not in (*found.available, "all"):
        raise unknown(f"split of {found.place}", typed, (*found.available, "all"))
    cut = whole is not None and split in ("train", "test")
    if split == "all":
        rows, labels = concatenate(list(found.splits.values())), np.concatenate(list(codes.values()))
    else:
        of = whole if cut and whole is not None else split
        rows, labels = found.splits[of], codes[of]
    marks = marks_of(rows.inputs) if mark and (sides is not None or whole is not None) else None
    if not cut:
        return _Chosen(rows, labels, marks, ())
    groups = _group_codes(rows.groups)
    before = np.full(len(rows), NEITHER) if sides is None or marks is None else sides.of(marks)
    fractions, cut_seed = (1 - TEST_SHARE, TEST_SHARE), derive(seed, "train and test")
    part = cut_alike(before, strata(labels, taxonomy), fractions, cut_seed, groups)
    chosen = np.flatnonzero(part == (TEST if split == "test" else TRAIN))
    if not len(chosen):
        raise DataError(
            f"{found.place}: its {len(rows)} rows are too few to cut a test split: give more, or take the split 'all'"
        )
    kept = before != NEITHER
    note = f"{split}: {len(chosen):,} of {len(rows):,} rows, because the source has no test split: "
    if kept.any() and (part == before)[kept].all():
        others = "" if kept.all() else ", the others 80/20 and stratified by class"
        note += f"{int(kept.sum()):,} cut as the earlier run was trained{others}"
    else:
        kept_whole = ", groups kept whole" if groups is not None else ""
        note += f"cut 80/20, stratified by class{kept_whole}, seed {seed}"
    return _Chosen(rows.select(chosen), labels[chosen], None if marks is None else marks[chosen], (note,))


def _twice(found: Source) -> tuple[str, ...]:
    """A warning of pictures that stand in more than one row, perhaps of different splits."""
    counts = Counter(item for rows in found.splits.values() for item in rows.items)
    names = [item for item, count in counts.items() if count > 1]
    if not names:
        return ()
    many = "1 input stands" if len(names) == 1 else f"{len(names):,} inputs stand"
    return (f"warning: {many} in more than one row, and may be in training and test rows both: {listed(names, 3)}",)


def _concepts(found: Source, rows: Rows, column: str | Path | None) -> Concepts | None:
    """Those of some rows; their names are the same for every split."""
    if rows.concepts is None:
        return None
    names = {name for split in found.splits.values() for name in split.concepts or () if name is not None}
    return Concepts.from_names(str(column), rows.concepts, sorted(names))


def _group_codes(groups: Sequence[str | None] | None) -> np.ndarray | None:
    """int64 (n,); a row without a group is a group of its own."""
    if groups is None:
        return None
    numbers: dict[object, int] = {}
    return np.array(
        [numbers.setdefault((row,) if name is None else name, len(numbers)) for row, name in enumerate(groups)],
        dtype=np.int64,
    )


def _texts(raws: Sequence[object], items: Sequence[str], skip: bool) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    missing = [row for row, text in enumerate(raws) if not isinstance(text, str)]
    if missing and not skip:
        more = f" (and {len(missing) - 1:,} more rows)" if len(missing) > 1 else ""
        raise DataError(f"{items[missing[0]]}: there is no text{more}; --on-bad-image skip leaves such rows out")
    kept = np.setdiff1d(np.arange(len(raws)), missing)
    named = listed([items[row] for row in missing], limit=5)
    notes = (f"left out, because they have no text: {len(missing):,} of {len(raws):,} rows: {named}",)
    return [str(raws[row]) for row in kept.tolist()], kept, notes if missing else ()
