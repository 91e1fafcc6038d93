"""Robust features: *Hierarchically Robust Representation Learning*, Qian, Hu, Li, CVPR 2020.

Algorithm 1: each step moves every image by tau along the gradient of its own loss (example robustness, Section 3.2),
updates the network with rows of concept k weighted (N / N_k) q_k (Equation 5), and moves q towards the concepts of
large loss (Equation 6). tau = 0 and strength = 'off' switch off the one and the other: neither is ERM, the first alone
EL, the second alone CL, both HRRL. Beyond the paper, rows known only to a coarser level count by their summed
probability, and group DRO weights the concepts by its rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from nestling import collective
from nestling.data.batch import Batch
from nestling.data.dataset import LabelledData
from nestling.data.transforms import Augmentation
from nestling.errors import UsageError, unknown
from nestling.methods.calibrate import select_by_likelihood, select_by_worst_concept, temperature_stage
from nestling.methods.concepts import concept_table, concepts_named, level_of_prior, parse_prior, prior_at
from nestling.methods.recipe import Context, Perturb, Recipe, Select, Stage, check, of_stage
from nestling.models.build import NetworkOptions
from nestling.models.model import Model
from nestling.objectives import robust
from nestling.objectives.reducers import ConceptReducer, ConceptWeighted, GroupDRO
from nestling.objectives.terms import MarginalCrossEntropy

ASCENTS = ("projected", "group-dro")
SELECTIONS = ("auto", "worst-concept", "likelihood", "last")


@dataclass(frozen=True, kw_only=True)
class Robust(Recipe):
    """One softmax whose features hold up when examples, or the mix of concepts, are others than in training."""

    method: ClassVar[str] = "robust"

    tau: float = 0.5
    """How far each image is moved along its unit gradient, an L2 norm of normalised pixels; 0 leaves them in place."""
    smoothness: float | None = None
    """L_x: each row's tau is Theorem 2's, its gradient's norm over 3 L_x, in place of one for all."""
    strength: float | str = 10.0
    """lambda, by which the concepts' weights are held at the prior: the smaller, the more adversarial; or off."""
    concept_level: str | None = None
    """The level whose classes are the concepts; by default the column of concepts, or where none is the coarsest."""
    prior: tuple[str, ...] = ()
    """q_0 as CONCEPT=SHARE for each, for a target whose mix is known; the training rows' own mix by default."""
    ascent: str = "projected"
    """How the weights move: projected (Equation 6), or group-dro, the rival's exponentiated gradient."""
    schedule: str = "paper"
    """Step sizes of q: paper (s and c as they stand here), or auto, measured on the first ten batches (Theorem 3)."""
    s: int = 1000
    """So many steps of q are slow, ..."""
    c: float = 10.0
    """... by this factor."""
    eta: float = 0.01
    """Step size of group-dro."""
    selection: str = "auto"
    """How epochs are compared: worst-concept (validation accuracy), likelihood, or auto: the first where concepts are
    weighted; last keeps the last epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("tau", self.tau, least=0)
        check("smoothness", self.smoothness, above=0)
        for name, options in (("ascent", ASCENTS), ("schedule", ("paper", "auto")), ("selection", SELECTIONS)):
            if getattr(self, name) not in options:
                raise unknown(name, getattr(self, name), options)
        if isinstance(self.strength, str):
            if self.strength != "off":
                raise unknown("strength", self.strength, ("off", "a number above 0"))
        elif not 0 < self.strength < float("inf"):
            raise UsageError(
                f"strength, lambda, must be above 0, got {self.strength!r}: the smaller, the more adversarial the "
                "concepts' weights; strength = 'off' leaves the concepts alone"
            )
        check("s", self.s, least=1)
        check("c", self.c, least=1)
        check("eta", self.eta, above=0)
        if parse_prior(self.prior) and not self.weighted:
            raise UsageError("prior is the mix that concepts' weights start from: set strength to a number")

    @property
    def weighted(self) -> bool:
        """Whether concepts are weighted."""
        return self.strength != "off"

    @property
    def searched(self) -> dict[str, tuple[float, float]]:
        """What has an effect: group DRO knows no strength, and Theorem 2 has a tau of its own."""
        found = {"tau": (1e-3, 1e1)} if self.smoothness is None else {}
        if not self.weighted:
            return found
        return {**found, "eta": (1e-4, 1e0)} if self.ascent == "group-dro" else {**found, "strength": (1e-3, 1e1)}

    @property
    def by_worst_concept(self) -> bool:
        """Whether epochs are compared by the worst concept's accuracy."""
        return self.selection == "worst-concept" or (self.selection == "auto" and self.weighted)

    def network(self) -> NetworkOptions:
        return NetworkOptions(norm=self.norm, plain=True)

    def concepts_at(self, data: LabelledData) -> str:
        if self.concept_level is not None:
            return concepts_named(data, self.concept_level)
        if self.prior:
            return level_of_prior(parse_prior(self.prior), data)
        return data.taxonomy.levels[0] if data.concepts is None else data.concepts.name

    def stages(self, model: Model, data: LabelledData) -> Iterator[Stage]:
        levels, finest = data.taxonomy.levels, data.taxonomy.levels[-1]
        rows = np.flatnonzero(data.finest_known() >= 0)
        if len(rows) == 0:
            raise UsageError("no training row is labelled, and robust training needs labels: label some")
        batch_size, epochs = self.batch_for(len(rows)), of_stage("epochs", self.epochs or 60, 0, 1)
        steps = self.steps_for(len(rows), batch_size)
        concepts = self.concepts_at(data)
        total = epochs * (steps or -(-len(rows) // batch_size))
        reducer = self.reducer(data, rows, concepts, batch_size, total) if self.weighted else None
        yield Stage(
            name="robust",
            data=data,
            rows=rows,
            objective=MarginalCrossEntropy(finest, data.taxonomy, reducer=reducer),
            trainable=model.parts(finest),
            optimizer=self.optimizer,
            lr=of_stage("optimizer.lr", self.optimizer.lr, 0, 1),
            epochs=epochs,
            steps_per_epoch=steps,
            batch_size=batch_size,
            balance=self.balance,
            augmentation=Augmentation.parse(self.augmentation, model.config["input_shape"]),
            select=self.select(levels, concepts),
            patience=self.patience,
            perturb=along_the_gradient(self.tau, self.smoothness) if self.tau or self.smoothness else None,
            after_epoch=partial(note_schedule, reducer, total // epochs)
            if isinstance(reducer, ConceptWeighted) and reducer.total is not None
            else None,
        )
        yield temperature_stage(model, data, self.optimizer)

    def select(self, levels: tuple[str, ...], concepts: str) -> Select | None:
        """How epochs are compared; None: the last one is kept."""
        if self.selection == "last":
            return None
        return select_by_worst_concept(concepts) if self.by_worst_concept else select_by_likelihood(levels)

    def reducer(self, data: LabelledData, rows: np.ndarray, level: str, batch_size: int, total: int) -> ConceptReducer:
        """What weights the concepts of ``rows``; the training takes ``total`` steps."""
        table = concept_table(data, rows, level, batch_size=batch_size, balance=self.balance)
        given = prior_at(parse_prior(self.prior), table.names, level)
        prior = table.prior if given is None else given
        if self.ascent == "group-dro":
            return GroupDRO(table.concept_of, table.counts, table.names, prior, eta=self.eta)
        assert not isinstance(self.strength, str)
        return ConceptWeighted(
            table.concept_of,
            table.counts,
            table.names,
            prior,
            strength=self.strength,
            s=self.s,
            c=self.c,
            total=total if self.schedule == "auto" else None,
        )


def along_the_gradient(tau: float, smoothness: float | None = None) -> Perturb:
    """Move every row by ``tau`` along the unit gradient of its own loss, or by Theorem 2's own tau (Section 3.2)."""

    def perturb(loss: Callable[[Batch], Tensor], batch: Batch) -> Batch:
        inputs = batch.inputs.detach().requires_grad_()
        # The loss is a mean over the global batch; of the sum, a row's gradient is that of its own loss.
        rows = collective.all_sum(torch.tensor(float(len(inputs)), device=inputs.device)) / collective.world_size()
        total = loss(replace(batch, inputs=inputs)) * rows
        if smoothness is not None:
            return replace(batch, inputs=inputs.detach() + robust.adversarial_step(total, inputs, smoothness))
        return replace(batch, inputs=inputs.detach() + tau * robust.adversarial_direction(total, inputs))

    return perturb


def note_schedule(reducer: ConceptWeighted, steps: int, context: Context) -> None:
    """Say what the first batches have shown, after the epoch, of so many steps, in which it was found.

    Of a training that is over by then, after its first epoch, that q never moves.
    """
    if reducer.total is not None and reducer.total <= reducer.MEASURED:
        why = (
            f"warning: the first {reducer.MEASURED} batches only measure the gradient of q, and there are "
            f"{reducer.total}, so the concepts keep their weights: train longer, or set schedule=paper"
        )
        if context.epoch == 0:
            context.note("s and c", "none", why)
        return
    if not 0 <= reducer.t < steps:
        return
    s, c, mu = int(reducer.s), float(reducer.c), float(reducer.mu)
    hint = "" if c > 1 else "; warning: Theorem 3 has no slow start for so small a gradient, so none is taken"
    context.note("s and c", f"{s} and {c:.3g}", f"the largest gradient of q over the first batches is {mu:.3g}{hint}")
