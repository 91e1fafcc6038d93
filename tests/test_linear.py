"""Linear evaluation against scikit-learn's logistic regression, and top-k accuracy by hand."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from nestling.errors import UsageError
from nestling.evaluate.linear import linear_evaluation, top_k_accuracy


def test_top_k_by_hand() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [9.0, 0.0, 0.0]])
    labels = torch.tensor([0, 2, 0, -1])
    assert [top_k_accuracy(scores, labels, k) for k in (1, 2, 3, 9)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert math.isnan(top_k_accuracy(scores, torch.full((4,), -1), 1))


def test_as_scikit_learn_answers() -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 8
    features = torch.randn(8, 6, generator=g)[labels] + 1.2 * torch.randn(400, 6, generator=g)
    train, test = slice(0, 300), slice(300, 400)
    known = labels[train].clone()
    known[::10] = -1
    found = linear_evaluation(features[train], known, features[test], labels[test], decay=1e-2)
    rows = known >= 0
    mean, std = features[train][rows].mean(0), features[train][rows].std(0, correction=0)
    model = LogisticRegression(C=1 / (1e-2 * int(rows.sum())), max_iter=1000, tol=1e-8)
    model.fit(((features[train][rows] - mean) / std).numpy(), known[rows].numpy())
    scores = torch.from_numpy(model.decision_function(((features[test] - mean) / std).numpy()))
    expected = [top_k_accuracy(scores, labels[test], k) for k in (1, 5)]
    assert [found["top1"], found["top5"]] == pytest.approx(expected, abs=0.011)
    assert 0.3 < found["top1"] < found["top5"]


def test_one_row_is_enough() -> None:
    """A column without spread says nothing, and breaks nothing: the class of the one row is the answer."""
    labels = torch.tensor([2, -1])
    found = linear_evaluation(torch.randn(2, 3), labels, torch.randn(4, 3), torch.tensor([2, 2, 1, 0]))
    assert found == {"top1": 0.5, "top5": 1.0}


def test_without_labels_it_is_refused() -> None:
    with pytest.raises(UsageError, match="needs labelled training rows"):
        linear_evaluation(torch.zeros(2, 3), torch.full((2,), -1), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
