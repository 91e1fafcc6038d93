"""What is measured on a trained network, on test rows and at the end alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nestling.data.dataset import LabelledData
from nestling.data.loader import DeviceData
from nestling.engine.fit import fit
from nestling.engine.predict import predict
from nestling.engine.run import Run
from nestling.engine.runtime import Runtime
from nestling.evaluate.linear import in_top
from nestling.files import write_json
from nestling.models.model import Outputs
from nestling.reproduce.rows import Parts, Rows
from nestling.reproduce.table import Cell, Place, Trial

SINGLE, ENSEMBLE = "single", "ensemble"
"""Columns: the last classifier, and all of them."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network that is trained, and the rows that it was trained for."""

    run: Run
    train: LabelledData
    validation: LabelledData
    """Without a row where nothing is chosen."""
    test: LabelledData
    runtime: Runtime

    @property
    def level(self) -> str:
        """The finest, which all figures are of."""
        return self.test.taxonomy.levels[-1]

    def outputs(self, data: LabelledData) -> tuple[Outputs, Tensor]:
        """Of every row, without augmentation, and the labels (n, levels)."""
        self.runtime.prepare(self.run.model)
        rows = DeviceData(data, self.run.preprocessing, self.runtime.device)
        return predict(self.run.model, rows, self.runtime)

    def embed(self, data: LabelledData) -> np.ndarray:
        """Features (n, d) of every row: the pooled last map of the backbone."""
        return self.outputs(data)[0].embedding.cpu().numpy()

    def logits(self, data: LabelledData) -> tuple[dict[str, Tensor], Tensor]:
        """Of every output for every row, and the labels (n,) of the finest level."""
        outputs, labels = self.outputs(data)
        return {name: scores.cpu() for name, scores in outputs.logits.items()}, labels[:, -1].cpu()


@lru_cache(maxsize=2)
def load(rows: Rows, data_dir: str | None, seed: int = 0) -> Parts:
    """The rows, held for the next trial of this process."""
    return rows.load(data_dir, seed)


def trained(trial: Trial, place: Place) -> Trained:
    """Train the trial's recipe, or read it back; how long a training took that nothing interrupted is noted beside."""
    parts = load(trial.rows, place.data_dir, place.seed)
    folder = place.training(trial)
    began = None if folder.exists() else time.monotonic()
    run = fit(
        trial.recipe,
        parts.train,
        out=folder,
        seed=place.seed,
        device=place.device,
        precision=place.precision,
        validation=parts.validation,
        backbone=trial.backbone,
        compile=place.compile,
        verbose=False,
        whole=trial.whole,
    )
    if began is not None:
        write_json(took(folder), {"seconds": round(time.monotonic() - began, 2)})
    runtime = Runtime.choose(place.device, place.precision)
    kept = parts.train.subset([]) if parts.validation is None else parts.validation
    return Trained(run=run, train=parts.train, validation=kept, test=parts.test, runtime=runtime)


def took(folder: Path) -> Path:
    """The file that says how long a training took."""
    return folder.with_name(f"{folder.name}.json")


def accuracies(trial: Trial, place: Place) -> list[Cell]:
    """Of the classifier behind each layer, of the last one (single), and of all of them together (ensemble).

    ``options``: ``top`` = 5 adds whether the class is among the five most probable ones.
    """
    found = trained(trial, place)
    return by_depth(trial.row, found, found.test, trial.options.get("top"))


def by_depth(row: str, found: Trained, data: LabelledData, top: int | None = None) -> list[Cell]:
    """The accuracies on some rows."""
    logits, labels = found.logits(data)
    layers = {name.replace("-", " "): s for name, s in logits.items() if name.startswith("layer-")}
    named: Mapping[str, Tensor] = {**layers, SINGLE: list(layers.values())[-1]}
    if len(layers) > 1:
        named = {**named, ENSEMBLE: logits[found.level]}
    cells = [share(row, name, scores, labels) for name, scores in named.items()]
    if top:
        cells += [share(row, f"top-{top} {name}", scores, labels, top) for name, scores in named.items()]
    return cells


def share(row: str, column: str, scores: Tensor, labels: Tensor, top: int = 1) -> Cell:
    """How often the label is among the ``top`` highest of scores (n, classes)."""
    right = in_top(scores, labels, top).to(torch.float32)
    return Cell(row, column, float(right.mean()), tuple(right.tolist()))
