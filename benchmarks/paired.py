"""Measurements in pairs: on a machine that others use too, only what is measured side by side can be compared."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

MEASURES: dict[str, Callable[[float, float], float]] = {
    "ours / theirs": lambda ours, theirs: ours / theirs,
    "ours - theirs": lambda ours, theirs: ours - theirs,
    "ours": lambda ours, theirs: ours,
}
"""What of a pair is held against the target."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the benchmark: a figure of ours and one to compare it with for every round."""

    name: str
    text: str
    unit: str
    ours: Sequence[float]
    theirs: Sequence[float]
    measure: str = "ours / theirs"
    target: float
    at_least: bool = True
    """Whether the target is a floor or a ceiling."""

    def values(self) -> list[float]:
        """What is held against the target, one for each round."""
        return [MEASURES[self.measure](ours, theirs) for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def met(self) -> bool:
        """Whether the median attains the target."""
        value = median(self.values())
        return value >= self.target if self.at_least else value <= self.target

    def record(self) -> dict[str, Any]:
        """The row as it stands in results/bench.json."""
        values = self.values()
        value, compared = median(values), self.measure != "ours"
        return {
            "name": self.name,
            "text": self.text,
            "unit": self.unit,
            "ours": median(self.ours),
            "theirs": median(self.theirs) if compared else None,
            "measure": self.measure,
            "value": value,
            "ratio": value if self.measure == "ours / theirs" else None,
            "spread": list(quartiles(values)),
            "rounds": len(values),
            "target": f"{'>=' if self.at_least else '<='} {self.target:g}",
            "met": self.met,
        }

    def line(self) -> str:
        """The row on the terminal."""
        found = self.record()
        low, high = found["spread"]
        sides = f"{found['ours']:.4g}" + ("" if found["theirs"] is None else f" and {found['theirs']:.4g}")
        return (
            f"{self.name:22} {found['value']:8.3f}  [{low:.3f}, {high:.3f}]  target {found['target']:8} "
            f"{'met' if self.met else 'NOT MET':8} {self.text}: {sides} {self.unit}"
        )


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of one value, twice that."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int, most: float = math.inf
) -> tuple[list[float], list[float]]:
    """Seconds of both, one after the other, each the first in every other round; ends after ``most`` seconds."""
    found: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    for number in range(rounds):
        for side in (0, 1) if number % 2 else (1, 0):
            found[side].append(seconds((ours, theirs)[side]))
        if time.perf_counter() - began > most:
            break
    return found


def process(*command: str) -> Callable[[], object]:
    """A process of its own, which must succeed."""
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
