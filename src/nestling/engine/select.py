"""How the epochs of a stage are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nestling import collective
from nestling.data.dataset import LabelledData
from nestling.engine.predict import accuracy_per_level
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
    levels: tuple[str, ...]
    until: str | None

    @staticmethod
    def of(engine: Engine, stage: Stage) -> Judge | None:
        """The stage's judge; None where nothing is selected, or no row is labelled: then the last epoch is kept."""
        if stage.select is None:
            return None
        rows = stage.data if stage.rows is None else stage.data.subset(stage.rows)
        data = rows if stage.select.split == "train" else engine.validation
        levels = stage.select.levels or engine.train.taxonomy.levels
        columns = [engine.train.taxonomy.level_index(level) for level in levels]
        if not (data.labels[:, columns] >= 0).any():
            return None
        return Judge(engine, stage.select, data, levels, stage.until)

    def score(self) -> tuple[float, dict[str, Any]]:
        """A loss, the lower the better, and what to record. Raises NotFinite where it is not."""
        taxonomy = self.engine.train.taxonomy
        outputs, labels = self.engine.predict(self.data, self.until)
        answers = {k: p for k, p in self.engine.model.answers(outputs).combined.items() if k in self.levels}
        score = collective.broadcast_object(self.select.metric(answers, labels, taxonomy.levels))
        if not math.isfinite(score):
            raise NotFinite(self.select.name)
        record = {self.select.name: score, "accuracy": accuracy_per_level(answers, labels, taxonomy)}
        return (score if self.select.mode == "min" else -score), record
