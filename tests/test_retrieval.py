"""Recall@k, mAP@R and R-precision against naive loops, ties included, and values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nestling.data.dataset import LabelledData
from nestling.errors import UsageError
from nestling.evaluate import ranks, retrieval
from nestling.evaluate.retrieval import highest, precision_at_r, recall_at_k, recalls, retrieval_metrics


def order(features: Tensor, query: int, among: list[int]) -> list[int]:
    """The others by falling cosine similarity, ties by number."""
    units = features.double() / features.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    score = {j: round(float(units[query] @ units[j]), 12) for j in among if j != query}
    return sorted(score, key=lambda j: (-score[j], j))


def naive(features: Tensor, labels: Tensor, ks: tuple[int, ...]) -> dict[int, float]:
    known = [i for i in range(len(labels)) if labels[i] >= 0]
    hits = {k: [any(labels[j] == labels[i] for j in order(features, i, known)[:k]) for i in known] for k in ks}
    return {k: sum(hit) / len(known) for k, hit in hits.items()}


def naive_at_r(features: Tensor, labels: Tensor) -> tuple[float, float]:
    average, precise = [], []
    for i in range(len(labels)):
        r = int((labels == labels[i]).sum()) - 1
        right = [bool(labels[j] == labels[i]) for j in order(features, i, list(range(len(labels))))[:r]]
        average.append(sum(sum(right[: k + 1]) / (k + 1) for k in range(r) if right[k]) / max(r, 1))
        precise.append(sum(right) / max(r, 1))
    return float(np.mean(average)), float(np.mean(precise))


def tied(n: int = 60) -> Tensor:
    """Rows of four entries of one half, either sign: similarities are -1, -0.5 … 1 exactly, most of them often."""
    return torch.randint(0, 2, (n, 4), generator=torch.Generator().manual_seed(3)).float() - 0.5


@pytest.mark.parametrize("features", [torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), tied()])
@pytest.mark.parametrize("size", [1, 7, 64], ids=["one row", "seven rows", "all at once"])
def test_recall_equals_a_naive_loop(features: Tensor, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "BLOCK", size * 60)
    monkeypatch.setattr(ranks, "TILE", size)
    labels = torch.arange(60) % 7
    labels[::11] = -1
    ks = (1, 2, 4, 8, 70)
    assert recall_at_k(features, labels, ks) == pytest.approx(naive(features, labels, ks))
    known = labels >= 0
    assert precision_at_r(features, labels) == pytest.approx(naive_at_r(features[known], labels[known]))


@pytest.mark.parametrize("tile", [4, 512])
def test_what_rounding_does_not_tell_apart_goes_by_index(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of few rows, in classes across copies: sums of fp32 differ by their place, and none may win by that.

    At several levels at once, of which none lies in the other; a row that is alone in its class is a miss.
    """
    monkeypatch.setattr(ranks, "TILE", tile)
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randn(6, 301, generator=generator)
    which = torch.randint(6, (90,), generator=generator)
    features = kinds[which]
    labels = torch.stack([torch.arange(90) % 5, torch.randint(30, (90,), generator=generator)], 1)
    labels[7] = 99
    ks = (1, 2, 5, 20)
    found = recalls(features, labels, ks)
    for level in range(2):
        assert found[level] == pytest.approx(naive(features, labels[:, level], ks))


def test_ranks_by_hand() -> None:
    """Two of a class with three of others between them, one of them as near; a class of one."""
    angle = torch.tensor([0.0, 10.0, 30.0, -20.0, 20.0, 90.0]) * math.pi / 180
    units = torch.stack([angle.cos(), angle.sin()], 1)
    # From row 0: 10 degrees to row 1; 20 to rows 3 and 4, of which the lower is of another class; 30 to row 2.
    labels = torch.tensor([0, 1, 1, 2, 0, 2])[:, None]
    assert ranks.ranks(units, labels, range(1, 6))[:, 0].tolist() == [2, 2, 1, 4, 2, 4]
    assert ranks.ranks(units, torch.arange(6)[:, None], (1,))[:, 0].tolist() == [6] * 6


def test_by_hand() -> None:
    """Directions at 0, 10, 20 and 90 degrees, classes a b a b: the nearest of the first two is of the other class."""
    angle = torch.tensor([0.0, 10.0, 21.0, 90.0]) * math.pi / 180
    features, labels = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([0, 1, 0, 1])
    # 0 finds 1 then 2; 1 finds 0, 2, 3; 2 finds 1 then 0; 3 finds 2 then 1.
    assert recall_at_k(features, labels, (1, 2, 3)) == {1: 0.0, 2: 0.75, 3: 1.0}
    assert precision_at_r(features, torch.tensor([0, 0, 1, 0])) == pytest.approx(
        # R = 2: 0 and 1 find each other, then the other class; 2 is alone; 3 finds the other class, then 1.
        ((1 / 2 + 1 / 2 + 0 + 1 / 4) / 4, (1 / 2 + 1 / 2 + 0 + 1 / 2) / 4)
    )


def test_a_row_alone_in_its_class_is_a_miss() -> None:
    assert recall_at_k(torch.eye(3), torch.tensor([0, 0, 1]), (1, 2)) == {
        1: pytest.approx(2 / 3),
        2: pytest.approx(2 / 3),
    }
    assert recall_at_k(torch.ones(1, 2), torch.tensor([0]), (1,)) == {1: 0.0}
    assert math.isnan(recall_at_k(torch.eye(3), torch.full((3,), -1), (1,))[1])
    assert precision_at_r(torch.eye(3), torch.arange(3)) == (0, 0)


def test_scale_does_not_count_and_zero_is_like_nothing() -> None:
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(5))
    labels, scale = torch.arange(20) % 3, torch.rand(20, 1) + 0.1
    assert recall_at_k(features * scale, labels) == recall_at_k(features, labels)
    # Ties go to the lower index: 0 finds 1, all others find 0.
    assert recall_at_k(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]), (1,)) == {1: 0.25}


def test_the_highest_are_sorted_and_ties_go_by_index() -> None:
    gallery = tied()
    for query in gallery[:10]:
        indices, scores = highest(query[None] @ gallery.T, 9)
        expected = sorted(range(60), key=lambda j: (-float(query @ gallery[j]), j))[:9]
        assert indices[0].tolist() == expected
        assert scores[0].tolist() == [float(query @ gallery[j]) for j in expected]
    assert highest(gallery[:2] @ gallery.T, 100)[0].shape == (2, 60)


def test_every_level(toy_data: LabelledData) -> None:
    data = toy_data.keep({"fine": 0.5})
    features = torch.from_numpy(data.inputs.numpy().reshape(240, -1)).float()
    found = retrieval_metrics(features, data)
    assert retrieval_metrics(features.numpy(), data) == found
    assert found["retrieval"].keys() == {"coarse", "middle", "fine"}
    for place, shares in enumerate(found["retrieval"].values()):
        expected = recall_at_k(features, torch.from_numpy(data.labels[:, place]))
        assert shares == {str(k): pytest.approx(share) for k, share in expected.items()}
    assert found["retrieval_at_r"].keys() == {"fine"}
    nothing = LabelledData(data.inputs, np.full((240, 3), -1), data.taxonomy)
    assert retrieval_metrics(features, nothing) == {"retrieval": {}, "retrieval_at_r": {}}


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected features \(n, d\)"):
        recall_at_k(torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UsageError, match="at least 1"):
        recalls(torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.int64), (0,))
