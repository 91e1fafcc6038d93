"""Classes held out: their rows are taken away and the tree forgets them, so that they can be met as unknown later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nestling.data.dataset import LabelledData
from nestling.errors import UsageError, unknown
from nestling.taxonomy import Taxonomy


def parse_held_out(texts: Sequence[str], taxonomy: Taxonomy) -> list[tuple[int, int]]:
    """``["fine=husky"]`` to (number of the level, code). Raises UsageError for what is no LEVEL=CLASS of the tree."""
    found = []
    for text in texts:
        level, equals, name = (part.strip() for part in text.partition("="))
        if not equals or not level or not name:
            raise UsageError(f"--hold-out names a level and a class, such as fine=husky; got {text!r}")
        number = taxonomy.level_index(level)
        if name not in taxonomy.classes[level]:
            raise unknown(f"class at level {level!r}", name, taxonomy.classes[level])
        found.append((number, taxonomy.classes[level].index(name)))
    return found


def hold_out(data: LabelledData, texts: Sequence[str]) -> tuple[LabelledData, LabelledData]:
    """(the rows of all other classes, the rows of the classes that ``texts`` name), in the tree without these.

    With a class all below it goes. A row of such a class keeps the labels above it: a husky is still a dog. Rows that
    are not labelled at the level of a class may be of it, and stay. Raises UsageError where a level would be empty.
    """
    taxonomy = data.taxonomy
    gone = [np.zeros(len(taxonomy.classes[level]), dtype=bool) for level in taxonomy.levels]
    for number, code in parse_held_out(texts, taxonomy):
        gone[number][code] = True
    for number, level in enumerate(taxonomy.levels[1:], start=1):
        gone[number] |= gone[number - 1][taxonomy.parent[level]]
    for level, lost in zip(taxonomy.levels, gone, strict=True):
        if lost.all():
            raise UsageError(f"--hold-out leaves no class at level {level!r}: hold out fewer")
    for number, level in enumerate(taxonomy.levels[1:], start=1):
        parents = taxonomy.parent[level]
        for code in np.setdiff1d(parents[gone[number]], parents[~gone[number]]).tolist():
            if code >= 0 and not gone[number - 1][code]:
                above = taxonomy.levels[number - 1]
                name = taxonomy.classes[above][code]
                raise UsageError(
                    f"--hold-out leaves {name!r} of level {above!r} without a class below it, so that nothing tells "
                    f"its rows from those held out: hold out {above}={name}, or fewer of its classes"
                )
    new = [np.where(lost, -1, np.cumsum(~lost) - 1) for lost in gone]
    kept = Taxonomy(
        taxonomy.levels,
        {
            level: [name for name, lost in zip(taxonomy.classes[level], gone[number], strict=True) if not lost]
            for number, level in enumerate(taxonomy.levels)
        },
        {
            level: new[number - 1][taxonomy.parent[level]][~gone[number]] if number else np.full((~gone[0]).sum(), -1)
            for number, level in enumerate(taxonomy.levels)
        },
    )
    labels = np.stack(
        [np.where(codes >= 0, new[number][codes], -1) for number, codes in enumerate(data.labels.T)], axis=1
    )
    held = np.asarray(((data.labels >= 0) & (labels < 0)).any(1))
    parts = []
    for rows in (~held, held):
        part = data.subset(rows)
        parts.append(replace(part, labels=labels[rows], taxonomy=kept))
    note = f"held out {', '.join(texts)}: {int(held.sum()):,} of {len(data):,} rows"
    return replace(parts[0], notes=(*parts[0].notes, note)), parts[1]
