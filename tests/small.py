"""What several tests train: small networks, recipes of a few steps, and stages made for one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nestling.data.dataset import LabelledData
from nestling.engine import stage as engine_stage
from nestling.engine.fit import fit
from nestling.engine.run import Run
from nestling.engine.stage import StageRun
from nestling.methods import Coins, EndToEnd, FlatMarginal, Nested, Robust
from nestling.methods.recipe import Optimizer, Recipe, Stage
from nestling.models.backbones import conv_block
from nestling.models.build import build_model
from nestling.models.model import Model
from nestling.models.nested import NestedModel
from nestling.objectives.terms import CrossEntropy
from nestling.taxonomy import Taxonomy

BACKBONE = "conv:4/8"

PAPER = {"marginal": False, "reading": "exact", "balance": "rows", "calibration": "both", "rejection_epochs": 1}
PLATEAU = Optimizer(name="adam", lr=(3e-3, 2e-3, 1e-3), schedule="plateau", weight_decay=0.0, patience=1)

RECIPES: dict[str, Recipe] = {
    "nested": Nested(epochs=(1, 2, 2), batch_size=24, steps_per_epoch=5),
    "nested, the paper's": Nested(epochs=(2, 1, 2), batch_size=32, steps_per_epoch=4, optimizer=PLATEAU, **PAPER),
    "flat-marginal": FlatMarginal(epochs=3, batch_size=32, steps_per_epoch=6, optimizer=Optimizer(name="sgd", lr=0.05)),
    "end-to-end": EndToEnd(epochs=3, batch_size=8, steps_per_epoch=None, balance="rows"),
    "coins": Coins(variant="coinsp", epochs=4, batch_size=24, steps_per_epoch=5, learn_temperature=True, mlp=6),
    "robust": Robust(epochs=3, batch_size=24, steps_per_epoch=5, schedule="auto", strength=1.0),
}
"""Every method, each optimiser, both kinds of order; all with augmentation."""


def partly_labelled(data: LabelledData) -> LabelledData:
    """Every coarse label, 60 % of the middle and 50 % of the fine ones."""
    return data.keep({"coarse": 1.0, "middle": 0.6, "fine": 0.5}, seed=3)


def rows() -> LabelledData:
    """120 random images whose brightness says the class, a third of them labelled finely."""
    taxonomy = Taxonomy.from_paths(["a/p/1", "a/p/2", "a/q/3", "b/r/4", "b/r/5", "b/r/6"])
    generator = np.random.default_rng(0)
    fine = np.arange(120) % 6
    images = 30 * fine[:, None, None, None] + generator.integers(0, 60, (120, 1, 8, 8))
    labels = taxonomy.complete(np.stack([np.full(120, -1), np.full(120, -1), fine], axis=1))
    data = LabelledData(torch.from_numpy(images.astype(np.uint8)), labels, taxonomy, name="made")
    return data.keep({"middle": 0.7, "fine": 0.4}, seed=1)


def quick(recipe: Recipe, data: LabelledData, out: Path | None = None, **options: Any) -> Run:
    """``fit`` on the small network, in fp32 on the CPU, without a word."""
    if options.get("model") is None:
        options.setdefault("backbone", BACKBONE)
    return fit(recipe, data, out=out, **{"device": "cpu", "precision": "fp32", "verbose": False, **options})


class DropoutBackbone(nn.Module):
    """Two maps, and dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_block(1, 4, "batch"), conv_block(4, 8, "batch")
        self.dropout, self.pool = nn.Dropout(0.3), nn.MaxPool2d(2)
        self.channels = (4, 8)

    def forward(self, images: Tensor) -> list[Tensor]:
        first = self.first(images)
        return [first, self.second(self.dropout(self.pool(first)))]


def dropout_model(data: LabelledData, seed: int = 0) -> Model:
    """A nested network on ``DropoutBackbone``."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        config = {"backbone": "dropout", "input_shape": list(data.image_shape), "rejection": False}
        return NestedModel(DropoutBackbone(), data.taxonomy, config)


def small_model(data: LabelledData, seed: int = 0, **options: Any) -> Model:
    """The nested network on the small backbone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return build_model(data.taxonomy, data.image_shape, BACKBONE, **options)


def recipe_of(stages: Callable[[Recipe, Model, LabelledData], Iterator[Stage]], **fields: Any) -> Recipe:
    """A recipe whose algorithm is ``stages``, on nested learning's network."""
    return type("Made", (Recipe,), {"method": "nested", "stages": stages})(**fields)


def one_stage(build: Callable[[Model, LabelledData], dict[str, Any]] | None = None, **fields: Any) -> Recipe:
    """A recipe of one stage that trains everything on the fine labels, changed by what ``build`` returns."""

    def stages(recipe: Recipe, model: Model, data: LabelledData) -> Iterator[Stage]:
        stage = Stage(
            name="only",
            data=data,
            objective=CrossEntropy("fine"),
            trainable=[model.backbone, model.decoder, model.head["fine"]],  # type: ignore[attr-defined]
            optimizer=recipe.optimizer,
            lr=0.01,
            epochs=recipe.epochs,  # type: ignore[arg-type]
            steps_per_epoch=recipe.steps_per_epoch,
            batch_size=recipe.batch_size,
        )
        yield replace(stage, **build(model, data)) if build else stage

    return recipe_of(stages, **{"epochs": 2, "batch_size": 48, **fields})


class Crash(Exception):
    """Stands for the end of a process: nothing of ours catches it."""


class Watch:
    """Counts the steps that are taken, as (stage, epoch, step); it can make one of them crash, or a signal come.

    ``watch.crash_at`` and ``watch.stop_at`` are numbers of steps taken since the watch began.
    """

    def __init__(self, monkeypatch: Any) -> None:
        self.taken: list[tuple[str, int, int]] = []
        self.crash_at: int | None = None
        self.stop_at: int | None = None
        original = StageRun.step

        def step(run: StageRun, *arguments: Any) -> None:
            if len(self.taken) == self.crash_at:
                self.crash_at = None
                raise Crash
            where = run.stage.name, run.progress.epoch, run.progress.step
            original(run, *arguments)
            self.taken.append(where)

        def received() -> int | None:
            if len(self.taken) == self.stop_at:
                return 15
            return None

        monkeypatch.setattr(StageRun, "step", step)
        monkeypatch.setattr("nestling.interrupt.received", received)


def checkpoint_every_epoch(monkeypatch: Any) -> None:
    """However long writing takes."""
    monkeypatch.setattr(engine_stage, "CHECKPOINT_SHARE", 1e12)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    """Bit for bit."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different, different
