"""Labels that are hidden: each level stays known for its fraction of the rows, drawn class by class."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real

import numpy as np

from nestling.data.split import strata
from nestling.errors import UsageError
from nestling.seeds import derive
from nestling.taxonomy import Taxonomy
from nestling.tree import Integers


def keep_labels(
    labels: Integers, taxonomy: Taxonomy, fractions: Mapping[str, float], seed: int
) -> tuple[Integers, str]:
    """What ``LabelledData.keep`` leaves of ``labels`` (n, levels), and a note of how many; raises what it raises."""
    shares = _shares(fractions, taxonomy)
    rng = np.random.default_rng(derive(seed, "keep"))
    distinct, stratum = np.unique(strata(labels, taxonomy), axis=0, return_inverse=True)
    stratum = stratum.reshape(-1)
    sizes = np.bincount(stratum, minlength=len(distinct))
    example = np.zeros(len(distinct), dtype=np.int64)
    example[stratum] = np.arange(len(labels))
    order = np.lexsort((rng.random(len(labels)), stratum))
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - (np.cumsum(sizes) - sizes)[stratum[order]]

    kept = labels.copy()
    counts = np.zeros(len(distinct), dtype=np.int64)
    for level in reversed(range(len(shares))):
        classes = labels[example, level]
        tie = rng.random(len(distinct))
        counts = _allocate(np.where(classes >= 0, sizes, 0), shares[level], counts, classes, tie)
        kept[rank >= counts[stratum], level] = -1
    known = (kept >= 0).sum(axis=0)
    said = ", ".join(f"{level} {count:,}" for level, count in zip(taxonomy.levels, known, strict=True))
    note = f"labels kept, of {len(labels):,} rows: {said} (fractions {', '.join(f'{share:g}' for share in shares)})"
    return kept, note


def _shares(fractions: Mapping[str, float], taxonomy: Taxonomy) -> list[float]:
    """The fraction of every level, coarse to fine."""
    levels = taxonomy.levels
    for level, value in fractions.items():
        taxonomy.level_index(level)
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
            raise UsageError(f"the fraction known at level {level!r} must lie in [0, 1]; got {value!r}")
    shares: list[float] = []
    for number, level in enumerate(levels):
        coarser = shares[-1] if shares else 1.0
        share = float(fractions.get(level, coarser))
        if share > coarser:
            raise UsageError(
                f"fractions may not rise towards fine: {level}={share:g} is above "
                f"{levels[number - 1]}={coarser:g}, and a row that keeps {level!r} keeps the coarser levels"
            )
        shares.append(share)
    return shares


def _allocate(sizes: np.ndarray, share: float, floor: np.ndarray, classes: np.ndarray, tie: np.ndarray) -> np.ndarray:
    """How many rows of each stratum stay known at a level: ``share`` of all rows, by largest remainder.

    sizes, floor (what the finer level keeps already), classes (at this level, -1 = none), tie: (strata,) each.
    """
    if share == 0:
        return np.zeros_like(sizes)
    quota = sizes * share
    counts = np.minimum(np.maximum(np.floor(quota + 1e-9).astype(np.int64), floor), sizes)
    missing = int(np.floor(quota.sum() + 0.5)) - int(counts.sum())
    if missing > 0:
        open_ = counts < sizes
        order = np.lexsort((tie, counts - quota, ~open_))
        counts[order[: min(missing, int(open_.sum()))]] += 1
    for code in np.unique(classes[classes >= 0]):
        members = np.flatnonzero(classes == code)
        if counts[members].sum() == 0:
            counts[members[np.argmax(quota[members])]] = 1
    return counts
