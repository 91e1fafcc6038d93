"""Transfer to another set: splits, averages, PCA and the accuracy per class (Section C.3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from nestling.errors import DataError, UsageError
from nestling.evaluate.transfer import COSTS, linear_svm, svm_transfer, transfer_accuracy


def blobs(counts: tuple[int, ...], width: int = 6, distance: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """So many rows of each class around a centre of its own."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(counts)), counts)
    centres = distance * np.eye(width)[: len(counts)]
    return (centres[labels] + generator.normal(size=(len(labels), width))).astype(np.float32), labels


def test_separable_classes_and_none() -> None:
    features, labels = blobs((45, 40, 50), distance=20.0)
    found = transfer_accuracy(features, labels, splits=3)
    assert (found.mean, found.std, found.splits) == (1.0, 0.0, (1.0, 1.0, 1.0))
    chance = transfer_accuracy(features * 0 + np.random.default_rng(1).normal(size=features.shape), labels)
    assert 0.2 < chance.mean < 0.5 and len(chance.splits) == 10
    assert chance.mean == pytest.approx(np.mean(chance.splits))
    assert chance.std == pytest.approx(np.std(chance.splits, ddof=1)) and chance.std > 0


def test_every_class_counts_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """31, 40 and 200 rows leave 1, 10 and 170 to test on; an answer of the largest class alone is right for a third."""
    monkeypatch.setattr(LogisticRegression, "predict", lambda self, rows: np.full(len(rows), 2))
    features, labels = blobs((31, 40, 200))
    assert transfer_accuracy(features, labels, splits=2).splits == (pytest.approx(1 / 3),) * 2


def test_a_split_against_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty rows of each class, the rest for testing; centred, rotated, cut; a regression to convergence."""
    fitted: list[tuple[np.ndarray, np.ndarray]] = []
    projected: list[np.ndarray] = []
    fit_pca, fit = PCA.fit, LogisticRegression.fit

    def pca(self: PCA, rows: np.ndarray) -> Any:
        projected.append(rows)
        return fit_pca(self, rows)

    def regression(self: LogisticRegression, rows: np.ndarray, target: np.ndarray) -> Any:
        assert self.get_params() == {
            **LogisticRegression(solver="saga").get_params(),
            "random_state": self.random_state,
        }
        fitted.append((rows, target))
        return fit(self, rows, target)

    monkeypatch.setattr(PCA, "fit", pca)
    monkeypatch.setattr(LogisticRegression, "fit", regression)
    features, labels = blobs((45, 60), distance=1.5)
    found = transfer_accuracy(features, labels, splits=2, components=4)
    assert not np.array_equal(*projected), "every split draws its own rows"
    for (rows, target), chosen, accuracy in zip(fitted, projected, found.splits):
        assert rows.shape == (60, 4) and np.bincount(target).tolist() == [30, 30]
        numbers = [int(np.flatnonzero((features == row).all(1))[0]) for row in chosen]
        assert len(set(numbers)) == 60 and np.array_equal(labels[numbers], target)
        left = np.setdiff1d(np.arange(105), numbers)
        centre = chosen.mean(0)
        _, _, axes = np.linalg.svd(chosen - centre, full_matrices=False)
        ours = LogisticRegression(tol=1e-8, max_iter=10_000)
        fit(ours, (chosen - centre) @ axes[:4].T, target)
        right = ours.predict((features[left] - centre) @ axes[:4].T) == labels[left]
        expected = np.mean([right[labels[left] == c].mean() for c in (0, 1)])
        assert accuracy == pytest.approx(expected, abs=0.04), "a row near the border may differ"


@pytest.mark.parametrize(("components", "size"), [(500, 6), (6, 6), (3, 3)])
def test_as_many_components_as_there_are(components: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    fit_pca = PCA.fit
    monkeypatch.setattr(PCA, "fit", lambda self, rows: sizes.append(self.n_components) or fit_pca(self, rows))
    transfer_accuracy(*blobs((31, 31)), splits=1, components=components)
    transfer_accuracy(*blobs((9, 9), width=40), per_class=2, splits=1, components=components)
    assert sizes == [size, min(4, components)]


def test_maps_are_averaged() -> None:
    features, labels = blobs((40, 40), distance=1.0)
    noise = np.random.default_rng(2).normal(size=(80, 6, 3, 4))
    maps = features[:, :, None, None] + noise - noise.mean((2, 3), keepdims=True)
    by_maps, by_vectors = (transfer_accuracy(f, labels, splits=4, seed=5) for f in (torch.from_numpy(maps), features))
    np.testing.assert_allclose(by_maps.splits, by_vectors.splits, atol=1e-6)
    assert by_maps.mean < 1


def test_the_seed_decides_the_splits() -> None:
    features, labels = blobs((60, 60), distance=1.0)
    one, same, other = (transfer_accuracy(features, labels, splits=4, seed=seed) for seed in (0, 0, 1))
    assert one == same and one.splits != other.splits and len(set(one.splits)) > 1


def test_unlabelled_rows_are_left_out() -> None:
    features, labels = blobs((40, 40))
    more = np.concatenate([features, features]), np.concatenate([labels, np.full(80, -1)])
    assert transfer_accuracy(*more, splits=2) == transfer_accuracy(features, labels, splits=2)


def test_too_few_images_in_a_class() -> None:
    features, labels = blobs((40, 30, 29))
    with pytest.raises(DataError, match=r"class 2 has 29 images, .* needs at least 31"):
        transfer_accuracy(features, labels)
    with pytest.raises(DataError, match="class 'owl' has 29 images"):
        transfer_accuracy(features, labels, names=("ash", "elm", "owl"))
    with pytest.raises(DataError, match="class 1 has 30 images"):
        transfer_accuracy(features[:70], labels[:70])
    assert len(transfer_accuracy(features, labels, per_class=28, splits=1).splits) == 1


def test_what_transfer_refuses() -> None:
    features, labels = blobs((40, 40))
    for field in ("per_class", "splits", "components"):
        with pytest.raises(UsageError, match=f"{field} must be at least 1, got 0"):
            transfer_accuracy(features, labels, **{field: 0})
    with pytest.raises(DataError, match=r"got \(80, 6\) and \(79,\)"):
        transfer_accuracy(features, labels[1:])
    with pytest.raises(DataError, match="rows of two classes, got 1"):
        transfer_accuracy(features, labels * 0)


# The linear SVM ------------------------------------------------------------------------------------------------------


def two_candidates(seed: int = 0) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray, np.ndarray]:
    """Features of which the second's say more; 60 rows to train on, 90 to test on."""
    generator = np.random.default_rng(seed)
    labels, truth = np.arange(60) % 3, np.arange(90) % 3
    centres = np.eye(3, 5)

    def rows(target: np.ndarray, noise: float) -> np.ndarray:
        return centres[target] + noise * generator.normal(size=(len(target), 5))

    return {"poor": (rows(labels, 1.5), rows(truth, 1.5)), "good": (rows(labels, 0.4), rows(truth, 0.4))}, labels, truth


def test_the_svm_chooses_on_training_rows() -> None:
    """The whole grid is there; the second column takes what the source's validation rows preferred."""
    candidates, labels, truth = two_candidates()
    found = svm_transfer(candidates, labels, truth, {"poor": 0.9, "good": 0.8})
    assert found.grid.keys() == {"poor", "good"} and all(tuple(g) == COSTS for g in found.grid.values())
    assert found.by_target.candidate == "good" and found.by_source is not None
    assert found.by_source.candidate == "poor" and found.by_source.accuracy < found.by_target.accuracy
    for choice in (found.by_target, found.by_source):
        costs = found.grid[choice.candidate]
        assert costs[choice.cost] == max(costs.values())
        train, test = candidates[choice.candidate]
        assert choice.accuracy == np.mean(linear_svm(train, labels, choice.cost, 0)(test) == truth)
    assert svm_transfer(candidates, labels, truth).by_source is None


def test_test_rows_choose_nothing() -> None:
    """Other test labels change the accuracy, and nothing else."""
    candidates, labels, truth = two_candidates()
    one = svm_transfer(candidates, labels, truth, costs=(0.1, 10.0))
    other = svm_transfer(candidates, labels, (truth + 1) % 3, costs=(0.1, 10.0))
    assert one.grid == other.grid and one.by_target.cost == other.by_target.cost
    assert one.by_target.candidate == other.by_target.candidate and other.by_target.accuracy < one.by_target.accuracy


def test_the_svm_s_settings_and_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hinge loss, solved in its dual; features a thousand times as large are the same features."""
    from sklearn.svm import LinearSVC

    seen: list[dict[str, Any]] = []
    fit = LinearSVC.fit
    monkeypatch.setattr(LinearSVC, "fit", lambda self, *given: (seen.append(self.get_params()), fit(self, *given))[1])
    candidates, labels, truth = two_candidates()
    small = svm_transfer({"good": candidates["good"]}, labels, truth)
    train, test = candidates["good"]
    large = svm_transfer({"good": (1024 * train, 1024 * test)}, labels, truth)
    assert (small.grid, small.by_target) == (large.grid, large.by_target)
    assert {(p["loss"], p["dual"], p["fit_intercept"]) for p in seen} == {("hinge", True, True)}
    assert {p["C"] for p in seen} == set(COSTS)


def test_what_the_svm_refuses() -> None:
    candidates, labels, truth = two_candidates()
    kept = np.flatnonzero((labels != 2) | (np.arange(60) < 6))
    few = {"good": (candidates["good"][0][kept], candidates["good"][1])}
    with pytest.raises(DataError, match="class 2 has 2 training rows, of 3 classes: 3 folds need"):
        svm_transfer(few, labels[kept], truth)
    with pytest.raises(UsageError, match=r"the features of 'good' must be \(60, d\) and \(90, d\)"):
        svm_transfer({"good": (candidates["good"][0], candidates["good"][1][:, :2])}, labels, truth)
    for wrong, message in (
        ({"costs": (0.0,)}, "costs must be above 0"),
        ({"costs": ()}, "a candidate and a C at least"),
        ({"folds": 1}, "folds must be at least 2"),
        ({"source_scores": {"good": 1.0}}, "source_scores must score 'poor', 'good', got 'good'"),
    ):
        with pytest.raises(UsageError, match=message):
            svm_transfer(candidates, labels, truth, **wrong)  # type: ignore[arg-type]
