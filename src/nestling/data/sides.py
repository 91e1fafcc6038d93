"""On which side of the cut into training and test rows a row stood when a run was trained.

The cut is stratified by class, so that labels which are added later would move rows across it: a run remembers its
sides, by marks of what the rows hold, and what is scored by it, or trained on from it, is cut alike.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nestling.data.inputs import Inputs, Raw
from nestling.data.split import assign

TRAIN, TEST, NEITHER = 0, 1, -1
ENDS = 1 << 14
"""Bytes that are read at either end of a picture: with its size they tell it from any other."""


@dataclass(frozen=True, eq=False)
class Sides:
    """Marks, int64, of the rows that a run was given."""

    train: np.ndarray
    """Calibration and validation rows among them, and the rows of the runs that it began from."""
    test: np.ndarray

    def of(self, marks: np.ndarray) -> np.ndarray:
        """int64 (n,): TRAIN, TEST, or NEITHER for rows that the run has not met."""
        return np.where(np.isin(marks, self.test), TEST, np.where(np.isin(marks, self.train), TRAIN, NEITHER))

    def trained(self, marks: np.ndarray | None) -> int:
        """How many of the rows were trained on; 0 where they have no marks."""
        return 0 if marks is None else int(np.isin(marks, self.train).sum())


def marks_of(inputs: Inputs) -> np.ndarray:
    """int64 (n,): of what a row holds, wherever it lies and however it is labelled. Of equal rows the first, second, …
    have marks of their own."""
    times: Counter[bytes] = Counter()
    marks = bytearray()
    for _, raws in inputs.blocks():
        for raw in raws:
            content = hashlib.blake2b(_content(raw), digest_size=8).digest()
            times[content] += 1
            marks += hashlib.blake2b(content + times[content].to_bytes(8, "little"), digest_size=8).digest()
    return np.frombuffer(bytes(marks), dtype=np.int64).copy()


def _content(raw: Raw) -> bytes:
    if isinstance(raw, Path):
        try:
            with raw.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(ENDS)
                file.seek(max(size - ENDS, 0))
                return b"%d:" % size + head + file.read(ENDS)
        except (OSError, ValueError):
            return os.fsencode(raw.name)
    if isinstance(raw, bytes):
        return b"%d:" % len(raw) + raw[:ENDS] + raw[max(len(raw) - ENDS, 0) :]
    if isinstance(raw, np.ndarray):
        return raw.tobytes()
    return b"" if raw is None else raw.encode("utf-8", "surrogatepass")


def cut_alike(
    sides: np.ndarray, pairs: np.ndarray, fractions: Sequence[float], seed: int, groups: np.ndarray | None
) -> np.ndarray:
    """The part of every row, int64 (n,), as ``assign``: rows whose ``sides`` (n,) are known keep theirs, with their
    groups, and the others are cut by themselves. All are cut anew where that would leave one side empty."""
    part = sides.copy()
    if groups is not None:
        for side in (TRAIN, TEST):
            part[np.isin(groups, groups[sides == side]) & (part == NEITHER)] = side
    new = part == NEITHER
    if new.any():
        part[new] = assign(pairs[new], fractions, seed, None if groups is None else groups[new])
    return part if {TRAIN, TEST} <= set(part.tolist()) else assign(pairs, fractions, seed, groups)
