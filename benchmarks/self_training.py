"""Look for a nested network that flat + marginal does not beat: ``python benchmarks/self_training.py screen|final``.

Every candidate is a network (nested in cascade, nested jointly, one flat softmax) and what is added to it (averaged
weights, guesses of a slow copy inside the known class, as hard labels or with their doubts, coins' instance term on the
rows without a fine label), each added to all three. Equal rows, labels, steps and rate; mnist and fashion_mnist at
14 x 14 pixels and cifar100 at 16 x 16, scored on training rows that were held out. Test rows are never read.

screen     everything, 2 % of fine labels, one seed: results/self-training-screen.json
final      nothing and what the screen left, 2 % and 10 %, three seeds: results/self-training-choice.json

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
from nestling.evaluate.accuracy import paired_interval
from nestling.evaluate.compare import excess, gap
from nestling.evaluate.measure import CLEAN, measure, outputs_of
from nestling.files import write_json
from nestling.methods import FlatMarginal, Nested, Optimizer, Recipe
from nestling.methods.recipe import Stage
from nestling.methods.self_training import Following
from nestling.models.model import Model, Outputs
from nestling.objectives.momentum import MomentumContrast
from nestling.objectives.terms import Objective

RUNS = Path("runs/choose/self-training")
SOURCES = ("mnist", "fashion_mnist", "cifar100")
STEPS = {"steps_per_epoch": 20, "batch_size": 64, "patience": None, "optimizer": Optimizer(lr=3e-3)}
ADDED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "averaged": {"averaged": True},
    "hard": {"self_training": 1.0, "certain": 0.8},
    "hard, averaged": {"self_training": 1.0, "certain": 0.8, "averaged": True},
    "surer, averaged": {"self_training": 1.0, "certain": 0.95, "averaged": True},
    "soft, averaged": {"self_training": 1.0, "averaged": True},
    "instances": {"weight": 0.1},
}
FINAL = ("nothing", "hard, averaged")
"""What the screen left."""

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


def recipe(kind: type[Recipe], added: Mapping[str, Any], **fields: Any) -> Recipe:
    """A network's recipe, with what is added."""
    return (INSTANCES[kind] if "weight" in added else kind)(**STEPS, **fields, **added)


def candidates(levels: int) -> dict[str, Recipe]:
    """By name: the network, and what is added to it. The cascade's epochs are shared out as its default does."""
    networks: dict[str, Any] = {
        "cascade": lambda added: recipe(Nested, added, epochs=(2,) * (levels - 1) + (42 - 2 * levels,)),
        "joint": lambda added: recipe(Nested, added, epochs=40, cascade=False),
        "flat": lambda added: recipe(FlatMarginal, added, epochs=40),
    }
    return {f"{network}: {extra}": make(added) for network, make in networks.items() for extra, added in ADDED.items()}


@lru_cache(maxsize=1)
def training_rows(source: str) -> LabelledData:
    """All training rows of a source, at a quarter of their pixels."""
    return load_data(source, "train", image_size=16 if source == "cifar100" else 14)


def rows(source: str, fine: float, seed: int) -> tuple[LabelledData, LabelledData]:
    """6,000 training rows, labelled in part, and 4,000 others that score."""
    data, start = training_rows(source), 10_000 * seed
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


def over(row: str, name: str, right: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """A candidate's fine accuracy above the flat network's with the same addition, and above its own with none."""
    network, added = name.split(": ")
    for rival, column in ((f"flat: {added}", "fine, over flat"), (f"{network}: nothing", "fine, over nothing added")):
        if rival != name:
            mean, low, high = paired_interval(right[name], right[rival])
            print(f"{row} | over {rival}: {100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", flush=True)
            yield {"row": row, "column": column, "mean": mean, "interval": [low, high]}


def main(what: str, seeds: list[int], shares: tuple[float, ...], extras: tuple[str, ...]) -> None:
    """Train every candidate that is not trained yet, and write the table."""
    began = time.monotonic()
    names = [f"{network}: {extra}" for network in ("cascade", "joint", "flat") for extra in extras]
    settings = list(product(SOURCES, shares))
    run_jobs(
        [
            Job(f"{source} {fine} {name} {seed}", carry_out, (source, fine, name, seed))
            for (source, fine), seed, name in product(settings, seeds, names)
        ]
    )
    table, everywhere = [], {name: [] for name in names}
    for source, fine in settings:
        found = {name: [json.loads(record(source, fine, name, seed).read_text()) for seed in seeds] for name in names}
        right = {name: np.array([[int(bit) for bit in one["right"]] for one in found[name]], float) for name in names}
        for name, each in found.items():
            line = f"{source}, {fine:.0%} fine | {name}"
            print(line, "|", ", ".join(f"{c} {np.mean([one[c] for one in each]):.3f}" for c in FIGURES), flush=True)
            table += [*cells(line, each), *over(line, name, right)]
            everywhere[name].append(right[name])
    together = {name: np.concatenate(each, axis=1) for name, each in everywhere.items()}
    for name in names:
        table += over(f"all settings | {name}", name, together)
    write_table(f"self-training-{what}", f"python benchmarks/self_training.py {sys.argv[1]}", seeds, table, began)


if __name__ == "__main__":
    {
        "screen": lambda: main("screen", [0], (0.02,), tuple(ADDED)),
        "final": lambda: main("choice", [0, 1, 2], (0.02, 0.1), FINAL),
    }[sys.argv[1]]()
