"""Cutting rows into parts: shares, classes, groups, and what has one example."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nestling.data import LabelledData, cut
from nestling.data.split import assign, one_of_each_group, strata
from nestling.errors import UsageError
from nestling.taxonomy import Taxonomy


def flat(classes: list[int], groups: list[int] | None = None) -> LabelledData:
    """Rows of one level with the given classes; the pixel says which row it was."""
    taxonomy = Taxonomy.from_paths([f"c{number}" for number in range(max(classes) + 1)])
    return LabelledData(
        inputs=torch.zeros((len(classes), 1, 1, 1), dtype=torch.uint8),
        labels=np.array(classes)[:, None],
        taxonomy=taxonomy,
        groups=None if groups is None else np.array(groups),
    )


def test_shares_of_every_class_and_of_all_rows(toy_data: LabelledData) -> None:
    parts = cut(toy_data, (0.8, 0.1, 0.1), seed=3)
    assert [len(part) for part in parts] == [192, 24, 24]
    for part, share in zip(parts, (0.8, 0.1, 0.1), strict=True):
        counts = np.bincount(part.labels[:, 2], minlength=6)
        assert np.abs(counts - 40 * share).max() <= 1
    assert sorted(np.concatenate([part.index for part in parts]).tolist()) == list(range(240))
    for part in parts:
        assert (np.diff(part.index) > 0).all(), "rows keep their order"
        assert torch.equal(part.inputs, toy_data.inputs[torch.from_numpy(part.index)])


def test_label_budget_of_the_paper(toy_data: LabelledData) -> None:
    """135 rows with fine labels of 1,347: about 108, 13 and 14; the coarser ones by their shares too."""
    from nestling.data import load_data

    data = load_data("digits").keep({"coarse": 1, "middle": 0.4, "fine": 0.1}, seed=0)
    parts = cut(data, seed=0)
    counts = np.array([[(part.finest_known() == level).sum() for level in range(3)] for part in parts])
    assert counts.sum(axis=0).tolist() == [808, 404, 135]
    assert np.abs(counts - np.array([[0.8], [0.1], [0.1]]) * counts.sum(axis=0)).max() <= 1.5
    assert [len(part) for part in parts] == pytest.approx([1077, 135, 135], abs=2)


def test_seed_decides_and_nothing_else(toy_data: LabelledData) -> None:
    first, again, other = (cut(toy_data, seed=seed)[1].index.tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_single_examples_train() -> None:
    data = flat([0] * 20 + [1, 2, 3] + [4] * 2)
    for seed in range(5):
        train, validation, calibration = cut(data, seed=seed)
        assert set(train.labels[:, 0].tolist()) == {0, 1, 2, 3, 4}
        assert "3 classes have one example each, kept for training: 'c1', 'c2', 'c3'" in train.notes
        assert not {1, 2, 3} & {*validation.labels[:, 0].tolist(), *calibration.labels[:, 0].tolist()}
        # What the single ones cannot give is not taken from the others.
        assert np.bincount(train.labels[:, 0])[0] >= 14


def test_many_single_examples_do_not_drain_the_others() -> None:
    data = flat([*range(1, 200), *[0] * 20])
    train, validation, calibration = cut(data)
    assert np.bincount(train.labels[:, 0])[0] >= 16
    assert len(validation) <= 2
    assert len(calibration) <= 2


def test_groups_are_never_divided() -> None:
    generator = np.random.default_rng(0)
    groups = generator.integers(0, 60, 600)
    data = flat(generator.integers(0, 4, 600).tolist(), groups.tolist())
    parts = cut(data, (0.8, 0.1, 0.1), seed=1)
    held = [set(part.groups.tolist()) for part in parts if part.groups is not None]
    assert not held[0] & held[1]
    assert not held[0] & held[2]
    assert not held[1] & held[2]
    assert [len(part) for part in parts] == pytest.approx([480, 60, 60], abs=15)


def test_one_group_for_all_goes_to_training() -> None:
    train, rest = cut(flat([0, 0, 1, 1], [7, 7, 7, 7]), (0.5, 0.5))
    assert (len(train), len(rest)) == (4, 0)


def test_rows_without_labels_are_cut_as_well(toy_data: LabelledData) -> None:
    data = toy_data.keep({"coarse": 0.5})
    unknown = [(part.finest_known() < 0).sum() for part in cut(data, (0.8, 0.2))]
    assert unknown == [96, 24]


def test_strata_of_a_ragged_tree() -> None:
    taxonomy = Taxonomy.from_paths(["a/x", "a/y", "b"])
    labels = taxonomy.encode([("a", "x"), ("a", None), ("b", None), (None, None)])
    assert strata(labels, taxonomy).tolist() == [[1, 0], [0, 0], [1, 2], [-1, -1]]


def test_empty_and_two_row_classes() -> None:
    assert assign(np.empty((0, 2), dtype=np.int64), (0.8, 0.2), 0).tolist() == []
    part = assign(np.repeat(np.stack([np.zeros(50, dtype=np.int64), np.arange(50)], axis=1), 2, axis=0), (0.8, 0.2), 0)
    assert np.bincount(part).tolist() == [80, 20]
    assert (np.bincount(np.repeat(np.arange(50), 2)[part == 0], minlength=50) >= 1).all()


@pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (1.2, -0.2), (0.0, 1.0), (float("nan"), 1.0)])
def test_impossible_fractions(toy_data: LabelledData, fractions: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match=r"must lie in \[0, 1\], sum to 1 and start above 0"):
        cut(toy_data, fractions)


def test_one_row_of_every_group() -> None:
    groups = [4, 4, 1, 1, 1, 9]
    found = one_of_each_group(flat([0, 1, 0, 1, 0, 1], groups))
    assert found is not None and found.groups is not None and sorted(found.groups.tolist()) == [1, 4, 9]
    assert one_of_each_group(found) is not None and one_of_each_group(None) is None
    plain = flat([0, 1])
    assert one_of_each_group(plain) is plain
