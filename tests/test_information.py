"""Mutual information: the bound by hand, its corrected gradient, Gaussians of known information, and bottlenecks."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from nestling import functional
from nestling.data.dataset import LabelledData
from nestling.engine.runtime import Runtime
from nestling.errors import UsageError
from nestling.evaluate import information
from nestling.evaluate.bottlenecks import bottleneck_information
from nestling.evaluate.information import (
    Critic,
    Estimate,
    Mine,
    SaturatedWarning,
    bound,
    entropy,
    gaussian_information,
    gaussian_rows,
    mutual_information,
    split,
)
from nestling.methods import Nested
from nestling.objectives.information import corrected_loss, moving_log_average
from small import quick

QUICK = Mine(width=64, rank=8, steps=200, lr=3e-3)
CASES = [(1, 0.5), (1, 0.9), (2, 0.5), (2, 0.9), (20, 0.5)]
"""Numbers per variable, and their correlation."""


def close(estimate: float, truth: float) -> bool:
    """Within 10 % or 0.03 nats, whichever is larger."""
    return abs(estimate - truth) <= max(0.1 * truth, 0.03)


def test_the_bound_by_hand() -> None:
    # mean(1, 2) - log((e^0 + e^log 3) / 2) = 1.5 - log 2.
    found = functional.mutual_information_bound(torch.tensor([1.0, 2.0]), torch.tensor([0.0, math.log(3)]))
    assert found.item() == pytest.approx(1.5 - math.log(2))
    assert found.shape == ()
    joint, marginal = torch.randn(7, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    naive = sum(joint.tolist()) / 7 - math.log(sum(math.exp(v) for v in marginal.flatten().tolist()) / 30)
    assert functional.mutual_information_bound(joint, marginal).item() == pytest.approx(naive)
    # Large values do not overflow.
    assert functional.mutual_information_bound(torch.tensor([500.0]), torch.tensor([400.0])).item() == 100


@pytest.mark.parametrize(
    ("joint", "marginal"),
    [(torch.ones(0), torch.ones(3)), (torch.ones(3), torch.ones(0)), (torch.ones(3), torch.ones(3).long())],
)
def test_a_bound_of_nothing(joint: torch.Tensor, marginal: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=r"values on (joint|marginal) pairs"):
        functional.mutual_information_bound(joint, marginal)


def test_the_corrected_gradient_divides_by_the_average_over_batches() -> None:
    """Where the average is the batch's own it is the bound's gradient; else its second part is scaled."""
    joint, marginal = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    own = marginal.detach().exp().mean()
    plain = torch.autograd.grad(-functional.mutual_information_bound(joint, marginal), (joint, marginal))
    for factor in (1.0, 2.0):
        corrected = torch.autograd.grad(corrected_loss(joint, marginal, (factor * own).log()), (joint, marginal))
        torch.testing.assert_close(corrected[0], plain[0])
        torch.testing.assert_close(corrected[1], plain[1] / factor)


def test_the_average_moves_by_its_rate() -> None:
    first, second = torch.zeros(4), torch.full((4,), math.log(3))
    average = moving_log_average(None, first, 0.25)
    assert average.exp().item() == pytest.approx(1)
    assert moving_log_average(average, second, 0.25).exp().item() == pytest.approx(0.75 + 0.25 * 3)


def test_pairs_drawn_together_and_each_by_itself() -> None:
    values = torch.arange(9.0).view(3, 3)
    joint, marginal = split(values)
    assert joint.tolist() == [0, 4, 8] and sorted(marginal.flatten().tolist()) == [1, 2, 3, 5, 6, 7]


def test_the_bound_over_all_pairs_and_its_interval() -> None:
    """As by a loop; the interval holds the mean of many other draws nearly always."""
    torch.manual_seed(0)
    critic = Critic(1, 1, 16, 4)
    x, y = (torch.from_numpy(rows).float() for rows in gaussian_rows(60, 1, 0.8))
    with torch.no_grad():
        values = critic(x, y)
        others = values[~torch.eye(60, dtype=torch.bool)]
    expected = float(functional.mutual_information_bound(values.diagonal(), others))
    assert bound(critic, x, y).value == pytest.approx(expected, abs=1e-5)
    big = bound(critic, *(torch.from_numpy(rows).float() for rows in gaussian_rows(6_000, 1, 0.8, seed=1))).value
    found = [
        bound(critic, *(torch.from_numpy(rows).float() for rows in gaussian_rows(200, 1, 0.8, seed=seed)))
        for seed in range(2, 62)
    ]
    inside = np.mean([low <= big <= high for low, high in (e.interval for e in found)])
    assert 0.85 <= inside <= 1.0


def test_gaussians_of_one_number() -> None:
    truth = gaussian_information(1, 0.9)
    assert truth == pytest.approx(0.8304, abs=1e-4)
    found = mutual_information(*gaussian_rows(6_000, 1, 0.9), settings=QUICK)
    assert close(found.value, truth) and found.rows == 1_200 and not found.saturated
    assert found.interval[0] < truth < found.interval[1]
    nothing = mutual_information(*gaussian_rows(3_000, 1, 0.0), settings=QUICK)
    assert abs(nothing.value) < 0.03


@pytest.mark.long
@pytest.mark.parametrize(("dimension", "correlation"), CASES)
def test_gaussians(dimension: int, correlation: float, record_property) -> None:
    truth = gaussian_information(dimension, correlation)
    found = mutual_information(*gaussian_rows(40_000, dimension, correlation), settings=Mine(steps=2_000))
    record_property("estimate", found.value)
    record_property("truth", truth)
    assert close(found.value, truth)


def test_the_same_seed_gives_the_same_estimate_and_leaves_torchs_alone() -> None:
    rows = gaussian_rows(300, 1, 0.5)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one, two, other = (mutual_information(*rows, seed=seed, settings=Mine(steps=5)) for seed in (0, 0, 1))
    assert one == two != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_scale_and_shift_tell_nothing() -> None:
    x, y = gaussian_rows(300, 2, 0.5)
    one = mutual_information(x, y, settings=Mine(steps=5))
    other = mutual_information(1e4 * x + 3, y / 50, settings=Mine(steps=5))
    assert other.value == pytest.approx(one.value, abs=1e-3)


def test_more_than_the_rows_can_show_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Estimate(4.0, (3.9, 4.1), 50).saturated and not Estimate(3.9, (3.8, 4.0), 50).saturated
    found = Estimate(2.5, (2.4, 2.6), 10)
    monkeypatch.setattr(information, "bound", lambda *_: found)
    rows = gaussian_rows(50, 1, 0.5)
    with pytest.warns(SaturatedWarning, match="2.50 nats, is above log n = 2.30, more than n = 10 rows can show"):
        assert mutual_information(*rows, settings=Mine(steps=1)) is found


@pytest.mark.parametrize(
    ("x", "y", "part"),
    [
        (np.ones((60, 1)), np.ones((61, 1)), "as many rows"),
        (np.ones((20, 1)), np.ones((20, 1)), "at least 50"),
        (np.ones(60), np.ones((60, 1)), "expected x as rows"),
        (np.ones((60, 1)), np.full((60, 1), np.nan), "expected y as rows"),
    ],
)
def test_rows_that_cannot_be(x: np.ndarray, y: np.ndarray, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        mutual_information(x, y)


def test_entropies_by_hand() -> None:
    assert entropy([0, 1, 2, 3]) == pytest.approx(math.log(4))
    assert entropy([5, 5, 5]) == 0
    assert entropy([0, 0, 0, 1]) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_what_bottlenecks_hold(toy_data: LabelledData) -> None:
    run = quick(Nested(epochs=(1, 1, 4), batch_size=24, steps_per_epoch=10, augmentation="none"), toy_data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturatedWarning)
        held = bottleneck_information(
            run.model, run.preprocessing, toy_data, Runtime.choose("cpu", "fp32"), settings=Mine(steps=60, lr=3e-3)
        )
    assert list(held.inputs) == list(held.labels) == list(held.entropies) == ["coarse", "middle", "fine"]
    assert held.entropies["fine"] == pytest.approx(math.log(6))
    assert held.lost == held.inputs["coarse"].value - held.inputs["fine"].value
    # Within noise no label tells more than its entropy, and the coarse one is told by its bottleneck.
    for level, estimate in held.labels.items():
        assert estimate.interval[0] <= held.entropies[level] + 0.1
    assert held.labels["coarse"].value > 0.2 < held.ends.value
