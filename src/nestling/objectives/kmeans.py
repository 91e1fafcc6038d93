"""k-means of rows, on their device: exact Lloyd iterations that compute only what can have changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.errors import UsageError
from nestling.objectives.instances import sum_rows

BLOCK = 1 << 22
"""Distances that are held at once."""
MOST = 0.75
"""Share of the rows that are compared with all centres, past which all are: less to compute is more to copy."""


@dataclass(frozen=True, eq=False)
class Clusters:
    """What k-means found."""

    membership: Tensor
    """(n,) int64 in [0, k); every cluster has a row."""
    centres: Tensor
    """(k, d): the means of the clusters."""
    inertia: float
    """The summed squared distance of rows to their centres."""
    iterations: int


def num_clusters(sizes: Sequence[int], total: int) -> list[int]:
    """P_k = round(P n_k / n), at least 1 and at most n_k, for classes of n_k rows. Raises UsageError where P > n."""
    rows = sum(sizes)
    if not 1 <= total <= rows:
        raise UsageError(f"num_proxies must lie between 1 and the number of rows, {rows}; got {total}")
    return [min(max(int(total * size / rows + 0.5), 1), size) for size in sizes]


@torch.no_grad()
def kmeans(rows: Tensor, num: int, iterations: int = 20, seed: int = 0) -> Clusters:
    """Lloyd's algorithm from random distinct rows; ends early once nothing moves.

    A cluster that loses its last row starts again from the row that is farthest from its centre. After the first
    iteration most centres stay where they are: a row whose own centre stays is compared with those that moved alone.

    Parameters
    ----------
    rows: (n, d) float32.
    num: k, at most n; ``UsageError`` for another one.
    seed: the same gives the same clusters.
    """
    if rows.ndim != 2 or not 1 <= num <= len(rows):
        raise UsageError(f"expected 1 to {len(rows)} clusters of rows (n, d), got {num} of {tuple(rows.shape)}")
    start = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:num].sort().values
    centres = rows[start.to(rows.device)].clone()
    norms = rows.square().sum(1)
    membership = torch.full((len(rows),), -1, device=rows.device)
    distances = torch.full((len(rows),), torch.inf, device=rows.device)
    moved = torch.ones(num, dtype=torch.bool, device=rows.device)
    taken = 0
    while taken < iterations:
        taken += 1
        before = membership.clone()
        assign(rows, norms, centres, moved, membership, distances)
        refill(num, membership, distances)
        if torch.equal(before, membership):
            break
        changed = membership != before
        moved = torch.zeros_like(moved)
        moved[membership[changed]] = True
        moved[before[changed & (before >= 0)]] = True
        centres = means(rows, membership, centres, moved)
    inertia = (rows - centres[membership]).square_().sum(1).sum(dtype=torch.float64)
    return Clusters(membership, centres, float(inertia), taken)


def assign(rows: Tensor, norms: Tensor, centres: Tensor, moved: Tensor, membership: Tensor, distances: Tensor) -> None:
    """Give every row its nearest centre, ties by number; ``distances`` (n,) are squared. Both are changed in place."""
    anew = moved[membership.clamp_min(0)] | (membership < 0)
    some, others = anew.nonzero()[:, 0], (~anew).nonzero()[:, 0]
    if len(some) > MOST * len(rows):
        some, others = torch.arange(len(rows), device=rows.device), some[:0]
    for places, among in ((some, None), (others, moved.nonzero()[:, 0])):
        compared = centres if among is None else centres[among]
        if not len(places) or not len(compared):
            continue
        halves = compared.square().sum(1).div_(2)
        for part in parts(places, len(rows), max(BLOCK // len(compared), 1)):
            # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2)
            nearness, number = torch.addmm(halves, rows[part], compared.T, beta=-1).max(1)
            found = (norms[part] - 2 * nearness).clamp_min_(0)
            if among is not None:
                own, number = membership[part], among[number]
                better = (found < distances[part]) | ((found == distances[part]) & (number < own))
                found, number = torch.where(better, found, distances[part]), torch.where(better, number, own)
            distances[part], membership[part] = found, number


def parts(places: Tensor, total: int, size: int) -> Iterable[Tensor | slice]:
    """``places`` in parts of ``size``; as slices, which copy nothing, where they are all ``total`` of the rows."""
    if len(places) < total:
        return places.split(size)
    return [slice(begin, begin + size) for begin in range(0, total, size)]


def refill(num: int, membership: Tensor, distances: Tensor) -> None:
    """Give each empty cluster the farthest row of those whose cluster keeps another one; in place."""
    counts = torch.bincount(membership, minlength=num)
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if not empty:
        return
    farthest = iter(distances.argsort(descending=True, stable=True).tolist())
    left = counts.tolist()
    for cluster in empty:
        row = next(row for row in farthest if left[int(membership[row])] > 1)
        left[int(membership[row])] -= 1
        left[cluster] = 1
        membership[row], distances[row] = cluster, 0.0


def means(rows: Tensor, membership: Tensor, centres: Tensor, moved: Tensor) -> Tensor:
    """The mean of each cluster's rows; those that did not move are as they were."""
    touched = moved[membership].nonzero()[:, 0]
    every = len(touched) == len(rows)
    sums = sum_rows(rows if every else rows[touched], membership[touched], len(centres))
    counts = torch.bincount(membership[touched], minlength=len(centres)).clamp_min(1)
    return torch.where(moved[:, None], sums / counts[:, None], centres)
