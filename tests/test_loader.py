"""Which rows make which batch, counted; and that batches are what they should be on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestling.data import counter
from nestling.data.dataset import LabelledData
from nestling.data.distortions import parse_distortion
from nestling.data.loader import DeviceData, RowOrder, shares
from nestling.data.transforms import Augmentation, Preprocessing
from nestling.errors import DataError
from nestling.seeds import derive
from nestling.taxonomy import Taxonomy

CPU = torch.device("cpu")


def epoch_of(order: RowOrder, epoch: int) -> np.ndarray:
    return np.concatenate([order.batch(epoch, step)[0] for step in range(order.steps)])


# Order ---------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 70), st.integers(1, 40), st.integers(0, 5), st.integers(0, 2**62))
def test_every_row_once_an_epoch(num_rows: int, batch_size: int, epoch: int, key: int) -> None:
    order = RowOrder(np.zeros(num_rows), batch_size, "rows", None, key)
    batches = [order.batch(epoch, step) for step in range(order.steps)]
    assert sorted(np.concatenate([rows for rows, _ in batches])) == list(range(num_rows))
    sizes = [len(rows) for rows, _ in batches]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1, "a last batch of a few rows would upset batch norm"
    assert order.steps == -(-num_rows // batch_size)
    assert all((draws == epoch).all() for _, draws in batches)


def test_edges_are_those_of_linspace() -> None:
    """Bit for bit, for runs that were begun when the edges were computed so."""
    for num_rows in [*range(1, 130), 1437, 8191, 50_000, 60_000, 99_999]:
        for batch_size in {1, 2, 3, 7, 16, 48, 256, num_rows}:
            order = RowOrder(np.zeros(num_rows), batch_size, "rows", None, 0)
            expected = np.linspace(0, num_rows, order.steps + 1).round().astype(int)
            assert [order._edge(step) for step in range(order.steps + 1)] == expected.tolist()


def test_the_order_changes_with_epoch_and_key() -> None:
    order, other = (RowOrder(np.zeros(50), 10, "rows", None, key) for key in (1, 2))
    first = epoch_of(order, 0)
    assert first.tolist() != epoch_of(order, 1).tolist()
    assert first.tolist() != epoch_of(other, 0).tolist()
    assert first.tolist() != list(range(50)), "not shuffled"


FINEST = np.repeat([0, 1, 2], [40, 25, 7])
"""40 rows known to the coarse level alone, 25 to the middle one, 7 to the fine one."""


@pytest.mark.parametrize("how", [("rows", None), ("rows", 4), ("levels", None), ("levels", 5)])
def test_a_batch_is_a_pure_function(how: tuple) -> None:
    """Asked for in any order, also by another loader, also after many others: the same rows and draws."""
    places = [(epoch, step) for epoch in range(6) for step in range(4)]
    first = RowOrder(FINEST, 16, *how, key=9)
    expected = {place: first.batch(*place) for place in places}
    again = RowOrder(FINEST, 16, *how, key=9)
    for place in np.random.default_rng(0).permutation(len(places)):
        rows, draws = again.batch(*places[place])
        assert (rows == expected[places[place]][0]).all() and (draws == expected[places[place]][1]).all()
        assert rows.shape == draws.shape and rows.dtype.kind == draws.dtype.kind == "i"


@pytest.mark.parametrize(
    ("num_kinds", "batch_size", "expected"),
    [
        (3, 64, [16, 16, 32]),
        (1, 64, [64]),
        (2, 64, [32, 32]),
        (2, 5, [2, 3]),
        (4, 64, [11, 11, 10, 32]),
        (3, 2, [1, 0, 1]),
        (3, 1, [0, 0, 1]),
    ],
)
def test_shares_by_hand(num_kinds: int, batch_size: int, expected: list[int]) -> None:
    assert shares(num_kinds, batch_size) == expected


@pytest.mark.parametrize("batch_size", [64, 16, 10])
def test_balanced_batches_hold_their_shares(batch_size: int) -> None:
    """Also where a batch holds more of a kind than there are rows of it."""
    order = RowOrder(FINEST, batch_size, "levels", None, key=3)
    assert order.steps == -(-72 // batch_size)
    for epoch in range(3):
        for step in range(order.steps):
            rows, _ = order.batch(epoch, step)
            assert np.bincount(FINEST[rows]).tolist() == shares(3, batch_size)


def test_one_kind_is_not_balanced() -> None:
    order = RowOrder(np.full(30, 2), 8, "levels", None, key=3)
    assert sorted(epoch_of(order, 0)) == list(range(30))


@pytest.mark.parametrize(("balance", "steps"), [("levels", None), ("levels", 3), ("rows", 3), ("rows", 50)])
def test_streams_are_uniform_and_draws_unique(balance: str, steps: int | None) -> None:
    """No row is drawn once more before all others of its stream are; no (row, draw) comes twice."""
    order = RowOrder(FINEST, 24, balance, steps, key=5)
    drawn = [order.batch(epoch, step) for epoch in range(10) for step in range(order.steps)]
    rows, draws = (np.concatenate(column) for column in zip(*drawn))
    assert len({*zip(rows.tolist(), draws.tolist())}) == len(rows)
    for kind in np.unique(FINEST) if balance == "levels" else [None]:
        members = np.flatnonzero(kind == FINEST) if kind is not None else np.arange(len(FINEST))
        counts = np.bincount(rows, minlength=len(FINEST))[members]
        assert counts.max() - counts.min() <= 1
        # Draws count from 0, one by one.
        for row in members:
            assert sorted(draws[rows == row]) == list(range(counts[members == row][0]))


def test_positions_in_a_stream_are_uniform() -> None:
    """Over many keys every row is first equally often: 3,000 draws of 5 rows, 600 each, deviation 22."""
    first = [RowOrder(np.zeros(5), 2, "rows", 3, key).batch(0, 0)[0][0] for key in range(3000)]
    assert (abs(np.bincount(first) - 600) < 5 * 22).all()


def test_small_sets_fill_large_batches_only_with_given_steps() -> None:
    assert len(RowOrder(np.zeros(5), 64, "rows", None, 0).batch(0, 0)[0]) == 5
    rows, draws = RowOrder(np.zeros(5), 64, "rows", 2, 0).batch(0, 0)
    # Twelve times all five rows, and four of them once more.
    assert sorted(np.bincount(rows)) == [12, 13, 13, 13, 13] and draws.max() == 12


def test_seeds() -> None:
    """A pure function of all its parts, none of which can be mistaken for another."""
    assert derive(1, "a", 2) == derive(1, "a", 2)
    parts = [(1,), (2,), (1, "a"), (1, "a", 2), (1, "a", 3), (1, "a2"), (1, "a", "2", ""), (12,), (1, 2)]
    assert len({derive(*part) for part in parts}) == len(parts)
    assert all(0 <= derive(seed, "x") < 2**63 for seed in range(100))
    # Frozen: other numbers would change what every published seed means.
    assert derive(0, "weights") == 5421806286578840949


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(toy_data: LabelledData) -> DeviceData:
    return DeviceData(toy_data, Preprocessing.from_data(toy_data.images(np.arange(240))), CPU)


def test_a_batch_is_its_rows(toy_data: LabelledData, prepared: DeviceData) -> None:
    subset = toy_data.subset(np.arange(100, 240))
    data = DeviceData(subset, prepared.preprocessing, CPU)
    rows = np.array([5, 0, 139, 5])
    batch = data.batch(rows)
    assert len(data) == 140
    assert batch.index.tolist() == [105, 100, 239, 105]
    pixels = toy_data.inputs[[105, 100, 239, 105]].float() / 255  # type: ignore[index]
    expected = (pixels - prepared.preprocessing.mean[0]) / prepared.preprocessing.std[0]
    torch.testing.assert_close(batch.inputs, expected, rtol=1e-6, atol=1e-6)
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.tolist() == toy_data.labels[[105, 100, 239, 105]].tolist()
    assert batch.levels == ("coarse", "middle", "fine")
    assert batch.at("middle").tolist() == toy_data.labels[[105, 100, 239, 105], 1].tolist()


def test_targets_are_columns() -> None:
    """A leaf that ends above a level is carried into its column there; a partial label stays unknown."""
    taxonomy = Taxonomy.from_paths(["a/1", "a/2", "b"])
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    data = LabelledData(images, taxonomy.encode(["a/2", "b", "a"]), taxonomy)
    batch = DeviceData(data, Preprocessing(1, 4, 4, (0.0,), (1.0,)), CPU).batch(np.arange(3))
    assert batch.labels.tolist() == [[0, 1], [1, 2], [0, -1]]


def test_augmentation_follows_row_draw_and_key(toy_data: LabelledData, prepared: DeviceData) -> None:
    """What a row gets depends on nothing else: not on its place in the batch, nor on its companions."""
    affine = Augmentation(rotation=30, translation=1, scale=0.2)

    def augmented(rows: list[int], draws: list[int], key: int = 7) -> torch.Tensor:
        return prepared.batch(np.array(rows), affine, key, np.array(draws)).inputs

    batch = augmented([3, 50, 3], [0, 2, 1])
    torch.testing.assert_close(batch[1:2], augmented([50], [2]), rtol=0, atol=0)
    torch.testing.assert_close(batch[[2, 0]], augmented([3, 3], [1, 0]), rtol=0, atol=0)
    assert not torch.equal(batch[0], batch[2]), "the second draw of a row is the first again"
    assert not torch.equal(batch, augmented([3, 50, 3], [0, 2, 1], key=8))
    assert not torch.equal(batch[0], prepared.batch(np.array([3])).inputs[0]), "nothing was augmented"
    # By hand: the counter of a row is draw · 2^32 + its number in the source.
    images = affine(toy_data.images(np.array([50])), 7, torch.tensor([2 * 2**32 + 50]))
    torch.testing.assert_close(batch[1:2], prepared.preprocessing(images))
    # Rows of a subset are known by their number in the source.
    part = DeviceData(toy_data.subset([50, 3]), prepared.preprocessing, CPU)
    torch.testing.assert_close(part.batch(np.array([0]), affine, 7, np.array([2])).inputs, batch[1:2])


def test_distortion_follows_the_row(prepared: DeviceData) -> None:
    noise = parse_distortion("noise:0.1")
    whole = prepared.batch(np.arange(40), distortion=noise).inputs
    torch.testing.assert_close(prepared.batch(np.array([17]), distortion=noise).inputs[0], whole[17], rtol=0, atol=0)
    assert not torch.equal(whole, prepared.batch(np.arange(40)).inputs)


def test_counters_do_not_collide() -> None:
    """Draw 1 of row 0 and draw 0 of every other row: different numbers."""
    rows = torch.tensor([0, 1, 2, 2**32, 2**32 + 1])
    assert len({tuple(x) for x in counter.uniform(3, rows, 2).tolist()}) == 5


def test_images_of_another_size_are_refused(toy_data: LabelledData) -> None:
    with pytest.raises(DataError, match=r"'toy' has images of shape \(1, 8, 8\)"):
        DeviceData(toy_data, Preprocessing(1, 9, 8, (0.0,), (1.0,)), CPU)
