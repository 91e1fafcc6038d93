"""One stage on its way: its steps, its epochs, its checkpoints."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nestling import collective, interrupt
from nestling.data.batch import Batch
from nestling.data.loader import DeviceData, RowOrder
from nestling.engine.checkpoint import Saved, collect, optimizer_tensors, pick, restore_optimizer
from nestling.engine.features import Features, NoRoom
from nestling.engine.optim import begins_anew, build_optimizer, rate
from nestling.engine.plan import order_of
from nestling.engine.select import Judge
from nestling.engine.step import (
    StepModule,
    check_gradients,
    check_weights,
    listed_rows,
    mark_trainable,
    own,
    set_modes,
    unsynchronised,
    values_of,
)
from nestling.engine.tensorboard import TensorBoard
from nestling.errors import StorageError
from nestling.files import Appender
from nestling.methods.recipe import Context, Hook, Perturb, Stage
from nestling.models.weights import reshape, restore
from nestling.objectives.terms import Objective
from nestling.seeds import derive

if TYPE_CHECKING:
    from nestling.engine.fit import Engine

LOG_EVERY = 10
CHECKPOINT_MINUTES = 5.0
CHECKPOINT_SHARE = 0.01
"""An epoch's checkpoint is left out while writing them would take more than this share of the time."""


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


class StageRun:
    """One stage on its way: what is trained, how far it is, and the best weights so far."""

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
            predict=engine.predict,
            batches=lambda data: engine.device_data(data).batches(),
            note=self.note,
            epochs=stage.epochs,
        )
        self.trained = mark_trainable(stage, engine.model, objective)
        self.order = None
        if stage.epochs:
            self.rows = np.arange(len(stage.data)) if stage.rows is None else stage.rows
            self.order = order_of(stage, derive(engine.seed, "order", number))
            self.optimizer = build_optimizer(stage.optimizer, stage.lr, self.trained.values())
            self.scaler = torch.amp.GradScaler(engine.runtime.device.type, enabled=engine.runtime.precision == "fp16")
        self.judge = Judge.of(engine, stage)
        self.ahead: Iterator[Tensor | None] = itertools.repeat(None)
        self.board = TensorBoard(None, stage.name, 0)
        self.checked = False
        self.saved_at = time.monotonic()
        self.save_seconds = 0.0

    def where(self) -> str:
        """For messages."""
        return f"in stage {self.stage.name} epoch {self.progress.epoch}"

    def note(self, name: str, value: object, reason: str) -> None:
        self.decisions.append((name, value, reason))
        self.engine.decide(name, value, reason)

    def run(self) -> None:
        """Train from the last checkpoint to the end of the stage, run its hook, and write its file."""
        stage, state = self.stage, self.progress
        resumed = self.resume()
        state = self.progress
        if self.engine.folder is not None and collective.rank() == 0:
            self.engine.log = Appender(self.engine.folder.path / "metrics.jsonl", state.log)
            if self.order is not None:
                # Where the epoch's steps are taken but its figures are not, these come again.
                done = state.epoch * self.order.steps + min(state.step, self.order.steps - 1)
                self.board = TensorBoard(self.engine.folder.path, f"{self.number:02d}-{stage.name}", done)
        try:
            if self.order is not None:
                total, done = stage.epochs * self.order.steps, state.epoch * self.order.steps + state.step
                if resumed:
                    self.engine.reporter.say(f"resumed stage {stage.name} epoch {state.epoch} step {state.step}")
                trained = sum(p.numel() for p in self.trained.values())
                self.engine.reporter.stage(
                    stage.name,
                    total,
                    done,
                    f"{len(self.rows)} rows, {trained:,} parameters, "
                    f"at most {stage.epochs} epochs of {self.order.steps} steps",
                )
                data, since = self.data()
                with data.ahead(self.to_come(self.order), self.engine.runtime.workers) as self.ahead:
                    self.train_epochs(data, since)
            self.finish()
        finally:
            self.board.close()
            self.engine.reporter.stage_ended()

    def data(self) -> tuple[DeviceData | Features, int]:
        """The rows that this stage trains on, or the maps of its prefix, and how many modules these are behind."""
        stage, engine = self.stage, self.engine
        data = engine.device_data(stage.data)
        if not stage.prefix or stage.views is None:
            return data, 0
        folder = engine.folder.path if engine.folder else None
        began = time.monotonic()
        key = derive(engine.seed, "views")
        try:
            kept = Features(
                data, stage.prefix, engine.runtime, stage.views, stage.augmentation, key, engine.features, folder
            )
        except NoRoom as error:
            engine.reporter.say(f"features are not kept: {error}")
            return data, 0
        engine.features = kept
        took = time.monotonic() - began
        engine.reporter.say(f"kept features: {kept.place}, computed once for {len(data)} rows in {took:.1f} s")
        return kept, len(stage.prefix)

    def to_come(self, order: RowOrder) -> Iterator[np.ndarray]:
        """The rows of this process's batches from here to the end of the stage."""
        begun = self.progress.epoch * order.steps + self.progress.step
        places = (divmod(number, order.steps) for number in range(begun, self.stage.epochs * order.steps))
        return (self.rows[own(order.batch(epoch, step)[0])] for epoch, step in places)

    def train_epochs(self, data: DeviceData | Features, since: int) -> None:
        stage, state = self.stage, self.progress
        assert self.order is not None
        module = self.engine.runtime.wrap(
            StepModule(self.engine.model, self.objective, self.engine.runtime, stage.until, since)
        )
        if self.judge is not None and self.judge.select.start and not state.losses:
            with torch.no_grad():
                self.compare(self.judge)
        while state.epoch < stage.epochs and not (stage.patience and state.stale >= stage.patience):
            set_modes(stage, self.engine.model, self.objective)
            while state.step < self.order.steps:
                self.step(module, data)
                self.engine.reporter.step(state.epoch * self.order.steps + state.step)
                # Only rank 0 writes, so only its clock tells.
                due = collective.rank() == 0 and time.monotonic() - self.saved_at > 60 * CHECKPOINT_MINUTES
                signal, due = collective.all_max([interrupt.received() or 0, int(due)], self.engine.runtime.device)
                if signal or due:
                    self.save()
                if signal:
                    self.engine.obey(f"in stage {stage.name} epoch {state.epoch} step {state.step}")
            self.end_epoch()
            due = time.monotonic() - self.saved_at > self.save_seconds / CHECKPOINT_SHARE
            if collective.broadcast_object(due):
                self.save()

    def perturbed(self, perturb: Perturb, batch: Batch) -> Batch:
        """The batch that a second pass is made on; the first leaves the state of terms and reducers as it is."""
        self.objective.eval()
        with self.engine.runtime.autocast():
            batch = perturb(self.engine.model, self.objective, batch)
        self.objective.train()
        return batch

    def accumulate(
        self, module: nn.Module, batch: Batch, progress: float, global_size: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and terms of the batch, whose gradients are there afterwards, in as many parts as ``micro_batch`` asks.

        A part counts by its rows: exact where every row has the labels that the objective reads.
        """
        parts = -(-global_size // (self.stage.micro_batch or global_size))
        total, sums = batch.inputs.new_zeros((), dtype=torch.float32), {}
        for number in range(parts):
            part = batch if parts == 1 else batch.part(number, parts)
            with nullcontext() if number == parts - 1 else unsynchronised(module):
                loss, terms = module(part, progress)
                share = len(part.index) / len(batch.index)
                self.scaler.scale(loss * share if parts > 1 else loss).backward()
            total = total + share * loss.detach()
            sums = {name: sums.get(name, 0) + share * value for name, value in terms.items()}
        return total, sums

    def step(self, module: nn.Module, data: DeviceData | Features) -> None:
        """One update. Raises DivergedError where the loss or a gradient is not finite."""
        stage, state, order, engine = self.stage, self.progress, self.order, self.engine
        assert order is not None
        every, draws = order.batch(state.epoch, state.step)
        rows, draws = own(every), own(draws)
        engine.runtime.seed(derive(engine.seed, "step", self.number, state.epoch, state.step, collective.rank()))
        key = derive(engine.seed, "augment", self.number)
        if stage.views is not None:
            # The same views in every stage: what the layers below made of them is kept.
            key, draws = derive(engine.seed, "views"), draws % stage.views
        batch = data.batch(self.rows[rows], stage.augmentation, key, draws, images=next(self.ahead))
        if stage.perturb is not None:
            batch = self.perturbed(stage.perturb, batch)
        progress = (state.epoch * order.steps + state.step) / (stage.epochs * order.steps)
        lr = stage.lr * rate(stage.optimizer, progress, state.losses)
        if begins_anew(stage.optimizer, state.epoch * order.steps + state.step, stage.epochs * order.steps):
            self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, terms = self.accumulate(module, batch, progress, len(every))
        if not self.checked:
            check_gradients(stage, self.trained)
            self.checked = True
        self.scaler.unscale_(self.optimizer)
        value, parts = values_of(
            loss,
            terms,
            self.trained,
            self.scaler.is_enabled(),
            lambda: f"{self.where()} step {state.step}, rows {listed_rows(stage.data.index[self.rows[every]])}",
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.step(lr)
        if stage.after_step is not None:
            stage.after_step(self.hook_context())
        state.step += 1
        state.running = [state.running[0] + value, state.running[1] + 1]
        taken = state.epoch * order.steps + state.step
        if engine.log is not None and (taken % LOG_EVERY == 1 or state.step == order.steps):
            figures = {"loss": value, "lr": lr, "terms": parts}
            engine.log.append({"stage": stage.name, "epoch": state.epoch, "step": taken, **figures})
            self.board.add(taken, figures)

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Score the epoch on validation rows, keep the best weights, and move on to the next."""
        stage, state = self.stage, self.progress
        record: dict[str, Any] = {
            "stage": stage.name,
            "epoch": state.epoch + 1,
            "loss": state.running[0] / max(state.running[1], 1),
        }
        check_weights(self.weights(), f"{self.where()}")
        if stage.after_epoch is not None:
            self.run_hook(stage.after_epoch, "after epoch", state.epoch)
        if self.judge is not None:
            record |= self.compare(self.judge)
        state.history.append(record)
        state.epoch, state.step, state.running = state.epoch + 1, 0, [0.0, 0.0]
        assert self.order is not None
        figures = {name: value for name, value in record.items() if name not in ("stage", "epoch")}
        self.board.add(state.epoch * self.order.steps, {"epoch": figures})
        self.engine.reporter.epoch(
            stage.name,
            state.epoch,
            stage.epochs,
            state.epoch * self.order.steps,
            stage.epochs * self.order.steps,
            figures,
        )

    def compare(self, judge: Judge) -> dict[str, Any]:
        """Score the weights of this moment, and keep them where they are the best; what to record."""
        self.synchronise()
        loss, record = judge.score(self.where())
        state = self.progress
        state.losses.append(loss)
        if state.best is None or loss < state.best:
            state.best, state.stale = loss, 0
            self.best = {name: tensor.clone() for name, tensor in self.weights().items()}
        else:
            state.stale += 1
        return record

    def weights(self) -> dict[str, Tensor]:
        """Model and objective, detached but not copied."""
        return {**collect("model", self.engine.model.state_dict()), **collect("objective", self.objective.state_dict())}

    def synchronise(self) -> None:
        """Give every process the buffers of rank 0; with batch-norm statistics of their own they decide differently."""
        collective.broadcast_tensors([*self.engine.model.buffers(), *self.objective.buffers()])

    def hook_context(self) -> Context:
        """What a hook sees of this moment."""
        return replace(self.context, epoch=self.progress.epoch)

    def run_hook(self, hook: Hook, *moment: str | int) -> None:
        """Run a hook on rank 0, and give every process what it wrote, new shapes included."""
        self.synchronise()
        self.engine.runtime.seed(derive(self.engine.seed, *moment[:1], self.number, *moment[1:]))
        if collective.rank() == 0:
            hook(self.hook_context())
        for module in (self.engine.model, self.objective):
            reshape(module, collective.broadcast_object({name: t.shape for name, t in module.state_dict().items()}))
            collective.broadcast_tensors(module.state_dict().values())

    def finish(self) -> None:
        """Restore the best weights, run the hook on rank 0, broadcast, and write the stage's file."""
        stage, engine = self.stage, self.engine
        if self.best is not None:
            restore(engine.model, pick("model", self.best), "the best epoch")
            restore(self.objective, pick("objective", self.best), "the best epoch")
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
        check_weights(self.weights(), self.where())
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
        restore(engine.model, pick("model", saved.tensors), "the checkpoint")
        restore(self.objective, pick("objective", saved.tensors), "the checkpoint's objective")
        restore_optimizer(self.optimizer, pick("optimizer", saved.tensors))
        self.best = {name: t.to(engine.runtime.device) for name, t in pick("best", saved.tensors).items()} or None
        return True
