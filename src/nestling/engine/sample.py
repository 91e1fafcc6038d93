"""What the maps that a stage keeps will take, found on those of a few rows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nestling import collective
from nestling.engine.features import Features
from nestling.engine.room import choose
from nestling.engine.stage import StageRun

MAPPED = 64
"""Rows whose maps stand for those of all."""


@dataclass(frozen=True, kw_only=True)
class Maps:
    """Kept maps, as a stage will find them."""

    size: int = 0
    """Bytes of what the stage would keep."""
    place: str | None = None
    """device, memory or disk, by what is free now; None: they are not kept."""
    held: int = 0
    """Bytes of memory that maps take meanwhile: the stage's own or, where it keeps none, those of a stage before."""
    making: int = 0
    """Bytes of memory while they are made, those of the stage before included."""
    seconds: float = 0.0
    """That they take to make, once."""


def sample_maps(run: StageRun, folder: Path | None, lying: int) -> tuple[Maps, Features | None]:
    """What the maps of a stage will take, and those of a few rows: the run goes on with these rows alone.

    ``lying``: bytes of memory that the maps of a stage before take.
    """
    stage, engine = run.stage, run.engine
    if run.order is None or not stage.prefix or stage.views is None:
        return Maps(held=lying, making=lying), None
    few = run.rows[np.linspace(0, len(run.rows) - 1, min(len(run.rows), MAPPED)).astype(np.int64)]
    data, seconds = engine.device_data(stage.data), 0.0
    made = before = engine.features
    # The first pass warms up.
    for _ in range(2):
        began = time.perf_counter()
        made = Features(data, few, stage.prefix, engine.runtime, 1, stage.augmentation, before=before)
        seconds = time.perf_counter() - began
    assert made is not None
    times = len(np.unique(run.rows)) * stage.views / len(made)
    size = round(made.maps.nbytes * times)
    place = collective.of_first(lambda: choose(size, data.device, folder))
    if place is None:
        return Maps(size=size, held=lying, making=lying), None
    anew = before is None or made.maps is not before.maps
    held = size if place != "disk" else 0
    engine.features, run.rows = made, np.resize(few, len(run.rows))
    maps = Maps(size=size, place=place, held=held, making=held + lying * anew, seconds=seconds * times * anew)
    return maps, made
