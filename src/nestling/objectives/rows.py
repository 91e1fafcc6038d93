"""Rows of weights for every training row, W^I, told from each other within coarse classes: values, gradient, update.

The rows are the cost of instance classification, so they never meet autograd. One pass over the rows of the classes in
the batch gives values and the gradient of the features; a second one moves them, momentum and weight decay included,
by SGD exactly as ``torch.optim.SGD`` does it. Both are bound by memory, so each row is read as seldom as can be: what
follows from a block is computed while it lies in the cache. Rows of classes that are not in the batch are not touched:
what momentum and decay did to them meanwhile is one 2x2 matrix for each class, applied when the class is drawn again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nestling import collective

BLOCK = 1 << 21
"""Numbers of a block of rows that is updated at once: rows and momentum fit into a processor's last cache. Smaller
ones would fit into a core's own, but each call wakes the threads, and that costs more."""


@dataclass(frozen=True, eq=False)
class Part:
    """One class of a batch."""

    number: int
    begin: int
    end: int
    """Of its features, which are sorted."""
    residual: Tensor
    """(features, rows of the class): p - y."""
    scores: Tensor | None
    """Of unit rows, the same shape."""
    inverse: Tensor | None
    """Of unit rows, (rows of the class,): 1 / |w|."""


@dataclass(eq=False)
class Drawn:
    """What the update needs of a forward pass over the global batch."""

    features: Tensor
    """(b, d), sorted by row."""
    order: Tensor
    """(b,): the place of each sorted feature in the global batch."""
    parts: list[Part] = field(default_factory=list)
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
        begin = 0
        for number, count, matrix in zip(numbers.tolist(), counts.tolist(), matrices, strict=True):
            end = begin + count
            # Places of -1 come first, and belong to the class before the first.
            if number >= 0:
                if matrix != [[1.0, 0.0], [0.0, 1.0]]:
                    self.catch_up(number, matrix)
                part = self.one_class(number, begin, features[begin:end], places[begin:end], values[begin:end])
                scaled = part.residual if part.inverse is None else part.residual * part.inverse
                torch.mm(scaled, self.rows_of(number), out=gradients[begin:end])
                drawn.parts.append(part)
            begin = end
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return values[back], gradients[back], drawn

    def one_class(self, number: int, begin: int, features: Tensor, places: Tensor, values: Tensor) -> Part:
        """Fills ``values``, of the features that begin at ``begin``; what is left of them for the update."""
        rows = self.rows_of(number)
        scores, inverse, kept = features @ rows.T, None, None
        if self.unit:
            inverse = torch.linalg.vector_norm(rows, dim=1).clamp_min_(1e-12).reciprocal_()
            kept = scores.mul_(inverse)
            scores = scores.clone()
        target = (places - self.starts[number])[:, None]
        total = scores.logsumexp(1, keepdim=True)
        torch.sub(total, scores.gather(1, target), out=values[:, None])
        p = scores.sub_(total).exp_()
        p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand_as(target))
        return Part(number, begin, begin + len(features), p, kept, inverse)

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
        decay, momentum = self.weight_decay, self.momentum
        for part in drawn.parts:
            coefficients = part.residual.mul_(upstream[part.begin : part.end, None])
            pull = None
            if part.scores is not None and part.inverse is not None:
                # d(f w / |w|) / dw = (f - s w / |w|) / |w|: the part along w is a factor on each row.
                pull = decay - part.scores.mul_(coefficients).sum(0).mul_(part.inverse).mul_(part.inverse)
                coefficients.mul_(part.inverse)
            features, start = drawn.features[part.begin : part.end], self.starts[part.number]
            for first, last in self.blocks(part.number):
                w, v = self.weight[first:last], self.velocity[first:last]
                v.addmm_(coefficients[:, first - start : last - start].T, features, beta=momentum)
                if pull is not None:
                    v.addcmul_(w, pull[first - start : last - start, None])
                elif decay:
                    v.add_(w, alpha=decay)
                w.add_(v, alpha=-lr)
        moved = [part.number for part in drawn.parts]
        once = torch.tensor(
            [[1 - lr * decay, -lr * momentum], [decay, momentum]], dtype=torch.float64, device=self.behind.device
        )
        behind = once @ self.behind
        behind[moved] = torch.eye(2, dtype=torch.float64, device=behind.device)
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
