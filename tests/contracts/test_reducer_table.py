"""One row for every reducer: a naive reference, and gradients. A class without a row fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from discover import final_subclasses

from nestling.data.batch import Batch
from nestling.objectives.reducers import ConceptReducer, ConceptWeighted, GroupDRO, Mean, Reducer


def naive_mean(values: list[float], weights: list[float]) -> float:
    total = sum(v * w for v, w in zip(values, weights))
    return total / sum(weights) if sum(weights) else 0.0


@dataclass(frozen=True)
class Row:
    make: Callable[[], Reducer]
    naive: Callable[[list[float], list[float]], float]


CONCEPTS, COUNTS, PRIOR = [0, 1, 2, 0], [2, 1, 1], [0.25, 0.5, 0.25]
"""Of four rows; the prior is not what the counts would give, so that rows weigh differently. Exact in float32."""


def naive_concepts(values: list[float], weights: list[float]) -> float:
    """Equation 5: rows of concept k times (N / N_k) q_k, the first q being the prior."""
    factors = [4 / COUNTS[k] * PRIOR[k] for k in CONCEPTS]
    total = sum(v * w * factor for v, w, factor in zip(values, weights, factors))
    return total / sum(weights) if sum(weights) else 0.0


def concepts(kind: Callable[..., ConceptReducer], **options: Any) -> Callable[[], Reducer]:
    tables = torch.tensor(CONCEPTS), torch.tensor(COUNTS), ("one", "two", "three"), torch.tensor(PRIOR)
    return lambda: kind(*tables, **options)


TABLE = [
    Row(Mean, naive_mean),
    Row(concepts(ConceptWeighted, strength=2.0), naive_concepts),
    Row(concepts(ConceptWeighted, strength=2.0, total=50), naive_concepts),
    Row(concepts(GroupDRO, eta=0.1), naive_concepts),
]

CASES = {
    "one": ([2.0], [1.0]),
    "plain": ([1.0, 2.0, 6.0], [1.0, 1.0, 1.0]),
    "some left out": ([1.0, 2.0, 6.0, 100.0], [1.0, 0.5, 2.0, 0.0]),
    "all left out": ([1.0, 2.0], [0.0, 0.0]),
    "large": ([1e30, 1e30], [1.0, 1.0]),
}


def batch(size: int) -> Batch:
    return Batch(torch.zeros(size), torch.zeros(size, 1), torch.arange(size), ("only",))


def test_every_reducer_has_a_row() -> None:
    assert final_subclasses("objectives", Reducer) == {type(row.make()) for row in TABLE}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: type(row.make()).__name__)
def test_reducers(row: Row, case: str) -> None:
    """A scalar, as the naive one; its gradient by finite differences; rows of weight 0 have none."""
    given, weights = CASES[case]
    values = torch.tensor(given, dtype=torch.float64, requires_grad=True)
    scalar = row.make()(values, torch.tensor(weights, dtype=torch.float64), batch(len(given)))
    assert scalar.shape == ()
    assert scalar.item() == pytest.approx(row.naive(given, weights))
    scalar.backward()
    assert values.grad is not None
    for number in range(len(given)):
        step = 1e-4 * abs(given[number])
        more = [v + step * (i == number) for i, v in enumerate(given)]
        less = [v - step * (i == number) for i, v in enumerate(given)]
        slope = (row.naive(more, weights) - row.naive(less, weights)) / (2 * step)
        assert values.grad[number].item() == pytest.approx(slope, abs=1e-9)
        assert weights[number] or values.grad[number] == 0


@pytest.mark.parametrize("row", TABLE, ids=lambda row: type(row.make()).__name__)
def test_reducers_in_float32(row: Row) -> None:
    scalar = row.make()(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.0]), batch(2))
    assert scalar.dtype == torch.float32 and scalar.item() == pytest.approx(row.naive([1.0, 3.0], [1.0, 0.0]))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: type(row.make()).__name__)
def test_reducers_in_evaluation_mode(row: Row) -> None:
    """The first of two passes: the plain mean, of which nothing is kept."""
    reducer = row.make().eval()
    before = {name: tensor.clone() for name, tensor in reducer.named_buffers()}
    values, weights = [1.0, 2.0, 6.0], [1.0, 0.5, 2.0]
    scalar = reducer(torch.tensor(values), torch.tensor(weights), batch(3))
    assert scalar.item() == pytest.approx(naive_mean(values, weights))
    assert all(torch.equal(tensor, before[name]) for name, tensor in reducer.named_buffers())


@pytest.mark.parametrize("row", TABLE, ids=lambda row: type(row.make()).__name__)
def test_reducers_log_plain_numbers(row: Row) -> None:
    figures = row.make().figures()
    assert all(isinstance(name, str) and isinstance(value, float) for name, value in figures.items())
    assert bool(figures) == bool(list(row.make().buffers())), "whoever keeps something says it"
