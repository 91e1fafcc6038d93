"""What a stage keeps: weights, checkpoints, its file, and what its hooks write."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nestling import collective
from nestling.data.batch import Batch
from nestling.data.dataset import LabelledData
from nestling.engine.checkpoint import Saved, collect, optimizer_tensors, pick, restore_optimizer
from nestling.engine.optim import build_optimizer
from nestling.engine.plan import order_of
from nestling.engine.predict import predict
from nestling.engine.step import NotFinite, check_weights, listed_rows, mark_trainable
from nestling.engine.tensorboard import TensorBoard
from nestling.errors import DivergedError, StorageError, UsageError
from nestling.methods.recipe import Context, Hook, Stage
from nestling.models.model import Outputs
from nestling.models.weights import reshape, restore
from nestling.objectives.terms import Objective
from nestling.seeds import derive

if TYPE_CHECKING:
    from nestling.engine.fit import Engine


@dataclass
class Progress:
    """Where in its stage a run stands; JSON, and part of every checkpoint."""

    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    stale: int = 0
    log: int = 0
    """Offset in metrics.jsonl."""
    running: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Sum of the training loss in this epoch, and the number of its steps."""
    hooked: bool = False
    """Whether ``after_epoch`` has run for this epoch: a stop while its weights are compared must not run it twice."""


class StageState:
    """A stage's weights, optimiser and place, on the disk and back."""

    def __init__(self, engine: Engine, number: int, stage: Stage, objective: Objective) -> None:
        self.engine, self.number, self.stage, self.objective = engine, number, stage, objective
        self.progress = Progress(log=engine.log_offset)
        self.best: dict[str, Tensor] | None = None
        self.decisions: list[tuple[str, object, str]] = []
        self.context = Context(
            model=engine.model,
            objective=objective,
            train=engine.train,
            validation=engine.validation,
            predict=self.predict,
            batches=self.batches,
            note=self.note,
            epochs=stage.epochs,
        )
        self.trained = mark_trainable(stage, engine.model, objective)
        self.order = None
        if stage.epochs:
            self.rows = np.arange(len(stage.data)) if stage.rows is None else stage.rows
            self.order = order_of(stage, derive(engine.seed, "order", number))
            self.scaler = torch.amp.GradScaler(engine.runtime.device.type, enabled=engine.runtime.precision == "fp16")
            self.refuse_what_cannot_be()
            self.optimizer = build_optimizer(stage.optimizer, stage.lr, self.trained.values())
        self.board = TensorBoard(None, stage.name, 0)
        self.saved_at = time.monotonic()
        self.save_seconds = 0.0
        self.place: tuple[int, int] | None = None
        """Epoch and step of the newest checkpoint."""

    @contextmanager
    def finite(self, rows: np.ndarray | None = None) -> Iterator[None]:
        """What is found not to be finite inside the block ends the run, with the place and the rows of the batch."""
        try:
            yield
        except NotFinite as found:
            state = self.progress
            where, hint = f"in stage {self.stage.name} epoch {state.epoch}", ""
            if rows is not None:
                where += f" step {state.step}, rows {listed_rows(self.stage.data.index[self.rows[rows]])}"
                hint = ", or look at these rows"
            kept = self.engine.checkpoints is not None and self.engine.checkpoints.any()
            raise DivergedError(
                f"the {found} is not finite {where}: lower optimizer.lr{hint}; "
                + ("the last checkpoint is kept" if kept else "no checkpoint was written before")
            ) from None

    def overdue(self) -> bool:
        """Whether the time for training is over, by the first process's clock."""
        deadline = self.engine.deadline
        return deadline is not None and collective.broadcast_object(time.monotonic() > deadline)

    def reducers(self) -> dict[str, Any]:
        """What the objective's reducers have to log, where they have anything."""
        found = self.objective.figures()
        return {"reducers": found} if found else {}

    def note(self, name: str, value: object, reason: str) -> None:
        self.decisions.append((name, value, reason))
        self.engine.decide(name, value, reason)

    def refuse_what_cannot_be(self) -> None:
        """Raise UsageError for batches too small for the processes, ValueError for a mistake in the recipe."""
        stage, world = self.stage, collective.world_size()
        assert self.order is not None
        smallest = min(len(self.order.batch(0, step)[0]) for step in (0, self.order.steps - 1))
        if smallest < world:
            raise UsageError(
                f"stage {stage.name} has batches of {smallest} rows for {world} processes: raise batch_size, "
                "or start fewer"
            )
        if not self.trained:
            raise ValueError(f"stage {stage.name} has epochs, but declares nothing trainable: give it 'trainable'")
        if stage.micro_batch is not None and not self.objective.adds_up():
            raise ValueError(
                f"stage {stage.name} asks for micro-batches, but its objective compares rows or keeps something of "
                "each batch: leave micro_batch out"
            )
        if self.scaler.is_enabled() and self.objective.keeps():
            raise UsageError(
                f"precision fp16 scales gradients, which the objective of stage {stage.name} applies by itself: "
                "use bf16 or fp32"
            )

    def weights(self) -> dict[str, Tensor]:
        """Model and objective, detached but not copied."""
        return {**collect("model", self.engine.model.state_dict()), **collect("objective", self.objective.state_dict())}

    def put_back(self, tensors: dict[str, Tensor], what: str) -> None:
        """Weights and buffers as ``weights`` gave them; a hook may have changed the shape of what a term keeps."""
        kept = pick("objective", tensors)
        reshape(self.objective, {name: t.shape for name, t in kept.items()})
        restore(self.objective, kept, f"{what}'s objective")
        restore(self.engine.model, pick("model", tensors), what)

    def synchronise(self) -> None:
        """Give every process the buffers of rank 0; with batch-norm statistics of their own they decide differently."""
        collective.broadcast_tensors([*self.engine.model.buffers(), *self.objective.buffers()])

    def hook_context(self) -> Context:
        """What a hook sees of this moment."""
        return replace(self.context, epoch=self.progress.epoch)

    def predict(self, data: LabelledData) -> tuple[Outputs, Tensor]:
        """As the engine predicts, for a hook."""
        return predict(self.engine.model, self.engine.device_data(data), self.engine.runtime, obey=self.obey_in_hook)

    def batches(self, data: LabelledData) -> Iterator[Batch]:
        """All rows in their order, for a hook."""
        for batch in self.engine.device_data(data).batches():
            yield batch
            self.obey_in_hook()

    def obey_in_hook(self) -> None:
        """Between batches: a signal ends a hook, which a resume runs anew, where no step would be taken twice for it.

        What a hook has changed by then cannot be saved, and only the first of several processes runs it.
        """
        here = self.progress.epoch, self.progress.step
        saved = self.engine.checkpoints is None or self.order is None or self.place == here
        if saved and not collective.is_distributed():
            self.engine.obey(f"in a hook of stage {self.stage.name}")

    def run_hook(self, hook: Hook, *moment: str | int) -> None:
        """Run a hook on rank 0, and give every process what it wrote, new shapes included."""
        self.synchronise()
        self.engine.runtime.seed(derive(self.engine.seed, *moment[:1], self.number, *moment[1:]))
        if collective.rank() == 0:
            hook(self.hook_context())
        for module in (self.engine.model, self.objective):
            reshape(module, collective.broadcast_object({name: t.shape for name, t in module.state_dict().items()}))
            collective.broadcast_tensors(module.state_dict().values())
        with self.finite():
            check_weights(self.weights())

    def finish(self) -> None:
        """Restore the best weights, run the hook on rank 0, broadcast, and write the stage's file."""
        stage, engine = self.stage, self.engine
        if self.best is not None:
            self.put_back(self.best, "the best epoch")
        if stage.at_end is not None:
            engine.model.eval()
            self.run_hook(stage.at_end, "at end")
        engine.history += self.progress.history
        if engine.checkpoints is None or engine.log is None:
            return
        engine.log_offset = engine.log.flush(sync=True)
        state = {"history": self.progress.history, "decisions": self.decisions, "log": engine.log_offset}
        engine.checkpoints.finish(self.number, stage.name, Saved(self.weights(), state))

    def save(self) -> None:
        """Write a checkpoint of all that the next step depends on."""
        engine, state = self.engine, self.progress
        self.synchronise()
        with self.finite():
            check_weights(self.weights())
        if engine.checkpoints is None or engine.log is None:
            return
        began = time.monotonic()
        state.log = engine.log.flush(sync=True)
        self.board.flush()
        tensors = {
            **self.weights(),
            **collect("optimizer", optimizer_tensors(self.optimizer)),
            **collect("best", self.best or {}),
        }
        saved = Saved(tensors, {**vars(state), "stage": self.stage.name, "scaler": self.scaler.state_dict()})
        engine.checkpoints.save(self.number, state.epoch, state.step, saved)
        self.place = state.epoch, state.step
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - began

    def resume(self) -> bool:
        """Go on from the newest complete checkpoint of this stage, if there is one."""
        engine = self.engine
        if engine.checkpoints is None or self.order is None:
            return False
        checkpoints = engine.checkpoints
        saved, complaints = collective.of_first(lambda: checkpoints.latest(self.number))
        for complaint in complaints:
            engine.reporter.say(complaint)
        if saved is None:
            return False
        state = copy.deepcopy(saved.state)
        if state.pop("stage") != self.stage.name:
            raise StorageError(
                f"the checkpoint in {engine.checkpoints.partial} is of another recipe: choose another --out"
            )
        self.scaler.load_state_dict(state.pop("scaler"))
        self.progress = Progress(**state)
        self.place = self.progress.epoch, self.progress.step
        self.put_back(saved.tensors, "the checkpoint")
        restore_optimizer(self.optimizer, pick("optimizer", saved.tensors))
        self.best = {name: t.to(engine.runtime.device) for name, t in pick("best", saved.tensors).items()} or None
        return True
