"""The numbers of metrics.json against scikit-learn and plain loops, and by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score
from torchmetrics.functional.classification import multiclass_calibration_error

from nestling.errors import UsageError
from nestling.evaluate.accuracy import agreement, level_metrics, paired_interval
from nestling.taxonomy import Taxonomy

EVEN = Taxonomy.from_paths(["a/p/1", "a/p/2", "a/q/3", "b/r/4", "b/r/5", "b/r/6"])
RAGGED = Taxonomy.from_paths(["a/p/1", "a/p/2", "a/q", "b/r/3", "c"])


def test_level_metrics_by_hand() -> None:
    # Right; wrong by a sibling, 2 edges; wrong by the other side of the tree, 6 edges; not labelled.
    answers, confidence, labels = np.array([0, 0, 4, 5]), np.array([0.7, 0.6, 0.8, 0.5]), np.array([0, 1, 0, -1])
    metrics = level_metrics(answers, confidence, labels, EVEN, "fine")
    # Each in its own bin of 15: (|0.7 - 1| + 0.6 + 0.8) / 3.
    numbers = {
        "accuracy": 1 / 3,
        "confidence": 0.7,
        "overconfidence": 0.7 - 1 / 3,
        "ece": 1.7 / 3,
        "tree_distance": 4.0,
        "macro_accuracy": 0.25,  # half of class 0, none of class 1
    }
    assert metrics == {"name": "fine", "n": 3} | {key: pytest.approx(value) for key, value in numbers.items()}
    assert json.loads(json.dumps(metrics)) == metrics


def test_level_metrics_equal_other_libraries() -> None:
    generator = np.random.default_rng(0)
    probabilities = torch.from_numpy(generator.dirichlet(np.ones(6), size=300))
    labels = torch.from_numpy(generator.integers(-1, 6, size=300))
    confidence, answers = probabilities.max(1)
    metrics = level_metrics(answers, confidence, labels, EVEN, 2)
    known = labels >= 0
    assert metrics["n"] == known.sum()
    assert metrics["accuracy"] == pytest.approx(accuracy_score(labels[known], answers[known]))
    reference = multiclass_calibration_error(probabilities[known], labels[known], num_classes=6, n_bins=15)
    assert metrics["ece"] == pytest.approx(float(reference), abs=1e-6)
    distance = EVEN.distance("fine")
    edges = [distance[a, y] for a, y in zip(answers[known].tolist(), labels[known].tolist()) if a != y]
    assert metrics["tree_distance"] == pytest.approx(np.mean(edges))


def test_no_mistakes_have_no_distance() -> None:
    metrics = level_metrics(np.array([0, 1]), np.array([0.5, 0.7]), np.array([0, 1]), EVEN, "coarse")
    assert metrics["tree_distance"] is None
    assert metrics["overconfidence"] == pytest.approx(-0.4)


def test_answering_a_leaf_that_ended_above_is_a_mistake() -> None:
    q = RAGGED.column_names("fine").index("q")
    metrics = level_metrics(np.array([q]), np.array([1.0]), np.array([0]), RAGGED, "fine")
    assert metrics["accuracy"] == 0
    assert metrics["tree_distance"] == 3  # 1 to p, p to a, a to q


def test_no_rows_give_none() -> None:
    for labels in (np.array([-1, -1]), np.zeros(0, dtype=np.int64)):
        metrics = level_metrics(np.zeros_like(labels), np.full(len(labels), 0.5), labels, EVEN, "coarse")
        assert metrics["n"] == 0
        assert metrics["name"] == "coarse"
        assert {value for key, value in metrics.items() if key not in ("n", "name")} == {None}
        json.dumps(metrics, allow_nan=False)


def test_level_metrics_refuse_what_cannot_be() -> None:
    one, half = np.array([0]), np.array([0.5])
    with pytest.raises(
        UsageError, match=r"expected answers, confidence and labels \(n,\), got \(1,\), \(2,\) and \(1,\)"
    ):
        level_metrics(one, np.zeros(2), one, EVEN, "fine")
    with pytest.raises(UsageError, match=r"expected labels in \[0, 3\) at level 'fine', got 3 to 3"):
        level_metrics(one, half, np.array([3]), RAGGED, "fine")
    with pytest.raises(UsageError, match=r"expected answers in \[0, 5\) at level 'fine', got 5 to 5"):
        level_metrics(np.array([5]), half, one, RAGGED, "fine")
    with pytest.raises(UsageError, match="unknown level nope"):
        level_metrics(one, half, one, EVEN, "nope")


def test_agreement_by_hand() -> None:
    coarse, middle, fine = [0, 0, 1, 1], [1, 0, 2, 0], [2, 3, 5, 4]
    assert agreement([coarse, middle, fine], EVEN) == 0.5
    assert agreement([coarse, middle], EVEN, levels=["coarse", "middle"]) == 0.75
    assert agreement([coarse, fine], EVEN, levels=["coarse", "fine"]) == 0.75
    assert agreement([torch.tensor(fine)], EVEN, levels=["fine"]) == 1
    assert agreement([[], [], []], EVEN) is None


@given(st.integers(0, 2**31))
def test_agreement_equals_a_loop(seed: int) -> None:
    generator = np.random.default_rng(seed)
    answers = [generator.integers(RAGGED.width(level), size=30) for level in RAGGED.levels]
    on_path = [
        all(RAGGED.column_parent(i)[answers[i][row]] == answers[i - 1][row] for i in range(1, 3)) for row in range(30)
    ]
    assert agreement(answers, RAGGED) == pytest.approx(np.mean(on_path))


def test_agreement_refuses_other_shapes() -> None:
    with pytest.raises(UsageError, match="for each of the levels"):
        agreement([[0], [0]], EVEN)
    with pytest.raises(UsageError, match="for each of the levels"):
        agreement([[0], [0, 1], [0]], EVEN)


def naive_draws(difference: np.ndarray, draws: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    seeds, rows = difference.shape
    return np.array(
        [
            difference[np.ix_(generator.integers(seeds, size=seeds), generator.integers(rows, size=rows))].mean()
            for _ in range(draws)
        ]
    )


@pytest.mark.parametrize("kind", ["right or wrong", "real"])
def test_interval_equals_a_loop(kind: str) -> None:
    generator = np.random.default_rng(0)
    ours, theirs = generator.random((2, 4, 200))
    ours += np.array([0.0, 0.1, 0.2, 0.3])[:, None]
    if kind == "right or wrong":
        ours, theirs = ours > 0.4, theirs > 0.5
    difference, lo, hi = paired_interval(ours, theirs, draws=20_000)
    reference = naive_draws(ours.astype(float) - theirs, 20_000, seed=1)
    assert difference == pytest.approx((ours.astype(float) - theirs).mean())
    assert (lo, hi) == pytest.approx(tuple(np.quantile(reference, [0.025, 0.975])), abs=0.006)


def test_interval_of_one_seed_is_that_of_its_rows() -> None:
    # The mean of 1,000 coins: half-width 1.96 * sqrt(0.25 / 1000) = 0.031.
    ours = np.arange(1000)[None] % 2
    difference, lo, hi = paired_interval(ours, np.zeros((1, 1000)))
    assert difference == 0.5
    assert (lo, hi) == pytest.approx((0.469, 0.531), abs=0.004)
    assert paired_interval(ours, ours) == (0, 0, 0)


def test_seeds_are_drawn_from_three_on() -> None:
    ours = np.repeat([[0.0], [1.0]], 50, axis=1)
    assert paired_interval(ours, np.zeros((2, 50))) == (0.5, 0.5, 0.5)
    ours = np.repeat([[0.0], [0.0], [1.0]], 50, axis=1)
    difference, lo, hi = paired_interval(torch.from_numpy(ours), np.zeros((3, 50)))
    assert difference == pytest.approx(1 / 3) and (lo, hi) == pytest.approx((0, 1))


def test_interval_is_the_same_again() -> None:
    generator = np.random.default_rng(0)
    for ours, theirs in (generator.random((2, 3, 10_000)), generator.random((2, 3, 10_000)) > 0.5):
        assert paired_interval(ours, theirs) == paired_interval(ours, theirs)


def test_interval_refuses_what_it_cannot_use() -> None:
    with pytest.raises(UsageError, match=r"\(seeds, rows\)"):
        paired_interval(np.zeros((3, 5)), np.zeros((3, 4)))
    with pytest.raises(UsageError, match="not empty"):
        paired_interval(np.zeros((3, 0)), np.zeros((3, 0)))
    with pytest.raises(UsageError, match="NaN"):
        paired_interval(np.full((1, 2), np.nan), np.zeros((1, 2)))
    with pytest.raises(UsageError, match=r"level in \(0, 1\)"):
        paired_interval(np.zeros((1, 2)), np.zeros((1, 2)), level=95)
