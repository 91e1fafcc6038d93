"""Look for a nested network that flat + marginal does not beat: ``python benchmarks/self_training.py WHAT``.

Every candidate is a network (nested in cascade, one flat softmax, each at two learning rates) and what is added to it,
the same for all: averaged weights; guesses of a slow copy on another view, by all levels and inside the
known class, as hard labels or with their doubts; and rows without a fine label told apart by momentum contrast, as the
instance term of coins does by rows of weights. Equal rows, labels and steps; mnist and fashion_mnist at 14 x 14 pixels
and cifar100 at 16 x 16, scored on training rows that were held out. Test rows are never read.

screen     everything, 2 % of fine labels, seed 0: results/self-training-screen.json
final      what the screen left, 2 % and 10 %, seeds 1 to 3, other rows: results/self-training-choice.json
default    of these the epoch that is kept, the best by validation loss or the last, with two more seeds:
           results/self-training-default.json

Every training is kept in runs/choose and read back. Needs NESTLING_DATA.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch.nn.functional as F
from choose import log_loss, write_table
from torch import Tensor

from nestling.commands.jobs import Job, run_jobs
from nestling.data.batch import Batch
from nestling.data.dataset import LabelledData
from nestling.data.sources import load_data
from nestling.engine.fit import fit
from nestling.engine.runtime import Runtime
from nestling.evaluate.compare import excess, gap
from nestling.evaluate.measure import CLEAN, measure, outputs_of
from nestling.files import write_json
from nestling.methods import FlatMarginal, Nested, Optimizer, Recipe
from nestling.methods.recipe import Stage
from nestling.methods.self_training import Following
from nestling.models.model import Model, Outputs
from nestling.objectives.momentum import MomentumContrast
from nestling.objectives.terms import Objective
from nestling.reproduce.table import Cell
from nestling.reproduce.verdict import difference

RUNS = Path("runs/choose/self-training")
SOURCES = ("mnist", "fashion_mnist", "cifar100")
STEPS = {"steps_per_epoch": 20, "batch_size": 64, "selection": "likelihood"}
RATES = (3e-3, 1e-2)
ADDED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "last epoch": {"selection": "last"},
    "averaged": {"averaged": True},
    "hard": {"self_training": 1.0, "certain": 0.8},
    "hard, averaged": {"self_training": 1.0, "certain": 0.8, "averaged": True},
    "surer, averaged": {"self_training": 1.0, "certain": 0.95, "averaged": True},
    "soft, averaged": {"self_training": 1.0, "averaged": True},
    "instances": {"weight": 0.1},
}
NESTED, FLAT = ("cascade", "cascade at 1e-2"), ("flat", "flat at 1e-2")
FINAL = ("nothing", "last epoch", "surer, averaged", "averaged")
"""What the screen left: in the lead on most settings, for the cascade and for the flat softmax."""
AT_BEST = (NESTED[0], FLAT[0])
"""The networks of the final, each at the rate that leads in the screen where weights are averaged."""

TEMPERATURE, QUEUE, MOMENTUM = 0.2, 2048, 0.99
"""Of the instance term."""

TURBULENCE = "turbulence:0.5,0.5"
FIGURES = ("coarse", "fine", "fine distorted", "gap", "log loss")


class Told(MomentumContrast):
    """Rows without a fine label are told from each other by their finest bottleneck."""

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        features = F.normalize(outputs.features[self.output].float(), dim=1) / TEMPERATURE
        values, _ = super().forward(replace(outputs, features=outputs.features | {self.output: features}), batch)
        return values, (batch.labels[:, -1] < 0).float()


class WithInstances:
    """A recipe whose stages up to the finest level have the instance term beside their own."""

    weight: float

    def stages(self, model: Model, data: LabelledData) -> Iterator[Stage]:
        finest = data.taxonomy.levels[-1]
        for stage in super().stages(model, data):  # type: ignore[misc]
            if stage.until in (None, finest) and stage.epochs:
                term = Told(finest, model, model.calibration.sizes[finest][0], QUEUE, MOMENTUM)
                objective = Objective.of(stage.objective) + self.weight * term
                yield replace(stage, objective=objective, pairs=True, after_step=Following(term))
            else:
                yield stage


@dataclass(frozen=True, kw_only=True)
class NestedInstances(WithInstances, Nested):
    weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FlatInstances(WithInstances, FlatMarginal):
    weight: float = 0.0


INSTANCES: dict[type[Recipe], type[Recipe]] = {Nested: NestedInstances, FlatMarginal: FlatInstances}


def recipe(kind: type[Recipe], added: Mapping[str, Any], rate: float, **fields: Any) -> Recipe:
    """A network's recipe, with what is added."""
    kind = INSTANCES[kind] if "weight" in added else kind
    return kind(**{**STEPS, **added}, optimizer=Optimizer(lr=rate), **fields)


def candidates(levels: int) -> dict[str, Recipe]:
    """By name: the network, and what is added to it. The cascade's epochs are shared out as its default does."""
    cascade = (2,) * (levels - 1) + (42 - 2 * levels,)
    made: dict[str, Recipe] = {}
    for (extra, added), which in product(ADDED.items(), range(len(RATES))):
        made[f"{NESTED[which]}: {extra}"] = recipe(Nested, added, RATES[which], epochs=cascade)
        made[f"{FLAT[which]}: {extra}"] = recipe(FlatMarginal, added, RATES[which], epochs=40)
    return made


@lru_cache(maxsize=1)
def training_rows(source: str) -> LabelledData:
    """All training rows of a source, at a quarter of their pixels."""
    return load_data(source, "train", image_size=16 if source == "cifar100" else 14)


def rows(source: str, fine: float, seed: int) -> tuple[LabelledData, LabelledData]:
    """6,000 training rows, labelled in part, and 4,000 others that score; seed 5 of cifar100 has the screen's."""
    data = training_rows(source)
    start = 10_000 * seed % len(data)
    shares = {"fine": fine} | ({"middle": max(0.2, fine)} if "middle" in data.taxonomy.levels else {})
    train = data.subset(np.arange(start, start + 6000)).keep(shares, seed)
    return train, data.subset(np.arange(start + 6000, start + 10_000))


def carry_out(source: str, fine: float, name: str, seed: int) -> None:
    """Train one candidate, score it, and keep its figures and which held-out rows it gets right."""
    place = record(source, fine, name, seed)
    if place.exists():
        return
    train, held = rows(source, fine, seed)
    run = fit(candidates(len(train.taxonomy.levels))[name], train, seed=seed, verbose=False)
    outputs = outputs_of(run.model, run.preprocessing, held, Runtime.choose("cpu", "fp32"), [TURBULENCE])
    scored, finest = measure(run.model, outputs, held), held.taxonomy.levels[-1]
    right = scored.correct(held, finest)
    found = {
        "coarse": scored.correct(held, held.taxonomy.levels[0]).mean(),
        "fine": right.mean(),
        "fine distorted": scored.correct(held, finest, TURBULENCE).mean(),
        "gap": gap(excess([scored], held, finest, [CLEAN])),
        "log loss": log_loss(run, held, [TURBULENCE], reject=True),
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    write_json(place, {**found, "right": "".join(map(str, right.astype(int)))})


def record(source: str, fine: float, name: str, seed: int) -> Path:
    """Where a candidate's figures are kept."""
    return RUNS / f"{source}-{fine}" / f"{name}-{seed}.json".replace(" ", "_").replace(":", "")


def cells(row: str, each: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's cells of a candidate's figures."""
    return [
        {
            "row": row,
            "column": column,
            "mean": float(np.mean([one[column] for one in each])),
            "std": float(np.std([one[column] for one in each], ddof=1)) if len(each) > 1 else None,
        }
        for column in FIGURES
    ]


def over(row: str, name: str, fine: Mapping[str, dict[int, Cell]]) -> Iterator[dict[str, Any]]:
    """A cascade's fine accuracy above the better flat network's with the same addition; each one's above its own with
    nothing added."""
    network, added = name.split(": ")
    rivals = {"fine, over nothing added": f"{network}: nothing"}
    if network in NESTED:
        flat = [rival for rival in fine if rival in [f"{one}: {added}" for one in FLAT]]
        rivals["fine, over flat"] = max(flat, key=lambda rival: mean(c.value for c in fine[rival].values()))
    for column, rival in rivals.items():
        found = difference(fine[name], fine[rival])
        if rival != name and found is not None:
            middle, low, high = found
            print(f"{row} | over {rival}: {100 * middle:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", flush=True)
            yield {"row": row, "column": column, "mean": middle, "interval": [low, high]}


def main(
    what: str, seeds: list[int], shares: tuple[float, ...], networks: tuple[str, ...], extras: tuple[str, ...]
) -> None:
    """Train every candidate that is not trained yet, and write the table."""
    began = time.monotonic()
    names = [f"{network}: {extra}" for network in networks for extra in extras]
    settings = list(product(SOURCES, shares))
    run_jobs(
        [
            Job(f"{source} {fine} {name} {seed}", carry_out, (source, fine, name, seed))
            for extra, (source, fine), seed, network in product(extras, settings, seeds, networks)
            for name in (f"{network}: {extra}",)
        ]
    )
    table: list[dict[str, Any]] = []
    everywhere: dict[str, list[dict[int, Cell]]] = {name: [] for name in names}
    for source, share in settings:
        found = {name: [json.loads(record(source, share, name, seed).read_text()) for seed in seeds] for name in names}
        fine = {name: {seed: cell(name, one) for seed, one in zip(seeds, each)} for name, each in found.items()}
        for name, each in found.items():
            row = f"{source}, {share:.0%} fine | {name}"
            print(row, "|", ", ".join(f"{c} {mean(one[c] for one in each):.3f}" for c in FIGURES), flush=True)
            table += [*cells(row, each), *over(row, name, fine)]
            everywhere[name].append(fine[name])
    together = {
        name: {seed: Cell(name, "fine", *mean_of([cells[seed] for cells in each])) for seed in seeds}
        for name, each in everywhere.items()
    }
    for name in names:
        table += over(f"all settings | {name}", name, together)
    write_table(f"self-training-{what}", f"python benchmarks/self_training.py {sys.argv[1]}", seeds, table, began)


def cell(name: str, one: dict[str, Any]) -> Cell:
    """Its fine accuracy, row by row."""
    return Cell(name, "fine", one["fine"], tuple(float(bit) for bit in one["right"]))


def mean_of(cells: list[Cell]) -> tuple[float, tuple[float, ...]]:
    """The mean over settings, whose held-out rows are as many."""
    return mean(c.value for c in cells), tuple(np.mean([c.samples for c in cells], axis=0).tolist())


if __name__ == "__main__":
    {
        "screen": lambda: main("screen", [0], (0.02,), (*NESTED, *FLAT), tuple(ADDED)),
        "final": lambda: main("choice", [1, 2, 3], (0.02, 0.1), AT_BEST, FINAL),
        "default": lambda: main("default", [1, 2, 3, 4, 5], (0.02, 0.1), AT_BEST, FINAL[:2]),
    }[sys.argv[1]]()
