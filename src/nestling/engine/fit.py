"""The only training loop: it replays the stages that are finished, and trains the others.

Every decision (stop, best, a signal, a hook's result) is taken on rank 0 and broadcast. A checkpoint holds all that the
next step depends on; randomness is a pure function of (seed, stage, epoch, step, row), so none of it is stored.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestling import collective, interrupt
from nestling.config import to_dict
from nestling.data.dataset import LabelledData
from nestling.data.fingerprint import fingerprint
from nestling.data.images import LazyImages
from nestling.data.loader import DeviceData
from nestling.data.split import cut_parts
from nestling.data.stream import has_room, in_parts
from nestling.data.text import AnyPreprocessing, TextEncoding, encoded, is_text
from nestling.data.transforms import Preprocessing
from nestling.engine.checkpoint import Checkpoints, pick
from nestling.engine.features import Features
from nestling.engine.log import Reporter
from nestling.engine.plan import plan
from nestling.engine.predict import accuracy_per_level, predict
from nestling.engine.run import Run
from nestling.engine.runfolder import RunFolder
from nestling.engine.runtime import Runtime, seeded
from nestling.engine.stage import StageRun
from nestling.errors import Interrupted
from nestling.files import Appender
from nestling.methods.recipe import Recipe, Stage
from nestling.models.build import build_model
from nestling.models.model import Model, Outputs
from nestling.models.weights import reshape, restore, weights_hash
from nestling.objectives.calibration import negative_log_likelihood
from nestling.objectives.terms import Objective
from nestling.seeds import derive

SAMPLE = 10_000
"""Training rows, at even distances, from which the mean and deviation of pixels are taken."""


def fit(
    recipe: Recipe,
    data: LabelledData,
    model: Model | None = None,
    out: Path | str | RunFolder | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    *,
    validation: LabelledData | None = None,
    backbone: str = "auto",
    workers: int | None = None,
    compile: bool = False,
    verbose: bool = True,
    whole: bool = False,
    deadline: float | None = None,
) -> Run:
    """Train ``recipe`` on ``data`` and return the calibrated model.

    Parameters
    ----------
    data: the rows to learn from; they are cut 80/10/10 into training, validation and calibration rows, within each
        class of the finest known level, or 90/10 into training and calibration where ``validation`` is given.
    model: by default the recipe's network with fresh weights, on ``backbone``.
    out: the run folder. With it the same call resumes an interrupted run; without it nothing is written.
    precision: auto, fp32, bf16 or fp16.
    workers: processes that decode pictures ahead, where these do not fit into memory; by default one less than there
        are cores, at most 8. The result does not depend on it.
    compile: the network by ``torch.compile``, for training; predictions are made without.
    deadline: a moment of ``time.monotonic()``: a stage that is still on its way ends with the epoch under way.
    whole: train on every row of ``data``: there are no calibration rows, and no validation rows but those given.

    Raises UsageError for settings that cannot be, DivergedError where a loss, gradient or metric is not finite,
    StorageError for files and BusyError where another process holds ``out``.
    """
    began = time.monotonic()
    if isinstance(out, str | Path):
        with RunFolder(out, writer=collective.rank() == 0) as folder:
            chosen = {"backbone": backbone} if model is None and backbone != "auto" else {}
            every = {"whole": True} if whole else {}
            given = {"method": recipe.method, "seed": seed, **chosen, **every, **to_dict(recipe)}
            folder.open(given, collective.broadcast_object)
            return fit(
                recipe,
                data,
                model,
                folder,
                seed,
                device,
                precision,
                validation=validation,
                backbone=backbone,
                workers=workers,
                compile=compile,
                verbose=verbose,
                whole=whole,
                deadline=deadline,
            )
    data, validation = encoded(data), None if validation is None else encoded(validation)
    if whole:
        train, validation = data, data.subset([]) if validation is None else validation
        calibration = data.subset([])
    else:
        train, validation, calibration = cut_parts(data, validation, seed)
    if out is not None:
        out.recognise("training data", fingerprint([train, validation]), "the hash by which a resume knows them again")
        if model is not None:
            out.recognise("first weights", weights_hash(model), "of the model that was passed in")
    reporter = Reporter(verbose and collective.rank() == 0)
    runtime = Runtime.choose(device, precision, out.kept("precision") if out else None, workers)
    runtime = replace(runtime, compiled=compile)
    shape = data.image_shape
    sample = np.linspace(0, len(train) - 1, min(len(train), SAMPLE)).round().astype(np.int64)
    lazy = train.inputs if isinstance(train.inputs, LazyImages) else None
    why = runtime.reasons["workers"]
    if lazy is None:
        why = f"the {'texts' if is_text(shape) else 'pictures'} are in memory"
    elif not has_room(lazy, recipe.batch_for(len(train)), runtime.workers):
        runtime, why = replace(runtime, workers=0), "shared memory, /dev/shm, has no room for their batches"
    preprocessing: AnyPreprocessing
    if is_text(shape):
        preprocessing = TextEncoding(shape[-1])
    else:
        preprocessing = Preprocessing.from_data(
            train.images(sample) if lazy is None else in_parts(lazy, sample, runtime.workers)
        )
    if model is None:
        with seeded(derive(seed, "weights")):
            model = build_model(data.taxonomy, shape, backbone, recipe.method, recipe.network())
    engine = Engine(recipe, model, train, validation, out, seed, runtime, preprocessing, reporter, deadline)
    engine.decide("device", str(runtime.device), runtime.reasons["device"])
    engine.decide("precision", runtime.precision, runtime.reasons["precision"])
    engine.decide("workers", 0 if lazy is None else runtime.workers, why)
    engine.decide(
        "backbone",
        model.config["backbone"],
        (f"for texts of {shape[-1]} words" if is_text(shape) else f"for images of {'x'.join(map(str, shape))}")
        if backbone == "auto"
        else "as given",
    )
    rows = f"{len(train)} training, {len(validation)} validation, {len(calibration)} calibration"
    engine.decide("rows", rows, "all train" if whole else "cut within each class of the finest known level")
    # Whatever the recipe cannot do is found before anything is written or trained.
    with seeded(0):
        plan(recipe, model, train)
    if out is not None and not out.begun:
        out.begin()
    with interrupt.deferred():
        engine.run()
    return Run(
        model=model.eval(),
        metrics=engine.metrics(),
        path=out.path if out else None,
        preprocessing=preprocessing,
        history=engine.history,
        decisions=engine.decisions,
        seconds=time.monotonic() - began,
        objectives=engine.objectives,
        validation=validation,
        calibration=calibration,
    )


def cut_rows(data: LabelledData, validation: LabelledData | None, seed: int) -> tuple[LabelledData, LabelledData]:
    """Training and validation rows; the calibration rows that are cut off beside them serve the guarantee alone."""
    train, validation, _ = cut_parts(data, validation, seed)
    return train, validation


class Engine:
    """Trains one recipe on one model. ``fit`` is the way to use it."""

    def __init__(
        self,
        recipe: Recipe,
        model: Model,
        train: LabelledData,
        validation: LabelledData,
        folder: RunFolder | None,
        seed: int,
        runtime: Runtime,
        preprocessing: AnyPreprocessing,
        reporter: Reporter,
        deadline: float | None = None,
    ) -> None:
        self.deadline = deadline
        self.recipe, self.model, self.train, self.validation = recipe, model, train, validation
        self.seed, self.runtime, self.preprocessing, self.reporter = seed, runtime, preprocessing, reporter
        self.folder = folder
        self.checkpoints = Checkpoints(folder.path) if folder else None
        self.decisions: list[tuple[str, object, str]] = []
        self.history: list[dict[str, Any]] = []
        self.log: Appender | None = None
        self.log_offset = 0
        self.on_device: dict[int, tuple[LabelledData, DeviceData]] = {}
        self.features: Features | None = None
        self.objectives: dict[str, Objective] = {}

    def decide(self, name: str, value: object, reason: str) -> None:
        """Print what was chosen automatically, and keep it in the run's recipe.toml."""
        self.decisions.append((name, value, reason))
        self.reporter.say(f"{name}: {value} ({reason})")
        if self.folder is not None:
            self.folder.derive(name, value, reason)

    def run(self) -> None:
        """Train every stage that is not finished yet."""
        # A model fitted before brings a calibration that its new weights do not have; a replay restores its own.
        self.model.calibration.reset()
        self.model.config["rejection"] = False
        generator = self.recipe.stages(self.model, self.train)
        number = 0
        with seeded(0):
            while True:
                # What a recipe builds between two yields starts from weights that a replay finds again.
                self.runtime.seed(derive(self.seed, "build", number))
                stage = next(generator, None)
                if stage is None:
                    return
                objective = Objective.of(stage.objective)
                self.runtime.prepare(self.model)
                objective.to(self.runtime.device)
                if not self.replay(number, stage, objective):
                    StageRun(self, number, stage, objective).run()
                if objective.keeps():
                    self.objectives[stage.name] = objective
                self.obey(f"after stage {stage.name}")
                number += 1

    def obey(self, where: str) -> None:
        """Raise Interrupted where a signal has come; what there is to save is saved."""
        if signal := collective.all_max([interrupt.received() or 0], self.runtime.device)[0]:
            kept = "saved: the same command goes on from here" if self.checkpoints else "nothing is saved without out"
            raise Interrupted(signal, f"stopped by signal {signal} {where}; {kept}")

    def replay(self, number: int, stage: Stage, objective: Objective) -> bool:
        """Load a finished stage from its file, where there is one."""
        saved = collective.of_first(lambda: self.checkpoints and self.checkpoints.stage(number, stage.name))
        if not saved:
            return False
        # A stage may have ended by making the model narrower.
        for name, module in (("model", self.model), ("objective", objective)):
            tensors = pick(name, saved.tensors)
            reshape(module, {key: t.shape for key, t in tensors.items()})
            restore(module, tensors, f"the {name} of stage {stage.name}")
        self.history += saved.state["history"]
        for decision in saved.state["decisions"]:
            self.decide(*decision)
        self.log_offset = saved.state["log"]
        return True

    @torch.no_grad()
    def metrics(self) -> dict[str, Any]:
        """The validation figures of the finished model."""
        if len(self.validation) == 0:
            return {}
        outputs, labels = self.predict(self.validation)
        answers = self.model.answers(outputs).combined
        levels = self.train.taxonomy.levels
        loss = negative_log_likelihood(answers, labels, levels)
        return {
            "validation loss": None if math.isnan(loss) else loss,
            "accuracy": accuracy_per_level(answers, labels, self.train.taxonomy),
        }

    def device_data(self, data: LabelledData) -> DeviceData:
        """``data`` on the device; kept, since stages share it."""
        if id(data) not in self.on_device:
            self.on_device[id(data)] = data, DeviceData(data, self.preprocessing, self.runtime.device)
        return self.on_device[id(data)][1]

    def predict(self, data: LabelledData, until: str | None = None) -> tuple[Outputs, Tensor]:
        """Outputs of the model in evaluation mode for every row, and the targets (n, levels)."""
        return predict(self.model, self.device_data(data), self.runtime, until)
