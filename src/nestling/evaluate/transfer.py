"""How well features serve on another data set.

By a logistic regression on a few rows of each class (*Shallow Learning for Deep Networks*, Section C.3, Table 8), and
by a linear SVM (*Hierarchically Robust Representation Learning*, Section 4, Tables 2 to 4).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nestling.errors import DataError, UsageError, listed
from nestling.methods.recipe import check
from nestling.seeds import derive


@dataclass(frozen=True)
class Transfer:
    """Average per-class accuracies over random splits."""

    mean: float
    std: float
    """With ``splits - 1`` in the denominator; 0 for a single split."""
    splits: tuple[float, ...]
    """Of each split."""


def transfer_accuracy(
    features: torch.Tensor | np.ndarray,
    labels: torch.Tensor | np.ndarray,
    per_class: int = 30,
    splits: int = 10,
    components: int = 500,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> Transfer:
    """Train a linear classifier on ``per_class`` rows of each class, test it on all others; again for each split.

    A map is averaged over its positions, PCA fitted on the training rows leaves ``components`` dimensions (or as many
    as there are), and scikit-learn's multinomial logistic regression by SAGA, everything else as it is by default, is
    fitted on those (Section C.3).

    Parameters
    ----------
    features: (n, d), or maps (n, channels, h, w).
    labels: (n,) int; rows with -1 are left out.
    seed: decides the splits.
    names: of the classes, for messages.

    Raises DataError where a class has no row left to test on, and UsageError for counts below 1.
    """
    for what, value in (("per_class", per_class), ("splits", splits), ("components", components)):
        check(what, value, least=1)
    values, target = np.asarray(features, dtype=np.float32), np.asarray(labels)
    if values.ndim not in (2, 4) or target.shape != (len(values),):
        raise DataError(
            f"expected features (n, d) or (n, channels, h, w) and labels (n,), got {values.shape} and {target.shape}"
        )
    values, target = values.reshape(*values.shape[:2], -1).mean(2)[target >= 0], target[target >= 0]
    classes, counts = np.unique(target, return_counts=True)
    if len(classes) < 2:
        raise DataError(f"transfer needs rows of two classes, got {len(classes)}: choose another set")
    if counts.min() <= per_class:
        code, count = int(classes[counts.argmin()]), int(counts.min())
        name = repr(names[code]) if names is not None else str(code)
        raise DataError(
            f"class {name} has {count} images, and each split trains on {per_class} and tests on the others: it needs "
            f"at least {per_class + 1}, so leave the class out, or train on fewer per class"
        )
    found = tuple(
        one_split(values, target, per_class, components, derive(seed, "transfer", number)) for number in range(splits)
    )
    return Transfer(float(np.mean(found)), float(np.std(found, ddof=1)) if splits > 1 else 0.0, found)


def one_split(values: np.ndarray, target: np.ndarray, per_class: int, components: int, seed: int) -> float:
    """The mean over classes of the accuracy on the rows that a random split leaves for testing."""
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score

    generator = np.random.default_rng(seed)
    chosen = [generator.choice(np.flatnonzero(target == c), per_class, replace=False) for c in np.unique(target)]
    train = np.zeros(len(target), dtype=bool)
    train[np.concatenate(chosen)] = True
    state = seed % 2**32
    size = min(components, int(train.sum()), values.shape[1])
    pca = PCA(size, random_state=state).fit(values[train])
    model = LogisticRegression(solver="saga", random_state=state)
    with warnings.catch_warnings():
        # The protocol's defaults end after 100 rounds, whether SAGA has converged or not.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(pca.transform(values[train]), target[train])
    return float(balanced_accuracy_score(target[~train], model.predict(pca.transform(values[~train]))))


COSTS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""The paper's grid of C."""


@dataclass(frozen=True)
class Choice:
    """A candidate and its C, and how it serves."""

    candidate: str
    cost: float
    accuracy: float
    """On the target's test rows, of the SVM trained on all of its training rows."""


@dataclass(frozen=True)
class SvmTransfer:
    """What the linear SVM makes of several candidates' features."""

    grid: dict[str, dict[float, float]]
    """Candidate -> C -> mean accuracy over the folds of the target's training rows: all that was tried."""
    by_target: Choice
    """The best of the grid; ties go to the candidate named first, and to the smaller C."""
    by_source: Choice | None
    """The candidate that did best on its own source's validation rows, C from the grid; None without such scores."""


def svm_transfer(
    candidates: Mapping[str, tuple[np.ndarray, np.ndarray]],
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    source_scores: Mapping[str, float] | None = None,
    costs: Sequence[float] = COSTS,
    folds: int = 3,
    seed: int = 0,
) -> SvmTransfer:
    """Choose among ``candidates`` (settings of tau and lambda) and ``costs``, and test the choice alone.

    Chosen by cross-validation on the target's training rows and, as a second column, by validation on the source; test
    rows choose nothing. The SVM is scikit-learn's with the hinge loss, as LIBSVM's, one against all others. Features
    are divided by the mean norm of the training rows', so that one grid of C serves networks of any scale.

    Parameters
    ----------
    candidates: by name the features (n, d) of the target's training rows and (m, d) of its test rows.
    train_labels: (n,) int; test_labels: (m,) int.
    source_scores: by candidate, the higher the better.

    Raises DataError where a class has fewer training rows than there are folds, UsageError for counts, costs and shapes
    that cannot be.
    """
    check("folds", folds, least=2)
    check("costs", tuple(costs), above=0)
    if not candidates or not costs:
        raise UsageError(f"expected a candidate and a C at least, got {len(candidates)} and {len(costs)}")
    y, truth = np.asarray(train_labels), np.asarray(test_labels)
    for name, (train, test) in candidates.items():
        if train.ndim != 2 or len(train) != len(y) or test.shape != (len(truth), train.shape[1]):
            raise UsageError(
                f"the features of {name!r} must be ({len(y)}, d) and ({len(truth)}, d), got {train.shape} and "
                f"{test.shape}"
            )
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2 or counts.min() < folds:
        raise DataError(
            f"class {classes[counts.argmin()]} has {counts.min()} training rows, of {len(classes)} classes: {folds} "
            f"folds need two classes of {folds} rows each; leave small classes out, or take fewer folds"
        )
    if source_scores is not None and source_scores.keys() != candidates.keys():
        raise UsageError(f"source_scores must score {listed(candidates)}, got {listed(source_scores)}")
    grid = {
        name: {cost: cross_validated(train, y, cost, folds, seed) for cost in costs}
        for name, (train, _) in candidates.items()
    }

    def tested(name: str) -> Choice:
        cost = min(sorted(costs), key=lambda cost: -grid[name][cost])
        train, test = candidates[name]
        answers = linear_svm(train, y, cost, seed)(test)
        return Choice(name, cost, float(np.mean(answers == truth)))

    best = max(candidates, key=lambda name: max(grid[name].values()))
    by_source = None
    if source_scores is not None:
        by_source = tested(max(candidates, key=lambda name: source_scores[name]))
    return SvmTransfer(grid, tested(best), by_source)


def cross_validated(features: np.ndarray, labels: np.ndarray, cost: float, folds: int, seed: int) -> float:
    """The mean accuracy over stratified folds, each left out once."""
    from sklearn.model_selection import StratifiedKFold

    cut = StratifiedKFold(folds, shuffle=True, random_state=derive(seed, "folds") % 2**32)
    scores = [
        np.mean(linear_svm(features[train], labels[train], cost, seed)(features[test]) == labels[test])
        for train, test in cut.split(features, labels)
    ]
    return float(np.mean(scores))


def linear_svm(features: np.ndarray, labels: np.ndarray, cost: float, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Fit on (n, d) and (n,); what it returns answers for (m, d)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    scale = float(np.linalg.norm(features, axis=1).mean()) or 1.0
    model = LinearSVC(loss="hinge", dual=True, C=cost, random_state=derive(seed, "svm") % 2**32)
    with warnings.catch_warnings():
        # With a large C the last digits take more than its 1,000 rounds.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features / scale, labels)
    return lambda rows: model.predict(rows / scale)
