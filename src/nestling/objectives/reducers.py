"""From values per row to the scalar that is minimised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nestling import collective
from nestling.errors import DataError, UsageError, listed
from nestling.objectives import robust

if TYPE_CHECKING:
    from nestling.data.batch import Batch


class Reducer(nn.Module, ABC):
    """Abstract. ``reducer(values, weights, batch) -> scalar``; it may hold state, in buffers."""

    @abstractmethod
    def forward(self, values: Tensor, weights: Tensor, batch: Batch) -> Tensor:
        """Values and weights are (b,); a weight is 0 where a row lacks the label."""

    def figures(self) -> dict[str, float]:
        """What to log of its state, by name."""
        return {}


class Mean(Reducer):
    """The weighted mean over the rows of the global batch.

    The gradients of several processes are averaged, so each multiplies by their number and divides by the global
    weight: the result is the gradient of one process, however unevenly the labelled rows fall.
    """

    def forward(self, values: Tensor, weights: Tensor, batch: Batch) -> Tensor:
        total = collective.all_sum(weights.sum())
        return (values * weights).sum() * collective.world_size() / total.clamp_min(1e-12)


class ConceptReducer(Reducer):
    """Abstract. The mean with a weight (N / N_k) q_k for a row of concept k (Equation 5), and q moved by every batch.

    Evaluation mode, as in the first of two passes, is the plain mean: which way a row would get worse does not depend
    on its concept's weight, which may be 0.

    Parameters
    ----------
    concept_of: (largest row index + 1,) int64: the concept of each row by its ``Batch.index``, -1 = none: such a row
        weighs nothing in training. Any column of numbers will do, a level of the taxonomy is one.
    counts: (k,) N_k: the rows of each concept, or what share of the batches' rows it has.
    names: of the concepts, for messages and for the log.
    prior: (k,) q_0, summing to 1 but for a thousandth of rounding; by default counts / their sum.
    """

    def __init__(self, concept_of: Tensor, counts: Tensor, names: Sequence[str], prior: Tensor | None = None) -> None:
        super().__init__()
        empty = [names[k] for k in torch.nonzero(counts <= 0).flatten().tolist()]
        if empty:
            raise DataError(
                f"no training row is of the concept {listed(empty)}, so there is nothing to weight: label some, or "
                "leave the concept out of the data"
            )
        prior = counts / counts.sum() if prior is None else prior
        if prior.shape != counts.shape or bool((prior < 0).any()) or not abs(float(prior.sum()) - 1) <= 1e-3:
            raise UsageError(
                f"the prior must be {len(counts)} shares of at least 0 that sum to 1, got {prior.tolist()!s:.200}, "
                f"which sum to {float(prior.sum()):g}"
            )
        self.names = tuple(names)
        self.concept_of: Tensor
        self.counts: Tensor
        self.prior: Tensor
        self.scale: Tensor
        self.q: Tensor
        for name, value in {
            "concept_of": concept_of,
            "counts": counts.float(),
            "prior": (prior / prior.sum()).float(),
            "scale": (counts.sum() / counts).float(),
        }.items():
            self.register_buffer(name, value.clone(), persistent=False)
        self.register_buffer("q", self.prior.clone())

    @abstractmethod
    def ascend(self, sums: Tensor, size: Tensor) -> Tensor:
        """The next q, (k,), from the global batch's sums of losses per concept (k,) and its rows."""

    def forward(self, values: Tensor, weights: Tensor, batch: Batch) -> Tensor:
        if not self.training:
            return Mean()(values, weights, batch)
        concepts = self.concept_of[batch.index]
        weights = weights * (concepts >= 0)
        concepts = concepts.clamp_min(0)
        weighted = weights * (self.q * self.scale)[concepts]
        with torch.no_grad():
            found = torch.zeros(len(self.q) + 1, dtype=self.q.dtype, device=self.q.device)
            found[:-1].index_add_(0, concepts, (values * weights).to(found.dtype))
            found[-1] = weights.sum()
            found = collective.all_sum(found)
            size = found[-1].clamp_min(1e-12)
            self.q.copy_(self.ascend(found[:-1], size))
        return (values * weighted).sum() * collective.world_size() / size

    def figures(self) -> dict[str, float]:
        """q by concept."""
        return dict(zip(self.names, self.q.tolist(), strict=True))


class ConceptWeighted(ConceptReducer):
    """Concept robustness: projected gradient ascent on q (*Hierarchically Robust Representation Learning*, Eq. 6).

    Parameters
    ----------
    strength: lambda, above 0; the larger, the nearer q stays to the prior.
    s, c: the first s step sizes are 1 / (c * lambda * t), later ones 1 / (lambda * t).
    total: the training's steps, where s and c are to be measured: the first ``MEASURED`` batches leave q as it is and
        give mu, the largest norm of its gradient, from which Theorem 3 has s and c.
    """

    MEASURED = 10

    def __init__(
        self,
        concept_of: Tensor,
        counts: Tensor,
        names: Sequence[str],
        prior: Tensor | None = None,
        *,
        strength: float,
        s: int = 1000,
        c: float = 10.0,
        total: int | None = None,
    ) -> None:
        super().__init__(concept_of, counts, names, prior)
        if not 0 < strength < float("inf"):
            raise UsageError(f"strength, lambda, must be above 0, got {strength!r}: 'off' leaves the concepts alone")
        self.strength, self.total = strength, total
        self.t: Tensor
        self.s: Tensor
        self.c: Tensor
        self.mu: Tensor
        for name, value in {
            "t": torch.tensor(0 if total is None else -self.MEASURED),
            "s": torch.tensor(s),
            "c": torch.tensor(float(c)),
            "mu": torch.tensor(0.0),
        }.items():
            self.register_buffer(name, value)

    def ascend(self, sums: Tensor, size: Tensor) -> Tensor:
        gradient = robust.concept_gradient(self.q, sums, size, self.counts, self.prior, self.strength)
        self.t += 1
        if self.total is not None and self.t <= 0:
            self.measure(gradient)
            return self.q
        eta = robust.concept_step_size(self.t, self.strength, self.s, self.c)
        # A loss that is not finite is for the engine to report, with its step and rows.
        return robust.projected(self.q + eta * gradient)

    def measure(self, gradient: Tensor) -> None:
        """One of the first batches: keep the largest norm, and after the last of them choose s and c."""
        assert self.total is not None
        torch.maximum(self.mu, gradient.norm(), out=self.mu)
        if self.t == 0:
            s, c = robust.slow_start(self.total, float(self.mu), self.strength)
            self.s.fill_(s)
            self.c.fill_(c)


class GroupDRO(ConceptReducer):
    """The published rival under the same batches: exponentiated gradient ascent (Sagawa et al. 2020, Algorithm 1).

    ``eta``: its step size. It knows no strength: q may go wherever the losses drive it.
    """

    def __init__(
        self,
        concept_of: Tensor,
        counts: Tensor,
        names: Sequence[str],
        prior: Tensor | None = None,
        *,
        eta: float = 0.01,
    ) -> None:
        super().__init__(concept_of, counts, names, prior)
        if not 0 < eta < float("inf"):
            raise UsageError(f"eta, the step size of group DRO, must be above 0, got {eta!r}")
        self.eta = eta

    def ascend(self, sums: Tensor, size: Tensor) -> Tensor:
        return robust.group_dro_step(self.q, self.scale * sums / size, self.eta)
