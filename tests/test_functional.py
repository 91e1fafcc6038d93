"""The formulas against naive loops over the tree, and one number of each worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nestling import functional as public
from nestling.errors import UsageError
from nestling.objectives import functional
from nestling.taxonomy import Taxonomy

EVEN = Taxonomy.from_paths(["a/p/1", "a/p/2", "a/q/3", "b/r/4", "b/r/5", "b/r/6"])
"""Widths 2, 3, 6; ``b`` has one child."""
RAGGED = Taxonomy.from_paths(["a/p/1", "a/p/2", "a/q", "b/r/3", "c"])
"""``a/q`` ends at the middle level, ``c`` at the coarsest: widths 3, 4 and 5, the last with pass-through columns."""
SINGLE = Taxonomy.from_paths(["x", "y", "z"], levels=["only"])
TREES = [EVEN, RAGGED, SINGLE]


def random_probabilities(
    taxonomy: Taxonomy, rows: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (3 * torch.randn(rows, taxonomy.width(level), generator=generator, dtype=dtype)).softmax(1)
        for level in taxonomy.levels
    ]


def naive_combine(probabilities: list[Tensor], taxonomy: Taxonomy) -> list[Tensor]:
    combined = [probabilities[0].double()]
    for i, level in enumerate(taxonomy.levels[1:], start=1):
        given, parent = probabilities[i].double(), taxonomy.column_parent(level)
        result = torch.empty_like(given)
        for row in range(len(given)):
            for q in range(given.shape[1]):
                siblings = [w for w in range(given.shape[1]) if parent[w] == parent[q]]
                mass = sum(given[row, w] for w in siblings)
                share = given[row, q] / mass if mass > 0 else 1 / len(siblings)
                result[row, q] = share * combined[-1][row, parent[q]]
        combined.append(result)
    return combined


def naive_marginal(logits: Tensor, labels: Tensor, taxonomy: Taxonomy, level: int) -> Tensor:
    losses = []
    for row in range(len(logits)):
        p = logits[row].double().softmax(0)
        known = [i for i in range(level + 1) if labels[row, i] >= 0]
        if not known:
            losses.append(torch.zeros((), dtype=torch.float64))
            continue
        above = taxonomy.ancestor(known[-1], of=level)
        inside = [p[column] for column in range(len(p)) if above[column] == labels[row, known[-1]]]
        losses.append(-torch.stack(inside).sum().log())
    return torch.stack(losses)


def some_labels(taxonomy: Taxonomy, rows: int, seed: int = 0, from_level: int = 0) -> Tensor:
    """Complete columns of random leaves, each row cut off after a random level."""
    generator = np.random.default_rng(seed)
    finest = len(taxonomy.levels) - 1
    leaf = generator.integers(taxonomy.width(finest), size=rows)
    labels = np.stack([taxonomy.ancestor(i, of=finest)[leaf] for i in range(finest + 1)], axis=1)
    depth = generator.integers(from_level, finest + 2, size=rows)
    labels[np.arange(finest + 1) >= depth[:, None]] = -1
    return torch.from_numpy(labels)


@pytest.mark.parametrize("taxonomy", TREES)
def test_combine_levels_is_equation_2(taxonomy: Taxonomy) -> None:
    probabilities = random_probabilities(taxonomy, 7)
    combined = functional.combine_levels(probabilities, taxonomy)
    for ours, reference in zip(combined, naive_combine(probabilities, taxonomy), strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(ours.sum(1), torch.ones(7))
    assert torch.equal(combined[0], probabilities[0])


def test_combine_levels_by_hand() -> None:
    coarse = torch.tensor([[0.7, 0.3]])
    middle = torch.tensor([[0.2, 0.2, 0.6]])  # a: halves; b has one child
    fine = torch.tensor([[0.1, 0.3, 0.0, 0.0, 0.0, 0.6]])  # p: 1 to 3; q alone; r: all on its third
    _, middle, fine = functional.combine_levels([coarse, middle, fine], EVEN)
    torch.testing.assert_close(middle, torch.tensor([[0.35, 0.35, 0.3]]))
    torch.testing.assert_close(fine, torch.tensor([[0.0875, 0.2625, 0.35, 0.0, 0.0, 0.3]]))


def test_ragged_leaves_keep_their_mass() -> None:
    coarse, middle, fine = functional.combine_levels(random_probabilities(RAGGED, 5), RAGGED)
    assert RAGGED.column_names("middle") == ("p", "q", "r", "c")
    assert RAGGED.column_names("fine") == ("1", "2", "3", "c", "q")
    torch.testing.assert_close(middle[:, 3], coarse[:, 2])
    torch.testing.assert_close(fine[:, 3], coarse[:, 2])
    torch.testing.assert_close(fine[:, 4], middle[:, 1])


def test_children_without_mass_share_evenly() -> None:
    coarse = torch.tensor([[0.4, 0.6]])
    combined = functional.combine_levels([coarse, torch.zeros(1, 3), torch.zeros(1, 6)], EVEN)
    torch.testing.assert_close(combined[1], torch.tensor([[0.2, 0.2, 0.6]]))
    torch.testing.assert_close(combined[2], torch.tensor([[0.1, 0.1, 0.2, 0.2, 0.2, 0.2]]))


def test_shares_of_the_smallest_numbers_are_right() -> None:
    smallest = 2.0**-149
    fine = torch.tensor([[smallest, 3 * smallest, 1e-38, 1.0, 1e-30, 3e-30]])
    combined = functional.combine_levels([torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]), fine], EVEN)
    torch.testing.assert_close(combined[2], torch.tensor([[0.25, 0.75, 0.0, 0.0, 0.0, 0.0]]))


@given(st.integers(0, 2**31), st.sampled_from(TREES), st.floats(0, 200))
def test_combined_probabilities_sum_to_1_and_agree(seed: int, taxonomy: Taxonomy, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = [taxonomy.width(level) for level in taxonomy.levels]
    probabilities = [(sharpness * torch.randn(4, width, generator=generator)).softmax(1) for width in widths]
    combined = functional.combine_levels(probabilities, taxonomy)
    for level, p in zip(taxonomy.levels, combined, strict=True):
        assert bool(p.isfinite().all()) and bool((p >= 0).all())
        torch.testing.assert_close(p.sum(1), torch.ones(4))
        torch.testing.assert_close(functional.aggregate(combined[-1], taxonomy, level), p, rtol=1e-4, atol=1e-6)


def test_levels_without_a_head_are_left_out() -> None:
    coarse, middle, fine = random_probabilities(EVEN, 3)
    torch.testing.assert_close(
        functional.combine_levels([coarse, middle], EVEN), functional.combine_levels([coarse, middle, fine], EVEN)[:2]
    )
    combined = functional.combine_levels([coarse, fine], EVEN, levels=["coarse", "fine"])
    torch.testing.assert_close(functional.aggregate(combined[1], EVEN, "coarse"), coarse)


def test_half_precision_is_combined_in_float32() -> None:
    probabilities = [p.bfloat16() for p in random_probabilities(EVEN, 3)]
    combined = functional.combine_levels(probabilities, EVEN)
    assert combined[0] is probabilities[0] and combined[2].dtype == torch.float32


@pytest.mark.parametrize("taxonomy", [EVEN, RAGGED])
def test_combine_levels_gradient(taxonomy: Taxonomy) -> None:
    probabilities = [p.requires_grad_() for p in random_probabilities(taxonomy, 3, dtype=torch.float64)]
    torch.autograd.gradcheck(lambda *p: tuple(functional.combine_levels(p, taxonomy)), probabilities)


def test_combine_levels_refuses_other_shapes() -> None:
    coarse, middle, fine = random_probabilities(EVEN, 3)
    with pytest.raises(UsageError, match=r"expected probabilities \(b, 3\) at level 'middle', got \(3, 6\)"):
        functional.combine_levels([coarse, fine, middle], EVEN)
    with pytest.raises(UsageError, match="as many rows"):
        functional.combine_levels([coarse, middle[:2], fine], EVEN)
    with pytest.raises(UsageError, match="one tensor of probabilities for each level"):
        functional.combine_levels([coarse, middle, fine, fine], EVEN)
    with pytest.raises(UsageError, match="coarse to fine"):
        functional.combine_levels([middle, coarse], EVEN, levels=["middle", "coarse"])
    with pytest.raises(ValueError, match="unknown level nope"):
        functional.combine_levels([coarse], EVEN, levels=["nope"])


def test_nan_stays_visible() -> None:
    coarse, middle, fine = random_probabilities(EVEN, 1)
    middle[0, 0] = torch.nan
    combined = functional.combine_levels([coarse, middle, fine], EVEN)
    assert combined[1].isnan().tolist() == [[True, True, False]]


@pytest.mark.parametrize("taxonomy", TREES)
def test_aggregate_equals_numpy(taxonomy: Taxonomy) -> None:
    fine = random_probabilities(taxonomy, 5, dtype=torch.float64)[-1]
    for level in taxonomy.levels:
        ours = functional.aggregate(fine, taxonomy, level)
        np.testing.assert_allclose(ours.numpy(), taxonomy.aggregate(fine.numpy(), level), rtol=1e-12)


def test_aggregate_by_hand() -> None:
    fine = torch.tensor([[0.1, 0.2, 0.3, 0.05, 0.15, 0.2]])
    torch.testing.assert_close(functional.aggregate(fine, EVEN, "middle"), torch.tensor([[0.3, 0.3, 0.4]]))
    torch.testing.assert_close(functional.aggregate(fine, EVEN, 0), torch.tensor([[0.6, 0.4]]))
    torch.testing.assert_close(
        functional.aggregate(torch.tensor([[0.3, 0.3, 0.4]]), EVEN, "coarse", of="middle"), torch.tensor([[0.6, 0.4]])
    )
    assert functional.aggregate(fine, EVEN, "fine") is fine
    with pytest.raises(UsageError, match=r"expected probabilities \(b, 6\)"):
        functional.aggregate(fine[:, :3], EVEN, "coarse")
    with pytest.raises(UsageError, match="finer level"):
        functional.aggregate(fine[:, :2], EVEN, "fine", of="coarse")


@pytest.mark.parametrize("taxonomy", TREES)
def test_marginal_cross_entropy_equals_a_loop(taxonomy: Taxonomy) -> None:
    labels = some_labels(taxonomy, 40)
    for number, level in enumerate(taxonomy.levels):
        logits = 5 * torch.randn(40, taxonomy.width(level), generator=torch.Generator().manual_seed(number))
        ours = functional.marginal_cross_entropy(logits, labels, taxonomy, level=level)
        expected = naive_marginal(logits, labels, taxonomy, number)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
        if number == len(taxonomy.levels) - 1:
            assert torch.equal(ours, functional.marginal_cross_entropy(logits, labels, taxonomy))


def test_marginal_cross_entropy_by_hand() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.05, 0.15, 0.2]).log().expand(5, 6)
    labels = torch.tensor([[0, 0, 1], [0, 0, -1], [1, -1, -1], [-1, -1, -1], [-1, -1, 4]])
    expected = [-math.log(0.2), -math.log(0.3), -math.log(0.4), 0.0, -math.log(0.15)]
    ours = public.marginal_cross_entropy(logits, labels, EVEN)
    torch.testing.assert_close(ours, torch.tensor(expected))
    assert ours[3] == 0


def test_a_finer_label_counts_at_the_level_of_the_logits() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.3]]).log().expand(3, 3)
    labels = torch.tensor([[0, 1, 2], [-1, -1, 2], [0, -1, -1]])
    expected = torch.tensor([0.2, 0.2, 0.7]).log().neg()
    torch.testing.assert_close(functional.marginal_cross_entropy(logits, labels, EVEN, level="middle"), expected)


def test_a_ragged_leaf_counts_by_code_and_by_column() -> None:
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))[:1].expand(2, 5)
    labels = torch.tensor([[0, 1, -1], [0, 1, 4]])
    by_code, by_column = functional.marginal_cross_entropy(logits, labels, RAGGED)
    torch.testing.assert_close(by_code, by_column)
    torch.testing.assert_close(by_column, -logits[0].log_softmax(0)[4])
    assert torch.equal(torch.from_numpy(RAGGED.columns(labels[:1].numpy())), labels[1:])


def test_marginal_cross_entropy_is_stable() -> None:
    logits = torch.tensor([[1000.0, 0.0, 0.0, 0.0, 0.0, -1000.0]], requires_grad=True)
    loss = functional.marginal_cross_entropy(logits, torch.tensor([[1, -1, -1]]), EVEN)
    torch.testing.assert_close(loss.item(), 1000 - math.log(2))
    loss.sum().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("taxonomy", TREES)
def test_losses_have_the_right_gradient(taxonomy: Taxonomy) -> None:
    labels = some_labels(taxonomy, 8)
    for level in taxonomy.levels:
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(8, taxonomy.width(level), generator=generator, dtype=torch.float64, requires_grad=True)
        torch.autograd.gradcheck(lambda x, at=level: functional.marginal_cross_entropy(x, labels, taxonomy, at), logits)
        targets = labels[:, taxonomy.level_index(level)]
        torch.autograd.gradcheck(lambda x, y=targets: functional.level_cross_entropy(x, y), logits)


def test_rows_without_labels_pull_nowhere() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), requires_grad=True)
    functional.marginal_cross_entropy(logits, torch.full((4, 3), -1), EVEN).sum().backward()
    assert logits.grad is not None and not bool(logits.grad.any())


def test_marginal_cross_entropy_refuses_other_shapes() -> None:
    labels = torch.full((2, 3), -1)
    with pytest.raises(UsageError, match=r"expected logits \(b, 6\) at level 'fine', got \(2, 5\)"):
        functional.marginal_cross_entropy(torch.zeros(2, 5), labels, EVEN)
    with pytest.raises(UsageError, match=r"expected labels \(2, 3\)"):
        functional.marginal_cross_entropy(torch.zeros(2, 6), labels[:, :2], EVEN)
    with pytest.raises(UsageError, match=r"labels at 'coarse': expected columns in \[0, 2\) or -1"):
        functional.marginal_cross_entropy(torch.zeros(2, 6), torch.tensor([[2, -1, -1], [0, 0, 0]]), EVEN)


def test_no_rows() -> None:
    assert functional.marginal_cross_entropy(torch.zeros(0, 6), torch.zeros(0, 3, dtype=torch.int64), EVEN).shape == (
        0,
    )
    assert functional.least_expected_distance(torch.zeros(0, 6), EVEN).shape == (0,)
    assert [len(p) for p in functional.combine_levels([torch.zeros(0, 2), torch.zeros(0, 3)], EVEN)] == [0, 0]


def test_level_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    ours = functional.level_cross_entropy(logits, torch.tensor([1, -1]))
    torch.testing.assert_close(ours, torch.tensor([-math.log(0.75), 0.0]))
    with pytest.raises(UsageError, match=r"labels \(b,\), got \(2, 2\) and \(3,\)"):
        functional.level_cross_entropy(logits, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"\[0, 2\) or -1, got 0 to 2"):
        functional.level_cross_entropy(logits, torch.tensor([0, 2]))


def naive_similarity(rows: np.ndarray, labels: list[int], width: int) -> list[float]:
    """Pair by pair, the classes one-hot; the correlation of two rows is the cosine of them less their means."""
    onehot, known = np.eye(width), [j for j, label in enumerate(labels) if label >= 0]
    values = []
    for i, label in enumerate(labels):
        gaps = [
            np.corrcoef(rows[i], rows[j])[0, 1] - np.corrcoef(onehot[label], onehot[labels[j]])[0, 1] for j in known
        ]
        values.append(float(np.mean(np.square(gaps))) if label >= 0 else 0.0)
    return values


@pytest.mark.parametrize("width", [2, 3, 10])
def test_similarity_matching_equals_a_loop(width: int) -> None:
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    labels = torch.tensor([0, 1, -1, 1, width - 1, 0, -1, 0, 1])
    expected = naive_similarity(rows.numpy(), labels.tolist(), width)
    ours = functional.similarity_matching(rows, labels, width)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    part = functional.similarity_matching(rows[2:5], labels[2:5], width, (rows, labels))
    torch.testing.assert_close(part, ours[2:5])
    leaf = rows.clone().requires_grad_()
    torch.autograd.gradcheck(lambda x: functional.similarity_matching(x, labels, width), leaf)


def test_similarity_matching_by_hand() -> None:
    """(1, 0) and (0, 1) are opposite once centred: -1, where 1 is wanted, or -1/2 of three classes, or -1 of two."""
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for labels, width, value in (([0, 0], 3, (0 + 4) / 2), ([0, 1], 3, (0 + 0.25) / 2), ([0, 1], 2, 0.0)):
        ours = functional.similarity_matching(rows, torch.tensor(labels), width)
        torch.testing.assert_close(ours, torch.full((2,), value))


def test_rows_without_a_direction_pull_nowhere() -> None:
    """A dead layer's rows are all 0, and a level of one class tells nothing apart: finite, and a gradient of 0."""
    rows = torch.zeros(3, 4, requires_grad=True)
    value = functional.similarity_matching(rows, torch.tensor([0, 1, 1]), 2)
    torch.testing.assert_close(value, torch.ones(3))
    value.sum().backward()
    assert rows.grad is not None and not rows.grad.any()
    torch.testing.assert_close(
        functional.similarity_matching(torch.eye(2), torch.tensor([0, 0]), 1), torch.tensor([1.0, 1.0])
    )
    assert functional.similarity_matching(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2).shape == (0,)


def test_similarity_matching_refuses_other_shapes() -> None:
    rows, labels = torch.zeros(2, 4), torch.tensor([0, 1])
    with pytest.raises(UsageError, match=r"expected features \(b, 4\) and labels \(b,\), got \(2, 4\) and \(3,\)"):
        functional.similarity_matching(rows, torch.zeros(3, dtype=torch.int64), 2)
    with pytest.raises(UsageError, match=r"expected features \(b, 4\) and labels \(b,\), got \(2, 3\) and \(2,\)"):
        functional.similarity_matching(rows, labels, 2, (torch.zeros(2, 3), labels))
    with pytest.raises(UsageError, match=r"labels: expected columns in \[0, 1\) or -1, got 0 to 1"):
        functional.similarity_matching(rows, labels, 1)


@pytest.mark.parametrize("taxonomy", TREES)
def test_least_expected_distance_equals_a_loop(taxonomy: Taxonomy) -> None:
    finest = taxonomy.levels[-1]
    p = random_probabilities(taxonomy, 50, dtype=torch.float64)[-1]
    distance = taxonomy.distance(finest)
    expected = []
    for row in p:
        risk = [sum(row[y] * distance[c, y] for y in range(len(row))) for c in range(len(row))]
        expected.append(min(range(len(row)), key=risk.__getitem__))
    assert functional.least_expected_distance(p, taxonomy).tolist() == expected


def test_least_expected_distance_by_hand() -> None:
    # 4 is likeliest, yet a is: 1 costs 0.25*2 + 0.1*4 + 0.4*6 = 3.3, 4 costs 0.6*6 = 3.6, 2 costs 3.3 as well.
    p = torch.tensor([[0.25, 0.25, 0.1, 0.4, 0.0, 0.0]])
    assert p.argmax(1).tolist() == [3]
    assert functional.least_expected_distance(p, EVEN).tolist() == [0]
    with pytest.raises(UsageError, match=r"expected probabilities \(b, 6\)"):
        functional.least_expected_distance(p[0], EVEN)


def test_lookups_made_in_inference_mode_serve_training() -> None:
    taxonomy = Taxonomy.from_paths(["m/n/o", "m/n/p", "q/r/s"])
    with torch.inference_mode():
        functional.combine_levels(random_probabilities(taxonomy, 2), taxonomy)
        functional.marginal_cross_entropy(torch.zeros(2, 3), torch.tensor([[0, -1, -1], [0, 0, 0]]), taxonomy)
    logits = torch.zeros(2, 3, requires_grad=True)
    functional.marginal_cross_entropy(logits, torch.tensor([[0, -1, -1], [0, 0, 0]]), taxonomy).sum().backward()
    widths = [taxonomy.width(level) for level in taxonomy.levels]
    probabilities = [torch.full((2, width), 1 / width, requires_grad=True) for width in widths]
    functional.combine_levels(probabilities, taxonomy)[-1].square().sum().backward()
    assert probabilities[-1].grad is not None
