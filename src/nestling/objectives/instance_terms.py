"""Terms of *Weakly Supervised Representation Learning with Coarse Labels*: instances, proxies, and their rival.

All read the features that enter the last linear layer of an output: those of a cosine softmax are f / |f| / T there, so
that the temperature, fixed or learned, is the model's and the same for every term.
"""

from __future__ import annotations

from abc import ABC
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nestling import collective
from nestling.errors import UsageError, unknown
from nestling.objectives.instances import average_rows, supervised_contrastive
from nestling.objectives.kmeans import kmeans, num_clusters
from nestling.objectives.reducers import Reducer
from nestling.objectives.rows import ClassRows, Drawn, WithinClasses
from nestling.objectives.terms import Term

if TYPE_CHECKING:
    from nestling.data.batch import Batch
    from nestling.models.model import Outputs

UNLABELLED = ("skip", "instance")


def features_of(outputs: Outputs, name: str) -> Tensor:
    """(b, d) float32. Raises UsageError for an output that there is not."""
    if name not in outputs.features:
        raise unknown("output", name, outputs.features)
    return outputs.features[name].float()


class InstanceTerm(Term, ABC):
    """Abstract. Rows of weights, one for each training row, that move by SGD of their own.

    Parameters
    ----------
    output: whose features are told apart.
    index: (n,) int64, the numbers of the training rows in their source, as batches give them.
    classes: (n,) int64, the class within which each row is told from the others.
    dimension: of the features.
    momentum, weight_decay: of the rows' SGD, whose rate is the optimiser's.
    unit: rows are compared by their direction alone (cosine softmax).
    """

    def __init__(
        self,
        output: str,
        index: np.ndarray,
        classes: np.ndarray,
        dimension: int,
        momentum: float,
        weight_decay: float,
        unit: bool,
        reducer: Reducer | None,
    ) -> None:
        super().__init__("instance", reducer)
        if len(index) != len(classes) or len(set(index.tolist())) < len(index):
            raise UsageError(f"expected one class for each of {len(index)} different rows, got {len(classes)} classes")
        self.output = output
        self.rows = ClassRows(classes, dimension, momentum, weight_decay, unit)
        self.index = index[self.rows.sorting]
        """The number in its source of each row, as they lie in ``rows``."""
        place = torch.full((int(index.max(initial=-1)) + 1,), -1)
        place[torch.from_numpy(self.index)] = torch.arange(len(index))
        self.place: Tensor
        self.register_buffer("place", place, persistent=False)
        self.drawn: Drawn | None = None

    def places(self, index: Tensor) -> Tensor:
        """Where the rows with these numbers lie, -1 where there is none: later rows of the source, unlabelled ones."""
        inside = index < len(self.place)
        return torch.where(inside, self.place[index.clamp_max(len(self.place) - 1)], -1)

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        features = features_of(outputs, self.output)
        if features.shape[1] != self.rows.weight.shape[1]:
            raise UsageError(
                f"expected features (b, {self.rows.weight.shape[1]}) of {self.output!r}, got {tuple(features.shape)}"
            )
        places = self.places(batch.index)
        # All processes compute the whole batch: rows are read once for it, and every update is the same.
        own = collective.gather(torch.full_like(places, collective.rank())) == collective.rank()
        values, gradients, drawn = self.rows.compute(collective.gather(features.detach()), collective.gather(places))
        if self.training:
            self.drawn = drawn
        values = WithinClasses.apply(features, values[own], gradients[own], drawn)
        return values, (places >= 0).float()  # type: ignore[return-value]

    def own_gradients(self) -> list[Tensor]:
        assert self.drawn is not None and self.drawn.upstream is not None
        # The rows' gradients are products of these with p - y, which lies in [-1, 1].
        return [self.drawn.upstream, self.drawn.features]

    def step(self, lr: float) -> None:
        assert self.drawn is not None
        self.rows.step(self.drawn, lr)
        self.drawn = None

    @torch.no_grad()
    def adopt(self, other: InstanceTerm) -> None:
        """Go on from the rows of another term wherever both know a row: how rows are added later."""
        other.rows.current()
        mine = np.flatnonzero(np.isin(self.index, other.index))
        theirs = other.places(torch.from_numpy(self.index[mine]).to(other.place.device))
        for name in ("weight", "velocity"):
            getattr(self.rows, name)[torch.from_numpy(mine)] = getattr(other.rows, name)[theirs]


class Instance(InstanceTerm):
    """Every row is told from all others (Equation 1): the whole of the rows is read at every step."""

    def __init__(
        self,
        output: str,
        index: np.ndarray,
        dimension: int,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        unit: bool = False,
        reducer: Reducer | None = None,
    ) -> None:
        super().__init__(output, index, np.zeros_like(index), dimension, momentum, weight_decay, unit, reducer)


class InstanceWithin(InstanceTerm):
    """Every row is told from the others of its coarse class (Equation 4).

    ``classes``: (n,) int64, -1 where the coarse class is not known: such rows are skipped or, with ``unlabelled`` =
    'instance', a class of their own.
    """

    def __init__(
        self,
        output: str,
        index: np.ndarray,
        classes: np.ndarray,
        dimension: int,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        unit: bool = False,
        unlabelled: str = "skip",
        reducer: Reducer | None = None,
    ) -> None:
        if unlabelled not in UNLABELLED:
            raise unknown("unlabelled", unlabelled, UNLABELLED)
        if unlabelled == "instance":
            classes = np.where(classes < 0, classes.max(initial=-1) + 1, classes)
        known = classes >= 0
        super().__init__(output, index[known], classes[known], dimension, momentum, weight_decay, unit, reducer)


class InstanceProxy(Term):
    """Cross-entropy against the mean rows of clusters (Equation 7), which ``cluster`` makes and nothing else moves.

    Parameters
    ----------
    instances: whose rows are clustered, within each of its classes; not held, so that they are saved once.
    num_proxies: P, shared among the classes by their sizes.
    within: a feature is compared with the proxies of its own coarse class alone.

    Raises UsageError for more proxies than rows.
    """

    def __init__(
        self,
        instances: InstanceTerm,
        num_proxies: int,
        within: bool = False,
        reducer: Reducer | None = None,
    ) -> None:
        super().__init__("proxy", reducer)
        object.__setattr__(self, "instances", instances)
        self.instances: InstanceTerm
        self.output, self.within = instances.output, within
        starts = instances.rows.starts
        self.slices = [slice(*edges) for edges in pairwise(starts) if edges[0] < edges[1]]
        self.sizes = num_clusters([part.stop - part.start for part in self.slices], num_proxies)
        owner = torch.repeat_interleave(
            torch.arange(len(self.sizes)), torch.tensor(self.sizes), output_size=sum(self.sizes)
        )
        self.membership: Tensor
        self.proxies: Tensor
        self.owner: Tensor
        self.register_buffer("membership", torch.full((starts[-1],), -1))
        self.register_buffer("proxies", torch.zeros(len(owner), instances.rows.weight.shape[1]))
        self.register_buffer("owner", owner, persistent=False)

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        places = self.instances.places(batch.index)
        known = places >= 0
        target = torch.where(known, self.membership[places.clamp_min(0)], -1)
        scores = features_of(outputs, self.output) @ self.proxies.T
        if self.within:
            own = self.owner[target.clamp_min(0)]
            scores = scores.masked_fill((self.owner != own[:, None]) & (target >= 0)[:, None], -torch.inf)
        return F.cross_entropy(scores, target, ignore_index=-1, reduction="none"), (target >= 0).float()

    @torch.no_grad()
    def cluster(self, seed: int) -> float:
        """k-means of the rows within each coarse class (Equation 8), then their means (Equation 5); the inertia."""
        rows, begin, inertia = self.instances.rows.current(), 0, 0.0
        for number, (part, size) in enumerate(zip(self.slices, self.sizes, strict=True)):
            found = kmeans(rows[part], size, seed=seed + number)
            self.membership[part] = found.membership + begin
            begin, inertia = begin + size, inertia + found.inertia
        proxies = average_rows(rows, self.membership, begin)
        self.proxies.copy_(F.normalize(proxies, dim=1) if self.instances.rows.unit else proxies)
        return inertia


class SupervisedContrastive(Term):
    """Supervised contrastive learning on the labels of one level: the rival of coarse labels (Khosla et al. 2020).

    The pairs are those of the global batch. The features are those of a cosine softmax, f / |f| / T, so that the
    temperature is the model's, fixed or learned; those that they are compared with have unit norm. A row without label
    is neither anchor nor compared with.
    """

    compares = True

    def __init__(self, output: str, level: str, reducer: Reducer | None = None) -> None:
        super().__init__("contrast", reducer)
        self.output, self.level = output, level

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        labels, features = batch.at(self.level), features_of(outputs, self.output)
        others, theirs = collective.gather(features), collective.gather(labels)
        number = torch.arange(len(theirs), device=labels.device)
        own = number[collective.gather(torch.full_like(labels, collective.rank())) == collective.rank()]
        known = theirs >= 0
        positive = (labels[:, None] == theirs[known]) & (labels >= 0)[:, None]
        itself = own[:, None] == number[known]
        values = supervised_contrastive(features, F.normalize(others[known], dim=1), positive, itself)
        return values, ((positive & ~itself).any(1)).float()
