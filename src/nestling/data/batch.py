"""A batch, as terms of an objective see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.errors import unknown


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows on the device, with their targets at every level."""

    inputs: Tensor
    """(b, c, h, w) float, normalised."""
    labels: Tensor
    """(b, levels) int64: columns of each level as ``Taxonomy.columns`` gives them, -1 where not labelled."""
    index: Tensor
    """(b,) int64: the row's number in its source."""
    levels: tuple[str, ...]
    """Names of the columns of ``labels``."""
    other: Tensor | None = None
    """The inputs under another augmentation, of a stage of pairs."""

    def part(self, number: int, count: int) -> Batch:
        """Every ``count``-th row from ``number`` on: one of so many micro-batches."""
        inputs, other = (
            None if images is None else images[number::count].contiguous(memory_format=torch.channels_last)
            for images in (self.inputs, self.other)
        )
        assert inputs is not None
        return Batch(inputs, self.labels[number::count], self.index[number::count], self.levels, other)

    def at(self, level: str) -> Tensor:
        """The targets at one level, (b,). Raises UsageError for an unknown one."""
        if level not in self.levels:
            raise unknown("level", level, self.levels)
        return self.labels[:, self.levels.index(level)]
