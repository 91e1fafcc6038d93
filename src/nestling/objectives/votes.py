"""Combining the levels by votes: beside Equation 2, what the code of the authors of nested learning has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nestling.errors import UsageError
from nestling.taxonomy import Taxonomy


def vote(
    probabilities: Sequence[Tensor],
    taxonomy: Taxonomy,
    weights: Sequence[float] | None = None,
    levels: Sequence[str] | None = None,
) -> Tensor:
    """The column (b,) of the finest level that most levels vote for.

    Every level votes for all columns that lie under its most probable one, the finest for that one alone. Among
    columns with equally many votes the finest level's most probable one is taken, so that coarser levels overrule the
    finest only together.

    Parameters
    ----------
    probabilities: (b, width) for each level, coarse to fine; the last is of the finest given.
    weights: of each level's vote, such as its accuracy on validation rows; by default all 1, a majority vote.
    levels: the levels given, coarse to fine; all of them where they are not named.

    Raises UsageError on other shapes, and on weights that are negative or not finite.
    """
    names = list(taxonomy.levels if levels is None else levels)
    power = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
    widths = [(p.shape[-1] if p.ndim == 2 else -1) for p in probabilities]
    if not names or widths != [taxonomy.width(level) for level in names] or len({len(p) for p in probabilities}) != 1:
        raise UsageError(
            f"expected probabilities (b, width) for each of the levels {', '.join(names)}, "
            f"got {[tuple(p.shape) for p in probabilities]}"
        )
    if len(power) != len(names) or not all(0 <= weight < float("inf") for weight in power):
        raise UsageError(f"expected a weight of at least 0 for each of the levels {', '.join(names)}, got {power}")
    finest = probabilities[-1]
    votes = torch.zeros(finest.shape, dtype=torch.float64, device=finest.device)
    for level, p, weight in zip(names, probabilities, power, strict=True):
        under = torch.from_numpy(taxonomy.ancestor(level, of=names[-1]).copy()).to(finest.device)
        votes += weight * (under[None, :] == p.argmax(1)[:, None])
    most = votes.max(1, keepdim=True).values
    # Sums of the same weights in another order differ in the last bit.
    return finest.masked_fill(votes < most - 1e-9 * max(sum(power), 1.0), -1.0).argmax(1)
