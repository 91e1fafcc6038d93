"""``Rows``: what a source holds before anything is decoded.

Every reader (folder, table, hub, digits) gives this one form, so that levels are chosen, labels
encoded and splits cut in one place, on names alone; inputs are read last, for the chosen rows only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from nestling.data.inputs import Inputs, Joined
from nestling.errors import DataError

INPUTS = ("image", "path", "text")
"""Columns that hold the inputs; the first one present is taken."""
RESERVED = ("split", "group", "id")


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """``n`` rows of a source: names of classes, and the inputs."""

    columns: dict[str, list[str | None]]
    """Every column that may be a level, in file order; None = not labelled."""
    items: list[str]
    """A name for every row, for messages: a file, or ``mnist/train row 17``."""
    kind: Literal["image", "text"]
    inputs: Inputs
    groups: list[str | None] | None = None
    ids: list[str | None] | None = None
    """The values of an ``id`` column, which name the items."""
    concepts: list[str | None] | None = None
    """The values of the column that concepts are asked of."""
    splits: list[str | None] | None = None
    """The values of a ``split`` column."""
    refused: dict[str, str] = field(default_factory=dict)
    """Columns that cannot be levels, each with the reason."""

    def __len__(self) -> int:
        return len(self.items)

    def select(self, rows: np.ndarray) -> Rows:
        """The given rows (int64 numbers), in that order."""
        chosen = rows.tolist()

        def pick(values):
            return None if values is None else [values[row] for row in chosen]

        return replace(
            self,
            columns={name: [values[row] for row in chosen] for name, values in self.columns.items()},
            items=[self.items[row] for row in chosen],
            inputs=self.inputs.select(rows),
            groups=pick(self.groups),
            ids=pick(self.ids),
            concepts=pick(self.concepts),
            splits=pick(self.splits),
        )


def concatenate(parts: Sequence[Rows]) -> Rows:
    """All rows of all parts; a column that a part lacks is not labelled there."""
    if len(parts) == 1:
        return parts[0]
    names = list(dict.fromkeys(name for part in parts for name in part.columns))

    def joined(each: Sequence[list[str | None] | None]) -> list[str | None] | None:
        if all(values is None for values in each):
            return None
        return [value for part, values in zip(parts, each, strict=True) for value in values or [None] * len(part)]

    return Rows(
        columns={
            name: [value for part in parts for value in part.columns.get(name, [None] * len(part))] for name in names
        },
        items=[item for part in parts for item in part.items],
        kind=parts[0].kind,
        inputs=Joined([part.inputs for part in parts]),
        groups=joined([part.groups for part in parts]),
        ids=joined([part.ids for part in parts]),
        concepts=joined([part.concepts for part in parts]),
        refused={name: reason for part in parts for name, reason in part.refused.items()},
    )


def class_name(value: object) -> str | None:
    """A cell as the name of a class, None where it is not labelled: empty, null or NaN. A whole number stored as a
    float, as pandas does beside nulls, is written without its point."""
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    name = str(value)
    return name if name.strip() else None


def table_rows(
    columns: dict[str, list[str | None]],
    items: list[str],
    kind: Literal["image", "text"],
    inputs: Inputs,
    refused: Mapping[str, str],
) -> Rows:
    """The columns of a table as ``Rows``, the reserved ones put where they belong. Raises ``DataError``."""
    ids = columns.get("id")
    if ids is not None:
        items = [item if name is None else name for item, name in zip(items, ids, strict=True)]
    splits = columns.get("split")
    if splits is not None and None in splits:
        raise DataError(f"{items[splits.index(None)]}: the column 'split' is empty: give each row a split")
    return Rows(
        columns={name: values for name, values in columns.items() if name not in (*RESERVED, *INPUTS)},
        items=items,
        kind=kind,
        inputs=inputs,
        groups=columns.get("group"),
        ids=ids,
        splits=splits,
        refused={name: reason for name, reason in refused.items() if name not in RESERVED},
    )
