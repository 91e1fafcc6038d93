"""How well features serve on another data set (*Shallow Learning for Deep Networks*, Section C.3, Table 8)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nestling.errors import DataError
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
