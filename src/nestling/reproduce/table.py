"""What a table of a paper is made of: rows to train, columns to measure, the paper's numbers, and its claims."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nestling.config import to_dict
from nestling.errors import unknown
from nestling.methods.recipe import Recipe
from nestling.reproduce.rows import Rows

AXIS = re.compile(r"^(?:(.*) )?(layer|step|rank|epoch|s|C|lambda|strength|share|epsilon) ([\d.]+)$")
SCALES = ("smoke", "small", "paper")
PRECISION = {"smoke": "fp32", "small": "fp32", "paper": "auto"}
"""Below the paper's scale figures are the same wherever they are made."""


@dataclass(frozen=True)
class Cell:
    """One measured number. ``samples`` are what it is the mean of (test rows, splits), which comparisons pair."""

    row: str
    column: str
    value: float
    samples: tuple[float, ...] = ()
    count: int = 0
    """Rows that a share is of, where there are no samples."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a trial works, and where data and device are."""

    record: Path
    """The file that its figures are written to."""
    trainings: Path
    """The folder of all run folders of this scale: tables share what they train alike."""
    seed: int
    data_dir: str | None
    device: str
    precision: str
    compile: bool = False

    def training(self, trial: Trial, **more: Any) -> Path:
        """The run folder of a trial's network, named by all that its weights depend on.

        ``more``: of a network that is made from it.
        """
        told = json.dumps({**trial.trained_by(), "precision": self.precision, **more}, sort_keys=True)
        digest = hashlib.sha256(told.encode()).hexdigest()[:12]
        return self.trainings / f"{trial.recipe.method}-{digest}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training on one seed, and what is measured on it.

    ``measure(trial, place)`` trains or reads back, and gives the cells; a function of a module, which a process of its
    own can import.
    """

    row: str
    recipe: Recipe
    rows: Rows
    measure: Callable[[Trial, Place], list[Cell]]
    options: Mapping[str, Any] = field(default_factory=dict)
    """For ``measure``."""
    whole: bool = True
    """Every training row trains; else a tenth is kept for validation, and a tenth for calibration."""
    backbone: str = "auto"

    def key(self) -> dict[str, Any]:
        """All that its figures depend on, as JSON."""
        return {
            "row": self.row,
            **self.trained_by(),
            "measure": f"{self.measure.__module__}.{self.measure.__qualname__}",
            "options": dict(self.options),
        }

    def trained_by(self) -> dict[str, Any]:
        """All that its weights depend on besides seed and precision, as JSON."""
        return {
            "method": self.recipe.method,
            "recipe": to_dict(self.recipe),
            "rows": self.rows.key(),
            "whole": self.whole,
            "backbone": self.backbone,
        }


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper: the cell ``more`` lies above the cell ``less`` by more than ``least``."""

    id: str
    text: str
    more: tuple[str, str]
    """Row and column."""
    less: tuple[str, str]
    paper: float | None = None
    """The difference in the paper; None where it prints none."""
    least: float = 0.0


def better(id: str, text: str, more: str, less: str, paper: float | None = None, column: str = "single") -> Claim:
    """The claim that one row lies above another in a column."""
    return Claim(id=id, text=text, more=(more, column), less=(less, column), paper=paper)


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What a row must reach; below it nothing was learned, and no claim is decided."""

    row: str
    column: str
    least: float


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table or figure of a paper."""

    name: str
    paper: str
    about: str
    """What is shown, and how it departs from the paper."""
    trials: Callable[[str], list[Trial]]
    """By scale."""
    floor: Floor
    claims: Sequence[Claim]
    printed: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """The paper's numbers by row and column."""
    seeds: Mapping[str, int] = field(default_factory=lambda: {"smoke": 1, "small": 1, "paper": 1})
    units: Mapping[str, str] = field(default_factory=dict)
    """Of columns that are no shares, by how they begin: bytes, seconds, millions."""
    fixed: Callable[[], list[Cell]] = list
    """Cells that no training is needed for."""
    derived: Callable[[Sequence[Cell]], list[Cell]] = lambda cells: []
    """Further cells of one seed, made from all that were measured on it."""
    drawn: str = ""
    """A pattern of the columns that the figure shows; all by default."""
    picture: Callable[[Table, dict[str, Any], Path], bytes] | None = None
    """Draws the figure as PNG, from the table, its result and the folder of the records, in place of the usual one."""
    scales: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Fields that are others at a scale: what is shown there, its floor, its claims."""

    def at(self, scale: str) -> Table:
        """The table as it is at a scale."""
        return replace(self, **self.scales.get(scale, {}))


def on_axis(column: str) -> tuple[str, str, float] | None:
    """``top-5 layer 3`` as kind, axis and place on it (``top-5``, ``layer``, 3.0); None for a column by itself."""
    match = AXIS.match(column)
    return None if match is None else (match[1] or "", match[2], float(match[3]))


def check_scale(scale: str) -> None:
    """Raise UsageError for an unknown one."""
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
