"""From answers and labels to the numbers of ``metrics.json``: pure functions.

No number is NaN, which JSON does not have: it is None where there are no rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from nestling.errors import UsageError
from nestling.objectives.calibration import expected_calibration_error
from nestling.taxonomy import Taxonomy

Level = str | int
Array = ArrayLike | torch.Tensor


def level_metrics(answers: Array, confidence: Array, labels: Array, taxonomy: Taxonomy, level: Level) -> dict[str, Any]:
    """The entry of one level in ``metrics.json``.

    Parameters
    ----------
    answers: (n,) columns of the level.
    confidence: (n,) in [0, 1], of the answers.
    labels: (n,) class codes; rows with -1, not labelled or of a leaf that ended above the level, do not count.

    Returns
    -------
    ``name``; ``accuracy``; ``macro_accuracy``, the mean over the classes that have rows; mean ``confidence``;
    ``overconfidence``, confidence - accuracy; ``ece``, the expected calibration error in 15 bins; ``tree_distance``,
    the mean number of edges between answer and truth over the *mistakes*, None where there are none; ``n``, the rows
    that count. ``UsageError`` on other shapes, and on codes past the level's classes.
    """
    name = taxonomy.levels[taxonomy.level_index(level)]
    answers, sure, labels = _array(answers), _array(confidence), _array(labels)
    if labels.ndim != 1 or answers.shape != labels.shape or sure.shape != labels.shape:
        raise UsageError(
            f"expected answers, confidence and labels (n,), got {answers.shape}, {sure.shape} and {labels.shape}"
        )
    counts = labels >= 0
    answers, labels, sure = answers[counts], labels[counts], sure[counts]
    if not len(labels):
        nothing = dict.fromkeys(("accuracy", "macro_accuracy", "confidence", "overconfidence", "ece", "tree_distance"))
        return {"name": name, **nothing, "n": 0}
    for what, codes, width in (
        ("labels", labels, len(taxonomy.classes[name])),
        ("answers", answers, taxonomy.width(name)),
    ):
        if codes.min() < 0 or codes.max() >= width:
            raise UsageError(f"expected {what} in [0, {width}) at level {name!r}, got {codes.min()} to {codes.max()}")
    correct = answers == labels
    accuracy, mean = float(correct.mean()), float(sure.mean(dtype=np.float64))
    present, rows_of = np.unique(labels, return_counts=True)
    wrong = ~correct
    distance = float(taxonomy.distance(name)[answers[wrong], labels[wrong]].mean()) if wrong.any() else None
    return {
        "name": name,
        "accuracy": accuracy,
        "macro_accuracy": float((np.bincount(labels, correct)[present] / rows_of).mean()),
        "confidence": mean,
        "overconfidence": mean - accuracy,
        "ece": expected_calibration_error(sure, correct),
        "tree_distance": distance,
        "n": len(labels),
    }


def agreement(columns: Sequence[Array], taxonomy: Taxonomy, levels: Sequence[Level] | None = None) -> float | None:
    """The share of rows whose answers at all levels lie on one path of the tree; None without rows.

    Parameters
    ----------
    columns: the answers (n,) for each level, coarse to fine.
    levels: the levels given, coarse to fine; all of them where they are not named.
    """
    names = [taxonomy.levels[taxonomy.level_index(level)] for level in (taxonomy.levels if levels is None else levels)]
    answers = [_array(column) for column in columns]
    if not len(answers) == len(names) or len({answer.shape for answer in answers}) != 1 or answers[0].ndim != 1:
        raise UsageError(
            f"expected columns (n,) for each of the levels {tuple(names)}, got {[answer.shape for answer in answers]}"
        )
    if not len(answers[0]):
        return None
    agree = np.ones(len(answers[0]), dtype=bool)
    for coarse, fine, above, below in zip(names, names[1:], answers, answers[1:]):
        agree &= taxonomy.ancestor(coarse, of=fine)[below] == above
    return float(agree.mean())


def paired_interval(
    ours: Array, theirs: Array, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean difference ours - theirs and its interval: a paired bootstrap over seeds and test rows.

    Every draw takes rows with replacement, the same ones for all seeds, since they are the same test rows, and seeds
    with replacement. Below three seeds only rows are drawn: two seeds say nothing of how seeds differ.

    Parameters
    ----------
    ours, theirs: (seeds, rows), of the same seeds and rows, such as 1 where an answer is right.
    level: the share of draws inside the interval, its ends being quantiles of the draws.

    Returns
    -------
    (difference, lo, hi). ``UsageError`` on other shapes, no rows, or values that are not finite.
    """
    ours, theirs = _array(ours), _array(theirs)
    if ours.shape != theirs.shape or ours.ndim != 2 or not ours.size:
        raise UsageError(f"expected two arrays (seeds, rows), alike, not empty; got {ours.shape} and {theirs.shape}")
    if not 0 < level < 1 or draws < 1:
        raise UsageError(f"expected a level in (0, 1) and at least one draw, got {level} and {draws}")
    difference = ours.astype(np.float64) - theirs.astype(np.float64)
    if not np.isfinite(difference).all():
        raise UsageError("expected finite values, got NaN or infinity")
    generator = np.random.default_rng(seed)
    num_seeds, num_rows = difference.shape
    share = np.full((draws, num_seeds), 1 / num_seeds)
    if num_seeds >= 3:
        share = generator.multinomial(num_seeds, share[0], size=draws) / num_seeds
    # Rows with the same differences are exchangeable. Right or wrong, 3 seeds make 27 kinds of rows at most, so that
    # counts of kinds are drawn in place of rows.
    kinds, counts = np.unique(difference, axis=1, return_counts=True)
    if kinds.shape[1] <= num_rows // 8:
        drawn = generator.multinomial(num_rows, counts / num_rows, size=draws) / num_rows
        means = np.einsum("ds,sk,dk->d", share, kinds, drawn, optimize=True)
    else:
        means = np.array(
            [
                (weights @ difference)[generator.integers(num_rows, size=num_rows, dtype=np.int32)].mean()
                for weights in share
            ]
        )
    lo, hi = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(difference.mean()), float(lo), float(hi)


def _array(values: Array) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
