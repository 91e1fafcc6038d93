"""Nested learning: *Nested Learning for Multi-Level Classification*, Achddou, Di Martino, Sapiro, ICASSP 2021.

The network of Figure 1 is trained in cascade (Section 2.2): problem P_i trains everything that the levels 1..i are
computed by, on the rows labelled at least to level i, then calibrated by a rejection class and a temperature. Beyond
the paper, ``marginal`` and ``balance`` let the rows known only coarsely train the finer levels too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from nestling.data.dataset import LabelledData
from nestling.data.transforms import Augmentation
from nestling.errors import UsageError, unknown
from nestling.methods.calibrate import SelectionOptions, select_by_likelihood, temperature_stage
from nestling.methods.concepts import ConceptOptions
from nestling.methods.recipe import Optimizer, Recipe, Stage, check, of_stage
from nestling.methods.self_training import SelfTrainingOptions
from nestling.models.build import NetworkOptions
from nestling.models.model import Model
from nestling.objectives.reducers import Reducer
from nestling.objectives.terms import CrossEntropy, MarginalCrossEntropy, Objective, RejectionCrossEntropy

SYNTHETIC = (50_000, 60_000, 80_000)
"""Synthetic bottlenecks that the authors draw for the coarse, middle and fine rejection class."""

REJECTION_RATE = 5e-2
"""Highest learning rate of the rejection layers; the authors' 2.5e-3 needs their 20,000 steps, ours take 500."""


@dataclass(frozen=True, kw_only=True)
class Nested(ConceptOptions, SelfTrainingOptions, SelectionOptions, Recipe):
    """Coarse, middle and fine predictions from one network, trained in cascade on partly labelled data."""

    method: ClassVar[str] = "nested"

    reading: str = "at-least"
    """Which rows train stage i: those known at least to level i, or whose finest known level is exactly i."""
    cascade: bool = True
    """Level after level, as the paper trains; false trains all levels at once, on every row that has a label."""
    marginal: bool = True
    """Rows known only to a coarser level train the finer heads by their summed probability."""
    calibration: str = "temperature"
    """none, temperature, rejection (an extra class on synthetic bottlenecks), or both."""
    skips: bool = True
    """Finer levels see earlier maps of the backbone."""
    hidden: tuple[int, ...] = ()
    """Units of a hidden layer before each level's linear layer, coarse to fine; 0, or nothing at all, is none."""
    dropout: float = 0.0
    """Share of a map that is dropped after each pooling of a 'conv:…' backbone."""
    rejection_epochs: int = 12
    """Epochs of the rejection layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reading not in ("exact", "at-least"):
            raise unknown("reading", self.reading, ("exact", "at-least"))
        if self.calibration not in ("none", "temperature", "rejection", "both"):
            raise unknown("calibration", self.calibration, ("none", "temperature", "rejection", "both"))
        if not self.cascade and self.reading == "exact":
            raise UsageError(
                "cascade = false trains one stage on every labelled row, and reading = 'exact' on disjoint subsets: "
                "set reading = 'at-least'"
            )
        if self.marginal and self.reading == "exact":
            raise UsageError(
                "marginal = true trains finer heads on coarser rows, which reading = 'exact' leaves out: "
                "set marginal = false, or reading = 'at-least'"
            )
        check("rejection_epochs", self.rejection_epochs, least=1)
        check("hidden", self.hidden, least=0)
        check("dropout", self.dropout, least=0, most=0.99)
        self.check_self_training()
        self.check_selection()
        check("concept_strength", self.concept_strength, above=0)

    @property
    def idle(self) -> dict[str, str]:
        labelled = self.cascade and not self.marginal
        return (
            super().idle
            | self.idle_selection()
            | self.idle_self_training("marginal, or cascade = false" if labelled else None)
        )

    def network(self) -> NetworkOptions:
        return NetworkOptions(skips=self.skips, norm=self.norm, hidden=self.hidden, dropout=self.dropout)

    def stages(self, model: Model, data: LabelledData) -> Iterator[Stage]:
        levels = data.taxonomy.levels
        augmentation = Augmentation.parse(self.augmentation, model.config["input_shape"])
        problems = list(enumerate(levels)) if self.cascade else [(len(levels) - 1, levels[-1])]
        for number, (i, level) in enumerate(problems):
            rows = self.rows(data, i)
            if len(rows) == 0:
                raise UsageError(
                    f"no training row is labelled at level {level!r}, which nested learning trains: "
                    f"label some, raise --known {level}=…, or leave the level out with --levels"
                )
            stage = Stage(
                name=level if self.cascade else "joint",
                data=data,
                rows=rows,
                objective=self.objective(data, i, rows),
                trainable=model.parts(level),
                until=level,
                optimizer=self.optimizer,
                lr=of_stage("optimizer.lr", self.optimizer.lr, number, len(problems)),
                epochs=of_stage("epochs", self.epochs or (3,) * (len(problems) - 1) + (60,), number, len(problems)),
                steps_per_epoch=self.steps(data, i, rows),
                batch_size=self.batch_for(len(rows)),
                balance=self.balance,
                balance_level=level,
                augmentation=augmentation,
                select=select_by_likelihood(levels[: i + 1], self.keeps_best),
                patience=self.patience if self.keeps_best else None,
            )
            yield self.taught(stage, model)
        if self.calibration in ("rejection", "both"):
            heads = model.calibration.add_rejection()
            model.config["rejection"] = True
            yield Stage(
                name="rejection",
                data=data,
                objective=self.rejection(model, data),
                trainable=[heads],
                optimizer=Optimizer(name="adam", lr=REJECTION_RATE, weight_decay=0.0),
                lr=REJECTION_RATE,
                epochs=self.rejection_epochs,
                own_epochs=True,
                batch_size=128,
                steps_per_epoch=max(-(-len(data) // 128), 40),
            )
        if self.calibration in ("temperature", "both"):
            yield temperature_stage(model, data, self.optimizer)

    def rows(self, data: LabelledData, i: int) -> np.ndarray:
        """D_i: the rows that train stage i. With ``marginal`` the coarser ones come along, weighted by ``balance``."""
        finest = data.finest_known()
        if (self.marginal or not self.cascade) and (finest >= i).any():
            return np.flatnonzero(finest >= 0)
        return np.flatnonzero(finest == i if self.reading == "exact" else finest >= i)

    def steps(self, data: LabelledData, i: int, rows: np.ndarray) -> int | None:
        """Steps per epoch: a pass over the rows known at least to level i, which the coarser ones accompany."""
        primary = int((data.finest_known() >= i).sum()) if self.marginal else len(rows)
        batch_size = self.batch_for(len(rows))
        return self.steps_for(primary, batch_size) or (-(-primary // batch_size) if self.marginal else None)

    def objective(self, data: LabelledData, i: int, rows: np.ndarray) -> Objective:
        """The sum over j <= i of alpha_j L(Y_j): alpha_j = n_coarse / n_j for the paper's loss, else 1."""
        levels = data.taxonomy.levels[: i + 1]
        reducers = [self.reducer(data, i, j, rows) for j in range(len(levels))]
        if self.marginal:
            terms = [MarginalCrossEntropy(level, data.taxonomy, reducer=r) for level, r in zip(levels, reducers)]
            return Objective([(1.0, term) for term in terms])
        known = (data.labels >= 0).sum(0)
        return Objective(
            [
                (float(known[0] / max(known[j], 1)), CrossEntropy(level, reducer=reducers[j]))
                for j, level in enumerate(levels)
            ]
        )

    def reducer(self, data: LabelledData, i: int, j: int, rows: np.ndarray) -> Reducer | None:
        """What weights the concepts in L(Y_j) of stage i, over the rows that it counts; None for the plain mean."""
        known = np.asarray(data.taxonomy.columns(data.labels)[:, : j + 1] >= 0)
        counted = np.asarray(known.any(1)) if self.marginal else known[:, j]
        batch_size, level = self.batch_for(len(rows)), data.taxonomy.levels[i]
        return self.concept_reducer(data, rows, counted, batch_size=batch_size, balance=self.balance, up_to=level)

    def rejection(self, model: Model, data: LabelledData) -> Objective:
        """One term per level, with as many synthetic rows as the authors draw, at most ten for each labelled one."""
        terms = []
        for i, level in enumerate(data.taxonomy.levels):
            drawn = SYNTHETIC[0] if i == 0 else SYNTHETIC[-1] if i == len(data.taxonomy.levels) - 1 else SYNTHETIC[1]
            ratio = min(max(drawn // max(int((data.labels[:, i] >= 0).sum()), 1), 1), 10)
            terms.append((1.0, RejectionCrossEntropy(level, model.calibration, ratio)))
        return Objective(terms)
