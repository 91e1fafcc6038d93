"""The strong augmentation, against slices, Pillow's formulas and scipy, and what holds of hue by hand."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from torch import Tensor

from nestling.data import counter, strong
from nestling.data.transforms import Augmentation
from nestling.errors import UsageError

PRESET = Augmentation.parse("strong", (3, 32, 32))


def some_pixels(rows: int = 5, channels: int = 3, height: int = 12, width: int = 16) -> Tensor:
    return torch.rand(rows, channels, height, width, generator=torch.Generator().manual_seed(0))


def test_the_preset() -> None:
    assert Augmentation(mirror=True, least_area=0.2, jitter=0.4, grey=0.2) == PRESET
    assert Augmentation.parse("strong", (3, 224, 224)).blur == 0.5
    digits = Augmentation.parse("strong", (1, 28, 28))
    assert not digits.mirror and not digits.grey, "a mirror image is no digit, and grey is what they are"
    for wrong in ({"least_area": 1.1}, {"jitter": -0.1}, {"grey": 2.0}, {"blur": -1.0}):
        with pytest.raises(UsageError, match="impossible augmentation"):
            Augmentation(**wrong)  # type: ignore[arg-type]


def test_key_and_row_decide_and_the_batch_does_not() -> None:
    every = Augmentation(mirror=True, least_area=0.2, jitter=0.4, grey=0.5, blur=0.5, crop=1, rotation=5)
    images = (some_pixels(6) * 255).round().to(torch.uint8)
    rows = torch.tensor([3, 2**40, 7, 0, 12, 5])
    together = every(images, 4, rows)
    assert together.dtype == torch.uint8 and together.shape == images.shape
    for row in range(6):
        alone = every(images[row : row + 1], 4, rows[row : row + 1])[0]
        # A batch may be added up in another order: a value on the edge is rounded the other way.
        assert (alone.int() - together[row].int()).abs().max() <= 1
    assert not torch.equal(every(images, 5, rows), together)
    # The columns of the plain ones are their own.
    plain = Augmentation(crop=1, mirror=True)(images, 4, rows)
    assert torch.equal(Augmentation(crop=1, mirror=True, grey=1e-9)(images, 4, rows), plain)


def test_a_crop_is_a_part_stretched() -> None:
    """On a picture that is a slope, bilinear stretching is exact but at the edge: every pixel says where it is from."""
    height, width = 16, 24
    down = torch.arange(height)[:, None].expand(height, width)
    across = torch.arange(width).expand(height, width)
    slopes = torch.stack([down, across]).float().expand(200, -1, -1, -1)
    draws = counter.uniform(1, torch.arange(200), 4)
    found = strong.resized_crop(slopes, 0.2, draws)
    middle = found[:, :, 4:12, 6:18]
    scale_y, scale_x = ((middle[:, c].diff(dim=c + 1).flatten(1).mean(1)) for c in (0, 1))
    area, ratio = 0.2 + 0.8 * draws[:, 0], ((2 * draws[:, 1] - 1) * math.log(4 / 3)).exp()
    torch.testing.assert_close(scale_x, (area * ratio).sqrt().clamp_max(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(scale_y, (area / ratio).sqrt().clamp_max(1), atol=1e-4, rtol=0)
    assert found[:, 0].min() >= 0 and found[:, 0].max() <= height - 1, "nothing from outside"
    assert 0.19 < float((scale_x * scale_y).min()) < 0.3 < 0.9 < float((scale_x * scale_y).max()) <= 1 + 1e-5


def test_colours_by_hand() -> None:
    """One pixel: brightness 1.2, contrast about its own mean, saturation 0.5; no hue."""
    pixel = torch.tensor([0.4, 0.2, 0.6]).view(1, 3, 1, 1)
    draws = torch.tensor([[0.0, 0.75, 0.5, 0.0, 0.5]])
    grey = 1.2 * (0.299 * 0.4 + 0.587 * 0.2 + 0.114 * 0.6)
    expected = [grey + 0.6 * (1.2 * x - grey) for x in (0.4, 0.2, 0.6)]
    found = strong.jitter(pixel, 0.4, draws).flatten()
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=0)
    untouched = strong.jitter(pixel, 0.4, torch.tensor([[0.8, 0.9, 0.9, 0.9, 0.9]]))
    torch.testing.assert_close(untouched, pixel, atol=1e-6, rtol=0)
    # Two pixels of 0.2 and 0.6 without colour, contrast 0.6: 0.4 -+ 0.6 * 0.2.
    pair = torch.tensor([0.2, 0.6]).view(1, 1, 1, 2)
    found = strong.jitter(pair, 0.4, torch.tensor([[0.0, 0.5, 0.0, 0.9, 0.9]])).flatten()
    torch.testing.assert_close(found, torch.tensor([0.28, 0.52]))


def test_hue_goes_round() -> None:
    """A whole turn is none, greys and their luma stay, and a small turn moves the hue as far, give or take a half."""
    turned = strong.hue_rotation(torch.tensor([0.0, 1.0, 0.3]))
    torch.testing.assert_close(turned[0], torch.eye(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(turned[1], torch.eye(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(turned[2] @ torch.ones(3), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.tensor(strong.LUMA) @ turned[2], torch.tensor(strong.LUMA), atol=1e-3, rtol=0)
    for colour in ((0.6, 0.4, 0.4), (0.4, 0.6, 0.5), (0.45, 0.5, 0.6)):
        moved = strong.hue_rotation(torch.tensor([0.05]))[0] @ torch.tensor(colour)
        before, after = (colorsys.rgb_to_hsv(*one)[0] for one in (colour, moved.tolist()))
        assert abs((after - before + 0.5) % 1 - 0.5) == pytest.approx(0.05, rel=0.5)


def test_grey_and_blur() -> None:
    pixels = some_pixels(6)
    draws = torch.tensor([0.1, 0.9, 0.1, 0.9, 0.1, 0.9])
    grey = strong.greyed(pixels, 0.2, draws)
    assert torch.equal(grey[1::2], pixels[1::2])
    torch.testing.assert_close(grey[::2], strong.luma(pixels[::2]).expand(-1, 3, -1, -1))
    pictures = some_pixels(2, 3, 112, 112)
    both = strong.blurred(pictures, 0.5, torch.tensor([[0.4, 0.7], [0.6, 0.7]]))
    assert torch.equal(both[1], pictures[1])
    sigma, place = 0.5 * (0.1 + 1.9 * 0.7), np.arange(-3, 4)
    kernel = np.exp(-(place**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    reference = pictures[0].numpy()
    for axis in (1, 2):
        reference = correlate1d(reference, kernel, axis=axis, mode="mirror")
    np.testing.assert_allclose(both[0].numpy(), reference, atol=1e-5)
