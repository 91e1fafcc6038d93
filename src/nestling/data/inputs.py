"""Inputs as their source holds them, read when asked for, and cheap to hand to another process.

Millions of rows stand in a few pieces of memory, not in an object each: a forked worker that so much as looks at an
object copies the page that its reference count lies in, and would end up with a copy of all of them.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nestling.errors import DataError

Raw = bytes | Path | str | np.ndarray | None
"""One input as it is stored: an encoded picture, its file, a text, pixels; None where the source has none."""

BLOCK = 1024
"""Rows that are read at a time where all of them are wanted, one after the other."""


class Inputs(ABC):
    """Abstract. The inputs of ``len(self)`` rows."""

    @property
    def in_memory(self) -> bool:
        """Whether reading is no more than looking."""
        return True

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, rows: np.ndarray) -> list[Raw]:
        """The inputs of the given rows, int64 (k,), in that order."""

    @abstractmethod
    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """int64 (k,): the bytes that each of the given rows takes, -1 where that cannot be told; nothing is read."""

    def select(self, rows: np.ndarray) -> Inputs:
        """The given rows, int64 (k,), in that order; nothing is read."""
        return Selected(self, rows)

    def obstacle(self) -> str | None:
        """Why single rows cannot be read at a bearable cost, and the remedy; None where they can."""
        return None

    def blocks(self) -> Iterator[tuple[np.ndarray, list[Raw]]]:
        """All rows in order, some at a time: their numbers (k,) and inputs."""
        for start in range(0, len(self), BLOCK):
            rows = np.arange(start, min(start + BLOCK, len(self)))
            yield rows, self.read(rows)

    def hold(self, limit: int) -> Inputs:
        """The same in memory, where that takes at most ``limit`` bytes; else as it is, or ``DataError`` where there is
        an ``obstacle`` to that."""
        if self.in_memory:
            return self
        if self.sizes(np.arange(len(self))).sum() <= limit:
            return Held(Packed(raw for _, raws in self.blocks() for raw in raws), self)
        if obstacle := self.obstacle():
            raise DataError(obstacle)
        return self


class Listed(Inputs):
    """Final. Texts and pixels, an object each."""

    def __init__(self, values: Sequence[Raw]) -> None:
        self.values = list(values)

    def __len__(self) -> int:
        return len(self.values)

    def read(self, rows: np.ndarray) -> list[Raw]:
        return [self.values[row] for row in rows.tolist()]

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        return np.array([_size(raw) for raw in self.read(rows)], dtype=np.int64)


_NOTHING, _ENCODED, _FILE = range(3)


class Packed(Inputs):
    """Final. Encoded pictures and names of files, in one piece of memory."""

    def __init__(self, values: Iterable[Raw]) -> None:
        data, ends, kinds = bytearray(), array("q", [0]), bytearray()
        for value in values:
            assert value is None or isinstance(value, bytes | Path)
            kinds.append(_NOTHING if value is None else _FILE if isinstance(value, Path) else _ENCODED)
            data += os.fsencode(value) if isinstance(value, Path) else value or b""
            ends.append(len(data))
        self.data = data
        self.ends, self.kinds = np.array(ends, dtype=np.int64), np.frombuffer(bytes(kinds), dtype=np.uint8)

    @staticmethod
    def fits(values: Sequence[Raw]) -> bool:
        """Whether these are what it holds."""
        return all(value is None or isinstance(value, bytes | Path) for value in values)

    def __len__(self) -> int:
        return len(self.kinds)

    def read(self, rows: np.ndarray) -> list[Raw]:
        # The view is let go of at the end, since a bytearray that is looked at cannot be copied to another process.
        with memoryview(self.data) as view:
            values = [view[start:end].tobytes() for start, end in zip(self.ends[rows], self.ends[rows + 1])]
        kinds = self.kinds[rows].tolist()
        return [
            value if kind == _ENCODED else Path(os.fsdecode(value)) if kind == _FILE else None
            for value, kind in zip(values, kinds, strict=True)
        ]

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        if (self.kinds[rows] == _FILE).any():
            return np.array([_size(raw) for raw in self.read(rows)], dtype=np.int64)
        return np.where(self.kinds[rows] == _NOTHING, -1, self.ends[rows + 1] - self.ends[rows])


class Held(Inputs):
    """Final. What was read from files and is kept; another process is given the place to read it from."""

    def __init__(self, values: Inputs, source: Inputs) -> None:
        self.values, self.source = values, source

    def __len__(self) -> int:
        return len(self.values)

    def read(self, rows: np.ndarray) -> list[Raw]:
        return self.values.read(rows)

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        return self.values.sizes(rows)

    def __reduce__(self) -> tuple[object, ...]:
        return _same, (self.source,)


class Selected(Inputs):
    """Final. Some rows of others."""

    def __init__(self, of: Inputs, rows: np.ndarray) -> None:
        self.of, self.rows = of, rows

    @property
    def in_memory(self) -> bool:
        return self.of.in_memory

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: np.ndarray) -> list[Raw]:
        return self.of.read(self.rows[rows])

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        return self.of.sizes(self.rows[rows])

    def select(self, rows: np.ndarray) -> Inputs:
        return Selected(self.of, self.rows[rows])

    def obstacle(self) -> str | None:
        return self.of.obstacle()


class Joined(Inputs):
    """Final. The rows of several, one after the other."""

    def __init__(self, parts: Sequence[Inputs]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in self.parts])

    @property
    def in_memory(self) -> bool:
        return all(part.in_memory for part in self.parts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, rows: np.ndarray) -> list[Raw]:
        found: list[Raw] = [None] * len(rows)
        for part, places, own in self._parts_of(rows):
            for place, raw in zip(places.tolist(), part.read(own), strict=True):
                found[place] = raw
        return found

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty(len(rows), dtype=np.int64)
        for part, places, own in self._parts_of(rows):
            found[places] = part.sizes(own)
        return found

    def obstacle(self) -> str | None:
        return next((found for part in self.parts if (found := part.obstacle())), None)

    def _parts_of(self, rows: np.ndarray) -> Iterator[tuple[Inputs, np.ndarray, np.ndarray]]:
        """Each part with the places in ``rows`` that are its, and their numbers in it."""
        owner = np.searchsorted(self.ends, rows, side="right")
        for number, part in enumerate(self.parts):
            places = np.flatnonzero(owner == number)
            if len(places):
                yield part, places, rows[places] - (int(self.ends[number]) - len(part))


def inputs_of(values: Sequence[Raw]) -> Inputs:
    """Values that are in memory already."""
    return Packed(values) if Packed.fits(values) else Listed(values)


def _same(inputs: Inputs) -> Inputs:
    return inputs


def _size(raw: Raw) -> int:
    try:
        if isinstance(raw, Path):
            return raw.stat().st_size
    except (OSError, ValueError):
        return -1
    return -1 if raw is None else raw.nbytes if isinstance(raw, np.ndarray) else len(raw)
