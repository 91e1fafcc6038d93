"""Which rows of a set a trial trains on, chooses by, and is tested on."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np

from nestling.data.dataset import LabelledData
from nestling.data.sources import load_data
from nestling.data.split import cut
from nestling.errors import DataError
from nestling.seeds import derive


@dataclass(frozen=True, eq=False)
class Parts:
    """The rows of a trial."""

    train: LabelledData
    validation: LabelledData | None
    """To choose by; None where nothing is chosen."""
    test: LabelledData


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A set and its rows; None for all of a split."""

    source: str
    train: int | None = None
    test: int | None = None
    split: str = "test"
    train_split: str = "train"
    image_size: int | None = None
    sizes: tuple[int, int] | None = None
    """The finest classes get so many training rows, log-spaced from the first number to the second in the order of
    their natural sizes: unbalanced concepts."""
    validation: int | float = 0
    """Kept from training, to choose by: so many rows of each of the finest classes beside their training rows, or a
    share of all of them."""
    known: tuple[int, ...] | None = None
    """So many rows are labelled up to each level, coarse to fine, and no further: disjoint subsets, stratified, other
    ones for each seed; the rest is left out. Where there are fewer rows in all, as many in the same proportions."""
    fine_only: bool = False
    """Of these, the rows labelled at the finest level alone: all that an end-to-end twin sees."""

    def load(self, data_dir: str | None, seed: int = 0) -> Parts:
        """Read them, or make them anew where they are made at random. Raises DataError where a class has too few."""
        size = self.image_size
        train = read(self.source, self.train_split, data_dir, size, seed, self.train)
        test = read(self.source, self.split, data_dir, size, seed, self.test)
        if self.known is not None:
            train = known_to(train, self.known, seed)
            if self.fine_only:
                train = train.subset(train.labels[:, -1] >= 0)
        if self.sizes is not None:
            assert isinstance(self.validation, int)
            return Parts(*unbalanced(train, self.sizes, self.validation), test)
        if self.validation:
            train, validation = cut(train, (1 - self.validation, self.validation), 0)
            return Parts(train, validation, test)
        return Parts(train, None, test)

    def key(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}


@lru_cache(maxsize=4)
def read(
    source: str, split: str, data_dir: str | None, image_size: int | None, seed: int, first: int | None
) -> LabelledData:
    """The rows of a split, held for the next trials of this process, which may keep other labels of them."""
    return load_data(source, split, data_dir, image_size=image_size, seed=seed, first=first)


def known_to(data: LabelledData, counts: tuple[int, ...], seed: int) -> LabelledData:
    """Disjoint subsets: ``counts`` rows whose finest known level is each of the levels, coarse to fine.

    Rows are put in one order, in which every beginning holds each of the finest classes in its share; the first ones
    keep every label, the next lose the finest, and so on, as the authors of nested learning cut theirs. So of one seed,
    more fine labels are the same ones and more. Raises DataError for another number of levels, or no row.
    """
    levels = data.taxonomy.levels
    if len(counts) != len(levels) or min(counts) < 0 or sum(counts) < 1:
        raise DataError(f"known must count rows for each of the levels {', '.join(levels)}; got {counts!r}")
    if len(data) < sum(counts):
        share = len(data) / sum(counts)
        counts = tuple(int(share * count) for count in counts)
    rng = np.random.default_rng(derive(seed, "known"))
    order = rng.permutation(len(data))
    _, code, sizes = np.unique(data.labels[order, -1], return_inverse=True, return_counts=True)
    rank = np.empty(len(data))
    grouped = np.argsort(code, kind="stable")
    rank[grouped] = np.arange(len(data)) - (np.cumsum(sizes) - sizes)[code[grouped]]
    order = order[np.argsort((rank + rng.random(len(data))) / sizes[code], kind="stable")][: sum(counts)]
    labels = data.labels[order]
    ends = np.cumsum(counts[::-1])
    for level in range(1, len(levels)):
        labels[ends[-level - 1] :, level] = -1
    return replace(data.subset(order), labels=labels)


def unbalanced(data: LabelledData, sizes: tuple[int, int], validation: int) -> tuple[LabelledData, LabelledData]:
    """Training rows of log-spaced classes, and ``validation`` rows of each class, which come first.

    Raises DataError where a class has fewer rows than that takes.
    """
    codes = data.labels[:, -1]
    classes, counts = np.unique(codes[codes >= 0], return_counts=True)
    wanted = np.geomspace(*sizes, len(classes)).round().astype(int)
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for code, size in zip(classes[np.argsort(-counts, kind="stable")], wanted):
        rows = np.flatnonzero(codes == code)
        if len(rows) < validation + size:
            name = data.taxonomy.classes[data.taxonomy.levels[-1]][code]
            raise DataError(
                f"class {name!r} has {len(rows)} rows, and {size} to train on and {validation} to choose by are asked "
                "for: ask for fewer"
            )
        parts[1].append(rows[:validation])
        parts[0].append(rows[validation : validation + size])
    train, kept = (data.subset(np.sort(np.concatenate(part))) for part in parts)
    return train, kept
