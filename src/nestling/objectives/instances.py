"""The formulas of *Weakly Supervised Representation Learning with Coarse Labels* (Xu et al. 2021), on torch tensors.

Scores are raw dot products. The cosine softmax is the same formulas on features f / |f| / T and rows w / |w|.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.errors import UsageError


def instance_loss(features: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Instance classification per row, in nats: every training row is a class of its own (Equation 1).

    Parameters
    ----------
    features: (b, d).
    rows: (n, d), W^I: one row of weights for each training row.
    index: (b,) int64, which of the rows each feature belongs to.

    Returns
    -------
    (b,). ``UsageError`` on other shapes, and on the CPU on an index past the rows.
    """
    _check(features, rows, index)
    return F.cross_entropy(features.float() @ rows.float().T, index, reduction="none")


def instance_loss_within(features: Tensor, rows: Tensor, index: Tensor, classes: Tensor) -> Tensor:
    """Instance classification among the rows of one's own coarse class, in nats: l_k of Equation 4.

    Parameters
    ----------
    features, rows, index: as of ``instance_loss``.
    classes: (n,) int64, the coarse class of every row.

    Returns
    -------
    (b,), 0 where a row is the only one of its class. ``UsageError`` as ``instance_loss``. Only the rows of the classes
    drawn are computed. The term ``InstanceWithin`` has the same values, a backward pass of its own, and its update.
    """
    _check(features, rows, index)
    if classes.shape != rows.shape[:1]:
        raise UsageError(f"expected classes ({len(rows)},), one for each row; got {tuple(classes.shape)}")
    own = classes[index]
    values = features.new_zeros(len(features), dtype=torch.float32)
    for number in own.unique().tolist():
        members, drawn = (classes == number).nonzero()[:, 0], (own == number).nonzero()[:, 0]
        target = torch.searchsorted(members, index[drawn])
        loss = F.cross_entropy(features[drawn].float() @ rows[members].float().T, target, reduction="none")
        values = values.index_copy(0, drawn, loss)
    return values


def average_rows(rows: Tensor, membership: Tensor, num_proxies: int) -> Tensor:
    """(P, d): the mean of every cluster's rows, W^P of Equation 5; 0 for a cluster without rows.

    ``rows``: (n, d); ``membership``: (n,) int64 in [0, P), or -1 for a row of no cluster.
    """
    known = membership >= 0
    sums = sum_rows(rows[known], membership[known], num_proxies)
    return sums / torch.bincount(membership[known], minlength=num_proxies).clamp_min(1)[:, None].to(rows.dtype)


def sum_rows(rows: Tensor, membership: Tensor, num: int) -> Tensor:
    """(num, d): the sum of the rows (n, d) of every cluster, by membership (n,) int64; the same on every call.

    ``index_add_`` takes them in their order on the CPU alone; a GPU adds whichever comes first.
    """
    if rows.device.type == "cpu":
        return rows.new_zeros((num, rows.shape[1])).index_add_(0, membership, rows)
    return sum_in_order(rows, membership, num)


def sum_in_order(rows: Tensor, membership: Tensor, num: int) -> Tensor:
    """``sum_rows`` by sorting: each cluster's rows one after the other, on any device."""
    lengths = torch.bincount(membership, minlength=num)
    return torch.segment_reduce(rows[membership.argsort(stable=True)], "sum", lengths=lengths, unsafe=True)


def proxy_loss(features: Tensor, rows: Tensor, membership: Tensor, index: Tensor) -> Tensor:
    """Cross-entropy against the mean rows of all clusters, in nats: the instance proxy loss (Equations 5 and 7).

    Parameters
    ----------
    features, rows, index: as of ``instance_loss``.
    membership: (n,) int64, the cluster of every row, from 0.

    Returns
    -------
    (b,). ``UsageError`` as ``instance_loss``.
    """
    _check(features, rows, index)
    if membership.shape != rows.shape[:1]:
        raise UsageError(f"expected membership ({len(rows)},), one for each row; got {tuple(membership.shape)}")
    proxies = average_rows(rows.float(), membership, int(membership.max()) + 1)
    return F.cross_entropy(features.float() @ proxies.T, membership[index], reduction="none")


def supervised_contrastive(anchors: Tensor, others: Tensor, positive: Tensor, itself: Tensor) -> Tensor:
    """L_out of *Supervised Contrastive Learning* (Khosla et al. 2020, Equation 2) per anchor, in nats.

    Parameters
    ----------
    anchors: (b, d), divided by the temperature; ``others``: (m, d), among them the anchors; both of unit norm before.
    positive: bool (b, m), the others of the anchor's class; ``itself``: bool (b, m), where the anchor stands.

    Returns
    -------
    (b,): minus the mean log-probability of the positives among all others, 0 without any. ``UsageError`` on other
    shapes.
    """
    if positive.shape != (len(anchors), len(others)) or itself.shape != positive.shape:
        raise UsageError(
            f"expected positive and itself ({len(anchors)}, {len(others)}), got {tuple(positive.shape)} and "
            f"{tuple(itself.shape)}"
        )
    scores = (anchors.float() @ others.float().T).masked_fill(itself, -torch.inf)
    positive = positive & ~itself
    counts = positive.sum(1)
    # An anchor alone in its batch has nothing to be told from.
    total = scores.masked_fill(counts[:, None] == 0, 0.0).logsumexp(1)
    mean = scores.masked_fill(~positive, 0.0).sum(1) / counts.clamp_min(1)
    return torch.where(counts > 0, total - mean, 0.0)


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor) -> Tensor:
    """Cross-entropy of each query's own key among the negatives, in nats (MoCo: He et al. 2020, Equation 1).

    Parameters
    ----------
    queries: (b, d), of unit norm divided by the temperature.
    keys: (b, d), the other view of each query; ``negatives``: (k, d); both of unit norm.

    Returns
    -------
    (b,). ``UsageError`` on other shapes.
    """
    if queries.ndim != 2 or keys.shape != queries.shape or negatives.shape[1:] != queries.shape[1:]:
        raise UsageError(
            f"expected queries and keys (b, d) and negatives (k, d), got {tuple(queries.shape)}, {tuple(keys.shape)} "
            f"and {tuple(negatives.shape)}"
        )
    own = (queries.float() * keys.float()).sum(1, keepdim=True)
    scores = torch.cat([own, queries.float() @ negatives.float().T], dim=1)
    return scores.logsumexp(1) - own[:, 0]


def _check(features: Tensor, rows: Tensor, index: Tensor) -> None:
    if features.ndim != 2 or rows.ndim != 2 or features.shape[1] != rows.shape[1]:
        raise UsageError(
            f"expected features (b, d) and rows (n, d), got {tuple(features.shape)} and {tuple(rows.shape)}"
        )
    if index.shape != features.shape[:1]:
        raise UsageError(f"expected index ({len(features)},), one for each feature; got {tuple(index.shape)}")
    # Only where looking does not stall the device.
    if index.device.type == "cpu" and len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(rows):
        raise UsageError(f"index: expected rows in [0, {len(rows)}), got {int(index.min())} to {int(index.max())}")
