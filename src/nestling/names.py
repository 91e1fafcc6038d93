"""Names to codes: the labels of rows as numbers of a taxonomy's classes."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from nestling.errors import DataError, unknown
from nestling.tree import Integers
from nestling.tree_cells import PATH_SEPARATOR, label_columns, names_of

if TYPE_CHECKING:
    from nestling.taxonomy import Taxonomy

UNRESOLVED = -2


class Names:
    """What the classes of a taxonomy are called."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy

    def encode(self, rows: Any) -> Integers:
        """``Taxonomy.encode``, without the check that labels do not contradict each other."""
        columns = label_columns(rows, self.taxonomy.levels, every_level=False)
        labels = np.empty((len(columns[0]), len(self.taxonomy.levels)), np.int64)
        for i, (level, column) in enumerate(zip(self.taxonomy.levels, columns)):
            names = names_of(column, level)
            codes = {
                value: -1 if name is None else self.codes[i].get(name, UNRESOLVED) for value, name in names.items()
            }
            labels[:, i] = np.fromiter(map(codes.__getitem__, column), np.int64, len(column))
            resolved: dict[tuple[object, bytes], int] = {}
            for row in np.flatnonzero(labels[:, i] == UNRESOLVED).tolist():
                key = (column[row], labels[row, :i].tobytes())
                if key not in resolved:
                    resolved[key] = self.resolve(i, str(names[column[row]]), labels[row], row)
                labels[row, i] = resolved[key]
        return labels

    @cached_property
    def codes(self) -> tuple[dict[str, int], ...]:
        """Per level: name -> code."""
        return tuple({name: code for code, name in enumerate(names)} for names in self.taxonomy.classes.values())

    @cached_property
    def plain(self) -> tuple[dict[str, dict[int, int]], ...]:
        """Per level: plain name -> parent -> class named by its path; 'x' -> under 'a' 'a/x', under 'b' 'b/x'."""
        taxonomy = self.taxonomy
        result: list[dict[str, dict[int, int]]] = []
        above: list[str] = []
        for level in taxonomy.levels:
            paths: list[str] = []
            plain: dict[str, dict[int, int]] = {}
            for code, (name, parent) in enumerate(zip(taxonomy.classes[level], taxonomy.parent[level].tolist())):
                prefix = above[parent] + PATH_SEPARATOR if parent >= 0 else ""
                short = name.removeprefix(prefix)
                paths.append(prefix + short)
                if prefix and short != name:
                    plain.setdefault(short, {})[parent] = code
            result.append(plain)
            above = paths
        return tuple(result)

    def resolve(self, i: int, name: str, labels: Integers, row: int) -> int:
        """The code of a name that is no class as it stands, by the row's coarser labels."""
        taxonomy = self.taxonomy
        level = taxonomy.levels[i]
        by_parent = self.plain[i].get(name, {})
        if i and int(labels[i - 1]) in by_parent:
            return by_parent[int(labels[i - 1])]
        candidates = list(by_parent.values())
        if not candidates:
            raise unknown(f"class at level {level!r} (row {row})", name, taxonomy.classes[level], DataError)
        known = [j for j in range(i) if labels[j] >= 0]
        fitting = [code for code in candidates if all(taxonomy.ancestor(j, of=i)[code] == labels[j] for j in known)]
        if len(fitting) == 1:
            return fitting[0]
        options = " or ".join(repr(taxonomy.classes[level][code]) for code in (fitting or candidates)[:3])
        if fitting:
            raise DataError(
                f"row {row}: {level} {name!r} may be {options}: write one of these, or label a coarser level"
            )
        says = ", ".join(f"{taxonomy.levels[j]} {taxonomy.classes[taxonomy.levels[j]][labels[j]]!r}" for j in known)
        raise DataError(f"row {row}: {level} {name!r} is {options}, but the row says {says}: correct one of them")
