"""Normalisation and augmentation against NumPy, scipy and slices, one image at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from torch import Tensor

from nestling.data import counter
from nestling.data.transforms import Augmentation, Preprocessing
from nestling.errors import DataError, UsageError

ALL = Augmentation(rotation=12, translation=1.5, scale=0.2, crop=3, mirror=True, cutout=4)


def some_images(rows: int = 6, channels: int = 3, height: int = 10, width: int = 14) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (rows, channels, height, width), generator=generator, dtype=torch.uint8)


# Preprocessing -------------------------------------------------------------------------------------------------------


def test_statistics_equal_numpy() -> None:
    images = some_images(50)
    preprocessing = Preprocessing.from_data(images)
    pixels = images.numpy() / 255
    np.testing.assert_allclose(preprocessing.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(preprocessing.std, pixels.std((0, 2, 3)), rtol=1e-12)
    assert (preprocessing.channels, preprocessing.height, preprocessing.width) == (3, 10, 14)
    normalised = preprocessing(images)
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised.std((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-5)


def test_normalisation_by_hand() -> None:
    preprocessing = Preprocessing(2, 1, 1, mean=(0.5, 0.2), std=(0.25, 0.1))
    images = torch.tensor([[[[255]], [[0]]]], dtype=torch.uint8)
    assert preprocessing.pixels(images).flatten().tolist() == [1, 0]
    torch.testing.assert_close(preprocessing(images).flatten(), torch.tensor([2.0, -2.0]))


def test_a_constant_channel_is_centred() -> None:
    images = torch.full((4, 1, 2, 2), 51, dtype=torch.uint8)
    preprocessing = Preprocessing.from_data(images)
    assert preprocessing.mean == pytest.approx((0.2,)) and preprocessing.std == (1.0,)
    torch.testing.assert_close(preprocessing(images), torch.zeros(4, 1, 2, 2))


def test_gradients_pass_normalisation_after_inference() -> None:
    preprocessing = Preprocessing(1, 2, 2, mean=(0.1234,), std=(0.5,))
    with torch.inference_mode():
        preprocessing.normalise(torch.zeros(1, 1, 2, 2))
    pixels = torch.zeros(1, 1, 2, 2, requires_grad=True)
    preprocessing.normalise(pixels).sum().backward()
    assert pixels.grad is not None and pixels.grad.flatten().tolist() == [2.0] * 4


def test_preprocessing_goes_through_json() -> None:
    preprocessing = Preprocessing.from_data(some_images())
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 2},
        {"channels": 0, "mean": [], "std": []},
        {"height": 0},
        {"width": 3.0},
        {"height": True},
        {"mean": [0.1, 0.2, float("nan")]},
        {"std": [0.1, 0.2, 0.0]},
        {"std": None},
        {"mean": ["a", "b", "c"]},
    ],
)
def test_preprocessing_refuses_damaged_json(change: dict) -> None:
    values = Preprocessing.from_data(some_images()).to_dict()
    with pytest.raises(DataError, match="impossible preprocessing"):
        Preprocessing.from_dict(values | change)
    del values["std"]
    with pytest.raises(DataError, match="'std'"):
        Preprocessing.from_dict(values)


def test_preprocessing_refuses_other_images() -> None:
    preprocessing = Preprocessing.from_data(some_images())
    with pytest.raises(UsageError, match=r"expected images \(b, 3, 10, 14\), got \(6, 3, 14, 10\)"):
        preprocessing(some_images().transpose(2, 3))
    with pytest.raises(UsageError, match=r"expected images \(b, 3, 10, 14\)"):
        preprocessing.normalise(torch.zeros(3, 10, 14))
    with pytest.raises(UsageError, match=r"expected uint8 images, got torch.float32"):
        preprocessing(torch.zeros(1, 3, 10, 14))
    for images in (torch.zeros(2, 3, 4, 4), some_images()[:0], some_images()[0]):
        with pytest.raises(UsageError, match=r"expected uint8 images \(n, c, h, w\)"):
            Preprocessing.from_data(images)


# Augmentation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_and_mirror_equal_slices(dtype: torch.dtype) -> None:
    images, rows, key = some_images(40).to(dtype), torch.arange(100, 140), 9
    ours = Augmentation(crop=3, mirror=True)(images, key, rows)
    draws = counter.uniform(key, rows, 7)
    for row in range(40):
        image = images[row].numpy()
        if draws[row, 4] < 0.5:
            image = image[:, :, ::-1]
        padded = np.pad(image, ((0, 0), (3, 3), (3, 3)))
        top, left = (math.floor(float(draw) * 7) for draw in draws[row, 5:7])
        assert np.array_equal(ours[row].numpy(), padded[:, top : top + 10, left : left + 14])
    assert ours.dtype == dtype


def test_crop_and_mirror_take_every_value() -> None:
    image = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    image[0, 0, 2, 2] = 1
    moved = Augmentation(crop=2)(image.expand(2000, -1, -1, -1), 0, torch.arange(2000))
    counts = moved.sum((0, 1))
    assert int(counts.sum()) == 2000
    assert int(counts.min()) > 50 and int(counts.max()) < 115  # 80 expected at each of 25 places
    image[0, 0, 2, 4] = 2
    flipped = Augmentation(mirror=True)(image.expand(2000, -1, -1, -1), 0, torch.arange(2000))[:, 0, 2, 0] == 2
    assert 900 < int(flipped.sum()) < 1100


@pytest.mark.parametrize("side", [1, 4, 5, 40])
def test_cutout_equals_slices(side: int) -> None:
    """About a pixel of the image, cut off at its borders; all else stays."""
    images, rows, key = some_images(40) | 1, torch.arange(100, 140), 9
    ours = Augmentation(cutout=side)(images, key, rows)
    draws = counter.uniform(key, rows, 9)
    for row in range(40):
        image = images[row].numpy().copy()
        top, left = math.floor(float(draws[row, 7]) * 10) - side // 2, math.floor(float(draws[row, 8]) * 14) - side // 2
        image[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
        assert np.array_equal(ours[row].numpy(), image)
    assert ours.dtype == torch.uint8


def naive_affine(image: np.ndarray, angle: float, size: float, move: tuple[float, float]) -> np.ndarray:
    """Every pixel looks up where it comes from, about the centre; zero outside."""
    height, width = image.shape
    y, x = np.mgrid[:height, :width].astype(float)
    y, x = y - (height - 1) / 2, x - (width - 1) / 2
    from_x = (math.cos(angle) * x - math.sin(angle) * y) / size + move[0] + (width - 1) / 2
    from_y = (math.sin(angle) * x + math.cos(angle) * y) / size + move[1] + (height - 1) / 2
    return map_coordinates(image, [from_y, from_x], order=1, mode="grid-constant", cval=0.0)


def test_affine_equals_scipy() -> None:
    images, rows, key = some_images().double() / 255, torch.arange(6), 4
    ours = Augmentation(rotation=30, translation=2, scale=0.3)(images, key, rows)
    draws = 2 * counter.uniform(key, rows, 4).double() - 1
    for row in range(6):
        angle, size = math.radians(30) * float(draws[row, 0]), 1 + 0.3 * float(draws[row, 1])
        move = (2 * float(draws[row, 2]), 2 * float(draws[row, 3]))
        for channel in range(3):
            reference = naive_affine(images[row, channel].numpy(), angle, size, move)
            np.testing.assert_allclose(ours[row, channel], reference, atol=1e-5)


def test_affine_by_hand() -> None:
    # Moves of up to one pixel along each axis: the bright pixel's mass stays, its centre moves by the draw.
    image = torch.zeros(1, 1, 7, 7)
    image[0, 0, 3, 3] = 1
    moved = Augmentation(translation=1.0)(image, 3, torch.tensor([5]))[0, 0]
    draw = 2 * counter.uniform(3, torch.tensor([5]), 4)[0] - 1
    place = torch.arange(7.0)
    assert float(moved.sum()) == pytest.approx(1, abs=1e-5)
    assert float((moved.sum(0) * place).sum()) == pytest.approx(3 - float(draw[2]), abs=1e-4)
    assert float((moved.sum(1) * place).sum()) == pytest.approx(3 - float(draw[3]), abs=1e-4)


def test_uint8_and_float_are_augmented_alike() -> None:
    images, rows = some_images(), torch.arange(6)
    on_bytes = ALL(images, 1, rows)
    on_floats = ALL(images.float() / 255, 1, rows)
    assert on_bytes.dtype == torch.uint8
    torch.testing.assert_close(on_bytes.float() / 255, on_floats, rtol=0, atol=0.5 / 255 + 1e-6)


@given(st.integers(0, 2**63 - 1), st.permutations(range(6)), st.integers(1, 6))
def test_an_augmentation_does_not_depend_on_the_batch(key: int, order: list[int], size: int) -> None:
    images, rows = some_images(), torch.tensor([3, 2**40, 7, 0, 12, 5])
    together = ALL(images, key, rows)
    some = order[:size]
    assert torch.equal(ALL(images[some], key, rows[some]), together[some])


def test_key_and_row_decide() -> None:
    images, rows = some_images(1).expand(6, -1, -1, -1), torch.arange(6)
    first = ALL(images, 1, rows)
    assert torch.equal(ALL(images, 1, rows), first)
    assert not torch.equal(ALL(images, 2, rows), first)
    assert torch.equal(ALL(images, 1, rows.flip(0)), first.flip(0))
    assert len({image.numpy().tobytes() for image in first}) == 6


def test_parameters_do_not_depend_on_each_other() -> None:
    images, rows = some_images(), torch.arange(6)
    both = Augmentation(crop=2, mirror=True)(images, 1, rows)
    assert torch.equal(Augmentation(crop=2)(Augmentation(mirror=True)(images, 1, rows), 1, rows), both)
    three = Augmentation(crop=2, mirror=True, cutout=4)(images, 1, rows)
    assert torch.equal(Augmentation(cutout=4)(both, 1, rows), three) and not torch.equal(three, both)


def test_inputs_stay_as_they_are() -> None:
    images = some_images()
    before = images.clone()
    ALL(images, 0, torch.arange(6))
    assert torch.equal(images, before)
    assert Augmentation()(images, 0, torch.arange(6)) is images
    assert ALL(images[:0], 0, torch.zeros(0, dtype=torch.int64)).shape == (0, 3, 10, 14)


def test_augmentations_by_name() -> None:
    assert Augmentation.parse("none", (3, 32, 32)) == Augmentation()
    assert Augmentation.parse("crop", (3, 32, 32)) == Augmentation(crop=4)
    assert Augmentation.parse("crop-mirror", (1, 8, 16)) == Augmentation(crop=1, mirror=True)
    assert Augmentation.parse("crop-mirror-cutout", (3, 32, 32)) == Augmentation(crop=4, mirror=True, cutout=16)
    assert Augmentation.auto(3, 32, 32) == Augmentation.parse("auto", (3, 32, 32)) == Augmentation(crop=4, mirror=True)
    grey = Augmentation.parse("auto", [1, 8, 8])
    assert grey == Augmentation.parse("affine", (1, 8, 8)) == Augmentation.auto(1, 8, 8)
    assert (grey.rotation, grey.scale, grey.crop, grey.mirror) == (10, 0.1, 0, False)
    assert grey.translation == pytest.approx(0.56)
    with pytest.raises(UsageError, match=r"unknown augmentation crop-miror: .* Did you mean 'crop-mirror'?"):
        Augmentation.parse("crop-miror", (3, 32, 32))


def test_augmentation_refuses_what_cannot_be() -> None:
    for wrong in ({"rotation": -1.0}, {"crop": -1}, {"scale": 1.0}, {"translation": -0.5}, {"cutout": -1}):
        with pytest.raises(UsageError, match="impossible augmentation"):
            Augmentation(**wrong)
    with pytest.raises(UsageError, match=r"images \(b, c, h, w\) and rows \(b,\), got \(6, 3, 10, 14\) and \(5,\)"):
        ALL(some_images(), 0, torch.arange(5))
    with pytest.raises(UsageError, match=r"expected rows \(b,\) int64"):
        ALL(some_images(), 0, torch.zeros(6))
