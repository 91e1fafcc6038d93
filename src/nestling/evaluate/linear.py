"""Linear evaluation: what a linear classifier makes of frozen features (Table 4 of the coarse labels paper)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.errors import UsageError


def in_top(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """bool, one for each labelled row: whether its class is among the ``k`` highest of its scores (n, classes).

    ``labels``: (n,) int64, -1 = not labelled.
    """
    known = labels >= 0
    found = scores[known].topk(min(k, scores.shape[1]), dim=1).indices
    return (found == labels[known, None]).any(1)


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int) -> float:
    """The share of ``in_top``; NaN without a labelled row."""
    return float(in_top(scores, labels, k).double().mean())


def linear_evaluation(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, decay: float = 1e-4, steps: int = 100
) -> dict[str, float]:
    """Top-1 and top-5 accuracy of multinomial logistic regression on frozen features, as shares.

    Parameters
    ----------
    train, test: (n, d); columns are standardised by the training rows.
    train_labels, test_labels: (n,) int64 class codes, -1 = not labelled.
    decay: L2 penalty on the weights, half of it times their square; ``steps``: of L-BFGS at most.

    Returns
    -------
    ``top1`` and ``top5``. ``UsageError`` where no training row is labelled.
    """
    known = train_labels >= 0
    if not known.any():
        raise UsageError("linear evaluation needs labelled training rows, and there is none")
    mean, std = train[known].float().mean(0), train[known].float().std(0, correction=0).clamp_min(1e-6)
    inputs, targets = (train[known].float() - mean) / std, train_labels[known]
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    weight = torch.zeros(num_classes, inputs.shape[1], device=inputs.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(inputs, weight, bias), targets) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[arg-type]
    scores = F.linear((test.float() - mean) / std, weight.detach(), bias.detach())
    return {f"top{k}": top_k_accuracy(scores, test_labels, k) for k in (1, 5)}
