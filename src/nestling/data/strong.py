"""The strong augmentation of contrastive learning, in batches: resized crops, colour, grey and blur.

That of MoCo-v2 (Chen et al. 2020) and SimCLR. It departs from torchvision's in this: a crop that does not fit is cut
short and not drawn anew, colours change in a fixed order, and hue is a rotation about the axis of greys.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RATIO = 4 / 3
"""The longest side of a crop by its shortest."""
JITTERED = 0.8
"""Of the pictures, whose colours change."""
LEAST_SIGMA, MOST_SIGMA = 0.1, 2.0
"""Of the blur, in pixels of a picture of 224."""
LUMA = (0.299, 0.587, 0.114)
"""What red, green and blue add to the grey that is seen (ITU-R BT.601)."""
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def resized_crop(pixels: Tensor, least: float, draws: Tensor) -> Tensor:
    """A part of each picture, stretched to the whole.

    ``pixels``: float (b, c, h, w); ``least``: the smallest share of the area; ``draws``: (b, 4) in [0, 1), for the
    area, uniform in [least, 1], the ratio of the sides, log-uniform, and the place.
    """
    area = least + (1 - least) * draws[:, 0]
    ratio = ((2 * draws[:, 1] - 1) * math.log(RATIO)).exp()
    size = torch.stack([area * ratio, area / ratio], dim=1).sqrt().clamp_max(1)
    matrix = torch.zeros(len(pixels), 2, 3, dtype=pixels.dtype, device=pixels.device)
    matrix[:, 0, 0], matrix[:, 1, 1] = size[:, 0], size[:, 1]
    matrix[:, :, 2] = (1 - size) * (2 * draws[:, 2:] - 1)
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def jitter(pixels: Tensor, strength: float, draws: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of four pictures in five, in this order.

    ``pixels``: float (b, c, h, w) in [0, 1], c = 1 or 3; grey ones have neither saturation nor hue. ``strength``: the
    largest relative change of the first three; a quarter of it is that of hue, in turns. ``draws``: (b, 5) in [0, 1),
    the first for whether.
    """
    change = strength * (2 * draws[:, 1:] - 1) * (draws[:, :1] < JITTERED)
    factor = (1 + change[:, :3]).clamp_min(0)[:, :, None, None, None]
    pixels = (pixels * factor[:, 0]).clamp(0, 1)
    mean = luma(pixels).mean((2, 3), keepdim=True)
    pixels = (mean + factor[:, 1] * (pixels - mean)).clamp(0, 1)
    if pixels.shape[1] == 1:
        return pixels
    grey = luma(pixels)
    pixels = (grey + factor[:, 2] * (pixels - grey)).clamp(0, 1)
    return torch.einsum("brc,bchw->brhw", hue_rotation(change[:, 3] / 4), pixels).clamp(0, 1)


def luma(pixels: Tensor) -> Tensor:
    """(b, 1, h, w): the grey of colour pictures (b, 3, h, w); grey ones are themselves."""
    if pixels.shape[1] == 1:
        return pixels
    return torch.einsum("c,bchw->bhw", pixels.new_tensor(LUMA), pixels)[:, None]


def hue_rotation(turns: Tensor) -> Tensor:
    """(b, 3, 3): what takes red, green and blue to those ``turns`` (b,) further round; greys stay."""
    basis = torch.tensor(YIQ, dtype=turns.dtype, device=turns.device)
    cos, sin = (2 * math.pi * turns).cos(), (2 * math.pi * turns).sin()
    rotation = torch.zeros(len(turns), 3, 3, dtype=turns.dtype, device=turns.device)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = cos
    rotation[:, 1, 2], rotation[:, 2, 1] = -sin, sin
    return torch.linalg.inv(basis) @ rotation @ basis


def greyed(pixels: Tensor, share: float, draws: Tensor) -> Tensor:
    """So large a ``share`` of the pictures without colour; ``draws``: (b,) in [0, 1)."""
    return torch.where((draws < share)[:, None, None, None], luma(pixels), pixels)


def blurred(pixels: Tensor, share: float, draws: Tensor) -> Tensor:
    """So large a ``share`` of the pictures under a Gaussian; ``draws``: (b, 2) in [0, 1), for whether and how wide."""
    batch, channels, height, width = pixels.shape
    scale = min(height, width) / 224
    sigma = scale * (LEAST_SIGMA + (MOST_SIGMA - LEAST_SIGMA) * draws[:, 1])
    radius = min(math.ceil(3 * MOST_SIGMA * scale), min(height, width) - 1)
    place = torch.arange(-radius, radius + 1, device=pixels.device, dtype=pixels.dtype)
    kernel = (-(place**2) / (2 * sigma[:, None] ** 2)).softmax(1) if radius else torch.ones_like(sigma)[:, None]
    # A picture's own kernel for each of its channels: every channel is a group.
    flat = pixels.reshape(1, batch * channels, height, width)
    weight = kernel.repeat_interleave(channels, 0)[:, None]
    padded = F.pad(flat, (radius,) * 4, mode="reflect") if radius else flat
    across = F.conv2d(padded, weight[:, :, None, :], groups=batch * channels)
    both = F.conv2d(across, weight[:, :, :, None], groups=batch * channels).view(pixels.shape)
    return torch.where((draws[:, 0] < share)[:, None, None, None], both, pixels)
