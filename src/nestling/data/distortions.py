"""The distortions under which *Nested Learning for Multi-Level Classification* tests its models (Section 3.1, Fig. 2).

They take float images in [0, 1] and give images in [0, 1]; what is random in them is a pure function of (seed, row).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.data import counter
from nestling.errors import UsageError, unknown
from nestling.seeds import derive


def turbulence(images: Tensor, smoothness: float, strength: float, generator: torch.Generator | None = None) -> Tensor:
    """Moves every pixel by a smooth random displacement, another one in every image.

    Two fields of white noise, smoothed by a Gaussian of width ``smoothness`` pixels (mirrored at the border, cut at
    four widths), centred, scaled to standard deviation ``strength`` pixels; bilinear, border padding.

    Parameters
    ----------
    images: (b, c, h, w) float.
    smoothness: pixels, from 0 (white noise) to the longer side.
    strength: pixels; 0 gives the images as they are.
    generator: where the noise comes from; None stands for a new one with seed 0, so that the function stays pure.

    Returns
    -------
    Images of the same shape and dtype. ``UsageError`` on other shapes and on impossible settings.
    """
    _check(images)
    generator = generator or torch.Generator(images.device).manual_seed(0)
    batch, _, height, width = images.shape
    noise = torch.randn(batch, 2, height, width, generator=generator, device=generator.device)
    return displace(images, noise.to(images.device), smoothness, strength)


def displace(images: Tensor, noise: Tensor, smoothness: float, strength: float) -> Tensor:
    """``turbulence`` by given white noise (b, 2, h, w): the fields of the horizontal and the vertical displacement."""
    _check(images)
    batch, _, height, width = images.shape
    if noise.shape != (batch, 2, height, width):
        raise UsageError(f"expected noise {(batch, 2, height, width)}, got {tuple(noise.shape)}")
    _check_smoothness(smoothness, height, width)
    if not 0 <= strength < math.inf:
        raise UsageError(f"the strength of a turbulence must be a number of pixels >= 0, got {strength}")
    if strength == 0 or images.numel() == 0:
        return images.clone()
    dtype = torch.promote_types(images.dtype, torch.float32)
    field = _smooth(noise.to(dtype), smoothness)
    field = field - field.mean((2, 3), keepdim=True)
    deviation = field.square().mean((2, 3), keepdim=True).sqrt()
    # A field of one pixel has no deviation to scale.
    field = torch.where(deviation > 0, field * strength / deviation, 0.0)
    x = torch.arange(width, device=images.device) + field[:, 0]
    y = torch.arange(height, device=images.device)[:, None] + field[:, 1]
    grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], dim=-1)
    moved = F.grid_sample(images.to(dtype), grid, mode="bilinear", padding_mode="border", align_corners=True)
    return moved.to(images.dtype)


@dataclass(frozen=True)
class Distortion:
    """``distortion(images, rows, seed) -> images``; made by ``parse_distortion``."""

    name: str
    spec: str
    """As it was given, which is its name in the files."""
    arguments: tuple[float | str, ...]

    def __call__(self, images: Tensor, rows: Tensor, seed: int = 0) -> Tensor:
        """Distorts images (b, c, h, w) float in [0, 1]; ``rows`` (b,) int64 are their numbers in their source.

        The draws are those of (seed, name, row): a stronger distortion of the same kind is the same one, stronger.
        """
        _check(images)
        if rows.shape != images.shape[:1]:
            raise UsageError(f"expected rows {tuple(images.shape[:1])}, one for each image; got {tuple(rows.shape)}")
        return _KINDS[self.name].apply(
            images, rows.to(images.device), derive(seed, "distortion", self.name), *self.arguments
        )

    def check(self, height: int, width: int) -> None:
        """``UsageError`` where images of this size cannot be distorted so: a Gaussian wider than the image."""
        if self.name in ("turbulence", "blur"):
            _check_smoothness(float(self.arguments[0]), height, width)


def parse_distortion(spec: str) -> Distortion:
    """``"turbulence:1,0.5"`` to a ``Distortion``; ``UsageError`` on an unknown name and on impossible values."""
    name, _, text = spec.strip().partition(":")
    if name not in _KINDS:
        raise unknown("distortion", spec, [kind.usage for kind in _KINDS.values()])
    kind = _KINDS[name]
    given = [value.strip() for value in text.split(",")] if text else []
    try:
        if len(given) != kind.num_arguments:
            raise ValueError
        arguments = (kind.parse(value) for value in given)
        return Distortion(name, spec.strip(), tuple(arguments))
    except ValueError:
        raise UsageError(f"impossible distortion {spec!r}: expected {kind.usage}, {kind.meaning}") from None


def _half(images: Tensor, rows: Tensor, key: int, side: str) -> Tensor:
    centre = torch.arange(images.shape[2], device=images.device)[:, None] - (images.shape[2] - 1) / 2
    return images.masked_fill(centre < 0 if side == "top" else centre > 0, 0.0)


def _occlude(images: Tensor, rows: Tensor, key: int) -> Tensor:
    height, width = images.shape[2:]
    angle = 2 * torch.pi * counter.uniform(key, rows, 1)[:, :, None]
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    return images.masked_fill((x * angle.cos() + y * angle.sin() > 0)[:, None], 0.0)


def _turbulence(images: Tensor, rows: Tensor, key: int, smoothness: float, strength: float) -> Tensor:
    height, width = images.shape[2:]
    noise = counter.normal(key, rows, 2 * height * width).view(-1, 2, height, width)
    return displace(images, noise, smoothness, strength)


def _blur(images: Tensor, rows: Tensor, key: int, smoothness: float) -> Tensor:
    _check_smoothness(smoothness, *images.shape[2:])
    return _smooth(images, smoothness).clamp(0, 1)


def _noise(images: Tensor, rows: Tensor, key: int, deviation: float) -> Tensor:
    noise = counter.normal(key, rows, math.prod(images.shape[1:])).view(images.shape)
    return (images + deviation * noise.to(images.dtype)).clamp(0, 1)


def _shift(images: Tensor, rows: Tensor, key: int, by: float) -> Tensor:
    return (images + by).clamp(0, 1)


@dataclass(frozen=True)
class _Kind:
    usage: str
    meaning: str
    num_arguments: int
    parse: Callable[[str], float | str]
    """Raises ``ValueError`` on what cannot be."""
    apply: Callable[..., Tensor]


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def _share(text: str) -> float:
    value = float(text)
    if not -1 <= value <= 1:
        raise ValueError
    return value


def _side(text: str) -> str:
    if text not in ("top", "bottom"):
        raise ValueError
    return text


_KINDS = {
    "turbulence": _Kind("turbulence:S,T", "smoothness and strength in pixels, >= 0", 2, _not_negative, _turbulence),
    "half": _Kind("half:top|bottom", "the half that is hidden", 1, _side, _half),
    "occlude": _Kind("occlude", "without a value", 0, _not_negative, _occlude),
    "mirror": _Kind("mirror", "without a value", 0, _not_negative, lambda images, rows, key: images.flip(3)),
    "blur": _Kind("blur:S", "the width of a Gaussian in pixels, >= 0", 1, _not_negative, _blur),
    "noise": _Kind("noise:STD", "a standard deviation >= 0, pixels being in [0, 1]", 1, _not_negative, _noise),
    "shift": _Kind("shift:D", "a number in [-1, 1] that is added to every pixel", 1, _share, _shift),
    "negative": _Kind("negative", "without a value", 0, _not_negative, lambda images, rows, key: 1 - images),
}


def _check(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise UsageError(f"expected float images (b, c, h, w), got {tuple(images.shape)} {images.dtype}")


def _check_smoothness(smoothness: float, height: int, width: int) -> None:
    if not 0 <= smoothness <= max(height, width):
        raise UsageError(
            f"the smoothness of a distortion must lie in [0, {max(height, width)}] pixels for images of "
            f"{height} x {width}, got {smoothness:g}: a wider Gaussian leaves nothing of it"
        )


def _smooth(images: Tensor, smoothness: float) -> Tensor:
    """Gaussian filter of (b, c, h, w) as two matrix products, which mirroring further than the image is wide allows."""
    if smoothness == 0:
        return images
    height, width = (_gaussian(size, smoothness).to(images) for size in images.shape[2:])
    return height @ images @ width.T


@lru_cache(maxsize=64)
def _gaussian(size: int, smoothness: float) -> Tensor:
    """(size, size): row i weighs the pixels that make up pixel i, as scipy.ndimage.gaussian_filter does by default."""
    radius = int(4 * smoothness + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / smoothness) ** 2)
    source = (np.arange(size)[:, None] + offsets) % (2 * size)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], np.minimum(source, 2 * size - 1 - source)), weights / weights.sum())
    with torch.inference_mode(False):
        return torch.from_numpy(matrix)
