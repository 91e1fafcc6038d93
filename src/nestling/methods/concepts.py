"""Concepts of training rows: who is of which, how often batches draw each, and the reducers that weight them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nestling.data.dataset import LabelledData
from nestling.data.loader import shares
from nestling.errors import DataError, UsageError, listed, unknown
from nestling.objectives.reducers import ConceptWeighted


@dataclass(frozen=True, eq=False)
class ConceptTable:
    """What a ``ConceptReducer`` is told of the data."""

    concept_of: Tensor
    """(largest row index + 1,) int64: the concept of each row by its index, -1 where it does not count."""
    counts: Tensor
    """(k,) float64: the rows of each concept; where batches are balanced, as often as these draw them."""
    prior: Tensor
    """(k,) float64: the concept's share of the rows, however they are drawn."""
    names: tuple[str, ...]


def concept_table(
    data: LabelledData,
    rows: np.ndarray,
    level: str,
    *,
    batch_size: int,
    balance: str,
    balance_level: str | None = None,
    counted: np.ndarray | None = None,
) -> ConceptTable:
    """The concepts at ``level``, or of the column of that name, of the rows that a stage trains on.

    Balanced batches draw a row of a rare kind more often: then N_k is what a concept has of the batches, not of the
    data, so that (N / N_k) q_k gives the concept the weight q_k all the same. The prior stays the share of the rows.

    Parameters
    ----------
    rows: numbers of the stage's rows; ``batch_size``, ``balance`` and ``balance_level`` are the stage's.
    counted: (n,) bool: the rows that the term gives a value; all by default.

    Of a column only the concepts that these rows show are weighted. Raises DataError where such a row has none.
    """
    codes, names = data.concepts_at(level)
    finest = data.finest_known()[rows]
    if balance_level is not None:
        finest = np.minimum(finest, data.taxonomy.level_index(balance_level))
    mass = np.ones(len(rows))
    kinds = np.unique(finest)
    if balance == "levels" and len(kinds) > 1:
        for kind, share in zip(kinds, shares(len(kinds), batch_size), strict=True):
            mass[finest == kind] = share / (finest == kind).sum()
    if counted is not None:
        rows, mass = rows[counted[rows]], mass[counted[rows]]
    nameless = rows[codes[rows] < 0]
    if len(nameless):
        is_level = level in data.taxonomy.levels
        why = f"they are not labelled at level {level!r}" if is_level else f"their {level!r} is empty"
        raise DataError(
            f"{len(nameless)} of {len(rows)} training rows have no concept, since {why} "
            f"({listed((data.items[row] for row in nameless[:3].tolist()), 3)}): drop these rows, or name "
            "their concepts"
        )
    if level not in data.taxonomy.levels:
        # A column may name, for test rows, what no training row is of: nothing is to be weighted there.
        present = np.unique(codes[rows])
        names, renumbered = tuple(names[code] for code in present), np.full(len(names), -1)
        renumbered[present] = np.arange(len(present))
        codes = np.where(codes >= 0, renumbered[codes], -1)
    counts = np.bincount(codes[rows], mass, minlength=len(names))
    natural = np.bincount(codes[rows], minlength=len(names)) / max(len(rows), 1)
    place = np.full(int(data.index.max(initial=-1)) + 1, -1)
    place[data.index[rows]] = codes[rows]
    total = counts.sum() or 1.0
    return ConceptTable(
        concept_of=torch.from_numpy(place),
        counts=torch.from_numpy(counts * len(rows) / total),
        prior=torch.from_numpy(natural),
        names=names,
    )


def concepts_named(data: LabelledData, name: str) -> str:
    """The level, or the column of concepts, of that name. Raises UsageError for neither."""
    if data.has_concepts(name):
        return name
    columns = () if data.concepts is None else (data.concepts.name,)
    raise unknown("level or column of concepts" if columns else "level", name, (*columns, *data.taxonomy.levels))


@dataclass(frozen=True, kw_only=True)
class ConceptOptions:
    """The fields of a recipe whose losses may weight concepts."""

    concept_weights: str = "off"
    """off, or the level, or column of concepts, that the losses of labels weight by how each fares (see robust)."""
    concept_strength: float = 10.0
    """lambda of these weights: the smaller, the farther they go from the concepts' shares."""

    def concepts_at(self, data: LabelledData) -> str | None:
        """The level or column of the concepts; None where they are left alone. Raises UsageError for an unknown one."""
        return None if self.concept_weights == "off" else concepts_named(data, self.concept_weights)

    def concept_reducer(
        self, data: LabelledData, rows: np.ndarray, counted: np.ndarray, *, batch_size: int, balance: str, up_to: str
    ) -> ConceptWeighted | None:
        """What weights the concepts of a stage's ``rows`` in a term that gives ``counted`` ones a value.

        Batches are balanced by the levels up to ``up_to``. None for the plain mean.
        """
        concepts = self.concepts_at(data)
        if concepts is None:
            return None
        table = concept_table(
            data, rows, concepts, batch_size=batch_size, balance=balance, balance_level=up_to, counted=counted
        )
        return ConceptWeighted(table.concept_of, table.counts, table.names, table.prior, strength=self.concept_strength)


def parse_prior(entries: tuple[str, ...]) -> dict[str, float]:
    """``("dog=0.25", "bird=0.75")`` as shares by name. Raises UsageError."""
    found: dict[str, float] = {}
    for entry in entries:
        name, _, text = entry.rpartition("=")
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not name or not 0 <= share < float("inf"):
            raise UsageError(f"prior must hold CONCEPT=SHARE, shares of at least 0, such as dog=0.25; got {entry!r}")
        if name in found:
            raise UsageError(f"prior gives the share of {name!r} twice: leave one of them")
        found[name] = share
    if found and not abs(sum(found.values()) - 1) <= 1e-3:
        raise UsageError(
            f"the shares of the prior must sum to 1, got {sum(found.values()):g}: divide each by that, or add what is "
            "missing"
        )
    return found


def level_of_prior(prior: dict[str, float], data: LabelledData) -> str:
    """The column of concepts, or the coarsest level, that has all names of ``prior``. Raises UsageError for none."""
    levels = {level: data.taxonomy.classes[level] for level in data.taxonomy.levels}
    named = levels if data.concepts is None else {data.concepts.name: data.concepts.names, **levels}
    for name, concepts in named.items():
        if prior.keys() <= set(concepts):
            return name
    home = max(named, key=lambda name: len(prior.keys() & set(named[name])))
    stranger = next(concept for concept in prior if concept not in named[home])
    raise unknown(f"concept of the prior at level {home!r}", stranger, named[home])


def prior_at(prior: dict[str, float], names: tuple[str, ...], level: str) -> Tensor | None:
    """(k,) shares of the concepts ``names``, 0 where none is given; None for no prior. Raises UsageError."""
    if not prior:
        return None
    for name in prior:
        if name not in names:
            raise unknown(f"concept of the prior at level {level!r}", name, names)
    return torch.tensor([prior.get(name, 0.0) for name in names], dtype=torch.float64)
