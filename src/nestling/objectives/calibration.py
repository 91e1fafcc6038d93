"""How far confidence can be believed: expected calibration error, temperature, synthetic rows for a rejection class."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def expected_calibration_error(confidence: Tensor | ArrayLike, correct: Tensor | ArrayLike, bins: int = 15) -> float:
    """The mean gap between confidence and accuracy over equal-width bins (lo, hi], weighted by their rows.

    Parameters
    ----------
    confidence: (n,) in [0, 1]; exactly 0 goes into the first bin.
    correct: (n,) bool, or 0 and 1.
    bins: the number of bins, at least 1.

    Returns
    -------
    A number in [0, 1]; 0 without rows. ``UsageError`` on other shapes or values.
    Source: Guo et al., *On Calibration of Modern Neural Networks*, Equation 3.
    """
    confidence, correct = torch.as_tensor(confidence).detach(), torch.as_tensor(correct).detach()
    if confidence.ndim != 1 or confidence.shape != correct.shape:
        raise UsageError(
            f"expected confidence (n,) and correct (n,), got {tuple(confidence.shape)} and {tuple(correct.shape)}"
        )
    if bins < 1:
        raise UsageError(f"expected at least one bin, got {bins}")
    if not len(confidence):
        return 0.0
    confidence = confidence.to(torch.promote_types(confidence.dtype, torch.float32))
    # Sums of float32 probabilities may pass 1 by a rounding error.
    if not bool(((confidence >= 0) & (confidence <= 1 + 1e-4)).all()):
        raise UsageError(f"expected confidence in [0, 1], got {float(confidence.min())} to {float(confidence.max())}")
    # Edges rounded as the confidences are: 0.8 of either precision is the upper edge of (0.7, 0.8], not above it.
    edges = torch.tensor([k / bins for k in range(1, bins)], dtype=torch.float64, device=confidence.device)
    member = torch.bucketize(confidence, edges.to(confidence.dtype), right=False)
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    return float(gap.index_add(0, member, confidence.double() - correct.double()).abs().sum() / len(confidence))


@dataclass(frozen=True, kw_only=True)
class TemperatureFit:
    """What ``fit_temperature`` found."""

    temperature: float
    """Divides the logits."""
    reason: str
    """Why it is this one: a sentence to print."""
    nll_before: float | None
    """Negative log-likelihood in nats per row at T = 1; None without rows."""
    nll_after: float | None
    ece_before: float | None
    """Expected calibration error at T = 1; None without rows."""
    ece_after: float | None


def fit_temperature(
    logits: Tensor,
    labels: Tensor,
    *,
    bounds: tuple[float, float] = (0.05, 10.0),
    min_rows: int = 200,
    min_errors: int = 20,
    bins: int = 15,
    num_real: int | None = None,
) -> TemperatureFit:
    """The temperature of least negative log-likelihood (Guo et al., Section 4.2), where the rows can tell.

    With fewer than ``min_rows`` rows or ``min_errors`` errors only T >= 1 is considered: of a handful of rows, all
    right, the likelihood is highest at T = 0. T = 1 when the temperature found would raise the expected calibration
    error.

    Parameters
    ----------
    logits: (n, width) logits or log-probabilities.
    labels: (n,) int64, -1 = does not count.
    bounds: the temperatures considered.
    num_real: how many columns, from the first on, can be answered; all of them by default. The others (rejection) count
        in the likelihood alone: errors and confidences are those of the most probable real column.

    Returns
    -------
    The fit, the same for the same rows. ``UsageError`` on other shapes, NaN or labels past the columns.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise UsageError(
            f"expected logits (n, width) and labels (n,), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    width = logits.shape[1] if num_real is None else num_real
    if num_real is not None and not 1 <= num_real <= logits.shape[1]:
        raise UsageError(f"expected num_real from 1 to {logits.shape[1]}, the width of the logits; got {num_real}")
    known = labels >= 0
    scores, labels = _relative(logits.detach()[known].double()), labels[known]
    rows = len(labels)
    if not rows:
        return TemperatureFit(
            temperature=1.0,
            reason="T = 1: no labelled rows to fit it on",
            nll_before=None,
            nll_after=None,
            ece_before=None,
            ece_after=None,
        )
    if int(labels.max()) >= width:
        what = "the width of the logits" if num_real is None else "the number of real columns"
        raise UsageError(f"expected labels below {width}, {what}; got {int(labels.max())}")
    correct = scores[:, :width].argmax(1) == labels
    errors = rows - int(correct.sum())
    enough = rows >= min_rows and errors >= min_errors
    lowest, highest = bounds if enough else (1.0, bounds[1])

    def nll(temperature: float) -> float:
        return float(F.cross_entropy(scores / temperature, labels))

    def ece(temperature: float) -> float:
        return expected_calibration_error((scores / temperature).softmax(1)[:, :width].amax(1), correct, bins)

    found = min(
        (
            1.0,
            lowest,
            highest,
            math.exp(_golden_section(lambda x: nll(math.exp(x)), math.log(lowest), math.log(highest))),
        ),
        key=nll,
    )
    where = f"in [{lowest:g}, {highest:g}] on {rows} rows with {errors} errors"
    if found == 1.0:
        temperature, reason = 1.0, f"T = 1: the least negative log-likelihood {where}"
    elif ece(found) > ece(1.0):
        temperature = 1.0
        reason = (
            f"T = 1: the least negative log-likelihood {where} is at {found:.3f}, which would raise the expected "
            f"calibration error from {ece(1.0):.4f} to {ece(found):.4f}"
        )
    else:
        temperature, reason = found, f"T = {found:.3f}: the least negative log-likelihood {where}"
    if not enough:
        reason += f" (below 1 is considered from {min_rows} rows and {min_errors} errors on)"
    return TemperatureFit(
        temperature=temperature,
        reason=reason,
        nll_before=nll(1.0),
        nll_after=nll(temperature),
        ece_before=ece(1.0),
        ece_after=ece(temperature),
    )


def negative_log_likelihood(probabilities: dict[str, Tensor], labels: Tensor, levels: tuple[str, ...]) -> float:
    """The mean over levels of the mean, over the rows known there, of -log of the true class's probability; in nats."""
    losses = []
    for level, p in probabilities.items():
        target = labels[:, levels.index(level)]
        known = target >= 0
        if known.any():
            losses.append(-p[known].gather(1, target[known, None]).clamp_min(1e-12).log().mean())
    return float(torch.stack(losses).mean()) if losses else float("nan")


def uniform_on_positive_sphere(num: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Synthetic bottlenecks of unknown inputs: uniform in [0, 1]^dim, then L2-normalised.

    Features follow a ReLU, so they lie on the positive part of the sphere (*Nested Learning*, Section 2.2). Where
    ``generator`` is None it is torch's own, as for dropout: whoever draws in training seeds both.

    Returns
    -------
    (num, dim) float32 on the generator's device.
    """
    device = generator.device if generator is not None else None
    return F.normalize(torch.rand(num, dim, generator=generator, device=device), dim=1)


def _relative(logits: Tensor) -> Tensor:
    """Logits less each row's largest; a probability that float32 rounded to 0 stands for the smallest that it holds."""
    relative = logits - logits.amax(1, keepdim=True) if logits.numel() else logits
    if bool(relative.isnan().any()):
        raise UsageError("expected logits without NaN and without rows that are infinite throughout")
    return relative.masked_fill(relative.isneginf(), math.log(2.0**-149))


def _golden_section(function: Callable[[float], float], lo: float, hi: float, tolerance: float = 1e-5) -> float:
    """The minimum of a function with one valley: the likelihood is convex in 1/T, so it has one in log T."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = hi - ratio * (hi - lo), lo + ratio * (hi - lo)
    at_left, at_right = function(left), function(right)
    while hi - lo > tolerance:
        if at_left <= at_right:
            hi, right, at_right = right, left, at_left
            left = hi - ratio * (hi - lo)
            at_left = function(left)
        else:
            lo, left, at_left = left, right, at_right
            right = lo + ratio * (hi - lo)
            at_right = function(right)
    return (lo + hi) / 2
