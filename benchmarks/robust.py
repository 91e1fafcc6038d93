"""What robustness costs: a step of robust training over the same step without it, in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from loops import Size, made
from paired import Row, in_turns

from nestling.data.transforms import Preprocessing
from nestling.engine.fit import Engine
from nestling.engine.log import Reporter
from nestling.engine.runtime import Runtime, seeded
from nestling.engine.stage import StageRun
from nestling.engine.step import StepModule, set_modes
from nestling.methods import Robust
from nestling.models.build import build_model
from nestling.objectives.terms import Objective


def steps_of(size: Size, **fields: Any) -> Callable[[], None]:
    """A call takes a burst of the engine's own steps of ``Robust(**fields)``, on a network and rows of its own."""
    data, runtime = made(size), Runtime.choose("cpu")
    recipe = Robust(epochs=1, batch_size=size.batch, augmentation="none", **fields)
    with seeded(0):
        model = build_model(data.taxonomy, data.image_shape, size.backbone, recipe.method, recipe.network())
    channels = data.image_shape[0]
    preprocessing = Preprocessing(*data.image_shape, mean=(0.5,) * channels, std=(0.25,) * channels)
    engine = Engine(recipe, model, data, data.subset([]), None, 0, runtime, preprocessing, Reporter(verbose=False))
    stage = next(iter(recipe.stages(model, data)))
    objective = Objective.of(stage.objective)
    runtime.prepare(model)
    run = StageRun(engine, 0, stage, objective)
    set_modes(stage, model, objective)
    module, rows = StepModule(model, objective, runtime, stage.until), engine.device_data(data)

    def burst() -> None:
        run.progress.step = 0
        for _ in range(size.burst):
            run.step(module, rows)

    return burst


def beside(name: str, text: str, size: Size, target: float, **fields: Any) -> Row:
    """A row: steps with ``fields`` over steps of ERM, burst by burst."""
    plain = {"tau": 0.0, "strength": "off"}
    ours, theirs = steps_of(size, **{**plain, **fields}), steps_of(size, **plain)
    in_turns(ours, theirs, 1)
    times = in_turns(ours, theirs, size.rounds, size.most)
    mine, others = ([1000 * s / size.burst for s in t] for t in times)
    return Row(name=name, text=text, unit="ms a step", ours=mine, theirs=others, target=target, at_least=False)


def concepts(folder: Path, size: Size) -> Row:
    """Weights of ten concepts."""
    return beside("concepts", "a step that weights concepts over one that does not", size, 1.02, strength=10.0)


def second_pass(folder: Path, size: Size) -> Row:
    """Every image moved along its own gradient first."""
    return beside("second-pass", "a step on moved images over one on plain images", size, 2.1, tau=0.5)
