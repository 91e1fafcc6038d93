"""What the arguments of a ``Taxonomy`` are held against: everything that is no tree is a DataError of one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from nestling.errors import DataError, unknown
from nestling.tree import MAX_LEVELS, Integers, frozen

MAX_NAME = 1000


def check(
    levels: Sequence[str], classes: Mapping[str, Sequence[str]], parent: Mapping[str, ArrayLike]
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]], dict[str, Integers]]:
    """The arguments of ``Taxonomy`` as what it keeps. Raises DataError for everything that is no tree."""
    levels = tuple(levels)
    _check_names("level", levels)
    if len(levels) > MAX_LEVELS:
        raise DataError(f"the taxonomy has {len(levels)} levels: at most {MAX_LEVELS} are supported")
    for what, given in (("classes", classes), ("parent", parent)):
        for level in given:
            if level not in levels:
                raise unknown(f"level in {what!r} of the taxonomy:", level, levels, DataError)
        for level in levels:
            if level not in given:
                raise DataError(f"{what!r} of the taxonomy lacks the level {level!r}: give one list for every level")
    names: dict[str, tuple[str, ...]] = {}
    codes: dict[str, Integers] = {}
    above = 0
    for level in levels:
        names[level] = tuple(classes[level])
        if not names[level]:
            raise no_classes(level)
        _check_names(f"class at level {level!r}", names[level])
        codes[level] = _check_parents(level, names[level], parent[level], above)
        above = len(names[level])
    return levels, names, codes


def no_classes(level: str) -> DataError:
    """What is said of a level without a single label."""
    return DataError(
        f"level {level!r} has no classes: leave it out of the levels, label rows with it, or name its classes by a "
        "taxonomy"
    )


def _check_names(what: str, names: Sequence[str]) -> None:
    if not names:
        raise DataError(f"there is no {what}: a taxonomy needs at least one")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"a {what} is named {name!r:.80}: names must be text and not empty")
        if len(name) > MAX_NAME:
            raise DataError(f"a {what} is named {name:.40}…, {len(name)} characters: at most {MAX_NAME} are supported")
        if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
            raise DataError(f"the name {name!r:.80} of a {what} is no valid Unicode: rename it")
    if len(set(names)) < len(names):
        name, times = Counter(names).most_common(1)[0]
        raise DataError(f"the {what} {name!r} stands {times} times: give every {what} its own name")


def _check_parents(level: str, names: Sequence[str], parents: ArrayLike, above: int) -> Integers:
    """``parents`` as read-only int64; ``above`` is the number of classes of the next coarser level, 0 without one."""
    try:
        given = np.asarray(parents)
    except (ValueError, OverflowError):
        given = np.asarray(None)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise DataError(f"the parents of level {level!r} must be a list of integers, got {parents!r:.80}")
    if len(given) != len(names):
        raise DataError(f"level {level!r} has {len(names)} classes but {len(given)} parents: give one per class")
    low, high = (0, above - 1) if above else (-1, -1)
    wrong = np.flatnonzero((given < low) | (given > high))
    if wrong.size:
        expected = f"0 to {high}" if above else "−1 at the coarsest level"
        raise DataError(f"the parent of {level} {names[wrong[0]]!r} is {given[wrong[0]]}: expected {expected}")
    return frozen(given.astype(np.int64))
