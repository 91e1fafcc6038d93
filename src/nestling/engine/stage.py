"""One stage on its way: its steps, its epochs, its checkpoints."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nestling import collective, interrupt
from nestling.data.batch import Batch
from nestling.data.loader import DeviceData, RowOrder
from nestling.engine.features import Features, keep_features
from nestling.engine.keep import StageState
from nestling.engine.optim import begins_anew, rate, set_rate
from nestling.engine.select import Judge
from nestling.engine.step import (
    StepModule,
    check_gradients,
    check_weights,
    own,
    set_modes,
    shares,
    unsynchronised,
    values_of,
)
from nestling.engine.tensorboard import TensorBoard
from nestling.errors import LostError, out_of_memory
from nestling.files import Appender
from nestling.methods.recipe import Perturb, Stage
from nestling.models.recompute import statistics_kept
from nestling.objectives.terms import Objective
from nestling.seeds import derive

if TYPE_CHECKING:
    from nestling.engine.fit import Engine

LOG_EVERY = 10
CHECKPOINT_MINUTES = 5.0
LEAST_ROWS = 2
"""That go through the network at once: batch norm has nothing to say of a single one."""
CHECKPOINT_SHARE = 0.01
"""An epoch's checkpoint is left out while writing them would take more than this share of the time."""


class StageRun(StageState):
    """One stage on its way: what is trained, how far it is, and the best weights so far."""

    def __init__(self, engine: Engine, number: int, stage: Stage, objective: Objective) -> None:
        super().__init__(engine, number, stage, objective)
        self.judge = Judge.of(engine, stage)
        self.ahead: Iterator[Tensor | None] = itertools.repeat(None)
        self.checked = False

    def run(self) -> None:
        """Train from the last checkpoint to the end of the stage, run its hook, and write its file."""
        stage, state = self.stage, self.progress
        resumed = self.resume()
        state = self.progress
        if self.engine.folder is not None and collective.rank() == 0:
            self.engine.log = Appender(self.engine.folder.path / "metrics.jsonl", state.log)
            if self.order is not None:
                done = state.epoch * self.order.steps + state.step
                self.board = TensorBoard(self.engine.folder.path, f"{self.number:02d}-{stage.name}", done)
        if stage.select is not None and stage.select.keeps and self.judge is None:
            self.engine.reporter.say(f"stage {stage.name}: no labelled row to compare epochs by, the last one is kept")
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
        kept = keep_features(engine, stage, self.rows, self.note)
        if kept is None:
            return data, 0
        if self.judge is not None:
            self.judge = self.judge.on(kept, len(stage.prefix))
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
            if state.epoch and self.overdue():
                self.engine.reporter.say(f"stage {stage.name} ends after {state.epoch} epochs: the time is over")
                break
            set_modes(stage, self.engine.model, self.objective)
            while state.step < self.order.steps:
                try:
                    self.step(module, data)
                except LostError:
                    # A worker may die of the signal that this process is about to obey; the step was not taken.
                    if not interrupt.received() or collective.is_distributed():
                        raise
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

    def perturbed(self, perturb: Perturb, plain: StepModule, batch: Batch, progress: float) -> Batch:
        """The batch that a second pass is made on; the first leaves the state of model and objective as it is."""
        self.objective.eval()
        with statistics_kept(self.engine.model):
            batch = perturb(lambda seen: plain(seen, progress)[0], batch)
        self.objective.train()
        return batch

    def within_memory(
        self, module: nn.Module, batch: Batch, progress: float, global_size: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``accumulate``, and where memory runs out, the same batch in parts of half the rows, from then on."""
        while True:
            try:
                return self.accumulate(module, batch, progress, global_size)
            except (MemoryError, RuntimeError) as error:
                rows = min(self.stage.micro_batch or global_size, global_size) // 2
                # Other processes would wait for one that begins again; terms that compare rows need all of them.
                alone = not collective.is_distributed() and self.objective.adds_up()
                if not (out_of_memory(error) and alone and rows >= LEAST_ROWS):
                    raise
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self.stage = replace(self.stage, micro_batch=rows)
            self.note("micro_batch", rows, f"of a batch of {global_size}: not enough memory for more rows at once")
            place = (self.number, self.progress.epoch, self.progress.step, collective.rank())
            self.engine.runtime.seed(derive(self.engine.seed, "step", *place))

    def accumulate(
        self, module: nn.Module, batch: Batch, progress: float, global_size: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and terms of the batch, whose gradients are there afterwards, in as many parts as ``micro_batch`` asks.

        Every part has a row on every process, and counts by its rows on all of them.
        """
        wanted = -(-global_size // (self.stage.micro_batch or global_size))
        parts = max(min(wanted, global_size // collective.world_size()), 1)
        if parts == 1:
            loss, terms = module(batch, progress)
            self.scaler.scale(loss).backward()
            return loss, terms
        total, sums = batch.inputs.new_zeros((), dtype=torch.float32), {}
        for number, share in enumerate(shares(global_size, parts)):
            with nullcontext() if number == parts - 1 else unsynchronised(module):
                loss, terms = module(batch.part(number, parts), progress)
                self.scaler.scale(loss * share).backward()
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
        other = derive(engine.seed, "other view", self.number) if stage.pairs else None
        images = next(self.ahead)
        batch = data.batch(self.rows[rows], stage.augmentation, key, draws, images=images, other=other)
        progress = (state.epoch * order.steps + state.step) / (stage.epochs * order.steps)
        if stage.perturb is not None:
            plain = module if isinstance(module, StepModule) else module.module
            assert isinstance(plain, StepModule)
            batch = self.perturbed(stage.perturb, plain, batch, progress)
        lr = stage.lr * rate(stage.optimizer, progress, state.losses)
        if begins_anew(stage.optimizer, state.epoch * order.steps + state.step, stage.epochs * order.steps):
            self.optimizer.state.clear()
        set_rate(self.optimizer, lr)
        loss, terms = self.within_memory(module, batch, progress, len(every))
        if not self.checked:
            check_gradients(stage, self.trained)
            self.checked = True
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        with self.finite(every):
            value, parts = values_of(
                loss,
                terms,
                self.trained,
                [*gradients, *self.objective.own_gradients()],
                self.scaler.is_enabled(),
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
            figures = {"loss": value, "lr": lr, "terms": parts, **self.reducers()}
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
        self.synchronise()
        with self.finite():
            check_weights(self.weights())
        if stage.after_epoch is not None and not state.hooked:
            self.run_hook(stage.after_epoch, "after epoch", state.epoch)
            state.hooked = True
        if self.judge is not None:
            record |= self.compare(self.judge)
        record |= self.reducers()
        state.history.append(record)
        state.epoch, state.step, state.running, state.hooked = state.epoch + 1, 0, [0.0, 0.0], False
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
        with self.finite():
            loss, record = judge.score(self.obey_while_compared)
        state = self.progress
        state.losses.append(loss)
        if state.best is None or loss < state.best:
            state.best, state.stale = loss, 0
            if judge.select.keeps:
                self.best = {name: tensor.clone() for name, tensor in self.weights().items()}
        else:
            state.stale += 1
        return record

    def obey_while_compared(self) -> None:
        """Between the batches of a pass: where a signal has come, save and stop; a resume begins the pass anew."""
        if collective.all_max([interrupt.received() or 0], self.engine.runtime.device)[0]:
            self.save()
            where = f"in stage {self.stage.name} epoch {self.progress.epoch} step {self.progress.step}"
            self.engine.obey(f"{where}, while its weights were compared")
