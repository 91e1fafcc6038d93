"""Rows of weights for every training row, W^I, told from each other within coarse classes: values, gradient, update.

The rows are the cost of instance classification, so they never meet autograd. The rows of the classes in the batch are
read twice, for the values and for the gradient of the features, and once more when they are moved, momentum and weight
decay included, by SGD exactly as ``torch.optim.SGD`` does it: in one pass, block by block, each with its gradient in
the cache. What is done to single scores is done for many classes in one call, since each call wakes the threads. Rows
of classes that are not in the batch are not touched: what momentum and decay did to them meanwhile is one 2x2 matrix
for each class, applied when the class is drawn again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from nestling import collective

BLOCK = 1 << 21
"""Numbers of a block of rows that is updated at once: rows and momentum fit into a processor's last cache. Smaller
ones would fit into a core's own, but each call wakes the threads, and that costs more."""


@dataclass(frozen=True, eq=False)
class Part:
    """One class of a batch."""

    number: int
    size: int
    """How many rows it has."""
    begin: int
    end: int
    """Of its features, which are sorted."""


@dataclass(frozen=True, eq=False)
class Group:
    """Classes of about one size whose features follow each other: what is done to single scores is done to all at once.

    A class's own columns come first; those that it has less than the largest of the group have score -inf.
    """

    parts: list[Part]
    residual: Tensor
    """(features, rows of the largest class): p - y."""
    scores: Tensor | None
    """Of unit rows, the same shape."""
    inverse: list[Tensor]
    """Of unit rows, for each part (rows of the class,): 1 / |w|."""


def grouped(parts: list[Part]) -> list[list[Part]]:
    """Neighbours together, as long as at least half of what they are padded to is used."""
    groups: list[list[Part]] = []
    used, features, most = 0, 0, 0
    for part in parts:
        count = part.end - part.begin
        used, features, most = used + count * part.size, features + count, max(most, part.size)
        if groups and 2 * used >= features * most:
            groups[-1].append(part)
        else:
            groups.append([part])
            used, features, most = count * part.size, count, part.size
    return groups


def views(parts: list[Part], matrix: Tensor) -> list[Tensor]:
    """What a matrix of their group has of each class: (features, rows of the class)."""
    first = parts[0].begin
    return [matrix[part.begin - first : part.end - first, : part.size] for part in parts]


@dataclass(eq=False)
class Drawn:
    """What the update needs of a forward pass over the global batch."""

    features: Tensor
    """(b, d), sorted by row."""
    order: Tensor
    """(b,): the place of each sorted feature in the global batch."""
    groups: list[Group] = field(default_factory=list)
    upstream: Tensor | None = None
    """(own b,): the gradient of the loss with respect to each of this process's values."""


class ClassRows(nn.Module):
    """``n`` rows of weights sorted by class, so that a class is a slice; with momentum, in buffers.

    Parameters
    ----------
    classes: (n,) int64, the class of every row, from 0; a class may have any number of rows.
    dimension: d.
    momentum, weight_decay: of SGD.
    unit: rows are divided by their norm before they are compared (cosine softmax).
    """

    def __init__(
        self, classes: np.ndarray, dimension: int, momentum: float, weight_decay: float, unit: bool = False
    ) -> None:
        super().__init__()
        self.momentum, self.weight_decay, self.unit = momentum, weight_decay, unit
        self.sorting = np.argsort(classes, kind="stable")
        """The given number of each row, as they lie here."""
        sizes = np.bincount(classes, minlength=1)
        self.starts: list[int] = [0, *np.cumsum(sizes).tolist()]
        """Where each class begins; at the end the number of rows."""
        self.weight: Tensor
        self.velocity: Tensor
        self.behind: Tensor
        self.edges: Tensor
        bound = dimension**-0.5
        self.register_buffer("weight", torch.empty(len(classes), dimension).uniform_(-bound, bound))
        self.register_buffer("velocity", torch.zeros(len(classes), dimension))
        self.register_buffer("behind", torch.eye(2, dtype=torch.float64).repeat(len(sizes), 1, 1))
        self.register_buffer("edges", torch.tensor(self.starts), persistent=False)

    def extra_repr(self) -> str:
        return f"{len(self.weight)} rows of {self.weight.shape[1]} in {len(self.starts) - 1} classes"

    def classes_of(self, places: Tensor) -> Tensor:
        """The class of each row by its place here."""
        return torch.searchsorted(self.edges, places, right=True) - 1

    @torch.no_grad()
    def compute(self, features: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Drawn]:
        """Values (b,) and their gradients (b, d) with respect to features (b, d), and what ``step`` needs.

        ``places``: (b,) int64, the row of each feature; -1 gives 0.
        """
        order = places.argsort(stable=True)
        features, places = features[order], places[order]
        values, gradients = features.new_zeros(len(features)), torch.zeros_like(features)
        drawn = Drawn(features, order)
        numbers, counts = self.classes_of(places).unique_consecutive(return_counts=True)
        matrices = self.behind[numbers.clamp_min(0)].tolist()
        ends = counts.cumsum(0).tolist()
        begins = [0, *ends]
        parts = [
            Part(number, self.starts[number + 1] - self.starts[number], begin, end)
            for number, begin, end in zip(numbers.tolist(), begins, ends, strict=False)
        ]
        for part, matrix in zip(parts, matrices, strict=True):
            if part.number >= 0 and matrix != [[1.0, 0.0], [0.0, 1.0]]:
                self.catch_up(part.number, matrix)
        # Places of -1 come first, and belong to the class before the first.
        for group in grouped([part for part in parts if part.number >= 0]):
            drawn.groups.append(self.one_group(group, features, places, values, gradients))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return values[back], gradients[back], drawn

    def one_group(
        self, parts: list[Part], features: Tensor, places: Tensor, values: Tensor, gradients: Tensor
    ) -> Group:
        """Fills the ``values`` and ``gradients`` of the group's features; what is left of them for the update."""
        begin, end = parts[0].begin, parts[-1].end
        sizes = [part.size for part in parts]
        scores = features.new_empty(end - begin, max(sizes))
        if min(sizes) < max(sizes):
            scores.fill_(-torch.inf)
        inverse, kept = [], None
        for part, own in zip(parts, views(parts, scores), strict=True):
            rows = self.rows_of(part.number)
            torch.mm(features[part.begin : part.end], rows.T, out=own)
            if self.unit:
                inverse.append(torch.linalg.vector_norm(rows, dim=1).clamp_min_(1e-12).reciprocal_())
                own.mul_(inverse[-1])
        if self.unit:
            kept = scores.clone()
        starts = self.edges[self.classes_of(places[begin:end])]
        target = (places[begin:end] - starts)[:, None]
        total = scores.logsumexp(1, keepdim=True)
        torch.sub(total, scores.gather(1, target), out=values[begin:end, None])
        p = scores.sub_(total).exp_()
        p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand_as(target))
        for number, (part, own) in enumerate(zip(parts, views(parts, p), strict=True)):
            scaled = own * inverse[number] if self.unit else own
            torch.mm(scaled, self.rows_of(part.number), out=gradients[part.begin : part.end])
        return Group(parts, p, kept, inverse)

    def rows_of(self, number: int) -> Tensor:
        """(n_k, d): a view."""
        return self.weight[self.starts[number] : self.starts[number + 1]]

    def blocks(self, number: int) -> list[tuple[int, int]]:
        """A class's rows in parts that fit into the cache."""
        begin, end = self.starts[number], self.starts[number + 1]
        # A GPU has no such cache, and is bound by the number of calls.
        on_cpu = self.weight.device.type == "cpu"
        size = max(BLOCK // self.weight.shape[1], 1) if on_cpu else max(end - begin, 1)
        return [(first, min(first + size, end)) for first in range(begin, end, size)]

    def catch_up(self, number: int, matrix: list[list[float]]) -> None:
        """Apply the steps that passed without this class; ``matrix`` takes (w, v) of then to those of now."""
        (ww, wv), (vw, vv) = matrix
        for first, last in self.blocks(number):
            w, v = self.weight[first:last], self.velocity[first:last]
            old = w.clone()
            w.mul_(ww).add_(v, alpha=wv)
            v.mul_(vv).add_(old, alpha=vw)
        self.behind[number] = torch.eye(2, dtype=torch.float64)

    @torch.no_grad()
    def step(self, drawn: Drawn, lr: float) -> None:
        """One step of SGD for all rows: those of the classes drawn are moved, the others' steps noted."""
        assert drawn.upstream is not None, "a step without a backward pass"
        # The gradients of several processes are averaged.
        upstream = collective.gather(drawn.upstream / collective.world_size())[drawn.order]
        decay = self.weight_decay
        parts = [part for group in drawn.groups for part in group.parts]
        blocks = {part.number: self.blocks(part.number) for part in parts}
        # Written for each block anew: memory that is new each time costs as much as what is computed in it.
        longest = max((last - first for spans in blocks.values() for first, last in spans), default=0)
        scratch = self.weight.new_empty(longest, self.weight.shape[1])
        move = partial(sgd, lr=lr, momentum=self.momentum, dampening=0.0, nesterov=False, maximize=False, fused=True)
        for group in drawn.groups:
            coefficients = group.residual.mul_(upstream[group.parts[0].begin : group.parts[-1].end, None])
            pulls: list[Tensor | None] = [None] * len(group.parts)
            if group.scores is not None:
                # d(f w / |w|) / dw = (f - s w / |w|) / |w|: the part along w is a factor on each row.
                along = views(group.parts, group.scores.mul_(coefficients))
                pulls = [decay - s.sum(0).mul_(i).mul_(i) for s, i in zip(along, group.inverse, strict=True)]
                for own, inverse in zip(views(group.parts, coefficients), group.inverse, strict=True):
                    own.mul_(inverse)
            for part, own, pull in zip(group.parts, views(group.parts, coefficients), pulls, strict=True):
                features, start = drawn.features[part.begin : part.end], self.starts[part.number]
                for first, last in blocks[part.number]:
                    w, v, gradient = self.weight[first:last], self.velocity[first:last], scratch[: last - first]
                    torch.mm(own[:, first - start : last - start].T, features, out=gradient)
                    if pull is not None:
                        gradient.addcmul_(w, pull[first - start : last - start, None])
                    move([w], [gradient], [v], weight_decay=decay if pull is None else 0.0)
        once = torch.tensor(
            [[1 - lr * decay, -lr * self.momentum], [decay, self.momentum]],
            dtype=torch.float64,
            device=self.behind.device,
        )
        behind = once @ self.behind
        behind[[part.number for part in parts]] = torch.eye(2, dtype=torch.float64, device=behind.device)
        self.behind.copy_(behind)

    @torch.no_grad()
    def current(self) -> Tensor:
        """(n, d): all rows as they are now, sorted by class; of unit norm with ``unit``."""
        for number, matrix in enumerate(self.behind.tolist()):
            if matrix != [[1.0, 0.0], [0.0, 1.0]]:
                self.catch_up(number, matrix)
        if not self.unit:
            return self.weight
        return self.weight / torch.linalg.vector_norm(self.weight, dim=1, keepdim=True).clamp_min_(1e-12)


class WithinClasses(torch.autograd.Function):
    """Values of features against ``ClassRows``; the gradient is computed on the way forward, while rows are read."""

    @staticmethod
    def forward(context: Any, features: Tensor, values: Tensor, gradients: Tensor, drawn: Drawn) -> Tensor:
        context.save_for_backward(gradients)
        context.drawn = drawn
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (gradients,) = context.saved_tensors
        context.drawn.upstream = upstream
        return gradients * upstream[:, None], None, None, None
