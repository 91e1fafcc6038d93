"""Mutual information from samples, by MINE: Belghazi et al., *Mutual Information Neural Estimation*, ICML 2018.

A critic T(x, y) is trained to make the Donsker-Varadhan bound large on some rows, with the bias-corrected gradient of
Section 3.2, then the bound is read off rows that it never saw. The critic is a sum of products, f(x) . g(y) + a(x) +
b(y): one product of matrices has its value for every pair of a batch, so that the second part of the bound is a mean
over all pairs in place of one shuffle, which is what makes it steady. Measured on Gaussians of known information:
``docs/attacks.md``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nestling.errors import UsageError
from nestling.objectives.information import (
    corrected_loss,
    log_mean_exp,
    moving_log_average,
    mutual_information_bound,
)
from nestling.seeds import derive

Rows = NDArray[np.floating] | Tensor
QUANTILE = 1.96
"""Of the normal distribution, for 95 %."""
MOST_PAIRS = 2_000
"""Rows at a time whose pairs are read off."""


class SaturatedWarning(UserWarning):
    """More nats were found than so many rows can show."""


@dataclass(frozen=True, kw_only=True)
class Mine:
    """How the critic is trained."""

    width: int = 128
    """Of its hidden layers."""
    rank: int = 32
    """Products that are summed."""
    steps: int = 1500
    """At most; the critic that is best on rows kept aside is read."""
    batch_size: int = 256
    lr: float = 1e-3
    """Of Adam, towards 0 along a cosine."""
    rate: float = 0.01
    """Of the moving average that corrects the gradient's bias."""
    checks: int = 15
    """How often the rows kept aside are looked at."""


@dataclass(frozen=True)
class Estimate:
    """A lower bound of the mutual information, in nats."""

    value: float
    interval: tuple[float, float]
    """95 %, of the bound of this critic: how rows differ. What another critic might find is not in it."""
    rows: int
    """n: those that it was read off, which the critic never saw."""

    @property
    def saturated(self) -> bool:
        """Whether it is above log n, more than n rows can show (McAllester, Stratos 2020)."""
        return self.value > math.log(self.rows)


class Critic(nn.Module):
    """T(x, y) = f(x) . g(y) + a(x) + b(y), for every pair."""

    def __init__(self, x: int, y: int, width: int, rank: int) -> None:
        super().__init__()
        self.x, self.y = (
            nn.Sequential(
                nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, rank + 1)
            )
            for inputs in (x, y)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(b, c): row i of ``x`` (b, dx) with row j of ``y`` (c, dy)."""
        left, right = self.x(x), self.y(y)
        return left[:, :-1] @ right[:, :-1].T + left[:, -1:] + right[:, -1]


def mutual_information(x: Rows, y: Rows, seed: int = 0, settings: Mine | None = None) -> Estimate:
    """I(X; Y) in nats, as far as a critic can show it.

    Parameters
    ----------
    x, y: (n, dx) and (n, dy), rows that belong together; labels as one-hot rows. Their scale does not matter.
    seed: of the cut, the critic and its batches.

    Returns
    -------
    The bound on a fifth of the rows, from a critic trained on three fifths and chosen by another fifth. Warns
    ``SaturatedWarning`` where it exceeds log n. Raises UsageError on other shapes, too few rows, numbers not finite.
    """
    settings = settings or Mine()
    x, y = whitened(x, "x"), whitened(y, "y")
    if len(x) != len(y) or len(x) < 50:
        raise UsageError(f"expected as many rows of x as of y, at least 50, got {len(x)} and {len(y)}")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(derive(seed, "mine") % 2**63)
        order = torch.randperm(len(x))
        train, kept, read = (order[round(a * len(x)) : round(b * len(x))] for a, b in ((0, 0.6), (0.6, 0.8), (0.8, 1)))
        critic = trained_critic(x[train], y[train], x[kept], y[kept], settings)
    found = bound(critic, x[read], y[read])
    if found.saturated:
        warnings.warn(
            f"the estimate, {found.value:.2f} nats, is above log n = {math.log(found.rows):.2f}, more than "
            f"n = {found.rows} rows can show: take it for a large number, and give more rows to know how large",
            SaturatedWarning,
            stacklevel=2,
        )
    return found


def trained_critic(x: Tensor, y: Tensor, kept_x: Tensor, kept_y: Tensor, settings: Mine) -> Critic:
    """The critic of the step at which the bound on the rows kept aside is largest."""
    critic = Critic(x.shape[1], y.shape[1], settings.width, settings.rank)
    optimizer = torch.optim.Adam(critic.parameters(), lr=settings.lr)
    batch_size = min(settings.batch_size, len(x))
    best, weights, average = -math.inf, critic.state_dict(), None
    order = torch.randperm(len(x))
    for number in range(1, settings.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 + math.cos(math.pi * (number - 1) / settings.steps)) / 2
        if len(order) < batch_size:
            order = torch.randperm(len(x))
        rows, order = order[:batch_size], order[batch_size:]
        joint, marginal = split(critic(x[rows], y[rows]))
        average = moving_log_average(average, marginal, max(settings.rate, 1 / number))
        loss = corrected_loss(joint, marginal, average)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        optimizer.step()
        if number % max(settings.steps // settings.checks, 1) == 0 or number == settings.steps:
            value = bound(critic, kept_x[:MOST_PAIRS], kept_y[:MOST_PAIRS]).value
            if value > best:
                best, weights = value, {name: t.clone() for name, t in critic.state_dict().items()}
    critic.load_state_dict(weights)
    return critic


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """The critic's values (b, b) on a batch: on pairs drawn together (b,), and on those of two rows (b - 1, b)."""
    count = len(values)
    return values.diagonal(), values.flatten()[1:].view(count - 1, count + 1)[:, :-1]


@torch.no_grad()
def bound(critic: Critic, x: Tensor, y: Tensor) -> Estimate:
    """The bound on rows (n, …) from all their n (n - 1) pairs, and its interval by how much each row moves it.

    Row i is in one joint pair and in 2 (n - 1) others: it moves the bound by T_ii - (r_i + c_i) / m, r_i and c_i being
    the means of e^T over its row and its column, and m over all (the projection of a U-statistic, log by the delta
    method).
    """
    critic.eval()
    count = len(x)
    every = torch.arange(count)
    joint, rows, columns = torch.empty(count), torch.empty(count), torch.full((count,), -torch.inf)
    for block in every.split(MOST_PAIRS):
        values = critic(x[block], y)
        joint[block] = values[torch.arange(len(block)), block]
        values[torch.arange(len(block)), block] = -torch.inf
        rows[block] = values.logsumexp(1)
        columns = torch.logaddexp(columns, values.logsumexp(0))
    rows, columns = rows - math.log(count - 1), columns - math.log(count - 1)
    middle = log_mean_exp(rows)
    # Of m pairs the mean of means: as the bound of the critic's values on all pairs at once.
    value = float(mutual_information_bound(joint, rows))
    influence = joint - (rows - middle).exp() - (columns - middle).exp()
    half = QUANTILE * float(influence.std()) / math.sqrt(count)
    critic.train()
    return Estimate(value, (value - half, value + half), count)


def whitened(rows: Rows, name: str) -> Tensor:
    """(n, d) float32, each column of mean 0 and deviation 1: what a change of scale does to no information."""
    found = torch.as_tensor(np.asarray(rows), dtype=torch.float32)
    if found.ndim != 2 or not found.numel() or not torch.isfinite(found).all():
        raise UsageError(f"expected {name} as rows (n, d) of finite numbers, got {tuple(found.shape)}")
    return (found - found.mean(0)) / found.std(0, correction=0).clamp_min(1e-6)


def gaussian_information(dimension: int, correlation: float) -> float:
    """I(X; Y) in nats where X and Y have ``dimension`` Gaussian numbers each, correlated one to one."""
    return -dimension / 2 * math.log(1 - correlation**2)


def gaussian_rows(count: int, dimension: int, correlation: float, seed: int = 0) -> tuple[NDArray, NDArray]:
    """Such rows (count, dimension) of x and of y: what an estimate is tried on."""
    generator = np.random.default_rng(derive(seed, "gaussians"))
    x, noise = generator.normal(size=(2, count, dimension))
    return x, correlation * x + math.sqrt(1 - correlation**2) * noise


def entropy(labels: NDArray[np.integer] | Sequence[int]) -> float:
    """H(Y) in nats of the shares that labels (n,) have."""
    _, counts = np.unique(np.asarray(labels), return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
