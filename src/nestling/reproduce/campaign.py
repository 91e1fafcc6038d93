"""A table's trials: several at once, each with a record of its own, and read back where they are finished."""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nestling.commands.jobs import Job, run_jobs
from nestling.errors import unknown
from nestling.files import write_json
from nestling.provenance import commit
from nestling.reproduce.table import PRECISION, Cell, Place, Table, Trial


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """One table at one scale."""

    table: Table
    scale: str
    seeds: Sequence[int]
    folder: Path
    """Holds a record for each trial."""
    trainings: Path
    """Holds the run folders, which other tables of this scale share."""
    data_dir: str | None = None
    device: str = "auto"
    compile: bool = False
    rows: Sequence[str] | None = None
    """Only these are trained."""
    jobs: int | None = None
    """Trainings at once; None: one on a GPU, else one per core."""
    deadline: float = float("inf")
    """Seconds since 1970; no training is begun after it."""

    def trials(self) -> list[tuple[Trial, int]]:
        """Every trial on every seed; the first seed comes first, so that a budget's end leaves whole tables."""
        return [(trial, seed) for seed in self.seeds for trial in self.table.trials(self.scale)]

    def place(self, trial: Trial, seed: int) -> Place:
        """Where one trial works."""
        name = f"{re.sub(r'[^a-z0-9]+', '-', trial.row.lower()).strip('-')}-{seed}"
        return Place(
            record=self.folder / f"{name}.json",
            trainings=self.trainings,
            seed=seed,
            data_dir=self.data_dir,
            device=self.device,
            precision=PRECISION[self.scale],
            compile=self.compile,
        )

    def run(self) -> dict[int, list[dict[str, Any]]]:
        """Carry out what is still to do; by seed the record of each trial that is finished.

        Raises UsageError where one of ``rows`` is none of the table.
        """
        names = [trial.row for trial in self.table.trials(self.scale)]
        for row in self.rows or ():
            if row not in names:
                raise unknown("row", row, names)
        every = [(trial, self.place(trial, seed)) for trial, seed in self.trials()]
        wanted = [(trial, place) for trial, place in every if self.rows is None or trial.row in self.rows]
        open_ones = [(trial, place) for trial, place in wanted if stored(trial, place) is None]
        if self.scale == "smoke":
            for trial, place in open_ones:
                carry_out(trial, place, self.deadline)
        elif open_ones:
            # One thread each in what counts its own: scikit-learn's solvers.
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            run_jobs(
                [Job(place.record.stem, carry_out, (trial, place, self.deadline)) for trial, place in open_ones],
                workers=self.jobs or (1 if self.on_gpu() else None),
            )
        records: dict[int, list[dict[str, Any]]] = {seed: [] for seed in self.seeds}
        for trial, place in every:
            record = stored(trial, place)
            if record is not None:
                records[place.seed].append(record)
        return records

    def missing(self) -> list[str]:
        """Trials that are not finished, by the names of their folders."""
        places = [(trial, self.place(trial, seed)) for trial, seed in self.trials()]
        return [place.record.stem for trial, place in places if stored(trial, place) is None]

    def on_gpu(self) -> bool:
        """Where trainings come one after the other."""
        import torch

        return self.device.startswith("cuda") or (self.device == "auto" and torch.cuda.is_available())


def carry_out(trial: Trial, place: Place, deadline: float) -> bool:
    """Train and measure one trial, and write its record; False, and nothing, where the deadline is over."""
    if time.time() > deadline:
        return False
    began = time.monotonic()
    cells = trial.measure(trial, place)
    record = {
        "key": trial.key(),
        "cells": [pack(cell) for cell in cells],
        "seconds": round(time.monotonic() - began, 2),
        "commit": commit(),
    }
    write_json(place.record, record)
    return True


def stored(trial: Trial, place: Place) -> dict[str, Any] | None:
    """The record of a trial that is finished, None where it is not, or was another one."""
    try:
        record = json.loads(place.record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if record.get("key") == json.loads(json.dumps(trial.key())) else None


def pack(cell: Cell) -> dict[str, Any]:
    """A cell as JSON; samples that are all 0 or 1 take a bit each."""
    samples: Any = list(cell.samples)
    if samples and set(samples) <= {0.0, 1.0}:
        bits = np.packbits(np.asarray(samples, dtype=np.uint8)).tobytes()
        samples = {"n": len(samples), "bits": base64.b64encode(bits).decode("ascii")}
    return {"row": cell.row, "column": cell.column, "value": cell.value, "samples": samples, "count": cell.count}


def unpack(stored: dict[str, Any]) -> Cell:
    """The inverse of ``pack``."""
    samples = stored["samples"]
    if isinstance(samples, dict):
        bits = np.frombuffer(base64.b64decode(samples["bits"]), dtype=np.uint8)
        samples = np.unpackbits(bits, count=samples["n"]).astype(float).tolist()
    return Cell(stored["row"], stored["column"], stored["value"], tuple(samples), stored["count"])
