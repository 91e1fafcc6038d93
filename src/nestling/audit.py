"""Are labels nested? Definitions 2.1 and 2.2 of the nested paper, computed on data.

Achddou, Di Martino, Sapiro: *Nested Learning for Multi-Level Classification*, ICASSP 2021, Section 2. Labels
Y_1 … Y_n, coarse to fine, are nested if H(Y_i | Y_{i+1}) = 0 for every i < n, and strictly nested if also
H(Y_i | Y_{i−1}) < H(Y_i) for every i > 1. Entropies are those of the empirical distribution, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nestling.tree import Integers, some_rows

if TYPE_CHECKING:
    from nestling.taxonomy import Taxonomy


class Contradiction(NamedTuple):
    """Rows whose label at ``level`` has another ancestor at ``coarser`` than the rows say. Codes, not columns."""

    rows: Integers
    level: int
    code: int
    coarser: int
    given: int
    expected: int


@dataclass(frozen=True, kw_only=True)
class LevelAudit:
    """One level Y_i; an entropy over no rows at all is NaN."""

    level: str
    num_rows: int
    """Rows labelled at this level."""
    entropy: float
    """H(Y_i), over the rows that ``given_coarser`` is taken over; at the coarsest level over all labelled there."""
    given_finer: float | None
    """H(Y_i | Y_{i+1}), over the rows labelled at both levels; None at the finest. Exactly 0 where Y_{i+1} decides."""
    given_coarser: float | None
    """H(Y_i | Y_{i−1}), over the rows labelled at both levels; None at the coarsest."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What ``Taxonomy.audit`` found; ``str()`` is a table for people."""

    levels: tuple[LevelAudit, ...]
    """Coarse to fine."""
    breaking_rows: tuple[int, ...]
    """Rows whose coarser label is not the tree's ancestor of their finer one, ascending. Each H(Y_i | Y_{i+1}) > 0 has
    at least one; a class that is wrong in all of its rows has them too, though as data it is nested."""
    findings: tuple[str, ...]
    """The same rows with their names: ``row 3: fine 'husky' is a 'dog', but middle says 'cat'``."""

    @property
    def nested(self) -> bool:
        """Definition 2.1. Levels never labelled together do not speak against it."""
        return not any(level.given_finer is not None and level.given_finer > 0 for level in self.levels)

    @property
    def strictly_nested(self) -> bool:
        """Definition 2.2. Levels never labelled together cannot show it, and one class alone never has it."""
        pairs = [(level.given_coarser, level.entropy) for level in self.levels if level.given_coarser is not None]
        return self.nested and all(given < entropy for given, entropy in pairs)

    def __str__(self) -> str:
        width = max(len("level"), *(len(level.level) for level in self.levels))
        lines = [f"{'level':{width}}  {'rows':>8}  {'H(Y)':>8}  {'H(Y|finer)':>10}  {'H(Y|coarser)':>12}   (nats)"]
        for level in self.levels:
            finer, coarser = ("–" if h is None else f"{h:.4f}" for h in (level.given_finer, level.given_coarser))
            lines.append(
                f"{level.level:{width}}  {level.num_rows:>8}  {level.entropy:>8.4f}  {finer:>10}  {coarser:>12}"
            )
        verdict = "strictly nested" if self.strictly_nested else "nested, not strictly" if self.nested else "not nested"
        lines.append(
            verdict + (f"; nesting is broken in {some_rows(self.breaking_rows)}:" if self.breaking_rows else "")
        )
        lines += [f"  {finding}" for finding in self.findings[:5]]
        if len(self.findings) > 5:
            lines.append(f"  and {len(self.findings) - 5} more")
        return "\n".join(lines)


def audit(taxonomy: Taxonomy, labels: Integers) -> Audit:
    """``labels``: int64 ``(n, levels)``, −1 where not labelled, as ``Taxonomy.audit`` has checked them."""
    found = contradictions(taxonomy, labels)
    rows = sorted({int(row) for contradiction in found for row in contradiction.rows})
    findings = tuple(describe(taxonomy, contradiction) for contradiction in found)
    return Audit(levels=audit_levels(taxonomy.levels, labels), breaking_rows=tuple(rows), findings=findings)


def audit_levels(names: Sequence[str], labels: Integers) -> tuple[LevelAudit, ...]:
    """The entropies of every level; ``labels``: int64 ``(n, levels)``, of any names, −1 where not labelled."""
    levels = []
    for i, name in enumerate(names):
        here = labels[:, i]
        entropy, given_coarser, given_finer = _entropy(np.bincount(here[here >= 0])), None, None
        if i > 0:
            entropy, given_coarser = _entropies(here, labels[:, i - 1])
        if i + 1 < len(names):
            _, given_finer = _entropies(here, labels[:, i + 1])
        levels.append(
            LevelAudit(
                level=name,
                num_rows=int((here >= 0).sum()),
                entropy=entropy,
                given_finer=given_finer,
                given_coarser=given_coarser,
            )
        )
    return tuple(levels)


def contradictions(taxonomy: Taxonomy, labels: Integers) -> list[Contradiction]:
    """See ``Taxonomy.contradictions``."""
    found: list[Contradiction] = []
    for i in range(len(taxonomy.levels) - 1, 0, -1):
        pending = labels[:, i] >= 0
        for j in range(i - 1, -1, -1):
            rows = np.flatnonzero(pending & (labels[:, j] >= 0))
            pending &= labels[:, j] < 0
            expected = taxonomy.ancestor(j, of=i)[labels[rows, i]]
            rows = rows[expected != labels[rows, j]]
            num_coarser = taxonomy.num_classes(j)
            pairs, member = np.unique(labels[rows, i] * num_coarser + labels[rows, j], return_inverse=True)
            for number, pair in enumerate(pairs.tolist()):
                code, given = divmod(pair, num_coarser)
                right = int(taxonomy.ancestor(j, of=i)[code])
                found.append(Contradiction(rows[member == number], i, code, j, given, right))
    return found


def describe(taxonomy: Taxonomy, contradiction: Contradiction) -> str:
    """``rows 3, 17: fine 'husky' is a 'dog', but middle says 'cat'``."""
    fine, coarse = taxonomy.levels[contradiction.level], taxonomy.levels[contradiction.coarser]
    given, expected = (taxonomy.classes[coarse][code] for code in (contradiction.given, contradiction.expected))
    name = taxonomy.classes[fine][contradiction.code]
    return f"{some_rows(contradiction.rows)}: {fine} {name!r} is a {expected!r}, but {coarse} says {given!r}"


def _entropy(counts: Integers) -> float:
    counts = counts[counts > 0]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum()) + 0.0 if len(counts) else float("nan")


def _entropies(y: Integers, x: Integers) -> tuple[float, float]:
    """(H(Y), H(Y|X)) over the rows that have both, NaN without any."""
    both = (y >= 0) & (x >= 0)
    y, x = y[both], x[both]
    if not len(y):
        return float("nan"), float("nan")
    count_y, count_x = np.bincount(y), np.bincount(x)
    pairs, joint = np.unique(np.stack([y, x], axis=1), axis=0, return_counts=True)
    of_y, of_x = count_y[pairs[:, 0]], count_x[pairs[:, 1]]
    entropy = _entropy(count_y)
    cells = np.count_nonzero(count_y) * np.count_nonzero(count_x)
    if len(joint) == cells and np.array_equal(joint * len(y), of_y * of_x):
        # Exactly independent: rounding must not make the conditional entropy the smaller one.
        return entropy, entropy
    # A share of exactly 1 gives exactly 0, so "decided by X" needs no tolerance.
    return entropy, float(-(joint / len(y) * np.log(joint / of_x)).sum()) + 0.0
