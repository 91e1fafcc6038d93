"""The formulas of the objectives and of what is made of their probabilities: pure functions on torch tensors.

Levels go coarse to fine. The width of a level is its classes and, after them, the pass-through columns of a ragged tree
(see ``Taxonomy``); a label is a column of its level, or -1 where nothing is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.errors import UsageError
from nestling.taxonomy import Taxonomy

Level = str | int
"""A level by name or by number, the coarsest being 0."""
SHORTEST = 1e-8
"""Of a row that has a direction."""


def aggregate(probabilities: Tensor, taxonomy: Taxonomy, level: Level, of: Level | None = None) -> Tensor:
    """Sums probabilities of one level to a coarser one.

    Parameters
    ----------
    probabilities: (b, width of ``of``).
    level: the level wanted.
    of: the level given; the finest where it is not named.

    Returns
    -------
    (b, width of ``level``). ``UsageError`` where the shape is another one or ``level`` is finer than ``of``.
    """
    coarse, fine = _number(taxonomy, level), _number(taxonomy, of)
    if coarse > fine:
        raise UsageError(
            f"cannot sum level {taxonomy.levels[fine]!r} to the finer level {taxonomy.levels[coarse]!r}: "
            f"expected one of {taxonomy.levels[: fine + 1]}"
        )
    _check_width(probabilities, taxonomy, fine, "probabilities")
    if coarse == fine:
        return probabilities
    return _sum_by(probabilities, _ancestor(taxonomy, coarse, fine, probabilities.device), taxonomy.width(coarse))


def combine_levels(
    probabilities: Sequence[Tensor], taxonomy: Taxonomy, levels: Sequence[Level] | None = None
) -> list[Tensor]:
    """Refines every level by the coarser ones: Equation 2 of *Nested Learning*, and its recursion.

    A column's probability is its share among its siblings times the combined probability of its parent. Siblings are
    divided by the largest of them before they are summed, so that the shares of numbers as small as float32 holds are
    right; where all are zero they share their parent's mass evenly. The pass-through column of a ragged leaf has no
    siblings and gets the leaf's mass. Differentiable; half precision is computed in float32.

    Parameters
    ----------
    probabilities: (b, width) for each level, coarse to fine, of the real classes, without a rejection column.
    levels: the levels given, coarse to fine; the first ``len(probabilities)`` ones where they are not named.

    Returns
    -------
    A list of the same shapes: the first as it is, each row of the others with the sum of the first. ``UsageError`` on
    other shapes.
    """
    numbers = list(range(len(probabilities))) if levels is None else [_number(taxonomy, level) for level in levels]
    if not len(probabilities) == len(numbers) <= len(taxonomy.levels) or numbers != sorted(set(numbers)):
        raise UsageError(
            f"expected one tensor of probabilities for each level, coarse to fine, of {taxonomy.levels}; "
            f"got {len(probabilities)} for {levels or 'these levels'}"
        )
    for number, given in zip(numbers, probabilities, strict=True):
        _check_width(given, taxonomy, number, "probabilities")
        if len(given) != len(probabilities[0]):
            raise UsageError(
                f"expected as many rows at every level, got {len(probabilities[0])} at "
                f"{taxonomy.levels[numbers[0]]!r} and {len(given)} at {taxonomy.levels[number]!r}"
            )
    combined = list(probabilities[:1])
    for coarse, fine, given in zip(numbers, numbers[1:], probabilities[1:], strict=False):
        parent = _ancestor(taxonomy, coarse, fine, given.device)
        given = _at_least_float32(given)
        prior = _at_least_float32(combined[-1]).to(given.dtype)
        index = parent.expand(given.shape)
        largest = torch.zeros_like(prior).scatter_reduce(1, index, given.detach(), "amax")[:, parent]
        # Dividing by the same number leaves a share as it is, so the gradient may take it for a constant.
        scaled = torch.where(largest == 0, 1.0, given / largest.masked_fill(largest == 0, 1.0))
        share = scaled / _sum_by(scaled, parent, prior.shape[1])[:, parent]
        combined.append(share * prior[:, parent])
    return combined


def level_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Categorical cross-entropy per row, in nats: L_n of *Nested Learning*, Section 2.2.

    Parameters
    ----------
    logits: (b, width).
    labels: (b,) int64 columns, -1 = not labelled.

    Returns
    -------
    (b,), 0 where not labelled. ``UsageError`` on other shapes, and on the CPU on a label past the width.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise UsageError(
            f"expected logits (b, width) and labels (b,), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    _check_labels(labels, logits.shape[1], "labels")
    return F.cross_entropy(_at_least_float32(logits), labels, ignore_index=-1, reduction="none")


def marginal_cross_entropy(
    fine_logits: Tensor, labels: Tensor, taxonomy: Taxonomy, level: Level | None = None
) -> Tensor:
    """Cross-entropy per row, in nats, of the summed probability of the columns below the row's finest known class.

    Parameters
    ----------
    fine_logits: (b, width of ``level``).
    labels: (b, levels) int64: class codes or pass-through columns of every level, -1 = not labelled.
    level: the level whose logits are given; the finest where it is not named. A row known at that level or at a finer
        one contributes its class at that level, a row known only at a coarser one the sum of its finest known class.

    Returns
    -------
    (b,), 0 where nothing is known. ``UsageError`` on other shapes, and on the CPU on a label past its level's width.
    Source: *flat + marginal*, the baseline to which nested learning is compared.
    """
    number = _number(taxonomy, level)
    _check_width(fine_logits, taxonomy, number, "logits")
    logits = _at_least_float32(fine_logits)
    below = _below_known(labels, taxonomy, number, len(logits))
    return logits.logsumexp(1) - logits.masked_fill(~below, -torch.inf).logsumexp(1)


def within_known(probabilities: Tensor, labels: Tensor, taxonomy: Taxonomy, level: Level | None = None) -> Tensor:
    """The probabilities of one level given what is known of each row: 0 outside its finest known class.

    Parameters
    ----------
    probabilities: (b, width of ``level``).
    labels: (b, levels) int64, as ``marginal_cross_entropy`` takes them; a class finer than ``level`` counts by its
        ancestor there, and a row of which nothing is known keeps its probabilities.
    level: the finest where it is not named.

    Returns
    -------
    (b, width), each row with sum 1; even over the class where all of it has probability 0. ``UsageError`` on other
    shapes, and on the CPU on a label past its level's width.
    """
    number = _number(taxonomy, level)
    _check_width(probabilities, taxonomy, number, "probabilities")
    below = _below_known(labels, taxonomy, number, len(probabilities))
    inside = _at_least_float32(probabilities) * below
    total = inside.sum(1, keepdim=True)
    return torch.where(total > 0, inside / total.where(total > 0, 1.0), below / below.sum(1, keepdim=True))


def _below_known(labels: Tensor, taxonomy: Taxonomy, number: int, rows: int) -> Tensor:
    """(rows, width of level ``number``): the columns on a line with the row's finest known class; all, of no label."""
    if labels.shape != (rows, len(taxonomy.levels)):
        raise UsageError(
            f"expected labels {(rows, len(taxonomy.levels))}, a column for each of "
            f"{taxonomy.levels}; got {tuple(labels.shape)}"
        )
    depth = torch.full_like(labels[:, 0], number + 1)
    target = torch.zeros_like(depth)
    for other, name in enumerate(taxonomy.levels):
        column = labels[:, other]
        _check_labels(column, taxonomy.width(name), f"labels at {name!r}")
        known = column >= 0
        if other > number:
            column = _ancestor(taxonomy, number, other, labels.device)[column]
        target = torch.where(known, column, target)
        depth = depth.masked_fill(known, min(other, number))
    # A row of which nothing is known takes all columns, whose logarithms cancel exactly.
    return _ancestors(taxonomy, number, labels.device)[depth] == target[:, None]


def least_expected_distance(probabilities: Tensor, taxonomy: Taxonomy) -> Tensor:
    """The decision of least risk (CRM): the column whose expected distance in the tree to the truth is smallest.

    Parameters
    ----------
    probabilities: (b, width of the finest level).

    Returns
    -------
    (b,) int64, columns of the finest level. ``UsageError`` on other shapes.
    """
    _check_width(probabilities, taxonomy, len(taxonomy.levels) - 1, "probabilities")
    probabilities = _at_least_float32(probabilities)
    return (probabilities @ _distance(taxonomy, probabilities.device).to(probabilities.dtype)).argmin(1)


def similarity_matching(
    features: Tensor, labels: Tensor, width: int, others: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """How far the similarities of a batch's features are from those of its classes, per row.

    A row's value is the mean, over the labelled rows j, of (S(features)_ij - S(Y)_ij)^2: S holds the cosines of rows
    from which their own mean was taken, and Y the targets one-hot, so that S(Y) is 1 within a class and
    -1 / (width - 1) between two. A row that is constant has similarity 0 with all.

    Parameters
    ----------
    features: (b, d).
    labels: (b,) int64 columns of a level, -1 = not labelled.
    width: columns of that level.
    others: features (n, d) and labels (n,) of the rows compared with; the batch's own where they are not given.

    Returns
    -------
    (b,), from 0 to 4; 0 where not labelled. ``UsageError`` on other shapes, and on the CPU on a label past the width.
    Source: Nøkland and Eidnes, *Training Neural Networks with Local Error Signals*, ICML 2019, the similarity matching
    loss; the mean over pairs, as in the authors' experiments, where the text has the sum.
    """
    every, targets = (features, labels) if others is None else others
    for rows, columns in ((features, labels), (every, targets)):
        if rows.ndim != 2 or rows.shape[1] != features.shape[1] or columns.shape != rows.shape[:1]:
            raise UsageError(
                f"expected features (b, {features.shape[-1]}) and labels (b,), got {tuple(rows.shape)} and "
                f"{tuple(columns.shape)}"
            )
        _check_labels(columns, width, "labels")
    same = labels[:, None] == targets
    wanted = same.float() - (~same).float() / (width - 1) if width > 1 else torch.zeros_like(same, dtype=torch.float)
    gaps = (_centred_units(features) @ _centred_units(every).T - wanted).square()
    known = targets >= 0
    return (gaps * known).sum(1) / known.sum().clamp_min(1) * (labels >= 0)


def _centred_units(rows: Tensor) -> Tensor:
    """Each row less its own mean, at length 1; a constant one is 0, and has no direction to move in."""
    centred = _at_least_float32(rows) - _at_least_float32(rows).mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    return torch.where(length > SHORTEST, centred / length.clamp_min(SHORTEST), 0.0)


def _number(taxonomy: Taxonomy, level: Level | None) -> int:
    return len(taxonomy.levels) - 1 if level is None else taxonomy.level_index(level)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _sum_by(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    return values.new_zeros(len(values), num_groups).index_add(1, group, values)


def _check_width(values: Tensor, taxonomy: Taxonomy, number: int, what: str) -> None:
    width = taxonomy.width(number)
    if values.ndim != 2 or values.shape[1] != width:
        raise UsageError(
            f"expected {what} (b, {width}) at level {taxonomy.levels[number]!r}, got {tuple(values.shape)}"
        )


def _check_labels(labels: Tensor, width: int, what: str) -> None:
    # Only where looking does not stall the device.
    if labels.device.type == "cpu" and len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < width:
        raise UsageError(
            f"{what}: expected columns in [0, {width}) or -1, got {int(labels.min())} to {int(labels.max())}"
        )


# These are looked up in every step. Tensors made in inference mode could not be used in training later.


@lru_cache(maxsize=256)
def _ancestor(taxonomy: Taxonomy, coarse: int, fine: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(taxonomy.ancestor(coarse, of=fine).copy()).to(device)


@lru_cache(maxsize=64)
def _ancestors(taxonomy: Taxonomy, number: int, device: torch.device) -> Tensor:
    """(number + 2, width): every column's column at each coarser level and at its own, then a row of zeros."""
    rows = [taxonomy.ancestor(coarse, of=number) for coarse in range(number + 1)]
    with torch.inference_mode(False):
        return torch.from_numpy(np.stack([*rows, np.zeros_like(rows[0])])).to(device)


@lru_cache(maxsize=16)
def _distance(taxonomy: Taxonomy, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(taxonomy.distance(taxonomy.levels[-1]).astype(np.float32)).to(device)
