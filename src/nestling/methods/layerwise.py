"""Layerwise training: *Shallow Learning for Deep Networks*, Belilovsky, Eickenberg, Oyallon, 2019.

Algorithm 1: layer j is trained with an auxiliary classifier on top, all layers below it frozen, and is frozen in turn.
Beyond the paper, ``levels_at`` lets the classifiers predict coarse levels early and fine ones late, from rows with
missing labels, and ``together`` trains several layers at once: all of them are the end-to-end twin.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import ClassVar

import numpy as np

from nestling.data.dataset import LabelledData
from nestling.data.transforms import Augmentation
from nestling.errors import UsageError, unknown
from nestling.methods.calibrate import temperature_stage
from nestling.methods.identity import start_as_identity, training_risk
from nestling.methods.prune import Compression, Pruning, note_accuracy
from nestling.methods.recipe import Optimizer, Recipe, Select, Stage, check, of_stage
from nestling.models.build import LayerOptions
from nestling.models.convnet import DOWNSAMPLINGS
from nestling.models.layerwise import LayerwiseModel
from nestling.models.model import Model
from nestling.objectives.terms import MarginalCrossEntropy, Objective, SimilarityMatching, Term
from nestling.taxonomy import Taxonomy

ALL = 1000
"""More layers than any network has."""


@dataclass(frozen=True, kw_only=True)
class Layerwise(LayerOptions, Recipe):
    """Networks trained one layer at a time, whose every prefix is a classifier."""

    method: ClassVar[str] = "layerwise"

    final_aux_width: int | None = None
    """M~_f: at the end the last layer is trained once more under a classifier of so many channels (Section 4.3)."""
    init: str = "random"
    """random, or identity: a layer starts as the identity under a copy of the classifier before, and the weights of
    least training risk are kept, those included (Proposition 3.1)."""
    together: int = 1
    """Layers that are trained at once, under the classifier behind the last of them; as many as there are, or more, is
    end-to-end."""
    similarity: float = 0.0
    """Share of each layer's objective, below 1, that matches the similarities of rows to those of their classes."""
    compression: Compression = field(default_factory=Compression)
    """Whether layers become narrower while the network is trained."""
    views: int | None = None
    """So many augmentations of each row, fixed: what frozen layers make of them is computed once. None: new ones at
    every draw, unless augmentation is none."""
    keep_features: bool = True
    """Whether that is kept, in memory or on disk, for the layers to come."""
    micro_batch: int | None = None
    """Rows that go through the network at once; their gradients add up to the batch's."""
    recompute: bool = False
    """Keep only each layer's input and compute the rest again on the way back: less memory, more time."""
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(name="sgd", lr=0.1, weight_decay=5e-4, schedule="cosine", restarts=True)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k", "width", "aux_width", "final_aux_width", "num_blocks", "together", "views"):
            check(name, getattr(self, name), least=1)
        check("micro_batch", self.micro_batch, least=1)
        check("downsample_at", self.downsample_at, least=0)
        check("similarity", self.similarity, least=0)
        if self.similarity >= 1:
            raise UsageError(f"similarity must be below 1, got {self.similarity}: the classifiers learn from the rest")
        if self.similarity and self.micro_batch is not None:
            raise UsageError("similarity compares all rows of a batch: leave micro_batch out, or set similarity = 0")
        if self.downsampling not in DOWNSAMPLINGS:
            raise unknown("downsampling", self.downsampling, DOWNSAMPLINGS)
        if self.init not in ("random", "identity"):
            raise unknown("init", self.init, ("random", "identity"))
        if self.init == "identity" and (self.norm != "none" or self.augmentation != "none" or self.together > 1):
            raise UsageError(
                "init = 'identity' improves layer by layer only without batch norm and augmentation (Proposition 3.1): "
                "set norm = 'none', augmentation = 'none' and together = 1, or init = 'random'"
            )

    def network(self) -> LayerOptions:
        return LayerOptions(**{f.name: getattr(self, f.name) for f in fields(LayerOptions)})

    def end_to_end(self, epochs: int) -> Layerwise:
        """The twin that trains all layers of the same network at once, for so many epochs."""
        rate = self.optimizer.lr
        optimizer = replace(self.optimizer, lr=rate[0] if isinstance(rate, tuple) else rate)
        return replace(
            self,
            together=ALL,
            epochs=epochs,
            optimizer=optimizer,
            init="random",
            compression=Compression(),
            final_aux_width=None,
            similarity=0.0,
        )

    def stages(self, model: Model, data: LabelledData) -> Iterator[Stage]:
        assert isinstance(model, LayerwiseModel)
        model.recompute = self.recompute
        lasts = [*range(self.together, len(model.blocks), self.together), len(model.blocks)]
        for number, last in enumerate(lasts):
            first = lasts[number - 1] if number else 0
            model.add_auxiliary_head(after=last - 1, matching=self.similarity > 0)
            if self.init == "identity" and number:
                start_as_identity(model, last - 1)
            model.drop_matching(but=f"layer-{last}")
            yield self.problem(model, data, f"layer-{last}", number, first, last)
            if self.compression.share is not None:
                yield self.tuning(model, data, number, last)
        if self.final_aux_width is not None:
            model.add_auxiliary_head(len(model.blocks) - 1, self.final_aux_width, matching=self.similarity > 0)
            yield self.problem(model, data, "reduced", len(lasts), len(model.blocks) - 1, len(model.blocks))
        model.drop_matching()
        yield temperature_stage(model, data, self.optimizer)

    def problem(
        self, model: LayerwiseModel, data: LabelledData, name: str, number: int, first: int, last: int
    ) -> Stage:
        """The auxiliary problem that trains the blocks ``first`` to ``last - 1`` and the classifier behind them."""
        stage = self.stage(model, data, first, last)
        share = None if name == "reduced" else self.compression.share
        pruned = None if share is None else Pruning(last - 1, share)
        if pruned is not None:
            pruned.check(model)
        level = model.levels_at[last - 1]
        return replace(
            stage,
            name=name,
            trainable=[*model.blocks[first:last], model.auxiliary[f"layer-{last}"]],
            lr=of_stage("optimizer.lr", self.optimizer.lr, number, self.problems(model)),
            epochs=of_stage("epochs", self.epochs or 20, number, self.problems(model)),
            select=Select(
                partial(training_risk, data.taxonomy), "training risk", "min", (level,), "train", start=number > 0
            )
            if self.init == "identity"
            else None,
            at_end=pruned or note_accuracy,
            assume=None if pruned is None else pruned.assume,
        )

    def objective(self, output: str, taxonomy: Taxonomy, level: str) -> Term | Objective:
        """Of every problem: the cross-entropy of its classifier and, with ``similarity``, what is matched beside it."""
        predicted = MarginalCrossEntropy(output, taxonomy, level)
        if not self.similarity:
            return predicted
        matched = SimilarityMatching(f"similarity-{output}", taxonomy.width(level), level)
        return (1 - self.similarity) * predicted + self.similarity * matched

    def problems(self, model: LayerwiseModel) -> int:
        """How many stages train layers: as many values may a field have that is given per stage."""
        return -(-len(model.blocks) // self.together) + (self.final_aux_width is not None)

    def tuning(self, model: LayerwiseModel, data: LabelledData, number: int, last: int) -> Stage:
        """Only the classifier goes on learning, at a tenth of the rate, on the filters that are left (Section 4.3)."""
        return replace(
            self.stage(model, data, last, last),
            name=f"tune-{last}",
            trainable=[model.auxiliary[f"layer-{last}"]],
            lr=0.1 * of_stage("optimizer.lr", self.optimizer.lr, number, self.problems(model)),
            epochs=self.compression.epochs,
            own_epochs=True,
            at_end=note_accuracy,
        )

    def stage(self, model: LayerwiseModel, data: LabelledData, first: int, last: int) -> Stage:
        """What every problem on the maps behind ``first`` blocks has in common."""
        rows = np.flatnonzero(data.finest_known() >= 0)
        if len(rows) == 0:
            raise UsageError("no training row is labelled, and layerwise training needs labels: label some")
        augmentation = Augmentation.parse(self.augmentation, model.config["input_shape"])
        views = self.views or (1 if augmentation == Augmentation() else None)
        batch_size = self.batch_for(len(rows))
        return Stage(
            name="",
            data=data,
            rows=rows,
            objective=self.objective(f"layer-{last}", data.taxonomy, model.levels_at[last - 1]),
            trainable=[],
            optimizer=self.optimizer,
            lr=0.0,
            epochs=1,
            batch_size=batch_size,
            steps_per_epoch=self.steps_for(len(rows), batch_size),
            balance=self.balance,
            balance_level=model.levels_at[last - 1],
            augmentation=augmentation,
            until=f"layer-{last}",
            prefix=list(model.blocks[:first]) if self.keep_features else (),
            views=views,
            micro_batch=self.micro_batch,
        )
