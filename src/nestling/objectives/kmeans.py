"""k-means of rows, on their device: exact Lloyd iterations that compute only what can have changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.errors import UsageError

BLOCK = 1 << 22
"""Distances that are held at once."""


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
    inertia = (rows - centres[membership]).square().sum(dtype=torch.float64)
    return Clusters(membership, centres, float(inertia), taken)


def assign(rows: Tensor, norms: Tensor, centres: Tensor, moved: Tensor, membership: Tensor, distances: Tensor) -> None:
    """Give every row its nearest centre, ties by number; ``distances`` (n,) are squared. Both are changed in place."""
    anew = moved[membership.clamp_min(0)] | (membership < 0)
    every = torch.arange(len(centres), device=rows.device)
    for which, among in ((anew, every), (~anew, moved.nonzero()[:, 0])):
        places = which.nonzero()[:, 0]
        if not len(places) or not len(among):
            continue
        some = centres[among]
        halves = some.square().sum(1).div_(2)
        for part in places.split(max(BLOCK // len(among), 1)):
            # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2)
            nearness, number = torch.addmm(halves, rows[part], some.T, beta=-1).max(1)
            found, number = (norms[part] - 2 * nearness).clamp_min_(0), among[number]
            if among is not every:
                own = membership[part]
                better = (found < distances[part]) | ((found == distances[part]) & (number < own))
                found, number = torch.where(better, found, distances[part]), torch.where(better, number, own)
            distances[part], membership[part] = found, number


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
    sums = torch.zeros_like(centres).index_add_(0, membership[touched], rows[touched])
    counts = torch.bincount(membership[touched], minlength=len(centres)).clamp_min(1)
    return torch.where(moved[:, None], sums / counts[:, None], centres)
