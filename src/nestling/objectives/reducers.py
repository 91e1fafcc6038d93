"""From values per row to the scalar that is minimised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor, nn

from nestling import collective

if TYPE_CHECKING:
    from nestling.data.batch import Batch


class Reducer(nn.Module, ABC):
    """Abstract. ``reducer(values, weights, batch) -> scalar``; it may hold state, in buffers."""

    @abstractmethod
    def forward(self, values: Tensor, weights: Tensor, batch: Batch) -> Tensor:
        """Values and weights are (b,); a weight is 0 where a row lacks the label."""


class Mean(Reducer):
    """The weighted mean over the rows of the global batch.

    The gradients of several processes are averaged, so each multiplies by their number and divides by the global
    weight: the result is the gradient of one process, however unevenly the labelled rows fall.
    """

    def forward(self, values: Tensor, weights: Tensor, batch: Batch) -> Tensor:
        total = collective.all_sum(weights.sum())
        return (values * weights).sum() * collective.world_size() / total.clamp_min(1e-12)
