"""What a hierarchy has to beat: one flat softmax over the finest classes, on the same network.

* ``EndToEnd`` sees the rows with fine labels alone: the twin of Section 3.1 of *Nested Learning*.
* ``FlatMarginal`` sees every row: one known only at a coarser level contributes the cross-entropy of its summed leaf
  probabilities. With balanced batches it is the rival to beat: on MNIST with 2 % fine labels they alone took it from 75
  to 97.
* Flat + CRM decides anew from FlatMarginal's weights, by least expected distance in the tree (``evaluate.predict``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from nestling.data.dataset import LabelledData
from nestling.data.transforms import Augmentation
from nestling.errors import UsageError
from nestling.methods.calibrate import (
    SelectionOptions,
    select_by_likelihood,
    select_by_worst_concept,
    temperature_stage,
)
from nestling.methods.concepts import concepts_named
from nestling.methods.recipe import Recipe, Stage, check, of_stage
from nestling.methods.self_training import SelfTrainingOptions
from nestling.models.build import NetworkOptions
from nestling.models.model import Model
from nestling.objectives.terms import CrossEntropy, MarginalCrossEntropy, Term


@dataclass(frozen=True, kw_only=True)
class Flat(SelfTrainingOptions, SelectionOptions, Recipe):
    """Abstract. One stage, one softmax, and the temperature that every method gets."""

    skips: bool = True
    """As of nested learning, whose network this is."""
    hidden: tuple[int, ...] = ()
    """As of nested learning: the finest level's is the only one in use."""
    dropout: float = 0.0
    """As of nested learning."""
    plain: bool = False
    """The softmax reads the backbone's last map, without nested learning's decoder: as beside robust training."""
    worst_of: str | None = None
    """Epochs are compared by the worst class of this level, or by the worst of the column of concepts, as beside robust
    training, whatever ``selection`` says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("hidden", self.hidden, least=0)
        check("dropout", self.dropout, least=0, most=0.99)
        self.check_self_training()
        self.check_selection()

    @property
    def idle(self) -> dict[str, str]:
        return super().idle | self.idle_selection() | self.idle_self_training()

    @property
    def keeps_best(self) -> bool:
        return super().keeps_best or self.worst_of is not None

    def network(self) -> NetworkOptions:
        return NetworkOptions(
            skips=self.skips, norm=self.norm, plain=self.plain, hidden=self.hidden, dropout=self.dropout
        )

    def rows(self, data: LabelledData) -> np.ndarray:
        """The rows that this baseline can learn from."""
        raise NotImplementedError

    def term(self, data: LabelledData) -> Term:
        """Its loss."""
        raise NotImplementedError

    def stages(self, model: Model, data: LabelledData) -> Iterator[Stage]:
        rows = self.rows(data)
        if len(rows) == 0:
            raise UsageError(
                f"no training row is labelled for {self.method}: label some at level {data.taxonomy.levels[-1]!r}"
            )
        batch_size = self.batch_for(len(rows))
        levels = data.taxonomy.levels
        select = select_by_likelihood(levels, self.keeps_best)
        if self.worst_of is not None:
            select = select_by_worst_concept(concepts_named(data, self.worst_of))
        stage = Stage(
            name="flat",
            data=data,
            rows=rows,
            objective=self.term(data),
            trainable=model.parts(data.taxonomy.levels[-1]),
            optimizer=self.optimizer,
            lr=of_stage("optimizer.lr", self.optimizer.lr, 0, 1),
            epochs=of_stage("epochs", self.epochs or 60, 0, 1),
            steps_per_epoch=self.steps_for(len(rows), batch_size),
            batch_size=batch_size,
            balance=self.balance,
            augmentation=Augmentation.parse(self.augmentation, model.config["input_shape"]),
            select=select,
            patience=self.patience if self.keeps_best else None,
        )
        yield self.taught(stage, model)
        yield temperature_stage(model, data, self.optimizer)


@dataclass(frozen=True, kw_only=True)
class EndToEnd(Flat):
    """One softmax over the finest classes, trained on the rows with fine labels alone."""

    method: ClassVar[str] = "end-to-end"

    @property
    def idle(self) -> dict[str, str]:
        return super().idle | self.idle_self_training("rows without a fine label, which end-to-end leaves out")

    def rows(self, data: LabelledData) -> np.ndarray:
        return np.flatnonzero(data.finest_known() == len(data.taxonomy.levels) - 1)

    def term(self, data: LabelledData) -> Term:
        return CrossEntropy(data.taxonomy.levels[-1])


@dataclass(frozen=True, kw_only=True)
class FlatMarginal(Flat):
    """One softmax over the finest classes, trained on every row by the summed probability of what is known of it."""

    method: ClassVar[str] = "flat-marginal"

    def rows(self, data: LabelledData) -> np.ndarray:
        return np.flatnonzero(data.finest_known() >= 0)

    def term(self, data: LabelledData) -> Term:
        return MarginalCrossEntropy(data.taxonomy.levels[-1], data.taxonomy)
