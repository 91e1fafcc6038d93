"""How the epochs of a stage are compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nestling import collective
from nestling.data.dataset import LabelledData
from nestling.engine.features import Features
from nestling.engine.predict import accuracy_per_level, predict
from nestling.engine.step import NotFinite
from nestling.methods.recipe import Select, Stage

if TYPE_CHECKING:
    from nestling.engine.fit import Engine


@dataclass(frozen=True)
class Judge:
    """Scores the weights of this moment as a stage's ``select`` says."""

    engine: Engine
    select: Select
    data: LabelledData
    rows: np.ndarray
    """Numbers of the rows of ``data`` that are asked."""
    levels: tuple[str, ...]
    until: str | None
    maps: Features | None = None
    """Of these rows, behind so many modules as ``since`` says."""
    since: int = 0

    @staticmethod
    def of(engine: Engine, stage: Stage) -> Judge | None:
        """The stage's judge; None where nothing is selected, or no row is labelled: then the last epoch is kept."""
        if stage.select is None:
            return None
        own = stage.select.split == "train"
        data = stage.data if own else engine.validation
        rows = stage.rows if own and stage.rows is not None else np.arange(len(data))
        levels = stage.select.levels or engine.train.taxonomy.levels
        columns = [engine.train.taxonomy.level_index(level) for level in levels]
        if not (data.labels[rows][:, columns] >= 0).any():
            return None
        return Judge(engine, stage.select, data, rows, levels, stage.until)

    def on(self, maps: Features, since: int) -> Judge:
        """The judge that goes on from kept maps, where they are those of its rows without augmentation."""
        fitting = self.select.split == "train" and maps.plain
        return replace(self, maps=maps, since=since) if fitting else self

    def measure(
        self, rows: np.ndarray, obey: Callable[[], object] = lambda: None
    ) -> tuple[float, dict[str, Tensor], Tensor]:
        """The metric of some of the rows, the answers at each level (n, classes), and the targets (n, levels)."""
        engine = self.engine
        data = engine.device_data(self.data) if self.maps is None else self.maps
        outputs, labels = predict(
            engine.model, data, engine.runtime, self.until, rows=rows, since=self.since, obey=obey
        )
        answers = {k: p for k, p in engine.model.answers(outputs).combined.items() if k in self.levels}
        given: list[Any] = [answers, labels, engine.train.taxonomy.levels]
        if self.select.concepts is not None:
            codes, _ = self.data.concepts_at(self.select.concepts)
            given.append(torch.from_numpy(codes[rows]).to(labels.device))
        return self.select.metric(*given), answers, labels

    def score(self, obey: Callable[[], object] = lambda: None) -> tuple[float, dict[str, Any]]:
        """A loss, the lower the better, and what to record. Raises NotFinite where it is not.

        ``obey`` is called between batches, equally often on every process, and may raise.
        """
        score, answers, labels = self.measure(self.rows, obey)
        score = collective.broadcast_object(score)
        if not math.isfinite(score):
            raise NotFinite(self.select.name)
        accuracy = accuracy_per_level(answers, labels, self.engine.train.taxonomy)
        record = {self.select.name: score, "accuracy": accuracy}
        return (score if self.select.mode == "min" else -score), record
