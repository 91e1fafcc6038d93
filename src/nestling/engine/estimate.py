"""What training will take in memory and time: a few steps of every stage, on a model that is thrown away."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nestling.data.dataset import LabelledData
from nestling.data.images import LazyImages
from nestling.data.text import TextEncoding, encoded, is_text
from nestling.data.transforms import Preprocessing
from nestling.engine.count import Saved, allocated, tensors_of
from nestling.engine.features import Features
from nestling.engine.fit import Engine
from nestling.engine.log import Reporter
from nestling.engine.runtime import Runtime, seeded
from nestling.engine.sample import Maps, sample_maps
from nestling.engine.stage import StageRun
from nestling.engine.step import StepModule, own, set_modes
from nestling.methods.recipe import Recipe
from nestling.models.model import Model
from nestling.objectives.terms import Objective

STEPS = 3
"""That are timed, of each stage."""
EVALUATED = 256
"""Validation rows that an evaluation is timed on, at most."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes and seconds of one stage."""

    name: str
    parameters: int
    """Of the whole model and the objective, buffers included; twice where the best epoch is kept."""
    gradients: int
    optimizer: int
    activations: int
    """What a step at the stage's batch size keeps for its backward pass, all micro-batches together."""
    peak: int
    """The most that a step has allocated at one moment: gradients, activations, and what it computes with."""
    seconds: float
    """At most: early stopping ends sooner. Hooks between and behind the epochs are not in it."""
    maps: Maps = field(default_factory=Maps)
    """That it keeps of the frozen modules below."""

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.parameters + max(self.optimizer + self.peak + self.maps.held, self.maps.making)


def estimate(
    recipe: Recipe,
    model: Model,
    train: LabelledData,
    validation: LabelledData,
    runtime: Runtime,
    steps: int = STEPS,
    folder: Path | None = None,
) -> list[Estimate]:
    """Take so many ``steps`` of every stage of ``recipe``. Changes ``model``, which is of no use afterwards.

    ``folder`` is where the run will be, whose disk may hold maps; it need not be there yet, and nothing is written.
    """
    train, validation = encoded(train), encoded(validation)
    channels, *_, last = shape = train.image_shape
    # Pictures' statistics cost a pass over them, and take no less time for being others.
    preprocessing = (
        TextEncoding(last) if is_text(shape) else Preprocessing(*shape, mean=(0.5,) * channels, std=(0.25,) * channels)
    )
    alone = replace(runtime, workers=0)
    engine = Engine(recipe, model, train, validation, None, 0, alone, preprocessing, Reporter(verbose=False))
    found: list[Estimate] = []
    with seeded(0):
        for number, stage in enumerate(recipe.stages(model, train)):
            objective = Objective.of(stage.objective)
            runtime.prepare(model)
            objective.to(runtime.device)
            run = StageRun(engine, number, stage, objective)
            maps, made = sample_maps(run, folder, found[-1].maps.held if found else 0)
            one = measure(run, made, runtime.workers, steps)
            found.append(replace(one, maps=maps, seconds=one.seconds + maps.seconds))
            if stage.assume is not None:
                stage.assume(model)
    return found


def measure(run: StageRun, made: Features | None, workers: int, steps: int) -> Estimate:
    """The estimate of one stage, on maps ``made``, or on rows that ``workers`` processes will decode."""
    model, objective, stage, order = run.engine.model, run.objective, run.stage, run.order
    held = sum(t.nbytes for module in (model, objective) for t in tensors_of(module))
    kept = held * (1 + (stage.select is not None and stage.select.keeps))
    if order is None:
        return Estimate(name=stage.name, parameters=kept, gradients=0, optimizer=0, activations=0, peak=0, seconds=0.0)
    set_modes(stage, model, objective)
    since = len(stage.prefix) if made is not None else 0
    module = StepModule(model, objective, run.engine.runtime, stage.until, since)
    data = run.engine.device_data(stage.data) if made is None else made
    place = divmod(busiest(objective, stage.epochs * order.steps), order.steps)
    run.progress.epoch, run.progress.step = place
    decoding = 0.0
    if made is None and isinstance(stage.data.inputs, LazyImages):
        began = time.perf_counter()
        run.ahead = repeat(stage.data.images(run.rows[own(order.batch(*place)[0])]))
        decoding = time.perf_counter() - began
    saved = Saved(tensors_of(model, objective))
    # The first of two passes has let go of its own before the second begins.
    run.stage = replace(stage, perturb=None)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        run.step(module, data)
    run.stage = stage
    run.progress.step = place[1]
    peak = allocated(lambda: run.step(module, data), run.engine.runtime.device)
    times = []
    for _ in range(steps):
        run.progress.step = place[1]
        began = time.perf_counter()
        run.step(module, data)
        times.append(time.perf_counter() - began)
    # What disturbs a step only makes it slower.
    step = max(min(times), decoding / workers) if workers else min(times) + decoding
    return Estimate(
        name=stage.name,
        parameters=kept,
        gradients=sum(p.nbytes for p in run.trained.values()),
        optimizer=sum(t.nbytes for s in run.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)),
        activations=saved.bytes,
        peak=peak,
        seconds=stage.epochs * (order.steps * step + evaluation(run, made) / (workers or 1 if decoding else 1)),
    )


def evaluation(run: StageRun, made: Features | None) -> float:
    """Seconds that the rows which compare epochs take after one; on kept maps, where ``made`` are some of them."""
    if run.judge is None:
        return 0.0
    judge = run.judge if made is None else run.judge.on(made, len(run.stage.prefix))
    count = len(judge.rows)
    some = judge.rows[np.linspace(0, count - 1, min(count, EVALUATED)).astype(np.int64)]
    if judge.maps is not None:
        some = np.resize(judge.maps.rows, len(some))
    seconds = 0.0
    # The first pass warms up.
    for _ in range(2):
        began = time.perf_counter()
        with torch.no_grad():
            judge.measure(some)
        seconds = time.perf_counter() - began
    return seconds * count / len(some)


def busiest(objective: Objective, total: int) -> int:
    """The step, of so many, at which most terms take part: not all do from the first to the last."""

    def active(step: int) -> int:
        return sum((weight(step / total) if callable(weight) else weight) != 0 for weight in objective.weights)

    return max(range(total - 1, -1, -max(total // 100, 1)), key=active)
