"""Terms of an objective, and the objective that is their weighted sum: ``a + 0.5 * b``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling import collective
from nestling.objectives import functional
from nestling.objectives.calibration import uniform_on_positive_sphere
from nestling.objectives.reducers import Mean, Reducer
from nestling.taxonomy import Taxonomy

if TYPE_CHECKING:
    from nestling.data.batch import Batch
    from nestling.models.heads import Calibration
    from nestling.models.model import Outputs

Weight = float | Callable[[float], float]
"""A factor, or a function of the stage's progress in [0, 1]."""


class Term(nn.Module, ABC):
    """Abstract. ``term(outputs, batch) -> values (b,), weights (b,)``; the weight is 0 where a row lacks the label."""

    compares: ClassVar[bool] = False
    """Whether a row's value depends on the other rows of its batch."""

    def __init__(self, name: str, reducer: Reducer | None = None) -> None:
        super().__init__()
        self.name = name
        self.reducer = reducer or Mean()

    @abstractmethod
    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        """Values and weights per row."""

    def own_gradients(self) -> list[Tensor]:
        """Those that ``step`` will apply: a run stops before, where one of them is not finite."""
        return []

    def step(self, lr: float) -> None:
        """Move what the term keeps in buffers of its own; called after the optimiser's step, at its rate.

        Called for terms that took part in the step. Gradients of all processes are gathered first, so that every
        process applies the same update.
        """

    def __add__(self, other: Term | Objective) -> Objective:
        return 1.0 * self + other

    def __rmul__(self, weight: Weight) -> Objective:
        return Objective([(weight, self)])


class Objective(nn.Module):
    """A weighted sum of terms. ``objective(outputs, batch, progress) -> scalar, {term: value}``."""

    def __init__(self, weighted: list[tuple[Weight, Term]]) -> None:
        super().__init__()
        names = [term.name for _, term in weighted]
        if len(set(names)) < len(names):
            raise ValueError(f"the terms of an objective need different names, got {names}")
        self.weights = [weight for weight, _ in weighted]
        self.active: list[Term] = []
        """The terms that took part in the last forward pass; the others were switched off."""
        self.terms = nn.ModuleList(term for _, term in weighted)

    @staticmethod
    def of(given: Term | Objective) -> Objective:
        """A term by itself, as an objective; an objective as it is."""
        return given if isinstance(given, Objective) else 1.0 * given

    def weighted(self) -> list[tuple[Weight, Term]]:
        """The terms with their factors."""
        return list(zip(self.weights, self.terms, strict=True))  # type: ignore[arg-type]

    def step(self, lr: float) -> None:
        """Let the active terms that have rows of their own move them."""
        for term in self.active:
            term.step(lr)

    def own_gradients(self) -> list[Tensor]:
        """Of the active terms."""
        return [gradient for term in self.active for gradient in term.own_gradients()]

    def keeps(self) -> bool:
        """Whether a term moves rows of its own, or a reducer keeps something of a batch."""
        moves = any(type(term).step is not Term.step for _, term in self.weighted())
        return moves or any(True for _, term in self.weighted() for _ in term.reducer.buffers())

    def figures(self) -> dict[str, dict[str, float]]:
        """What the reducers have to log of their state, by term; those that have nothing are left out."""
        return {term.name: found for _, term in self.weighted() if (found := term.reducer.figures())}

    def adds_up(self) -> bool:
        """Whether its gradients over parts of a batch add up: it keeps nothing of a batch, and compares no rows."""
        return not self.keeps() and not any(term.compares for _, term in self.weighted())

    def __add__(self, other: Term | Objective) -> Objective:
        return Objective(self.weighted() + Objective.of(other).weighted())

    def __rmul__(self, factor: Weight) -> Objective:
        return Objective([(_scaled(weight, factor), term) for weight, term in self.weighted()])

    def forward(self, outputs: Outputs, batch: Batch, progress: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        total, values = batch.inputs.new_zeros((), dtype=torch.float32), {}
        self.active = []
        for weight, term in self.weighted():
            factor = _at(weight, progress)
            if factor == 0:
                # Its own weights wait for it to be switched on: their gradient is 0, not missing.
                total = total + 0.0 * sum(p.sum() for p in term.parameters() if p.requires_grad)
                continue
            self.active.append(term)
            value = term.reducer(*term(outputs, batch), batch)
            values[term.name] = value.detach()
            total = total + factor * value
        return total, values


def _scaled(weight: Weight, factor: Weight) -> Weight:
    if not callable(weight) and not callable(factor):
        return factor * weight
    return lambda progress: _at(factor, progress) * _at(weight, progress)


def _at(weight: Weight, progress: float) -> float:
    return weight(progress) if callable(weight) else weight


class CrossEntropy(Term):
    """Categorical cross-entropy of one output, over the rows labelled at its level: L_n of P_i (nested, Sec. 2.2)."""

    def __init__(self, output: str, level: str | None = None, reducer: Reducer | None = None) -> None:
        super().__init__(output, reducer)
        self.level = level or output

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = batch.at(self.level)
        values = [functional.level_cross_entropy(scores, labels) for scores in outputs.learners(self.name)]
        return reduce(torch.add, values), (labels >= 0).float()


class MarginalCrossEntropy(Term):
    """Cross-entropy of one output, where a row known only at a coarser level counts by its summed probability there."""

    def __init__(
        self, output: str, taxonomy: Taxonomy, level: str | None = None, reducer: Reducer | None = None
    ) -> None:
        super().__init__(output, reducer)
        self.taxonomy = taxonomy
        self.level = level or output
        self.depth = taxonomy.level_index(self.level) + 1

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        values = [
            functional.marginal_cross_entropy(scores, batch.labels, self.taxonomy, level=self.level)
            for scores in outputs.learners(self.name)
        ]
        return reduce(torch.add, values), (batch.labels[:, : self.depth] >= 0).any(1).float()


class SimilarityMatching(Term):
    """Brings rows of a class together and those of different classes apart, over the rows labelled at one level.

    The features of all processes are compared, as those of one (Nøkland and Eidnes 2019).

    Parameters
    ----------
    features: the name of the features, in the model's outputs, and of this term.
    width: columns of the level.
    level: the level whose classes are told apart; that of the features' name by default.
    """

    compares = True

    def __init__(self, features: str, width: int, level: str | None = None, reducer: Reducer | None = None) -> None:
        super().__init__(features, reducer)
        self.width = width
        self.level = level or features

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        features, labels = outputs.features[self.name].float(), batch.at(self.level)
        every = collective.gather(features), collective.gather(labels)
        return functional.similarity_matching(features, labels, self.width, every), (labels >= 0).float()


class RejectionCrossEntropy(Term):
    """Trains the rejection layer of one head (nested learning, Section 2.2, Calibration).

    Every labelled row is joined by ``ratio`` synthetic bottlenecks of class "rejected", uniform in [0, 1]^d and
    L2-normalised; a row's value is the mean cross-entropy over itself and its synthetic companions.

    Parameters
    ----------
    head: the output whose rejection layer is trained.
    calibration: the model's; not held, so that its weights are not saved with the objective.
    ratio: synthetic rows for each real one; at most ten is our default, where the authors draw 50,000 to 80,000 in all.
    """

    def __init__(self, head: str, calibration: Calibration, ratio: int, reducer: Reducer | None = None) -> None:
        super().__init__(f"rejection-{head}", reducer)
        self.head = head
        self.ratio = ratio
        object.__setattr__(self, "calibration", calibration)
        self.calibration: Calibration

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = batch.at(self.head)
        known = labels >= 0
        features = outputs.features[self.head]
        logits = self.calibration.rejection_logits(self.head, features)
        real = F.cross_entropy(logits, labels.clamp_min(0), reduction="none")
        synthetic = uniform_on_positive_sphere(len(labels) * self.ratio, features.shape[1]).to(features.device)
        rejected = torch.full((len(synthetic),), logits.shape[1] - 1, device=features.device)
        synthetic_loss = F.cross_entropy(
            self.calibration.rejection_logits(self.head, synthetic), rejected, reduction="none"
        )
        return (real + synthetic_loss.view(len(labels), -1).sum(1)) / (1 + self.ratio), known.float()
