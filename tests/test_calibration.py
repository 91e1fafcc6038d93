"""Expected calibration error against torchmetrics, temperatures against scipy, both against numbers made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from nestling.data.dataset import LabelledData
from nestling.engine.predict import accuracy_per_level
from nestling.errors import UsageError
from nestling.methods.calibrate import fit_temperatures
from nestling.methods.recipe import Context
from nestling.models.model import Outputs
from nestling.objectives.calibration import (
    expected_calibration_error,
    fit_temperature,
    uniform_on_positive_sphere,
)
from nestling.objectives.terms import CrossEntropy
from nestling.taxonomy import Taxonomy
from small import small_model


def scored(rows: int, scale: float, seed: int = 0, width: int = 5) -> tuple[Tensor, Tensor]:
    """Logits whose true temperature is ``scale``: labels are drawn from softmax(logits / scale)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, width, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return logits * scale, labels


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
def test_error_equals_torchmetrics(bins: int) -> None:
    generator = np.random.default_rng(0)
    # Away from edges: torchmetrics has bins [lo, hi), which is where the two differ.
    confidence = torch.from_numpy(generator.random(500))
    correct = torch.from_numpy(generator.random(500) < 0.6)
    reference = float(binary_calibration_error(confidence, correct, n_bins=bins, norm="l1"))
    assert expected_calibration_error(confidence, correct, bins) == pytest.approx(reference, abs=1e-6)


def test_error_by_hand() -> None:
    # Bins (0, 0.5] and (0.5, 1]: |0.4 - 0.5| * 2/5 + |0.8 - 2/3| * 3/5 = 0.04 + 0.08.
    confidence, correct = [0.3, 0.5, 0.7, 0.8, 0.9], [True, False, True, True, False]
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx(0.12)
    assert expected_calibration_error(np.array(confidence), np.array(correct), bins=2) == pytest.approx(0.12)
    assert expected_calibration_error([1.0, 1.0], [1, 1]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bins", [10, 15, 20])
def test_an_upper_edge_belongs_to_its_bin(bins: int, dtype: torch.dtype) -> None:
    # One right at the edge and one wrong inside the bin above: in one bin they would cancel in part.
    for k in range(1, bins):
        confidence = torch.tensor([k / bins, (k + 0.5) / bins], dtype=dtype)
        apart = (1 - k / bins + (k + 0.5) / bins) / 2
        assert expected_calibration_error(confidence, torch.tensor([True, False]), bins) == pytest.approx(
            apart, abs=1e-6
        )


def test_zero_belongs_to_the_first_bin() -> None:
    assert expected_calibration_error([0.0, 0.02], [False, True]) == pytest.approx(0.98 / 2)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=40), st.integers(1, 30))
def test_error_is_between_the_mean_gap_and_1(rows: list[tuple[float, bool]], bins: int) -> None:
    confidence, correct = torch.tensor([c for c, _ in rows]), torch.tensor([r for _, r in rows])
    error = expected_calibration_error(confidence, correct, bins)
    gap = abs(float((confidence - correct.float()).mean())) if rows else 0.0
    assert gap - 1e-6 <= error <= 1 + 1e-6


def test_error_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(UsageError, match=r"expected confidence \(n,\) and correct \(n,\), got \(2,\) and \(3,\)"):
        expected_calibration_error([0.1, 0.2], [1, 0, 1])
    with pytest.raises(UsageError, match=r"confidence in \[0, 1\], got 20.0 to 95.0"):
        expected_calibration_error([20.0, 95.0], [1, 0])
    with pytest.raises(UsageError, match="nan"):
        expected_calibration_error([float("nan")], [1])
    with pytest.raises(UsageError, match="at least one bin"):
        expected_calibration_error([0.5], [1], bins=0)
    assert expected_calibration_error([], []) == 0
    assert expected_calibration_error([1.0000001], [1]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("scale", [0.3, 1.7, 4.0])
def test_temperature_equals_scipy(scale: float) -> None:
    logits, labels = scored(2000, scale)
    fit = fit_temperature(logits, labels)
    reference = minimize_scalar(
        lambda t: float(F.cross_entropy(logits.double() / t, labels)), bounds=(0.05, 10), method="bounded"
    )
    assert fit.temperature == pytest.approx(reference.x, rel=1e-3)
    assert fit.temperature == pytest.approx(scale, rel=0.1)
    assert fit.nll_before is not None and fit.nll_after is not None
    assert fit.nll_after < fit.nll_before
    assert fit.nll_after == pytest.approx(reference.fun, abs=1e-6)
    assert fit.ece_before is not None and fit.ece_after is not None
    assert fit.ece_after <= fit.ece_before


def test_temperature_by_hand() -> None:
    # 3 of 4 right at log-odds 2 ln 3: the likelihood is highest where the odds are 3, at T = 2.
    logits = torch.tensor([[2 * math.log(3), 0.0]]).expand(400, 2)
    labels = (torch.arange(400) % 4 == 0).long()
    fit = fit_temperature(logits, labels)
    assert fit.temperature == pytest.approx(2, rel=1e-4)
    assert fit.ece_before == pytest.approx(0.9 - 0.75)
    assert fit.ece_after == pytest.approx(0, abs=1e-4)
    assert fit.reason == "T = 2.000: the least negative log-likelihood in [0.05, 10] on 400 rows with 100 errors"


def test_temperature_of_log_probabilities_is_that_of_the_logits() -> None:
    logits, labels = scored(1000, 3.0)
    assert fit_temperature(logits.log_softmax(1), labels).temperature == pytest.approx(
        fit_temperature(logits, labels).temperature, rel=1e-4
    )


def test_a_handful_of_rows_cannot_sharpen() -> None:
    logits, labels = scored(13, 0.2)
    labels = logits.argmax(1)
    fit = fit_temperature(logits, labels)
    assert fit.temperature == 1.0
    assert "13 rows with 0 errors" in fit.reason and "200 rows and 20 errors" in fit.reason
    few_errors = scored(300, 0.05, width=2)[0]
    assert fit_temperature(few_errors, few_errors.argmax(1)).temperature == 1.0


def test_temperature_that_raises_the_error_is_not_taken() -> None:
    # Confident and wrong once: its likelihood asks for a high T, which makes the other 199 underconfident.
    logits = torch.tensor([[6.0, 0.0]]).repeat(200, 1)
    logits[0] = torch.tensor([60.0, 0.0])
    labels = torch.zeros(200, dtype=torch.int64)
    labels[0] = 1
    fit = fit_temperature(logits, labels)
    assert fit.temperature == 1.0 and fit.ece_after == fit.ece_before
    assert "would raise the expected calibration error" in fit.reason


def test_temperature_stays_within_bounds() -> None:
    labels = torch.arange(400) % 2
    assert fit_temperature(torch.tensor([[50.0, 0.0]]).expand(400, 2), labels).temperature == 10
    logits = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert 0.05 <= fit_temperature(logits, logits.argmax(1)).temperature <= 10


def test_temperature_without_rows_and_with_unlabelled_ones() -> None:
    fit = fit_temperature(torch.zeros(3, 2), torch.full((3,), -1))
    assert (fit.temperature, fit.nll_before, fit.ece_after) == (1.0, None, None)
    assert fit.reason == "T = 1: no labelled rows to fit it on"
    assert fit_temperature(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)).temperature == 1.0
    logits, labels = scored(500, 2.0)
    more = torch.cat([labels, torch.full((100,), -1)])
    padded = torch.cat([logits, torch.full((100, 5), 9.0)])
    assert fit_temperature(padded, more) == fit_temperature(logits, labels)


def test_probabilities_of_zero_do_not_decide_alone() -> None:
    logits, labels = scored(1000, 1.0)
    logits = logits.log_softmax(1)
    logits[0, labels[0]] = -torch.inf
    fit = fit_temperature(logits, labels)
    assert math.isfinite(fit.temperature) and fit.nll_after is not None and math.isfinite(fit.nll_after)


def test_a_rejection_column_counts_in_the_likelihood_alone() -> None:
    """By hand: half of the rows are rejected, with odds 2:1 among the real columns, where 3 of 4 are right."""
    logits = torch.tensor([[2.0, 1.0, 3.0]]).log().expand(400, 3)
    labels = (torch.arange(400) % 4 == 0).long()
    fit = fit_temperature(logits, labels, num_real=2)
    assert "400 rows with 100 errors" in fit.reason
    assert fit.nll_before == pytest.approx(-(0.75 * math.log(2 / 6) + 0.25 * math.log(1 / 6)))
    assert fit.ece_before == pytest.approx(0.75 - 2 / 6)
    assert "with 400 errors" in fit_temperature(logits, labels).reason
    with pytest.raises(UsageError, match="expected labels below 2, the number of real columns; got 2"):
        fit_temperature(logits, labels + 1, num_real=2)
    for wrong in (0, 4):
        with pytest.raises(UsageError, match=f"num_real from 1 to 3, the width of the logits; got {wrong}"):
            fit_temperature(logits, labels, num_real=wrong)


def test_rows_that_end_above_a_level_do_not_count_there() -> None:
    """``b`` ends at the coarse level: its column at the fine one passes through, and is no class to be right about."""
    taxonomy = Taxonomy.from_paths(["a/x", "a/y", "b"])
    fine = taxonomy.levels[-1]
    assert (taxonomy.num_classes(fine), taxonomy.width(fine)) == (2, 3)
    labels = torch.from_numpy(taxonomy.columns(taxonomy.encode([["a", "x"], ["a", "y"], ["b"]]))).repeat(200, 1)
    right = F.one_hot(labels[:, 1], 3).float()
    right[1::3] = right[0]
    found = accuracy_per_level({fine: right, taxonomy.levels[0]: right[:, [0, 2]]}, labels, taxonomy)
    assert found == {fine: 0.5, taxonomy.levels[0]: 1.0}
    data = LabelledData(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), taxonomy.encode(["a/x", "a/y", "b"]), taxonomy)
    model = small_model(data)
    model.calibration.add_rejection()
    noted: dict[str, str] = {}
    outputs = Outputs(
        {level: 9 * F.one_hot(labels[:, i], taxonomy.width(level)).float() for i, level in enumerate(taxonomy.levels)},
        {level: torch.rand(600, model.calibration.sizes[level][0]) for level in taxonomy.levels},
        torch.zeros(600, 8),
    )
    context = Context(
        model=model,
        objective=1.0 * CrossEntropy(fine),
        train=data,
        validation=data,
        predict=lambda _: (outputs, labels),
        batches=lambda _: iter(()),
        note=lambda name, _, reason: noted.update({name: reason}),
    )
    fit_temperatures(context)
    assert "400 validation rows" in noted[f"temperature of {fine}"]
    assert "400 validation rows" in noted[f"temperature of {fine} with rejection"]
    assert "600 validation rows" in noted[f"temperature of {taxonomy.levels[0]}"]
    # Layers that were never trained take the confidence away from heads that are always right.
    said = noted[f"rejection class of {fine}"]
    assert said.startswith("warning: ") and "calibration=temperature leaves it out" in said


def test_temperature_refuses_what_it_cannot_use() -> None:
    with pytest.raises(UsageError, match=r"labels \(n,\), got \(2, 3\) and \(3,\)"):
        fit_temperature(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UsageError, match="without NaN"):
        fit_temperature(torch.tensor([[0.0, torch.nan]]), torch.tensor([0]))
    with pytest.raises(UsageError, match="expected labels below 2, the width of the logits; got 2"):
        fit_temperature(torch.zeros(1, 2), torch.tensor([2]))


def test_synthetic_features_are_normalised_uniform_ones() -> None:
    features = uniform_on_positive_sphere(1000, 7, torch.Generator().manual_seed(3))
    uniform = torch.rand(1000, 7, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(features, uniform / uniform.square().sum(1, keepdim=True).sqrt())
    assert features.shape == (1000, 7) and bool((features >= 0).all())
