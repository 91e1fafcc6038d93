"""What ``test_engine`` runs on two processes, and on one to compare with: ``two_processes.py MEETING_FILE OUT``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nestling import collective
from nestling.data.batch import Batch
from nestling.data.dataset import LabelledData
from nestling.engine.fit import fit
from nestling.errors import DivergedError
from nestling.methods import FlatMarginal, Nested
from nestling.methods.recipe import Optimizer, Recipe, Select
from nestling.models.model import Model, Outputs
from nestling.objectives.reducers import Mean
from nestling.objectives.terms import CrossEntropy
from nestling.taxonomy import Taxonomy
from small import BACKBONE, one_stage

SGD = Optimizer(name="sgd", lr=0.1)

CURVES: dict[str, Recipe] = {
    "nested": Nested(epochs=(1, 1, 2), batch_size=15, steps_per_epoch=6, norm="none", optimizer=SGD),
    "paper": Nested(
        epochs=1, batch_size=8, norm="none", marginal=False, reading="exact", balance="rows", optimizer=SGD
    ),
    "flat": FlatMarginal(epochs=2, batch_size=9, steps_per_epoch=7, norm="none", optimizer=SGD),
}


def rows() -> LabelledData:
    """120 random images whose brightness says the class, a third of them labelled finely."""
    taxonomy = Taxonomy.from_paths(["a/p/1", "a/p/2", "a/q/3", "b/r/4", "b/r/5", "b/r/6"])
    generator = np.random.default_rng(0)
    fine = np.arange(120) % 6
    images = 30 * fine[:, None, None, None] + generator.integers(0, 60, (120, 1, 8, 8))
    labels = taxonomy.complete(np.stack([np.full(120, -1), np.full(120, -1), fine], axis=1))
    data = LabelledData(torch.from_numpy(images.astype(np.uint8)), labels, taxonomy, name="made")
    return data.keep({"middle": 0.7, "fine": 0.4}, seed=1)


class OneRowIsNotFinite(CrossEntropy):
    """NaN where row 7 is, which only one process sees."""

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        values, _ = super().forward(outputs, batch)
        return torch.where(batch.index == 7, torch.nan, values), torch.ones_like(values)


def train(recipe: Recipe, data: LabelledData, model: Model | None = None) -> Any:
    backbone = {} if model is not None else {"backbone": BACKBONE}
    return fit(recipe, data, model, device="cpu", precision="fp32", verbose=False, **backbone)  # type: ignore[arg-type]


def results() -> dict[str, Any]:
    """Everything that must be the same on one process and on two."""
    data, found = rows(), {}
    for name, recipe in CURVES.items():
        run = train(recipe, data)
        state = run.model.state_dict()
        for tensor in state.values():
            assert torch.equal(collective.all_sum(tensor), collective.world_size() * tensor), "the processes differ"
        found[name] = {
            "losses": [record["loss"] for record in run.history],
            "validation": [record["validation loss"] for record in run.history],
            "names": list(state),
            "weights": torch.cat([tensor.flatten() for tensor in state.values()]).tolist(),
        }
    try:
        train(one_stage(lambda model, rows: {"trainable": [model]}), data)
    except ValueError as error:
        found["unused parameter"] = str(error)
    try:
        train(one_stage(lambda model, rows: {"objective": OneRowIsNotFinite("fine")}, epochs=20), data)
    except DivergedError as error:
        found["one process diverges"] = str(error)
    # A metric that each process would answer in its own way: the first decides.
    calls = iter(range(100))

    def metric(*_: object) -> float:
        return float(next(calls) if collective.rank() == 0 else -next(calls))

    run = train(one_stage(lambda model, rows: {"select": Select(metric, "score"), "patience": 1}, epochs=4), data)
    found["metric"] = [record["score"] for record in run.history]
    found["gradient of the mean"] = gradient_of_the_mean()
    return found


def gradient_of_the_mean() -> list[float]:
    """Of a batch whose labelled rows all fall to the second process: averaged over processes, as in training."""
    values = torch.arange(1.0, 9.0, requires_grad=True)
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0, 1.0, 0.0, 0.0])
    mine = slice(collective.rank(), None, collective.world_size())
    Mean()(values[mine] ** 2, weights[mine], None).backward()  # type: ignore[arg-type]
    assert values.grad is not None
    return (collective.all_sum(values.grad) / collective.world_size()).tolist()


def main() -> None:
    torch.set_num_threads(1)
    meeting, out = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )
    assert collective.world_size() == 2
    found = results()
    if collective.rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
