"""Lemma 1 and the constants of Theorems 1 and 2: by hand, against loops, and on a model that is trained."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.data.dataset import LabelledData
from nestling.engine.runtime import Runtime
from nestling.errors import UsageError
from nestling.evaluate.theory import check_theory, implied_constant, relaxed, theory_of
from nestling.methods import Coins
from nestling.objectives.instance_terms import InstanceTerm
from small import quick


def test_by_hand() -> None:
    """Two coarse classes of two rows; the feature of row 0 has scores log 6, log 2, log 1, log 1: of ten, of eight.

    The fine classes are {0, 1} and {2, 3}: means (log 12)/2 and 0: sqrt(12) and 1. z = 2, and the factor is
    sqrt(12) / 6.
    """
    rows = torch.tensor([[math.log(6)], [math.log(2)], [0.0], [0.0]])
    classes = fine = torch.tensor([0, 0, 1, 1])
    found = check_theory(torch.ones(1, 1), rows, torch.tensor([0]), classes, fine, torch.tensor([0.8]))
    assert found.instance.item() == pytest.approx(0.6) and found.within.item() == pytest.approx(0.75)
    root = math.sqrt(12)
    assert found.fine.item() == pytest.approx(root / (root + 1))
    assert found.bound.item() == found.lemma.item() == pytest.approx(2 * 0.6 * root / 6)
    # 1/0.6 - 1/0.75 = 1/3, and beta / (1 - beta) = 4.
    assert found.constant == pytest.approx(4 / 3)
    assert relaxed(0.75, 0.8, found.constant) == pytest.approx(0.6)


def test_what_theorem_2_says_at_its_ends() -> None:
    assert relaxed(0.5, 1.0, 7.0) == 0.5, "where coarse classes are told apart, nothing is lost"
    assert implied_constant(0.5, 0.5, 0.9) == 0 and implied_constant(0.5, 0.5, 1.0) == 0
    assert implied_constant(0.5, 0.4, 1.0) == implied_constant(0.5, 0.0, 0.9) == math.inf
    assert relaxed(0.5, 0.5, 1.0) == pytest.approx(1 / 3)


def loop(features, rows, own, classes, fine) -> list[tuple[float, float, float, float]]:
    """One row at a time, in plain arithmetic."""
    found = []
    for f, i in zip(features.tolist(), own.tolist()):
        e = [math.exp(sum(a * b for a, b in zip(f, w))) for w in rows.tolist()]
        mean = {
            s: [sum(w) / len(w) for w in zip(*(w for w, c in zip(rows.tolist(), fine.tolist()) if c == s))]
            for s in set(fine.tolist()) - {-1}
        }
        score = {s: sum(a * b for a, b in zip(f, m)) for s, m in mean.items()}
        s, nan = int(fine[i]), math.nan
        middle = math.exp(score[s]) if s in score else nan
        found.append(
            (
                e[i] / sum(e),
                e[i] / sum(x for x, c in zip(e, classes.tolist()) if c == classes[i]),
                middle / sum(map(math.exp, score.values())) if s in score else nan,
                middle / e[i],
            )
        )
    return found


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.booleans())
def test_as_a_loop_has_it_and_never_below_the_bound(seed: int, partly: bool) -> None:
    """Fine classes of unequal sizes, rows without fine label among them: z is the smallest class's."""
    g = torch.Generator().manual_seed(seed)
    rows, own = torch.randn(23, 3, generator=g), torch.randint(0, 23, (9,), generator=g)
    features = 2 * rows[own] + torch.randn(9, 3, generator=g)
    classes = torch.arange(23) % 3
    fine = classes + 3 * torch.randint(0, 2, (23,), generator=g)
    if partly:
        fine = torch.where(torch.rand(23, generator=g) < 0.3, -1, fine)
    found = check_theory(features, rows, own, classes, fine, torch.full((9,), 0.5))
    expected = torch.tensor(loop(features.double(), rows.double(), own, classes, fine), dtype=torch.float64)
    mine = torch.stack([found.instance, found.within, found.fine, found.factor], dim=1)
    torch.testing.assert_close(mine, expected, equal_nan=True)
    known = ~found.fine.isnan()
    assert (found.fine[known] >= found.bound[known] * (1 - 1e-9)).all()
    assert (found.lemma[known] <= found.bound[known]).all()


def test_without_fine_labels() -> None:
    """What does not need them is there, the rest is left out."""
    rows, classes, nothing = torch.eye(4), torch.tensor([0, 0, 1, 1]), torch.full((4,), -1)
    found = check_theory(rows, rows, torch.arange(4), classes, nothing, torch.full((4,), 0.9))
    figures = found.figures()
    assert "fine" not in figures and figures["rows"] == 4
    assert figures["alpha"]["mean"] == pytest.approx(math.e / (math.e + 3)) == figures["alpha"]["least"]
    with pytest.raises(UsageError, match=r"expected features \(m, d\).*got \(4, 4\), \(3,\)"):
        check_theory(rows, rows, torch.arange(3), classes, nothing, torch.full((4,), 0.9))


@pytest.mark.parametrize("variant", ["coins", "coins-cos"])
def test_on_a_trained_model(variant: str, toy_data: LabelledData) -> None:
    """The rows of the term, caught up, beside the features of the same rows; and the bound holds."""
    recipe = Coins(variant=variant, epochs=2, batch_size=16, steps_per_epoch=10, augmentation="none")
    run = quick(recipe, toy_data)
    found = theory_of(run, toy_data, Runtime.choose("cpu", "fp32"))
    assert found is not None and len(found.instance) == 192, "the rows that trained"
    term = run.objectives["search"].terms[1]
    assert isinstance(term, InstanceTerm)
    features = run.model(run.preprocessing(toy_data.images(term.index[:3]))).features["coarse"]
    expected = (features @ term.rows.current().T).softmax(1)[torch.arange(3), torch.arange(3)]
    torch.testing.assert_close(found.instance[:3].float(), expected, rtol=1e-4, atol=1e-6)
    figures = found.figures()
    assert figures["fine"]["violations"] == 0
    assert figures["fine"]["z"] == np.bincount(toy_data.labels[term.index, 2]).min()
    assert figures["fine"]["lemma"] <= figures["fine"]["bound"] <= figures["fine"]["measured"]
    assert figures["alpha"]["mean"] <= figures["alpha within"]["mean"]


def test_without_rows_there_is_nothing_to_check(toy_data: LabelledData) -> None:
    run = quick(Coins(variant="cos", epochs=1, batch_size=16, steps_per_epoch=1), toy_data)
    assert run.objectives == {} and theory_of(run, toy_data, Runtime.choose("cpu", "fp32")) is None
