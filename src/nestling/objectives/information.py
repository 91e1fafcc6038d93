"""The bound of MINE on mutual information: Belghazi et al., *Mutual Information Neural Estimation*, ICML 2018."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nestling.errors import UsageError


def mutual_information_bound(joint: Tensor, marginal: Tensor) -> Tensor:
    """The Donsker-Varadhan bound that a critic gives, in nats: mean(joint) - log(mean(exp(marginal))).

    Parameters
    ----------
    joint: values of the critic on pairs drawn together, of any shape.
    marginal: on pairs drawn each by itself, of any shape.

    Returns
    -------
    A scalar, at most I(X; Y) where both are expectations (Equation 5). ``UsageError`` where either is empty.
    """
    for name, values in (("joint", joint), ("marginal", marginal)):
        if not values.numel() or not values.is_floating_point():
            raise UsageError(
                f"expected the critic's values on {name} pairs, at least one, got {tuple(values.shape)} {values.dtype}"
            )
    return joint.mean() - log_mean_exp(marginal)


def log_mean_exp(values: Tensor) -> Tensor:
    """log(mean(exp(values))) over all of them, a scalar."""
    return values.flatten().logsumexp(0) - math.log(values.numel())


def corrected_loss(joint: Tensor, marginal: Tensor, log_average: Tensor) -> Tensor:
    """A scalar whose gradient is minus that of the bound without the bias of a mini-batch: Section 3.2, Equation 12.

    The gradient of the bound's second part is E[e^T grad T] / E[e^T], and a ratio of two means over one batch is
    biased: the denominator is ``log_average``, the log of a moving average of E[e^T] over batches.
    """
    return (marginal - log_average.detach()).exp().mean() - joint.mean()


def moving_log_average(log_average: Tensor | None, marginal: Tensor, rate: float) -> Tensor:
    """The log of an exponential moving average of E[e^T], moved by ``rate`` towards this batch's."""
    now = log_mean_exp(marginal.detach())
    if log_average is None:
        return now
    return torch.logaddexp(log_average + math.log1p(-rate), now + math.log(rate))
