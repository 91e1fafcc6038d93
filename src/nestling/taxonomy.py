"""A taxonomy: named levels, coarse to fine, the classes of each level, and the parent of every class.

NumPy only and immutable. A tree may be ragged: a *leaf* may end above the finest level. The columns of a level are its
classes and, after them, one *pass-through column* for each leaf that ended above it, by (level, code), so that the
columns of every level partition the same leaves. How trees are read from data stands in ``nestling.tree``, how names
become codes in ``nestling.names``, the audit of labels in ``nestling.audit``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestling import tree, tree_cells, tree_check, tree_files
from nestling.audit import Audit, Contradiction, audit, contradictions, describe
from nestling.errors import DataError, UsageError, unknown
from nestling.files import atomic_write
from nestling.names import Names
from nestling.tree import Integers, frozen, some_rows


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Taxonomy:
    """Levels, coarse to fine, with their classes and parents.

    A level is named or numbered (from 0, the coarsest) wherever one is asked for; an unknown one raises UsageError.
    Labels are int64 codes ``(n, levels)``, −1 where not labelled. Classes keep the order they are given in here and
    by ``load`` of a JSON, because weights follow it; every other constructor sorts them by (parent, natural order of
    the name). Raises DataError for a level without classes, an empty name, a name that stands twice in a level, a
    number of parents that is not the number of classes, and a parent out of range.
    """

    levels: tuple[str, ...]
    classes: Mapping[str, tuple[str, ...]]
    """Level -> names, unique within a level only."""
    parent: Mapping[str, Integers]
    """Level -> int64 ``(classes,)`` into the next coarser level; all −1 at the coarsest."""

    def __init__(
        self, levels: Sequence[str], classes: Mapping[str, Sequence[str]], parent: Mapping[str, ArrayLike]
    ) -> None:
        levels, names, codes = tree_check.check(levels, classes, parent)
        object.__setattr__(self, "levels", levels)
        object.__setattr__(self, "classes", MappingProxyType(names))
        object.__setattr__(self, "parent", MappingProxyType(codes))

    # Where taxonomies come from

    @classmethod
    def from_paths(
        cls, paths: Iterable[Any], levels: Sequence[str] | None = None, *, qualify: bool = False
    ) -> Taxonomy:
        """The tree of ``paths``: sequences of names or ``"a/b/c"``, coarse to fine; ragged where some end early.

        A node is a leaf exactly when no path goes on below it. ``levels`` defaults to coarse, fine · coarse, middle,
        fine · else level-1, level-2, … ``qualify``: as in ``from_table``. Raises DataError for an empty name and for
        a name under two parents, UsageError for a path deeper than ``levels``.
        """
        columns = tree_cells.columns_of_paths(paths)
        if not columns:
            raise DataError("no paths were given: a taxonomy needs at least one class")
        names = tree.named_levels(len(columns), levels)
        columns += [[None] * len(columns[0])] * (len(names) - len(columns))
        return cls(*tree.from_columns(columns, names, qualify))

    @classmethod
    def from_table(cls, rows_or_frame: Any, columns: Sequence[str], *, qualify: bool = False) -> Taxonomy:
        """The tree that labelled rows span; ``columns`` become the levels, coarse to fine.

        Takes mappings or sequences, a mapping of columns, a pandas frame or a pyarrow table. None, "" and NaN are not
        labelled: a row that stops at an inner node is a partial label, and a class that no row labels further is a
        ragged leaf. A name under two parents raises DataError with the rows; with ``qualify`` the classes of such a
        name are kept apart and named by their paths, 'a/x' and 'b/x'. The same name at two levels is fine.
        """
        names = (columns,) if isinstance(columns, str) else tuple(columns)
        return cls(*tree.from_columns(tree_cells.label_columns(rows_or_frame, names, every_level=True), names, qualify))

    @classmethod
    def from_folder(cls, path: str | Path, levels: Sequence[str] | None = None) -> Taxonomy:
        """The tree of class folders below ``path``; ``levels`` as in ``from_paths``.

        A class is a folder that holds files, or folders that do; hidden entries and files directly in ``path`` are
        ignored. A folder with both files and class folders is an inner class: its files are labelled down to it.
        Folders of one name under two parents are no accident, unlike in a table: the classes of such a name, and only
        these, are named by their paths, 'a/x' and 'b/x'. Raises DataError where no folder holds a file, StorageError
        where one cannot be read.
        """
        return cls.from_paths(tree_files.folder_paths(Path(path)), levels, qualify=True)

    @classmethod
    def load(cls, path: str | Path, levels: Sequence[str] | None = None) -> Taxonomy:
        """The taxonomy of a bundle's JSON, or of a ``.csv`` of edges ``parent,child``.

        In a CSV the header is optional, a root has no parent or is never a child, a node's level is its depth, and
        ``levels`` names the levels; a JSON names its own. The file is untrusted: at most 64 MB, read, parsed, then
        checked. Raises StorageError where it cannot be read, DataError for everything wrong inside it.
        """
        path = Path(path)
        text = tree_files.read_untrusted(path)
        try:
            if path.suffix.lower() == ".csv":
                return cls.from_paths(tree_files.parse_edges(text), levels)
            taxonomy = cls.from_dict(tree_files.parse_json(text))
        except DataError as error:
            raise DataError(f"taxonomy {path}: {error}") from None
        if levels is not None and tuple(levels) != taxonomy.levels:
            raise UsageError(f"taxonomy {path} names its levels {taxonomy.levels}, not {tuple(levels)}: leave them out")
        return taxonomy

    @classmethod
    def from_dict(cls, content: Any) -> Taxonomy:
        """The inverse of ``to_dict``. Raises DataError for any other shape."""
        return cls(*tree_files.check_content(content))

    def to_dict(self) -> dict[str, Any]:
        """``{"levels": […], "classes": {level: […]}, "parent": {level: […]}}``, as in a bundle's taxonomy.json."""
        return {
            "levels": list(self.levels),
            "classes": {level: list(names) for level, names in self.classes.items()},
            "parent": {level: codes.tolist() for level, codes in self.parent.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write the bundle's JSON, atomically. Raises StorageError."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n"
        with atomic_write(Path(path)) as file:
            file.write(text.encode())

    # Levels, classes, columns

    def level_index(self, level: str | int) -> int:
        """The number of a level, 0 the coarsest. Raises UsageError where there is none."""
        if isinstance(level, str):
            if level in self.levels:
                return self.levels.index(level)
        elif isinstance(level, int | np.integer) and 0 <= level < len(self.levels):
            return int(level)
        raise unknown("level", level, self.levels)

    def num_classes(self, level: str | int) -> int:
        """The classes of a level, without pass-through columns."""
        return len(self.classes[self.levels[self.level_index(level)]])

    def width(self, level: str | int) -> int:
        """The columns of a level: its classes and one for each leaf that ended above it."""
        return len(self._column_parent[self.level_index(level)])

    def column_names(self, level: str | int) -> tuple[str, ...]:
        """``(width,)``: the class names, then the names of the leaves that the pass-through columns stand for."""
        i = self.level_index(level)
        passing = self._ragged[: self.width(i) - self.num_classes(i)]
        return self.classes[self.levels[i]] + tuple(self.classes[self.levels[j]][code] for j, code in passing.tolist())

    def column_parent(self, level: str | int) -> Integers:
        """int64 ``(width,)``: for every column its column in the next coarser level; −1 at the coarsest."""
        return self._column_parent[self.level_index(level)]

    def ancestor(self, level: str | int, *, of: str | int) -> Integers:
        """int64 ``(width of `of`,)``: for every column of ``of`` its column at the coarser or equal ``level``."""
        i, j = self.level_index(level), self.level_index(of)
        if i > j:
            raise UsageError(f"{self.levels[i]!r} is finer than {self.levels[j]!r}: ancestors are coarser or equal")
        return self._ancestors[j][i]

    def children(self, level: str | int, code: int) -> Integers:
        """The codes of a class's children in the next finer level; empty for a leaf. Raises DataError out of range."""
        i = self.level_index(level)
        if not 0 <= code < self.num_classes(i):
            raise DataError(f"code {code} is no class of level {self.levels[i]!r}: give 0 to {self.num_classes(i) - 1}")
        if i + 1 == len(self.levels):
            return frozen(np.empty(0, np.int64))
        return frozen(np.flatnonzero(self.parent[self.levels[i + 1]] == code))

    @cached_property
    def leaves(self) -> tuple[tuple[str, int], ...]:
        """(level name, code) of every leaf, in the order of the finest level's columns."""
        finest = self.levels[-1]
        ragged = [(self.levels[i], code) for i, code in self._ragged.tolist()]
        return (*((finest, code) for code in range(len(self.classes[finest]))), *ragged)

    # Labels

    def encode(self, rows: Any) -> Integers:
        """int64 ``(n, levels)``, writable: the codes of named labels; None, "" and NaN become −1.

        ``rows``: as in ``from_table``, or paths ``"a/b/c"``; keys that are no levels are ignored, coarser labels are
        not filled in. A class named by its path, 'a/x', also goes by 'x' where the row's coarser labels tell which is
        meant. Raises DataError naming row, level and nearest class for any other name, and for rows whose labels
        contradict the tree.
        """
        labels = self._names.encode(rows)
        self._refuse(self.contradictions(labels))
        return labels

    def complete(self, labels: ArrayLike) -> Integers:
        """int64 ``(n, levels)``: ``labels`` with the coarser ones filled in from the finer.

        Raises DataError naming the rows for a contradiction with the tree, and for a code out of range.
        """
        labels = self._checked(labels)
        self._refuse(self.contradictions(labels))
        for i in range(len(self.levels) - 1, 0, -1):
            fill = (labels[:, i] >= 0) & (labels[:, i - 1] < 0)
            labels[fill, i - 1] = self.parent[self.levels[i]][labels[fill, i]]
        return labels

    def columns(self, labels: ArrayLike) -> Integers:
        """int64 ``(n, levels)``: training targets; completed, and ragged leaves carried into their columns below.

        −1 stays for what is not labelled. Raises as ``complete``.
        """
        labels = self.complete(labels)
        for i in range(len(self.levels) - 1):
            num_classes, above = self.num_classes(i + 1), self._column_parent[i + 1]
            passes_to = np.full(self.width(i) + 1, -1)  # the last entry serves the label −1
            passes_to[above[num_classes:]] = np.arange(num_classes, len(above))
            labels[:, i + 1] = np.maximum(labels[:, i + 1], passes_to[labels[:, i]])
        return labels

    def contradictions(self, labels: ArrayLike) -> list[Contradiction]:
        """Where labels contradict the tree, finest level first; each level is held against the next coarser known one.

        Raises DataError for a shape or a code that cannot be.
        """
        return contradictions(self, self._checked(labels))

    def audit(self, labels: ArrayLike) -> Audit:
        """Definitions 2.1 and 2.2 of the nested paper on data, and the rows that break nesting; see ``nestling.audit``.

        ``labels``: int64 ``(n, levels)``, which may contradict the tree.
        """
        return audit(self, self._checked(labels))

    # Probabilities and distances

    def aggregate(
        self, probabilities: ArrayLike, level: str | int, *, of: str | int | None = None
    ) -> NDArray[np.floating[Any]]:
        """``(…, width of `of`)`` summed up to ``(…, width of level)``; ``of`` defaults to the finest level.

        Raises UsageError where ``level`` is finer than ``of`` or the width is another.
        """
        source = len(self.levels) - 1 if of is None else self.level_index(of)
        above = self.ancestor(level, of=source)
        values = np.asarray(probabilities)
        if values.ndim < 1 or values.shape[-1] != len(above):
            raise UsageError(
                f"probabilities of shape {values.shape} are not those of level {self.levels[source]!r}: "
                f"give {len(above)} columns, one per class and pass-through leaf, or say which level with of="
            )
        order = np.argsort(above, kind="stable")
        starts = np.searchsorted(above[order], np.arange(self.width(level)))
        return np.add.reduceat(values[..., order], starts, axis=-1)

    def distance(self, level: str | int) -> Integers:
        """int64 ``(width, width)``: edges between the nodes of two columns; siblings 2, same 0.

        The coarsest classes hang on one virtual root. A pass-through column stands for its leaf where that leaf is.
        """
        i = self.level_index(level)
        if i not in self._distances:
            width, passing = self.width(i), self.width(i) - self.num_classes(i)
            depth = np.full(width, i + 1)
            depth[width - passing :] = self._ragged[:passing, 0] + 1
            result = depth[:, None] + depth[None, :]
            for ancestor in self._ancestors[i]:
                # Different columns never share a leaf, so what they share lies above both: two edges less each time.
                np.subtract(result, 2, out=result, where=ancestor[:, None] == ancestor[None, :])
            np.fill_diagonal(result, 0)
            self._distances[i] = frozen(result)
        return self._distances[i]

    # Equality

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Taxonomy) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        counts = ", ".join(f"{level}: {len(self.classes[level])}" for level in self.levels)
        above = f"; leaves above {self.levels[-1]}: {len(self._ragged)}" if len(self._ragged) else ""
        return f"Taxonomy({counts}{above})"

    def __reduce__(self) -> tuple[Any, ...]:
        # The read-only views that make it immutable cannot be pickled, and data workers are sent a copy.
        return Taxonomy.from_dict, (self.to_dict(),)

    # Derived once

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        return self.levels, tuple(self.classes.values()), tuple(codes.tobytes() for codes in self.parent.values())

    @cached_property
    def _distances(self) -> dict[int, Integers]:
        return {}

    @cached_property
    def _names(self) -> Names:
        return Names(self)

    @cached_property
    def _ragged(self) -> Integers:
        """``(leaves, 2)``: (level, code) of the leaves above the finest level, sorted.

        Those that end above a level are a prefix of it, so a leaf's rank is its place among the pass-through columns
        of every level below it.
        """
        childless = [
            np.setdiff1d(np.arange(len(self.classes[level])), self.parent[finer])
            for level, finer in zip(self.levels, self.levels[1:])
        ]
        pairs = [np.stack([np.full(len(codes), i), codes], axis=1) for i, codes in enumerate(childless)]
        return np.concatenate([np.empty((0, 2), np.int64), *pairs])

    @cached_property
    def _column_parent(self) -> tuple[Integers, ...]:
        columns = []
        for i, level in enumerate(self.levels):
            ended = self._ragged[self._ragged[:, 0] < i]
            coarser = len(self.classes[self.levels[i - 1]])
            passing = np.where(ended[:, 0] == i - 1, ended[:, 1], coarser + np.arange(len(ended)))
            columns.append(frozen(np.concatenate([self.parent[level], passing])))
        return tuple(columns)

    @cached_property
    def _ancestors(self) -> tuple[tuple[Integers, ...], ...]:
        """``[of][level]``."""
        rows: list[tuple[Integers, ...]] = []
        for i, above in enumerate(self._column_parent):
            coarser = rows[i - 1] if i else ()
            rows.append((*(frozen(ancestor[above]) for ancestor in coarser), frozen(np.arange(len(above)))))
        return tuple(rows)

    def _refuse(self, found: Sequence[Contradiction]) -> None:
        if found:
            others = f" (and {len(found) - 1} more contradictions)" if len(found) > 1 else ""
            raise DataError(f"{describe(self, found[0])}{others}; correct these labels, or the taxonomy")

    def _checked(self, labels: ArrayLike) -> Integers:
        """A copy as int64 ``(n, levels)``. Raises DataError for another shape or kind, and for a code out of range."""
        try:
            given = np.asarray(labels)
        except ValueError:
            given = np.asarray(None)
        if given.size == 0 and given.shape[0] == 0:
            return np.empty((0, len(self.levels)), np.int64)
        if given.ndim != 2 or given.shape[1] != len(self.levels) or given.dtype.kind not in "iu":
            raise DataError(
                f"labels of shape {given.shape} and type {given.dtype} cannot be used: "
                f"give integers of shape (n, {len(self.levels)}), −1 where not labelled"
            )
        for i, level in enumerate(self.levels):
            last = len(self.classes[level]) - 1
            wrong = np.flatnonzero((given[:, i] < -1) | (given[:, i] > last))
            if wrong.size:
                raise DataError(
                    f"{some_rows(wrong)}: {given[wrong[0], i]} is no code at level {level!r}: "
                    f"give 0 to {last}, or −1 where not labelled"
                )
        return given.astype(np.int64)
