"""What a number of wrong rows proves: p-values, fixed sequences and conformal thresholds, as pure functions of counts.

Learn then Test: Angelopoulos, Bates, Candès, Jordan, Lei, *Learn then Test: Calibrating Predictive Algorithms to
Achieve Risk Control* (2021). Conformal risk control: Angelopoulos, Bates, Fisch, Lei, Schuster (2022), Theorem 1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc

from nestling.errors import UsageError


def binomial_p_value(errors: ArrayLike, rows: ArrayLike, risk: float) -> NDArray[np.float64]:
    """P(B <= errors) for B ~ Binomial(rows, risk): how likely so few errors are where the error rate is ``risk``.

    A p-value of the hypothesis that the rate is above ``risk``: under it, P(p <= u) <= u for every u. For errors of 0
    and 1 it is never above the Hoeffding-Bentkus p-value, which bounds the same tail. Broadcasts; 1 where there are no
    rows. Counts need not be whole: between whole ones it is interpolated, as a prediction of what other rows will give.

    Source: Learn then Test, Section 2.2 (the exact tail in place of its bounds). ``UsageError`` for impossible counts.
    """
    errors, rows = np.asarray(errors, dtype=np.float64), np.asarray(rows, dtype=np.float64)
    if not ((errors >= 0) & (errors <= rows)).all():
        raise UsageError(f"expected counts of errors between 0 and the number of rows, got {errors} of {rows}")
    check_share("risk", risk)
    every = errors >= rows
    # The binomial tail is a regularised incomplete beta function: P(B <= k) = I_{1-p}(n - k, k + 1).
    return np.where(every, 1.0, betainc(np.where(every, 1.0, rows - errors), errors + 1, 1 - risk))


def rows_needed(risk: float, delta: float, errors: int = 0) -> int:
    """The fewest rows that prove an error rate of at most ``risk`` with confidence 1 - ``delta``, so many of them
    wrong. Without errors the least n with (1 - risk)^n <= delta: 45 for 5 % and 0.1."""
    check_share("risk", risk)
    check_share("delta", delta)
    count = max(math.ceil(math.log(delta) / math.log1p(-risk) - 1e-9), 1)
    while errors and binomial_p_value(errors, count, risk) > delta:
        count += 1
    return count


def fixed_sequence(p_values: ArrayLike, delta: float) -> int:
    """How many hypotheses are rejected, in the order in which they stand: all before the first with p > ``delta``.

    With probability 1 - delta none of them is true, whatever their number and dependence, where the order owes nothing
    to the rows that the p-values are made of. Source: Learn then Test, Section 3.3.
    """
    passed = np.asarray(p_values) <= delta
    return len(passed) if passed.all() else int(np.argmin(passed))


def rows_needed_on_average(risk: float) -> int:
    """The fewest rows with which conformal methods keep ``risk``: the least n with 1 / (n + 1) <= risk."""
    check_share("risk", risk)
    return max(math.ceil(1 / risk - 1 - 1e-9), 1)


def risk_control_threshold(turns: ArrayLike, risk: float) -> float:
    """The least threshold whose expected loss on a new row is at most ``risk``, where a row's loss is 1 for thresholds
    up to its ``turns`` (n,) and 0 above; -inf marks a row that is never lost.

    (losses + 1) / (n + 1) <= risk, with the loss of the row to come taken for its largest, 1. Source: Conformal Risk
    Control, Equation 4. ``UsageError`` where n is below ``rows_needed_on_average``.
    """
    turns = np.sort(np.asarray(turns, dtype=np.float64))[::-1]
    allowed = math.floor(risk * (len(turns) + 1) + 1e-9) - 1
    if allowed < 0:
        raise UsageError(f"{len(turns)} rows cannot keep a risk of {risk:g}: {rows_needed_on_average(risk)} are needed")
    if allowed >= len(turns) or turns[allowed] == -np.inf:
        return 0.0
    return float(np.nextafter(turns[allowed], np.inf))


def set_threshold(truth: ArrayLike, risk: float) -> float:
    """Split conformal: the threshold t such that the classes of probability >= t hold the true one with probability at
    least 1 - ``risk``; ``truth`` (n,) are the probabilities of the true classes of other rows.

    The k-th smallest, k = floor(risk (n + 1)). Source: Sadinle, Lei, Wasserman, *Least Ambiguous Set-Valued
    Classifiers*. ``UsageError`` where k is 0.
    """
    truth = np.sort(np.asarray(truth, dtype=np.float64))
    place = math.floor(risk * (len(truth) + 1) + 1e-9)
    if place < 1:
        raise UsageError(f"{len(truth)} rows cannot keep a risk of {risk:g}: {rows_needed_on_average(risk)} are needed")
    return float(truth[place - 1]) if place <= len(truth) else math.inf


def check_share(name: str, value: float) -> None:
    """Raise UsageError unless ``value`` lies in (0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise UsageError(f"{name} must lie between 0 and 1, such as {0.1 if name == 'delta' else 0.05}; got {value!r}")
