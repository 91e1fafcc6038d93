"""A batch, as terms of an objective see it."""

from __future__ import annotations

from dataclasses import dataclass

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

    def at(self, level: str) -> Tensor:
        """The targets at one level, (b,). Raises UsageError for an unknown one."""
        if level not in self.levels:
            raise unknown("level", level, self.levels)
        return self.labels[:, self.levels.index(level)]
