"""Checks of inputs that stand there more than once: the same row, the same picture, nearly the same picture.

Exact duplicates have the same bytes or the same pixels. Near-duplicates have hashes of gradients that differ in at
most 8 of 64 bits, thumbnails that correlate to 0.997, and mean colours at most 16 grey levels apart: that finds
pictures that were saved anew, scaled or made brighter. The bounds were picked by hand, on some hundred pictures each of
digits, cifar10 and plantvillage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from nestling.errors import listed
from nestling.lint.finding import Finding
from nestling.lint.inputs import Prints
from nestling.lint.table import Table
from nestling.tree import Integers, some_rows

MOST_BITS = 8
LEAST_CORRELATION = 0.997
MOST_COLOUR = 16.0
MOST_ALIKE = 6
"""Pictures; where more of them look alike, it is how pictures of their class look."""
BLOCK = 2048
"""Rows that are compared with all others at a time."""


def same_rows(table: Table, prints: Prints) -> list[Finding]:
    """Rows that say the same of the same input, in the same split: all but the first may go."""
    found = []
    for places in prints.copies:
        alike: dict[object, list[int]] = defaultdict(list)
        for place in places:
            # Two files that show the same are two rows; of other sources the bytes are all that there is.
            file = table.inputs.read(np.array([place]))[0] if table.files and table.kind == "image" else None
            own = table.items[place] if table.folders else file or prints.digest[place]
            told = (own, table.splits[place], *_labels(table, place))
            alike[told].append(place)
        for twice in alike.values():
            if len(twice) > 1:
                message = f"{some_rows(table.numbers[twice])} are the same row: {table.items[twice[0]]}"
                found.append(
                    table.finding("same-row-twice", twice, message, "keep the first of them", drop=sorted(twice)[1:])
                )
    return found


def across_splits(table: Table, prints: Prints) -> list[Finding]:
    """Inputs of training rows that test or validation rows have too: what is scored there has been learned by heart."""
    found = []
    for places in prints.copies:
        splits = sorted({table.splits[place] for place in places})
        if len(splits) < 2:
            continue
        kept = "test" if "test" in splits else "validation" if "validation" in splits else splits[0]
        drop = [place for place in places if table.splits[place] != kept]
        message = f"{_named(table, places)} show the same, in {listed(splits)}"
        remedy = f"keep those in {kept} alone, or give them one value in a column 'group' and let the splits be cut"
        found.append(table.finding("duplicate-across-splits", places, message, remedy, drop=drop))
    return found


def contradicting(table: Table, prints: Prints) -> list[Finding]:
    """The same input with different labels: at least one of them is wrong."""
    found = []
    for places in prints.copies:
        for level, column in enumerate(table.columns):
            said = {place: column[place] for place in places if column[place] is not None}
            if len(set(said.values())) > 1:
                message = (
                    f"{_named(table, list(said))} show the same, but {table.levels[level]} says "
                    f"{listed(dict.fromkeys(map(str, said.values())))}"
                )
                remedy = "look at it and correct the labels; until then none of them can be trusted"
                cells = [(place, finer, None) for place in places for finer in range(level, len(table.levels))]
                found.append(table.finding("duplicate-contradicting", places, message, remedy, cells=cells))
                break
    return found


def near_duplicates(table: Table, prints: Prints) -> list[Finding]:
    """Inputs that show nearly the same, and exact copies that no other check names."""
    first = {places[0]: places for places in prints.copies}
    member = {place: head for head, places in first.items() for place in places}
    links: dict[int, int] = {}

    def root(place: int) -> int:
        while links.get(place, place) != place:
            place = links[place]
        return place

    for one, other in close_pairs(prints):
        links[root(member.get(one, one))] = root(member.get(other, other))
    groups: dict[int, list[int]] = defaultdict(list)
    for place in {*links, *links.values(), *member}:
        groups[root(member.get(place, place))].append(place)
    found = []
    for group in sorted(map(sorted, groups.values())):
        exact = len({member.get(place, -1 - place) for place in group}) == 1
        told = {(table.splits[place], _labels(table, place)) for place in group}
        same = exact and (len(told) > 1 or len({table.items[place] for place in group}) == 1)
        if len(group) < 2 or same or (exact and table.kind == "text"):
            # Copies that differ in split or label, and rows that stand there twice, have findings of their own.
            continue
        if table.kind == "image" and len({prints.pixels[place] for place in group}) > MOST_ALIKE:
            continue
        splits = sorted({table.splits[place] for place in group})
        differing = [
            table.levels[level]
            for level, column in enumerate(table.columns)
            if len({column[place] for place in group} - {None}) > 1
        ]
        message = f"{_named(table, group)} show {'the same' if exact else 'nearly the same'}"
        message += f", in {listed(splits)}" if len(splits) > 1 else ""
        message += f", with different labels at level {differing[0]!r}" if differing else ""
        remedy = "give them one value in a column 'group', and no cut will divide them; or keep one of them"
        found.append(table.finding("near-duplicate", group, message, remedy))
    return found


def close_pairs(prints: Prints) -> Iterator[tuple[int, int]]:
    """Pairs of places that show nearly the same, the smaller one first."""
    if not prints.thumbs.shape[1]:
        heads: dict[bytes, int] = {}
        for place, plain in enumerate(prints.pixels):
            if plain and heads.setdefault(plain, place) != place:
                yield heads[plain], place
        return
    # Of exact copies one is enough, and flat pictures look alike without being so.
    _, firsts = np.unique(np.array(prints.pixels), return_index=True)
    usable = np.sort([place for place in firsts.tolist() if prints.thumbs[place].any()]).astype(np.int64)
    hashes = prints.hashes[usable]
    for start in range(0, len(usable), BLOCK):
        part = hashes[start : start + BLOCK]
        for offset in range(start, len(usable), BLOCK):
            others = hashes[offset : offset + BLOCK]
            near = np.argwhere(np.bitwise_count(part[:, None] ^ others[None]) <= MOST_BITS) + np.array([start, offset])
            near = near[near[:, 0] < near[:, 1]]
            one, other = usable[near[:, 0]], usable[near[:, 1]]
            alike = _agree(prints, one, other)
            yield from zip(one[alike].tolist(), other[alike].tolist(), strict=True)


def _agree(prints: Prints, one: Integers, other: Integers) -> np.ndarray:
    found = np.zeros(len(one), bool)
    for start in range(0, len(one), 1 << 16):
        a, b = one[start : start + (1 << 16)], other[start : start + (1 << 16)]
        correlation = np.einsum("ij,ij->i", prints.thumbs[a], prints.thumbs[b])
        apart = np.abs(prints.colours[a] - prints.colours[b]).max(axis=1)
        found[start : start + (1 << 16)] = (correlation >= LEAST_CORRELATION) & (apart <= MOST_COLOUR)
    return found


def _labels(table: Table, place: int) -> tuple[str | None, ...]:
    return tuple(column[place] for column in table.columns)


def _named(table: Table, places: list[int]) -> str:
    return f"{some_rows(table.numbers[places])} ({listed([table.items[place] for place in places], 3)})"
