"""How near the own class is: how many rows of other classes are more like a row than the nearest of its own.

That number decides Recall@k for every k, needs no sorting, and each similarity is computed once for both of its rows.
In fp32 a few comparisons are closer than rounding tells apart; where one decides, it is made again in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations_with_replacement, islice

import torch
from torch import Tensor

TILE = 512
"""Rows and columns of similarities that are computed at once: they stay in the cache."""
ROUNDING = 2.0**-24
"""Of fp32, relative."""


def ranks(units: Tensor, labels: Tensor, ks: Sequence[int]) -> Tensor:
    """How many rows of other classes come before the nearest other one of the own class; n where there is none.

    Similarities are those of fp64, rounded to fp32; of equal ones the lower index comes first.

    Parameters
    ----------
    units: (n, d) float32, of norm 1 or 0.
    labels: (n, levels) integers, all known.
    ks: a number may be off where it lies on the same side of each of these all the same.

    Returns
    -------
    (n, levels) int64.
    """
    # Own classes side by side lie in few tiles.
    order = torch.arange(len(units), device=units.device)
    for column in reversed(labels.unbind(1)):
        order = order[column[order].argsort(stable=True)]
    units, labels = units[order], labels[order]
    # Two sums of d products, each off by no more than this in whatever order it was added up.
    margin = 2.02 * units.shape[1] * ROUNDING
    best = nearest(units, labels)
    least, most = count(units, labels, [best + margin, best - margin])
    edges = torch.tensor(list(ks), device=units.device)[:, None, None]
    undecided = ((least < edges) != (most < edges)).any(0).any(1).nonzero()[:, 0]
    for rows in undecided.split(max(16 * TILE * TILE // max(len(units), 1), 1)) if len(undecided) else ():
        least[rows] = exact(units, labels, order, rows)
    least[~(best > -torch.inf)] = len(units)
    return torch.empty_like(least).index_copy_(0, order, least)


def nearest(units: Tensor, labels: Tensor) -> Tensor:
    """(n, levels): the highest similarity to another row of the own class, -inf without one."""
    best = units.new_full(labels.shape, -torch.inf)
    for a, b, scores, own in tiles(units, labels, apart=False):
        for level, same in own.items():
            inside = scores.masked_fill(~same, -torch.inf)
            for rows, axis in ((a, 1), (b, 0)):
                best[rows, level] = torch.maximum(best[rows, level], inside.amax(axis))
    return best


def count(units: Tensor, labels: Tensor, edges: Sequence[Tensor]) -> list[Tensor]:
    """For each of ``edges`` (n, levels): how many rows of other classes are more similar, (n, levels) int64."""
    workers = torch.get_num_threads() if units.device.type == "cpu" and len(units) > TILE else 1
    if workers == 1:
        return counted(units, labels, edges)
    # Each thread has tiles of its own: those that share a tile wake each other for every call.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            shares = list(pool.map(lambda share: counted(units, labels, edges, share, workers), range(workers)))
    finally:
        torch.set_num_threads(workers)
    return [torch.stack(parts).sum(0) for parts in zip(*shares, strict=True)]


def counted(units: Tensor, labels: Tensor, edges: Sequence[Tensor], share: int = 0, shares: int = 1) -> list[Tensor]:
    """``count`` over every ``shares``-th pair of tiles, from number ``share`` on."""
    found = [torch.zeros_like(labels) for _ in edges]
    mask, ones = units.new_empty(TILE, TILE), units.new_ones(TILE)
    for a, b, scores, own in tiles(units, labels, share=share, shares=shares):
        height, width = scores.shape
        part = mask[:height, :width]
        for level in range(labels.shape[1]):
            others = scores.masked_fill(own[level], -torch.inf) if level in own else scores
            for counts, edge in zip(found, edges, strict=True):
                torch.gt(others, edge[a, level, None], out=part)
                counts[a, level] += (part @ ones[:width]).long()
                if a != b:
                    torch.gt(others, edge[None, b, level], out=part)
                    counts[b, level] += (ones[:height] @ part).long()
    return found


def tiles(
    units: Tensor, labels: Tensor, apart: bool = True, share: int = 0, shares: int = 1
) -> Iterator[tuple[slice, slice, Tensor, dict[int, Tensor]]]:
    """Rows, columns, their similarities, and by level where both are of one class, for the levels where any are.

    A pair of tiles comes once, not also the other way round; a row is not similar to itself. Without ``apart`` only
    tiles come that have a class in common; of all pairs every ``shares``-th, from number ``share`` on. The similarities
    are overwritten by the next ones.
    """
    parts = [slice(begin, min(begin + TILE, len(units))) for begin in range(0, len(units), TILE)]
    lows, highs = ([kind(labels[part], 0).tolist() for part in parts] for kind in (torch.amin, torch.amax))
    place = units.new_empty(TILE * TILE)
    for a, b in islice(combinations_with_replacement(range(len(parts)), 2), share, None, shares):
        spans = enumerate(zip(lows[a], highs[a], lows[b], highs[b], strict=True))
        shared = [level for level, (low, high, least, most) in spans if low <= most and least <= high]
        if not (shared or apart):
            continue
        rows, columns = parts[a], parts[b]
        height, width = rows.stop - rows.start, columns.stop - columns.start
        scores = torch.mm(units[rows], units[columns].T, out=place[: height * width].view(height, width))
        if a == b:
            scores.fill_diagonal_(-torch.inf)
        yield rows, columns, scores, {level: labels[rows, level, None] == labels[columns, level] for level in shared}


def exact(units: Tensor, labels: Tensor, order: Tensor, rows: Tensor) -> Tensor:
    """(b, levels): ``ranks`` of some rows, ties included; ``order`` (n,) are the numbers that ties go by."""
    some = units[rows].double()
    scores = torch.cat([(some @ part.double().T).float() for part in units.split(TILE)], 1)
    scores[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
    found = torch.empty_like(labels[rows])
    for level in range(labels.shape[1]):
        same = labels[rows, level, None] == labels[:, level]
        best = scores.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        first = torch.where(same & (scores == best), order, len(order)).amin(1, keepdim=True)
        before = (scores > best) | ((scores == best) & (order < first))
        found[:, level] = (before & ~same).sum(1)
    return found
