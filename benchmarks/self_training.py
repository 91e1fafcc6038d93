"""Look for a nested network that flat + marginal does not beat: ``python benchmarks/self_training.py [SEEDS]``.

Every candidate is a network (nested in cascade, nested jointly, one flat softmax) and what is added to it (guesses of
a slow copy inside the known class, as hard labels or with their doubts, averaged weights, coins' instance term on the
rows without a fine label), each added to all three. Equal rows, labels,
steps and rate; mnist and fashion_mnist at 14 x 14 pixels and cifar100 at 16 x 16, with 2 % and 10 % of fine labels,
scored on training rows that were held out. Test rows are never read. Needs NESTLING_DATA.

Every training is kept in runs/choose and read back. Writes results/self-training-choice.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
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
SETTINGS = tuple((source, fine) for source in ("mnist", "fashion_mnist", "cifar100") for fine in (0.02, 0.1))
STEPS = {"steps_per_epoch": 20, "batch_size": 64, "patience": None, "optimizer": Optimizer(lr=3e-3)}
ADDED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "hard": {"self_training": 1.0, "certain": 0.8},
    "hard, averaged": {"self_training": 1.0, "certain": 0.8, "averaged": True},
    "surer, averaged": {"self_training": 1.0, "certain": 0.95, "averaged": True},
    "soft, averaged": {"self_training": 1.0, "averaged": True},
    "instances": {"weight": 0.1},
}
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


def candidates() -> dict[str, Recipe]:
    """By name: the network, and what is added to it."""
    networks: dict[str, Any] = {
        "cascade": lambda added: recipe(Nested, added, epochs=(7, 8, 25)),
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
    made = candidates()[name]
    if name.startswith("cascade") and len(train.taxonomy.levels) == 2:
        made = replace(made, epochs=(10, 30))
    run = fit(made, train, seed=seed, verbose=False)
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


def main(seeds: list[int], sources: list[str]) -> None:
    """Train every candidate that is not trained yet, and write the table."""
    began = time.monotonic()
    settings = [setting for setting in SETTINGS if setting[0] in sources]
    run_jobs(
        [
            Job(f"{source} {fine} {name} {seed}", carry_out, (source, fine, name, seed))
            for seed in seeds
            for source, fine in settings
            for name in candidates()
        ]
    )
    table = []
    for source, fine in settings:
        found = {
            name: [json.loads(record(source, fine, name, seed).read_text()) for seed in seeds] for name in candidates()
        }
        right = {
            name: np.stack([np.frombuffer(one["right"].encode(), np.uint8) - 48.0 for one in each])
            for name, each in found.items()
        }
        for name, each in found.items():
            row = f"{source}, {fine:.0%} fine | {name}"
            for column in FIGURES:
                values = [one[column] for one in each]
                std = float(np.std(values, ddof=1)) if len(values) > 1 else None
                table.append({"row": row, "column": column, "mean": float(np.mean(values)), "std": std})
            rival = f"flat: {name.split(': ')[1]}"
            mean, low, high = paired_interval(right[name], right[rival])
            table.append({"row": row, "column": "fine, over flat", "mean": mean, "interval": [low, high]})
            print(
                row, "|", ", ".join(f"{c} {np.mean([one[c] for one in each]):.3f}" for c in FIGURES),
                f"| over {rival}: {100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", flush=True,
            )  # fmt: skip
    command = f"python benchmarks/self_training.py {len(seeds)} {' '.join(sources)}"
    write_table("self-training-choice", command, seeds, table, began)


if __name__ == "__main__":
    main(list(range(int(sys.argv[1]))), sys.argv[2:] or ["mnist", "fashion_mnist", "cifar100"])
