"""Search by cosine similarity, exact and in bounded memory: neighbours, Recall@k, mAP@R and R-precision.

Every row is a query against all others; ties go to the lower index; a row without label is neither query nor found,
and a query without another row of its class is a miss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.data.dataset import LabelledData
from nestling.errors import UsageError
from nestling.evaluate.ranks import ranks

KS = (1, 2, 4, 8)
BLOCK = 1 << 24
"""Similarities that are held at once."""


def normalised(features: Tensor) -> Tensor:
    """(n, d) float32 of unit norm; a row of zeros stays one."""
    return F.normalize(features.float(), dim=1)


def highest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest of each row of scores (b, n), all where there are fewer: indices (b, k) int64, and scores.

    Scores fall; of equal ones the lower index comes first.
    """
    if k == 0:
        return scores.new_zeros((len(scores), 0), dtype=torch.int64), scores[:, :0]
    # One more than asked for shows whether the last place is contested.
    values, indices = scores.topk(min(k + 1, scores.shape[1]))
    if values.shape[1] > k:
        contested = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
        values, indices = values[:, :k].contiguous(), indices[:, :k].contiguous()
        for part in contested.split(64):
            edge, some = values[part, -1:], scores[part]
            # Those above the edge are there already; of those on it, the lowest indices take the places left.
            above = values[part] > edge
            numbers = torch.arange(scores.shape[1], 0, -1, dtype=torch.int32, device=scores.device)
            on_edge = scores.shape[1] - torch.where(some == edge, numbers, 0).topk(k).values.long()
            places = (torch.arange(k, device=scores.device) - above.sum(1, keepdim=True)).clamp_min(0)
            indices[part] = torch.where(above, indices[part], on_edge.gather(1, places))
    by_index = indices.argsort(1)
    order = by_index.gather(1, values.gather(1, by_index).argsort(dim=1, descending=True, stable=True))
    return indices.gather(1, order), values.gather(1, order)


def neighbours(features: Tensor, k: int) -> Iterator[tuple[slice, Tensor]]:
    """The ``k`` nearest other rows of each of ``features`` (n, d), of unit norm, block by block: (rows, indices)."""
    size = max(BLOCK // max(len(features), 1), 1)
    for begin in range(0, len(features), size):
        rows = slice(begin, min(begin + size, len(features)))
        scores = features[rows] @ features.T
        own = torch.arange(rows.start, rows.stop, device=features.device)
        scores[own - rows.start, own] = -torch.inf
        yield rows, highest(scores, min(k, len(features) - 1))[0]


def recall_at_k(features: Tensor, labels: Tensor, ks: Sequence[int] = KS) -> dict[int, float]:
    """The share of rows that have one of their class among their ``k`` nearest others, by cosine similarity.

    Parameters
    ----------
    features: (n, d).
    labels: (n,) integers, -1 = not labelled.
    ks: the numbers of neighbours looked at.

    Returns
    -------
    From each of ``ks`` to the share; NaN without a labelled row. ``UsageError`` on other shapes, and for a k below 1.
    """
    return recalls(features, labels[:, None], ks)[0]


@torch.no_grad()
def recalls(features: Tensor, labels: Tensor, ks: Sequence[int] = KS) -> list[dict[int, float]]:
    """``recall_at_k`` at several levels, labels (n, levels); the similarities are computed once where all are known."""
    if features.ndim != 2 or labels.ndim != 2 or len(labels) != len(features):
        raise UsageError(
            f"expected features (n, d) and labels (n,), got {tuple(features.shape)}, {tuple(labels.shape)}"
        )
    if not ks or min(ks) < 1:
        raise UsageError(f"ks must be numbers of at least 1, got {tuple(ks)}")
    found: dict[int, dict[int, float]] = {}
    known = labels >= 0
    # Levels that are known of the same rows share their neighbours.
    for rows in torch.unique(known, dim=1).T if labels.shape[1] else []:
        levels = [level for level in range(labels.shape[1]) if torch.equal(known[:, level], rows)]
        some, units = labels[rows][:, levels], normalised(features[rows])
        before = ranks(units, some, ks)
        hits = torch.stack([(before < k).sum(0) for k in ks], 1).double()
        shares = (hits / len(some)).tolist() if len(some) else [[float("nan")] * len(ks)] * len(levels)
        found |= {level: dict(zip(ks, share, strict=True)) for level, share in zip(levels, shares, strict=True)}
    return [found[level] for level in range(labels.shape[1])]


@torch.no_grad()
def precision_at_r(features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean average precision at R and R-precision (Musgrave et al. 2020); R is the number of a query's relevant rows.

    mAP@R is the mean over queries of the sum over i up to R of precision@i where the i-th is relevant, divided by R.
    ``features`` (n, d), ``labels`` (n,), -1 = not labelled; NaN for both without a labelled row.
    """
    features, labels = normalised(features[labels >= 0]), labels[labels >= 0]
    if len(labels) == 0:
        return float("nan"), float("nan")
    _, codes, counts = labels.unique(return_inverse=True, return_counts=True)
    relevant = counts[codes] - 1
    most, sums = int(relevant.max()), torch.zeros(2, dtype=torch.float64, device=labels.device)
    if most == 0:
        return 0.0, 0.0
    rank = torch.arange(1, most + 1, device=labels.device)
    for rows, others in neighbours(features, most):
        r = relevant[rows, None]
        right = ((labels[others] == labels[rows, None]) & (rank <= r)).double()
        precision = right.cumsum(1) / rank
        sums[0] += ((precision * right).sum(1) / r[:, 0].clamp_min(1)).sum()
        sums[1] += (right.sum(1) / r[:, 0].clamp_min(1)).sum()
    average, precise = (sums / len(labels)).tolist()
    return average, precise


def retrieval_metrics(
    features: Tensor | np.ndarray, data: LabelledData, ks: Sequence[int] = KS
) -> dict[str, dict[str, dict]]:
    """``retrieval`` of metrics.json, by level and k, and ``retrieval_at_r``: mAP@R and R-precision of the finest level.

    ``features`` are those of the rows of ``data``, as ``Predictor.embed`` gives them; levels without a labelled row are
    left out.
    """
    features = torch.as_tensor(features)
    levels = [number for number in range(len(data.taxonomy.levels)) if (data.labels[:, number] >= 0).any()]
    if not levels:
        return {"retrieval": {}, "retrieval_at_r": {}}
    labels = torch.from_numpy(np.ascontiguousarray(data.labels[:, levels])).to(features.device)
    names = [data.taxonomy.levels[number] for number in levels]
    shares = {
        name: {str(k): share for k, share in found.items()}
        for name, found in zip(names, recalls(features, labels, ks), strict=True)
    }
    average, precise = precision_at_r(features, labels[:, -1])
    return {"retrieval": shares, "retrieval_at_r": {names[-1]: {"map": average, "precision": precise}}}
