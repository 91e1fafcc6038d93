"""``LabelledData``: inputs with labels of any granularity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from nestling.data.images import LazyImages
from nestling.data.keep import keep_labels
from nestling.data.split import strata
from nestling.errors import DataError
from nestling.taxonomy import Taxonomy


@dataclass(frozen=True, eq=False)
class Concepts:
    """Of which concept each row is, by a column that is no level: a place, a camera, a season."""

    name: str
    """The column's."""
    names: tuple[str, ...]
    codes: np.ndarray
    """int64 (n,), -1 = none is given."""

    @classmethod
    def from_names(cls, name: str, values: Sequence[str | None], names: Sequence[str] | None = None) -> Concepts:
        """Of (n,) names of concepts; ``names`` are those there are, by default those of the rows, sorted."""
        known = tuple(sorted({value for value in values if value is not None}) if names is None else names)
        number = {value: code for code, value in enumerate(known)}
        codes = [-1 if value is None else number[value] for value in values]
        return cls(name, known, np.array(codes, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class LabelledData:
    """``n`` inputs, the labels known of each, and the taxonomy that the labels speak of. Checked when made.

    Raises ``DataError`` where shapes disagree, a label is no class of its level, or a row's labels contradict.
    """

    inputs: torch.Tensor | LazyImages | list[str]
    """Pictures, uint8 (n, c, h, w) as a tensor or decoded on access; or n texts, encoded as int32 (n, 2, 1, length) or
    not."""
    labels: np.ndarray
    """int64 (n, levels), coarse to fine; -1 = not labelled. Levels coarser than a known one are filled in."""
    taxonomy: Taxonomy
    index: np.ndarray = field(default=None)  # type: ignore[assignment]
    """int64 (n,): the row's number in the split as it was loaded; a subset keeps it. By default 0 … n-1."""
    items: tuple[str, ...] = field(default=None)  # type: ignore[assignment]
    """A name for every row, used in messages: a file, or ``mnist/train row 17``."""
    groups: np.ndarray | None = None
    """int64 (n,) or None: rows of one group never fall into different splits."""
    concepts: Concepts | None = None
    """Of the rows, where a column that is no level tells them; classes of a level are concepts without it."""
    marks: np.ndarray | None = None
    """int64 (n,) or None: by what it holds a row is known again, whatever its labels and its place."""
    name: str = "data"
    notes: tuple[str, ...] = ()
    """What was decided on the way, each with its reason, for the user to read."""

    def __post_init__(self) -> None:
        count = len(self.inputs)
        if isinstance(self.inputs, torch.Tensor) and (
            self.inputs.dtype not in (torch.uint8, torch.int32) or self.inputs.ndim != 4
        ):
            raise DataError(
                f"the inputs of {self.name!r} must be uint8 of shape (n, c, h, w); "
                f"got {self.inputs.dtype} of shape {tuple(self.inputs.shape)}"
            )
        levels = len(self.taxonomy.levels)
        labels = np.asarray(self.labels)
        if labels.shape != (count, levels) or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(
                f"the labels of {self.name!r} must be integers of shape ({count}, {levels}), one row per input and "
                f"one column per level; got {labels.dtype} of shape {labels.shape}"
            )
        index = np.arange(count) if self.index is None else np.asarray(self.index)
        items = self.items if self.items is not None else [f"{self.name} row {row}" for row in range(count)]
        groups = None if self.groups is None else np.asarray(self.groups)
        for what, column in (("index", index), ("groups", groups), ("marks", self.marks)):
            if column is not None and (column.shape != (count,) or not np.issubdtype(column.dtype, np.integer)):
                raise DataError(
                    f"the {what} of {self.name!r} must be integers of shape ({count},); "
                    f"got {column.dtype} of shape {column.shape}"
                )
        if self.concepts is not None:
            size, codes = len(self.concepts.names), self.concepts.codes
            if self.concepts.name in self.taxonomy.levels:
                raise DataError(f"{self.concepts.name!r} is a level of {self.name!r}, and its concepts are its classes")
            whole = np.issubdtype(codes.dtype, np.integer)
            if codes.shape != (count,) or not whole or (count and not -1 <= codes.min() <= codes.max() < size):
                raise DataError(
                    f"the concepts of {self.name!r} must be -1 or one of {size} for each of the {count} rows; got "
                    f"{codes.dtype} of shape {codes.shape}"
                )
        if len(items) != count:
            raise DataError(f"the items of {self.name!r} must be {count} names; got {len(items)}")
        sizes = np.array([len(self.taxonomy.classes[level]) for level in self.taxonomy.levels])
        wrong = np.argwhere((labels < -1) | (labels >= sizes))
        if len(wrong):
            row, level = wrong[0].tolist()
            raise DataError(
                f"{items[row]}: label {labels[row, level]} at level {self.taxonomy.levels[level]!r} must be -1 (not "
                f"labelled) or one of its {sizes[level]} classes, 0 to {sizes[level] - 1}"
            )
        values = {
            "labels": self.taxonomy.complete(labels.astype(np.int64)),
            "index": index.astype(np.int64),
            "items": tuple(items),
            "groups": None if groups is None else groups.astype(np.int64),
            "notes": tuple(self.notes),
        }
        for what, value in values.items():
            object.__setattr__(self, what, value)

    @classmethod
    def from_arrays(
        cls,
        inputs: Any,
        labels: Any,
        *,
        taxonomy: Taxonomy | None = None,
        levels: Sequence[str] | None = None,
        qualify_names: bool = False,
        image_size: int | tuple[int, int] | None = None,
        groups: Any = None,
        concepts: Mapping[str, Sequence[str | None]] | None = None,
        name: str = "arrays",
    ) -> LabelledData:
        """Rows that are in memory.

        Parameters
        ----------
        inputs: pictures as an array (n, h, w), (n, h, w, 1 or 3) or a tensor (n, 1 or 3, h, w), whole numbers in
            0 … 255 or fractions in [0, 1]; or a list of such pictures, of PIL images, of paths; or n texts.
        labels: rows of names, coarse to fine, or paths ``"a/b/c"``; or a mapping from level to n names; or whole
            numbers (n,) or (n, levels), which are codes where ``taxonomy`` is given and names else. None, "", NaN
            and -1 are not labelled.
        taxonomy: the tree; by default the one that the labels span. ``levels`` names its levels.
        groups: (n,) whole numbers; rows of one group never fall into different parts.
        concepts: a name, such as ``"camera"``, and the n names of the rows by it, None where there is none: what robust
            training is to weight where that is no level.

        Raises ``DataError`` naming the row for what is no picture, no label, or contradicts the tree.
        """
        from nestling.data.arrays import from_arrays

        return from_arrays(
            inputs,
            labels,
            taxonomy=taxonomy,
            levels=levels,
            qualify_names=qualify_names,
            image_size=image_size,
            groups=groups,
            concepts=concepts,
            name=name,
        )

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        *,
        taxonomy: Taxonomy | None = None,
        levels: Sequence[str] | None = None,
        image_size: int | tuple[int, int] | None = None,
        name: str = "dataset",
    ) -> LabelledData:
        """The rows of a data set of torch with a length, ``dataset[i] = (input, label)``, read once.

        A label is a whole number (named by ``dataset.classes``, where it has them), a name, or several of either,
        coarse to fine. Inputs and the rest as in ``from_arrays``. Raises ``UsageError`` and ``DataError``.
        """
        from nestling.data.arrays import from_dataset

        return from_dataset(dataset, taxonomy=taxonomy, levels=levels, image_size=image_size, name=name)

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        shape = "texts" if isinstance(self.inputs, list) else "x".join(map(str, self.inputs.shape[1:]))
        known = zip(self.taxonomy.levels, (self.labels >= 0).sum(axis=0), strict=True)
        levels = ", ".join(f"{level} ({len(self.taxonomy.classes[level])} classes, {n} known)" for level, n in known)
        return f"LabelledData({self.name!r}, {len(self)} rows of {shape}: {levels})"

    def subset(self, rows: np.ndarray | Sequence[int]) -> LabelledData:
        """The given rows, in that order: int numbers (k,), or a mask (n,)."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        inputs = self.inputs
        if isinstance(inputs, torch.Tensor):
            inputs = inputs[torch.from_numpy(rows)]
        elif isinstance(inputs, LazyImages):
            inputs = inputs.subset(rows)
        else:
            inputs = [inputs[row] for row in rows.tolist()]
        return replace(
            self,
            inputs=inputs,
            labels=self.labels[rows],
            index=self.index[rows],
            items=tuple(self.items[row] for row in rows.tolist()),
            groups=None if self.groups is None else self.groups[rows],
            marks=None if self.marks is None else self.marks[rows],
            concepts=None if self.concepts is None else replace(self.concepts, codes=self.concepts.codes[rows]),
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images. Raises ``DataError`` for texts."""
        if isinstance(self.inputs, list):
            raise DataError(f"{self.name!r} holds texts, and pictures are asked for: give a source of images")
        channels, height, width = self.inputs.shape[1:]
        return channels, height, width

    def images(self, rows: np.ndarray) -> torch.Tensor:
        """uint8 (b, c, h, w): the images of the given rows, decoded where they are not. Raises as ``image_shape``."""
        if isinstance(self.inputs, torch.Tensor):
            return self.inputs[torch.from_numpy(rows).to(self.inputs.device)]
        if isinstance(self.inputs, LazyImages):
            return self.inputs.take(rows)
        raise DataError(f"{self.name!r} holds texts, not images")

    def finest_known(self) -> np.ndarray:
        """int64 (n,): the number of each row's finest labelled level, -1 without a label.

        A row at a ragged leaf counts as labelled at the finest level: there is nothing finer to know.
        """
        return strata(self.labels, self.taxonomy)[:, 0]

    def has_concepts(self, name: str) -> bool:
        """Whether ``name`` is the column of concepts, or a level."""
        return name in self.taxonomy.levels or (self.concepts is not None and self.concepts.name == name)

    def concepts_at(self, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """int64 (n,), the concept of each row, -1 = none; and the names: of the column that is no level, or of a level.

        At a level a leaf that ends above it is a concept as well. Raises ``UsageError`` for a name of neither.
        """
        if self.concepts is not None and self.concepts.name == name:
            return self.concepts.codes, self.concepts.names
        number = self.taxonomy.level_index(name)
        return self.taxonomy.columns(self.labels)[:, number], self.taxonomy.column_names(name)

    def keep(self, fractions: Mapping[str, float], seed: int = 0) -> LabelledData:
        """The same rows with labels forgotten, so that each level stays known for its fraction of the rows.

        ``fractions``: from level to [0, 1]; a level not named keeps the fraction of the next coarser one, the
        coarsest 1. Stratified by fine class, and nested: rows that keep a level keep the coarser ones. At least one
        row of each class stays known, but 0 means none. Rows that lose everything stay, as -1.
        Raises ``UsageError`` for an unknown level, a value outside [0, 1], or fractions that rise towards fine.
        """
        labels, note = keep_labels(self.labels, self.taxonomy, fractions, seed)
        return replace(self, labels=labels, notes=(*self.notes, note))
