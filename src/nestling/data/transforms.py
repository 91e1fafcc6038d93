"""From uint8 images to what a network takes: normalisation, and augmentation of whole batches.

An augmentation's parameters are a pure function of (key, row), so that neither the batch nor a resume changes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.data import counter, strong
from nestling.errors import DataError, UsageError, unknown


@dataclass(frozen=True)
class Preprocessing:
    """``preprocessing(images: uint8 (b, c, h, w)) -> float32``, normalised channel by channel."""

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    """Of each channel's pixels in [0, 1]."""
    std: tuple[float, ...]
    """Of each channel's pixels in [0, 1]; 1 for a channel that is constant."""

    def __post_init__(self) -> None:
        if (
            min(self.channels, self.height, self.width) < 1
            or not len(self.mean) == len(self.std) == self.channels
            or not all(math.isfinite(m) and math.isfinite(s) and s > 0 for m, s in zip(self.mean, self.std))
        ):
            raise DataError(
                f"impossible preprocessing {self}: expected a size of at least 1 x 1 x 1, and for each channel "
                "a finite mean and a positive std"
            )

    @classmethod
    def from_data(cls, images: Tensor | Iterable[Tensor]) -> Preprocessing:
        """Statistics of uint8 images (n, c, h, w), whole or in parts: training rows, or a sample of them."""
        shape, counts = None, None
        for part in [images] if isinstance(images, Tensor) else images:
            if part.ndim != 4 or part.dtype != torch.uint8 or not part.numel():
                raise UsageError(
                    f"expected uint8 images (n, c, h, w), at least one; got {tuple(part.shape)} {part.dtype}"
                )
            found = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in part.unbind(1)]).cpu()
            shape, counts = part.shape[1:], found if counts is None else counts + found
        if shape is None or counts is None:
            raise UsageError("expected uint8 images (n, c, h, w), at least one; got none")
        values = torch.arange(256, dtype=torch.float64) / 255
        mean, std = [], []
        for channel in counts:
            share = channel.double() / int(channel.sum())
            mean.append(float(share @ values))
            std.append(math.sqrt(float(share @ (values - mean[-1]).square())) or 1.0)
        return cls(*shape, mean=tuple(mean), std=tuple(std))

    def __call__(self, images: Tensor) -> Tensor:
        return self.normalise(self.pixels(images))

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 (b, c, h, w) to float32 in [0, 1]."""
        if images.dtype != torch.uint8:
            raise UsageError(f"expected uint8 images, got {images.dtype}")
        self._check(images)
        return images.to(torch.float32).div_(255)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Float in [0, 1] (b, c, h, w) to the network's input space; differentiable."""
        self._check(pixels)
        return (pixels - _per_channel(self.mean, pixels.device, pixels.dtype)) / _per_channel(
            self.std, pixels.device, pixels.dtype
        )

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1:] != (self.channels, self.height, self.width):
            raise UsageError(
                f"expected images (b, {self.channels}, {self.height}, {self.width}), got {tuple(images.shape)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON, as it stands in a bundle."""
        return {
            "channels": self.channels,
            "height": self.height,
            "width": self.width,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From ``to_dict``; ``DataError`` on anything else."""
        try:
            size = [values[name] for name in ("channels", "height", "width")]
            if not all(type(number) is int for number in size):
                raise TypeError(f"the size must be three integers, got {size}")
            return cls(*size, mean=tuple(map(float, values["mean"])), std=tuple(map(float, values["std"])))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"impossible preprocessing: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """``augmentation(images, key, rows) -> images`` of the same shape and dtype: affine, mirror, crop, then cutout.

    Last come ``least_area``, ``jitter``, ``grey`` and ``blur``, of ``data.strong``.
    """

    rotation: float = 0.0
    """Largest angle in degrees, either way."""
    translation: float = 0.0
    """Largest distance in pixels, along each axis."""
    scale: float = 0.0
    """Largest change of size: 0.1 stands for 0.9 to 1.1."""
    crop: int = 0
    """Pixels of zero padding from which the image is cropped."""
    mirror: bool = False
    """Half of the images are flipped left to right."""
    cutout: int = 0
    """Side in pixels of a square, about any pixel of the image, that is made black."""
    least_area: float = 0.0
    """A part of the image of at least this share of its area is stretched to the whole; 0 for the whole image."""
    jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation; that of hue is a quarter of it, in turns."""
    grey: float = 0.0
    """The share of images that lose their colours."""
    blur: float = 0.0
    """The share of images that are blurred, by at most 2 pixels of 224."""

    def __post_init__(self) -> None:
        whole = (self.rotation, self.translation, self.scale, self.crop, self.cutout, self.jitter)
        shares = (self.least_area, self.grey, self.blur)
        if min(*whole, *shares) < 0 or self.scale >= 1 or max(shares) > 1:
            raise UsageError(f"impossible augmentation {self}: expected numbers >= 0, scale below 1, shares up to 1")

    @classmethod
    def auto(cls, channels: int, height: int, width: int) -> Augmentation:
        """Affine for grey images, which may be digits, that no mirror may see; crop and mirror for colour.

        None for texts.
        """
        if height == 1:
            return cls()
        return cls.parse("affine" if channels == 1 else "crop-mirror", (channels, height, width))

    @classmethod
    def parse(cls, text: str, input_shape: Sequence[int]) -> Augmentation:
        """``none``, ``auto``, ``affine``, ``crop``, ``crop-mirror``, ``crop-mirror-cutout`` or ``strong``.

        Sized for images (channels, height, width). ``strong`` is that of MoCo-v2, without mirror for grey images, which
        may be digits, and without blur for those of at most 64 pixels, which have no detail to lose.
        """
        channels, height, width = input_shape
        side = min(height, width)
        if height == 1 and text not in ("none", "auto"):
            raise UsageError(f"the augmentation {text!r} moves pixels, which texts do not have: use none or auto")
        match text:
            case "none":
                return cls()
            case "auto":
                return cls.auto(channels, height, width)
            case "affine":
                return cls(rotation=10.0, translation=0.07 * side, scale=0.1)
            case "crop" | "crop-mirror":
                return cls(crop=round(side / 8), mirror=text == "crop-mirror")
            case "crop-mirror-cutout":
                return cls(crop=round(side / 8), mirror=True, cutout=round(side / 2))
            case "strong":
                colour = channels > 1
                return cls(mirror=colour, least_area=0.2, jitter=0.4, grey=0.2 * colour, blur=0.5 if side > 64 else 0.0)
        names = ["none", "auto", "affine", "crop", "crop-mirror", "crop-mirror-cutout", "strong"]
        raise unknown("augmentation", text, names)

    def __call__(self, images: Tensor, key: int, rows: Tensor) -> Tensor:
        """Images (b, c, h, w), uint8 or float in [0, 1]; rows (b,) int64. ``UsageError`` on other shapes."""
        if images.ndim != 4 or rows.shape != images.shape[:1]:
            raise UsageError(
                f"expected images (b, c, h, w) and rows (b,), got {tuple(images.shape)} and {tuple(rows.shape)}"
            )
        affine = bool(self.rotation or self.translation or self.scale)
        harder = bool(self.least_area or self.jitter or self.grey or self.blur)
        if not (affine or self.crop or self.mirror or self.cutout or harder) or not images.numel():
            return images
        # Each parameter has its column, so that one does not change with another's being used.
        num = 21 if harder else 9 if self.cutout else 7 if self.crop or self.mirror else 4
        draws = counter.uniform(key, rows, num)
        if affine:
            images = self._affine(images, draws[:, :4])
        if self.mirror:
            images = torch.where((draws[:, 4] < 0.5)[:, None, None, None], images.flip(3), images)
        if self.crop:
            images = _crop(images, self.crop, draws[:, 5:7])
        if self.cutout:
            images = _cut_out(images, self.cutout, draws[:, 7:9])
        return self._strong(images, draws[:, 9:]) if harder else images

    def _strong(self, images: Tensor, draws: Tensor) -> Tensor:
        pixels = images if images.is_floating_point() else images.to(torch.float32).div_(255)
        if self.least_area:
            pixels = strong.resized_crop(pixels, self.least_area, draws[:, :4])
        if self.jitter:
            pixels = strong.jitter(pixels, self.jitter, draws[:, 4:9])
        if self.grey:
            pixels = strong.greyed(pixels, self.grey, draws[:, 9])
        if self.blur:
            pixels = strong.blurred(pixels, self.blur, draws[:, 10:])
        return pixels if images.is_floating_point() else pixels.mul_(255).round_().to(images.dtype)

    def _affine(self, images: Tensor, draws: Tensor) -> Tensor:
        height, width = images.shape[2:]
        signed = 2 * draws - 1
        angle = signed[:, 0] * math.radians(self.rotation)
        # The grid says where each pixel comes from, so sizes are divided by.
        zoom = 1 / (1 + self.scale * signed[:, 1])
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        move = self.translation * signed[:, 2:]
        matrix = torch.stack(
            [
                cos,
                sin * (-height / width),
                move[:, 0] * (2 / width),
                sin * (width / height),
                cos,
                move[:, 1] * (2 / height),
            ],
            dim=1,
        ).view(-1, 2, 3)
        pixels = images if images.is_floating_point() else images.to(torch.float32)
        grid = F.affine_grid(matrix.to(pixels.dtype), list(images.shape), align_corners=False)
        moved = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return moved if images.is_floating_point() else moved.round_().to(images.dtype)


def _crop(images: Tensor, padding: int, draws: Tensor) -> Tensor:
    """Crops each image (b, c, h, w) at its own offset, draws (b, 2) in [0, 1), from zero padding.

    A line of pixels is one window of the padded batch laid out flat: copying windows is twice as fast as gathering
    pixels.
    """
    batch, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    offset = (draws * (2 * padding + 1)).long()
    line = torch.arange(batch * channels, device=images.device).view(batch, channels, 1) * padded.shape[2]
    line = line + offset[:, 0].view(batch, 1, 1) + torch.arange(height, device=images.device)
    start = line * padded.shape[3] + offset[:, 1].view(batch, 1, 1)
    windows = padded.view(-1).as_strided((padded.numel() - width + 1, width), (1, 1))
    return windows.index_select(0, start.view(-1)).view(images.shape)


def _cut_out(images: Tensor, side: int, draws: Tensor) -> Tensor:
    """Blacks out a square of each image (b, c, h, w) about its own pixel, draws (b, 2) in [0, 1).

    DeVries and Taylor, *Improved Regularization of Convolutional Neural Networks with Cutout*, 2017: what of the square
    lies outside is lost.
    """
    inside = []
    for size, draw in zip(images.shape[2:], draws.unbind(1), strict=True):
        first = (draw * size).long()[:, None] - side // 2
        place = torch.arange(size, device=images.device)
        inside.append((place >= first) & (place < first + side))
    return images.masked_fill(inside[0][:, None, :, None] & inside[1][:, None, None, :], 0)


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    # Made outside of inference mode, since gradients of attacks pass through it later.
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1)
