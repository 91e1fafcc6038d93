"""How far paths are answered, and what comes of it: pure functions of scores and thresholds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nestling.evaluate.scores import Scores
from nestling.taxonomy import Taxonomy


@dataclass(frozen=True, eq=False)
class Backoff:
    """Where a path may be answered."""

    thresholds: tuple[NDArray[np.float64], ...]
    """For each level (width,): the least confidence at which a column is answered; infinity where never."""
    text: str
    """What is promised, on what evidence and on what condition, in a sentence or two."""

    def depth(self, confidence: NDArray[np.float64], columns: NDArray[np.int64], named: NDArray[np.bool_]) -> NDArray:
        """int (n,): how many levels of a path (n, levels) are answered; 0 where there is no answer."""
        least = np.stack([t[columns[:, i]] for i, t in enumerate(self.thresholds)], axis=1)
        return np.logical_and.accumulate((confidence >= least) & named, axis=1).sum(1)

    def depth_of(self, scores: Scores) -> NDArray:
        """int (n,): the same of rows with scores."""
        return self.depth(scores.confidence, scores.columns, scores.named)


@dataclass(frozen=True)
class Outcome:
    """What came of answering rows to given depths."""

    answered: float
    """The share of rows that are answered at all."""
    depth: float
    """The mean number of levels answered, over all rows; 0 for no answer."""
    wrong: int
    """Wrong answers, among ``counted``."""
    counted: int
    """Answered rows whose label at the answered level is known."""

    @property
    def risk(self) -> float | None:
        """The share of wrong answers; None where none counts."""
        return self.wrong / self.counted if self.counted else None


def outcome(scores: Scores, depth: NDArray) -> Outcome:
    """``depth`` (n,): levels answered of each row. A row counts where its label at the answered level is known."""
    at = np.maximum(depth - 1, 0)[:, None]
    known = np.take_along_axis(scores.known, at, 1)[:, 0] & (depth > 0)
    wrong = np.take_along_axis(scores.columns != scores.labels, at, 1)[:, 0] & known
    share, mean = (float((depth > 0).mean()), float(depth.mean())) if len(depth) else (0.0, 0.0)
    return Outcome(share, mean, int(wrong.sum()), int(known.sum()))


def depth_under(scores: Scores, threshold: float, cap: int) -> NDArray:
    """int (n,): levels answered under one threshold, at most ``cap`` of them."""
    return ((scores.confidence[:, :cap] >= threshold) & scores.named[:, :cap]).sum(1)


def turns(scores: Scores, cap: int) -> NDArray[np.float64]:
    """(n,): the largest threshold at which a row is answered wrongly: the confidence of its first wrong class.

    Once wrong the path stays wrong below, so that the loss of a row never falls as the threshold does.
    """
    wrong = ((scores.columns != scores.labels) & scores.named)[:, :cap]
    first = np.take_along_axis(scores.confidence[:, :cap], wrong.argmax(1)[:, None], 1)[:, 0]
    return np.where(wrong.any(1), first, -np.inf)


def counted_at(scores: Scores, level: int) -> NDArray[np.bool_]:
    """(n,): the rows known at a level; of those whose path ended above it, as large a share as of the others.

    A leaf's label is known at every finer level, that of another row only where somebody gave it: were all leaves
    counted, they would stand for more rows than they are. Which of them are left out is drawn, the same each time.
    """
    classes = np.array([scores.taxonomy.num_classes(name) for name in scores.levels])
    named = scores.known & (scores.labels < classes)
    counted, share = scores.known[:, level].copy(), 1.0
    for end in range(level - 1, -1, -1):
        ends = named[:, end] & scores.known[:, end + 1] & ~named[:, end + 1]
        goes_on = named[:, end] & ~ends
        share *= float(named[goes_on, end + 1].mean()) if goes_on.any() else 1.0
        rows = np.flatnonzero(counted & ends)
        counted[np.random.default_rng(end).permutation(rows)[round(share * len(rows)) :]] = False
    return counted


def known_to(scores: Scores, cap: int) -> Scores:
    """The rows that count where ``cap`` levels may be answered."""
    return take(scores, counted_at(scores, cap - 1))


def single_level(scores: Scores, i: int, members: NDArray | None = None) -> Scores:
    """Level ``i`` alone: the rows that count there whose path goes to one of the classes ``members``, None for any."""
    rows = scores.named[:, i] & counted_at(scores, i)
    if members is not None:
        rows &= np.isin(scores.columns[:, i], members)
    return take(scores, rows, slice(i, i + 1))


def take(scores: Scores, rows: NDArray, levels: slice = slice(None)) -> Scores:
    """Some rows, given by numbers or a mask (n,), and levels."""
    parts = (getattr(scores, name)[rows, levels] for name in ("confidence", "columns", "labels", "truth"))
    return Scores(scores.taxonomy, scores.levels[levels], *parts)


def one_threshold(scores: Scores, threshold: float, cap: int) -> tuple[NDArray[np.float64], ...]:
    """The same threshold for every column of the first ``cap`` levels, infinity below."""
    return tuple(
        np.full(scores.taxonomy.width(level), threshold if i < cap else np.inf) for i, level in enumerate(scores.levels)
    )


def fixed(taxonomy: Taxonomy, levels: tuple[str, ...], threshold: float) -> Backoff:
    """One threshold at every level, which promises nothing."""
    return Backoff(tuple(np.full(taxonomy.width(level), threshold) for level in levels), f"confidence {threshold:g}")
