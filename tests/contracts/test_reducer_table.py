"""One row for every reducer: a naive reference, and gradients. A class without a row fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from discover import final_subclasses

from nestling.data.batch import Batch
from nestling.objectives.reducers import Mean, Reducer


def naive_mean(values: list[float], weights: list[float]) -> float:
    total = sum(v * w for v, w in zip(values, weights))
    return total / sum(weights) if sum(weights) else 0.0


@dataclass(frozen=True)
class Row:
    make: Callable[[], Reducer]
    naive: Callable[[list[float], list[float]], float]


TABLE = [Row(Mean, naive_mean)]

CASES = {
    "one": ([2.0], [1.0]),
    "plain": ([1.0, 2.0, 6.0], [1.0, 1.0, 1.0]),
    "some left out": ([1.0, 2.0, 6.0, 100.0], [1.0, 0.5, 2.0, 0.0]),
    "all left out": ([1.0, 2.0], [0.0, 0.0]),
    "large": ([1e30, 1e30], [1.0, 1.0]),
}
BATCH = Batch(torch.zeros(1), torch.zeros(1, 1), torch.zeros(1), ("only",))


def test_every_reducer_has_a_row() -> None:
    assert final_subclasses("objectives", Reducer) == {type(row.make()) for row in TABLE}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: type(row.make()).__name__)
def test_reducers(row: Row, case: str) -> None:
    """A scalar, as the naive one; its gradient by finite differences; rows of weight 0 have none."""
    given, weights = CASES[case]
    values = torch.tensor(given, dtype=torch.float64, requires_grad=True)
    scalar = row.make()(values, torch.tensor(weights, dtype=torch.float64), BATCH)
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
    scalar = row.make()(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.0]), BATCH)
    assert scalar.dtype == torch.float32 and scalar.item() == 1.0
