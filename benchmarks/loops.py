"""The loops that are compared: ours, as ``fit`` runs it, and those that a user writes by hand."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from networks import NETWORKS, SMALL, Network
from paired import seconds

from nestling.data.dataset import LabelledData
from nestling.engine.checkpoint import Checkpoints
from nestling.engine.fit import fit
from nestling.engine.runtime import DTYPES, Runtime, seeded
from nestling.engine.stage import StageRun
from nestling.methods import EndToEnd, Optimizer, Recipe, Stage
from nestling.methods.recipe import Context
from nestling.models.build import build_model
from nestling.models.model import Model
from nestling.taxonomy import Taxonomy


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large everything is."""

    backbone: str = "resnet18-16"
    side: int = 32
    num_rows: int = 8192
    batch: int = 128
    burst: int = 2
    """Steps that a loop takes at a time."""
    rounds: int = 100
    """An even number."""
    most: float = 75.0
    """Seconds after which a row makes do with the rounds it has: on a crowded machine a step takes ten times longer."""
    starts: int = 5
    """Processes that are started of each kind."""
    run_seconds: float = 60.0
    """Of the run whose checkpoints are timed."""
    networks: Mapping[str, Network] = field(default_factory=lambda: NETWORKS)
    """Whose memory is measured."""


TINY = Size(
    backbone="conv:4/8",
    side=8,
    num_rows=256,
    batch=32,
    burst=2,
    rounds=2,
    starts=1,
    run_seconds=0.5,
    networks=SMALL,
)


def made(size: Size) -> LabelledData:
    """Noise in colour, ten coarse and a hundred fine classes."""
    generator = np.random.default_rng(0)
    paths = [f"{coarse}/{coarse}{fine}" for coarse in range(10) for fine in range(10)]
    images = generator.integers(0, 256, (size.num_rows, 3, size.side, size.side), dtype=np.uint8)
    labels = generator.permutation(np.arange(size.num_rows) % len(paths))
    taxonomy = Taxonomy.from_paths(paths)
    rows = [paths[label].split("/") for label in labels]
    return LabelledData(inputs=torch.from_numpy(images), labels=taxonomy.encode(rows), taxonomy=taxonomy, name="noise")


class Bare:
    """A training loop as one writes it by hand: ``bare.run(5)`` takes five steps."""

    def __init__(self, model: Model, data: LabelledData, size: Size, precision: str, channels_last: bool) -> None:
        """``channels_last`` and ``precision`` other than fp32 are what a user has to know of; so is a fused step."""
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = copy.deepcopy(model).to(memory_format=self.layout)  # type: ignore[call-overload]
        self.images = data.inputs
        self.labels = torch.from_numpy(data.taxonomy.columns(data.labels))[:, -1]
        self.precision, self.batch = precision, size.batch
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4, fused=channels_last or None)
        self.order, self.at = torch.randperm(len(self.labels)), 0

    def run(self, steps: int) -> None:
        """Take so many steps."""
        for _ in range(steps):
            if self.at + self.batch > len(self.order):
                self.order, self.at = torch.randperm(len(self.order)), 0
            rows = self.order[self.at : self.at + self.batch]
            self.at += self.batch
            inputs = self.images[rows].to(torch.float32).div_(255).sub_(0.5).div_(0.29)
            inputs = inputs.contiguous(memory_format=self.layout)
            with torch.autocast("cpu", dtype=DTYPES.get(self.precision), enabled=self.precision != "fp32"):
                outputs = self.model(inputs)
            loss = F.cross_entropy(outputs.logits[self.model.outputs[-1]].float(), self.labels[rows])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if not math.isfinite(loss.item()):
                raise ValueError("the loss is not finite")


def network(data: LabelledData, size: Size) -> Model:
    """The network that every loop trains, in training mode."""
    with seeded(0):
        return build_model(data.taxonomy, data.image_shape, size.backbone, EndToEnd.method).train()


def one_stage(size: Size, steps: int, after_step: Callable[[Context], None]) -> Recipe:
    """One softmax in one epoch of so many steps, without augmentation, as the loops by hand have it."""

    class OneStage(EndToEnd):
        def stages(self, model: Model, data: LabelledData) -> Iterator[Stage]:
            stage = next(iter(super().stages(model, data)))
            yield replace(stage, select=None, after_step=after_step)

    return OneStage(
        epochs=1, steps_per_epoch=steps, batch_size=size.batch, optimizer=Optimizer(lr=1e-4), augmentation="none"
    )


class Enough(Exception):
    """Ends a training that has shown what it was to show."""


def beside(folder: Path, data: LabelledData, size: Size, **plain: Any) -> tuple[list[float], list[float]]:
    """Images/s of our loop and of one by hand, burst by burst, for each round.

    Ours is ``fit`` itself, log and all. Its hook after a step lets the other loop take as many steps, on a copy of the
    same network; each side is the first in every other round. ``plain``: precision and channels_last of the loop by
    hand; by default ours.
    """
    precision = Runtime.choose("cpu").precision
    found: tuple[list[float], list[float]] = ([], [])
    other: list[Bare] = []
    taken, began, first = 0, 0.0, time.perf_counter()

    def after_step(context: Context) -> None:
        nonlocal taken, began
        taken += 1
        if not other:
            other.append(Bare(context.model, data, size, **{"precision": precision, "channels_last": True, **plain}))
        elif taken % size.burst:
            return
        else:
            ended, number = time.perf_counter(), taken // size.burst
            # Ours, theirs, theirs, ours: theirs of this round and of the next, or those that were measured already.
            theirs = [seconds(lambda: other[0].run(size.burst)) for _ in range(2 * (number % 2))]
            # The first bursts of both warm up.
            if number > 2:
                images = size.burst * size.batch
                found[0].append(images / (ended - began))
                found[1].extend(images / s for s in theirs)
                if number % 2 == 0 and time.perf_counter() - first > size.most:
                    raise Enough
        began = time.perf_counter()

    recipe = one_stage(size, size.burst * (size.rounds + 2), after_step)
    with suppress(Enough):
        fit(recipe, data, out=folder, device="cpu", backbone=size.backbone, verbose=False)
    return found


def checkpointing(folder: Path, data: LabelledData, size: Size) -> tuple[float, float]:
    """Seconds that a run of about ``run_seconds`` spends in saving, by the default rules, and its seconds in all."""
    trial = Bare(network(data, size), data, size, Runtime.choose("cpu").precision, True)
    # The fastest burst is the one that no neighbour disturbed.
    burst = min(seconds(lambda: trial.run(size.burst)) for _ in range(6))
    per_epoch = burst / size.burst * 0.8 * len(data) / size.batch
    spent = [0.0]
    originals = {(kind, name): getattr(kind, name) for kind, name in ((StageRun, "save"), (Checkpoints, "finish"))}

    def timed(original: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            begun = time.perf_counter()
            original(*arguments)
            spent[0] += time.perf_counter() - begun

        return call

    for (kind, name), original in originals.items():
        setattr(kind, name, timed(original))
    try:
        recipe = EndToEnd(epochs=max(round(size.run_seconds / per_epoch), 2), batch_size=size.batch)
        run = fit(recipe, data, out=folder, device="cpu", backbone=size.backbone, verbose=False)
    finally:
        for (kind, name), original in originals.items():
            setattr(kind, name, original)
    return spent[0], run.seconds
