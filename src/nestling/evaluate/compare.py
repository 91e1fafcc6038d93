"""A method against its baselines, on the same test rows and seeds: paired intervals, and a verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nestling.data.dataset import LabelledData
from nestling.evaluate.accuracy import paired_interval
from nestling.evaluate.measure import CLEAN, Measurement

AT_ONCE = 1 << 24
"""Bytes of the bootstrap's weights, (draws, rows), that are held at once."""


def compare(
    ours: Sequence[Measurement], baselines: Mapping[str, Sequence[Measurement]], data: LabelledData
) -> list[dict[str, Any]]:
    """The ``comparisons`` of metrics.json, ours minus theirs: accuracy per level and condition, calibration gap.

    The calibration gap is |confidence - accuracy| at the finest level, averaged over the distortions; lower is better.
    Each method has one measurement per seed.
    """
    levels = list(ours[0].decisions[CLEAN].columns)
    conditions = list(ours[0].decisions)
    distorted = [c for c in conditions if c != CLEAN]
    results = []
    for name, theirs in baselines.items():
        for condition in conditions:
            for level in levels if condition == CLEAN else levels[-1:]:
                a = np.stack([m.correct(data, level, condition) for m in ours])
                b = np.stack([m.correct(data, level, condition) for m in theirs])
                if not a.size:
                    continue
                difference, lo, hi = paired_interval(a, b)
                results.append(
                    {
                        "baseline": name,
                        "level": level,
                        "metric": "accuracy",
                        "condition": condition,
                        "difference": difference,
                        "interval": [lo, hi],
                    }
                )
        for label, chosen in (("clean", [CLEAN]), ("distorted", distorted)):
            if chosen and ours[0].correct(data, levels[-1]).size:
                difference, lo, hi = gap_interval(
                    excess(ours, data, levels[-1], chosen), excess(theirs, data, levels[-1], chosen)
                )
                results.append(
                    {
                        "baseline": name,
                        "level": levels[-1],
                        "metric": "calibration gap",
                        "condition": label,
                        "difference": difference,
                        "interval": [lo, hi],
                    }
                )
    return results


def excess(
    measurements: Sequence[Measurement], data: LabelledData, level: str, conditions: Sequence[str]
) -> np.ndarray:
    """Confidence minus correctness, (conditions, seeds, rows)."""
    return np.stack(
        [[m.confidence(data, level, c) - m.correct(data, level, c) for m in measurements] for c in conditions]
    )


def gap(excess: np.ndarray) -> float:
    """|mean confidence - accuracy|, averaged over conditions and seeds; ``excess`` is (conditions, seeds, rows)."""
    return float(np.abs(excess.mean(2)).mean())


def gap_interval(
    ours: np.ndarray, theirs: np.ndarray, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Difference of two gaps and its interval, by a paired bootstrap over seeds (from three on) and rows.

    ours, theirs: (conditions, seeds, rows).
    """
    conditions, seeds, rows = ours.shape
    generator = np.random.default_rng(seed)
    columns = np.concatenate([values.reshape(-1, rows) for values in (ours, theirs)]).T.astype(np.float32)
    means = np.empty((draws, columns.shape[1]), dtype=np.float32)
    chunk = max(AT_ONCE // (4 * rows), 1)
    for start in range(0, draws, chunk):
        counts = np.empty((min(chunk, draws - start), rows), dtype=np.float32)
        for draw in counts:
            draw[:] = np.bincount(generator.integers(rows, size=rows, dtype=np.int32), minlength=rows)
        counts /= rows
        means[start : start + chunk] = counts @ columns
    share = (
        generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
        if seeds >= 3
        else np.full((draws, seeds), 1 / seeds)
    )

    gaps = (np.abs(means).reshape(draws, 2, conditions, seeds).mean(2) * share[:, None]).sum(2)
    lo, hi = np.quantile(gaps[:, 0] - gaps[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return gap(ours) - gap(theirs), float(lo), float(hi)


def verdict(method: str, comparisons: Sequence[dict[str, Any]], finest: str, num_seeds: int) -> str:
    """For each baseline by how much it is beaten, or not, in accuracy at the finest level, and in calibration.

    Accuracies at coarser levels and under distortion are named where their interval excludes 0. The intervals are not
    corrected for their number; the last line says how many they are.
    """
    sentences = []
    for name in dict.fromkeys(c["baseline"] for c in comparisons):
        mine = [c for c in comparisons if c["baseline"] == name]
        fine = [c for c in mine if c["metric"] == "accuracy" and c["level"] == finest and c["condition"] == CLEAN]
        if fine:
            won = _outcome(fine[0], "beats", "loses to", "is not told apart from")
            sentence = f"{method} {won} {name} in {finest} accuracy ({_points(fine[0])})"
        else:
            sentence = f"{method} is not compared with {name} in {finest} accuracy: no test row is labelled there"
        for c in (c for c in mine if c["metric"] == "calibration gap" and c["condition"] == "distorted"):
            size = _outcome(c, "larger", "smaller", "not told apart")
            sentence += f"; its calibration gap under distortion is {size} ({_points(c)})"
        others = [(c, _outcome(c, "better", "worse", "")) for c in mine if c["metric"] == "accuracy" and c not in fine]
        for outcome in ("worse", "better"):
            if found := [_where(c) for c, way in others if way == outcome]:
                sentence += f"; it is clearly {outcome} in {', '.join(found)}"
        sentences.append(sentence + ".")
    seeds = f"{num_seeds} seeds" if num_seeds > 1 else "1 seed, which says nothing of how seeds differ"
    drawn = "seeds and test rows" if num_seeds >= 3 else "test rows"
    small = (
        f"Points are percentage points; paired 95 % intervals over {drawn}, {seeds}. Comparisons made: "
        f"{len(comparisons)}; where methods do not differ at all, about one in twenty would look clear by chance."
    )
    return "\n".join([*sentences, small])


def _where(comparison: dict[str, Any]) -> str:
    under = "" if comparison["condition"] == CLEAN else f" under {comparison['condition']}"
    return f"{comparison['level']} accuracy{under} ({_points(comparison)})"


def _outcome(comparison: dict[str, Any], above: str, below: str, neither: str) -> str:
    lo, hi = comparison["interval"]
    return above if lo > 0 else below if hi < 0 else neither


def _points(comparison: dict[str, Any]) -> str:
    lo, hi = comparison["interval"]
    return f"{100 * comparison['difference']:+.1f} points [{100 * lo:+.1f}, {100 * hi:+.1f}]"
