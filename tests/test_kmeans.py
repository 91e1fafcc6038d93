"""k-means against a naive Lloyd and scikit-learn's; seeds, empty clusters, and how many clusters a class gets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from nestling.errors import UsageError
from nestling.objectives.instances import sum_in_order, sum_rows
from nestling.objectives.kmeans import kmeans, num_clusters


def rows(n: int = 300, d: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def naive(x: torch.Tensor, num: int, iterations: int, seed: int) -> torch.Tensor:
    """All distances in every iteration; for starts that empty no cluster."""
    start = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:num].sort().values
    centres = x[start].double()
    for _ in range(iterations):
        membership = torch.cdist(x.double(), centres).argmin(1)
        assert membership.unique().numel() == num, "this start empties a cluster: take another"
        centres = torch.stack([x.double()[membership == k].mean(0) for k in range(num)])
    return membership


@pytest.mark.parametrize("num", [3, 12, 40])
@pytest.mark.parametrize("iterations", [1, 4, 20])
def test_only_what_can_change_is_computed_and_nothing_else_differs(num: int, iterations: int) -> None:
    x = rows()
    found = kmeans(x, num, iterations, seed=1)
    assert torch.equal(found.membership, naive(x, num, iterations, seed=1))
    own = found.centres[found.membership]
    assert found.inertia == pytest.approx(float((x - own).square().sum()), rel=1e-6)
    means = torch.stack([x[found.membership == k].mean(0) for k in range(num)])
    torch.testing.assert_close(found.centres, means)


def test_as_good_as_scikit_learn() -> None:
    """Both from random rows: the mean over starts within one per cent."""
    x = rows(2000, 16)
    ours = [kmeans(x, 100, seed=seed).inertia for seed in range(5)]
    theirs = [
        KMeans(100, init="random", n_init=1, max_iter=20, tol=0, random_state=seed).fit(x.numpy()).inertia_
        for seed in range(5)
    ]
    assert np.mean(ours) < 1.01 * np.mean(theirs)


def test_the_same_seed_gives_the_same() -> None:
    x = rows()
    one, two, other = (kmeans(x, 20, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.membership, two.membership) and torch.equal(one.centres, two.centres)
    assert not torch.equal(one.membership, other.membership)


def test_empty_clusters_start_again_from_the_farthest_rows() -> None:
    """Of 40 equal rows all but one start at the same place: the far rows fill the clusters that stay empty."""
    x = torch.cat([torch.zeros(40, 2), torch.tensor([[9.0, 0.0], [0.0, 5.0], [3.0, 3.0]])])
    for seed in range(20):
        found = kmeans(x, 4, seed=seed)
        assert torch.bincount(found.membership, minlength=4).min() > 0
        assert found.inertia == pytest.approx(0, abs=1e-6)
    # More clusters than different rows: none is empty all the same.
    assert torch.bincount(kmeans(torch.zeros(7, 2), 5).membership, minlength=5).min() > 0
    assert kmeans(x, len(x)).inertia == 0


def test_classes_share_the_clusters_by_their_sizes() -> None:
    assert num_clusters([2500] * 20, 10_000) == [500] * 20
    assert num_clusters([1, 4, 95], 10) == [1, 1, 10], "round(0.1) is at least 1, round(0.4) too, round(9.5) up"
    assert num_clusters([3, 5], 8) == [3, 5]
    for total in (0, 9):
        with pytest.raises(UsageError, match=f"number of rows, 8; got {total}"):
            num_clusters([3, 5], total)


def test_what_it_refuses() -> None:
    with pytest.raises(UsageError, match="1 to 5 clusters"):
        kmeans(torch.zeros(5, 2), 6)


def test_sums_by_sorting_are_those_of_the_rows_in_their_order() -> None:
    """What a GPU does, where ``index_add_`` takes whichever row comes first: to the last bit what the CPU does."""
    x, membership = rows(500, 5), torch.randint(60, (500,), generator=torch.Generator().manual_seed(1))
    membership[membership == 7] = 8
    expected = torch.zeros(61, 5)
    for row, cluster in zip(x, membership.tolist(), strict=True):
        expected[cluster] += row
    assert torch.equal(sum_in_order(x, membership, 61), expected) and torch.equal(sum_rows(x, membership, 61), expected)
    assert not expected[[7, 60]].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_same_seed_gives_the_same_on_a_gpu() -> None:
    x = rows(5000, 64).cuda()
    one, two = (kmeans(x, 500, seed=3) for _ in range(2))
    assert torch.equal(one.membership, two.membership) and torch.equal(one.centres, two.centres)
