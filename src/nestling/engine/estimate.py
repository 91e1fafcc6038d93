"""What training will take in memory and time: a few steps of every stage, on a model that is thrown away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import torch
from torch import Tensor, nn

from nestling.data.dataset import LabelledData
from nestling.data.images import LazyImages
from nestling.data.transforms import Preprocessing
from nestling.engine.fit import Engine, seeded
from nestling.engine.log import Reporter
from nestling.engine.runtime import Runtime
from nestling.engine.stage import StageRun
from nestling.engine.step import StepModule, set_modes
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

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.parameters + self.optimizer + self.peak


def estimate(
    recipe: Recipe, model: Model, train: LabelledData, validation: LabelledData, runtime: Runtime, steps: int = STEPS
) -> list[Estimate]:
    """Take so many ``steps`` of every stage of ``recipe``. Changes ``model``, which is of no use afterwards."""
    channels = train.image_shape[0]
    # Pictures' statistics cost a pass over them, and take no less time for being others.
    preprocessing = Preprocessing(*train.image_shape, mean=(0.5,) * channels, std=(0.25,) * channels)
    alone = replace(runtime, workers=0)
    engine = Engine(recipe, model, train, validation, None, 0, alone, preprocessing, Reporter(verbose=False))
    found = []
    with seeded(0):
        for number, stage in enumerate(recipe.stages(model, train)):
            objective = stage.objective if isinstance(stage.objective, Objective) else 1.0 * stage.objective
            runtime.prepare(model)
            objective.to(runtime.device)
            found.append(measure(StageRun(engine, number, stage, objective), runtime.workers, steps))
            if stage.assume is not None:
                stage.assume(model)
    return found


def measure(run: StageRun, workers: int, steps: int) -> Estimate:
    """The estimate of one stage, whose batches ``workers`` processes will decode."""
    model, objective, stage, order = run.engine.model, run.objective, run.stage, run.order
    held = sum(t.nbytes for module in (model, objective) for t in tensors_of(module))
    kept = held * (1 + (stage.select is not None))
    if order is None:
        return Estimate(name=stage.name, parameters=kept, gradients=0, optimizer=0, activations=0, peak=0, seconds=0.0)
    set_modes(stage, model, objective)
    module = StepModule(model, objective, run.engine.runtime, stage.until)
    data = run.engine.device_data(stage.data)
    decoding = 0.0
    if isinstance(stage.data.inputs, LazyImages):
        began = time.perf_counter()
        run.ahead = repeat(stage.data.images(run.rows[order.batch(0, 0)[0]]))
        decoding = time.perf_counter() - began
    saved = Saved(tensors_of(model, objective))
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        run.step(module, data)
    run.progress.step = 0
    peak = allocated(lambda: run.step(module, data), run.engine.runtime.device)
    times = []
    for _ in range(steps):
        run.progress.step = 0
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
        seconds=stage.epochs * (order.steps * step + evaluation(run) / (workers or 1 if decoding else 1)),
    )


def evaluation(run: StageRun) -> float:
    """Seconds that the validation rows take after an epoch."""
    judge, engine = run.judge, run.engine
    if judge is None:
        return 0.0
    count = len(judge.data)
    some = judge.data.subset(np.linspace(0, count - 1, min(count, EVALUATED)).astype(np.int64))
    seconds = 0.0
    # The first pass warms up.
    for _ in range(2):
        began = time.perf_counter()
        outputs, labels = engine.predict(some, run.stage.until)
        with torch.no_grad():
            judge.select.metric(engine.model.answers(outputs).combined, labels, engine.train.taxonomy.levels)
        seconds = time.perf_counter() - began
    return seconds * count / len(some)


def allocated(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that ``step`` has had allocated at one moment, beside those that were there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        most = max(most, now)
    return most


class Saved:
    """Counts the memory of what is saved for a backward pass, each storage once; the weights' own is not counted."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in own}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Called for every tensor that is saved."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        # A reference to the tensor itself would be a cycle.
        return tensor.detach()


def tensors_of(*modules: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
